"""A protocol with a name: all that a number of a paper depends on, held against what the user asks for. Those of the
papers are in `paper_protocols`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from d2o.errors import UserError
from d2o.evaluation import measures
from d2o.evaluation.known_metrics import parse_metrics
from d2o.evaluation.protocol import option
from d2o.inputs import JsonObject


@dataclass(frozen=True)
class Preset:
    """One protocol.

    `metrics`: as `--metrics` takes them. `settings`: what is fixed, by the name of the option (`pr_k`: --pr-k).
    `reference`: its name, as `--against` takes it; None: the user brings it. `n_ref`: images behind it, where that is
    known. `extractor`: of every metric that has a choice and names none; "" where none has. `tool`: whose numbers it
    gives. `needs`: options that only the user can give, and what is to be given.
    """

    name: str
    paper: str
    data: str
    metrics: tuple[str, ...]
    settings: JsonObject
    reference: str | None
    n_ref: int | None
    extractor: str
    tool: str
    notes: tuple[str, ...] = ()
    needs: Mapping[str, str] = field(default_factory=dict)

    @property
    def fixed(self) -> JsonObject:
        """Everything that it settles, by the name of the option."""
        against = {"against": self.reference} if self.reference else {}
        extractor = {"extractor": self.extractor} if self.extractor else {}
        return {"metrics": self.metrics, **extractor, **against, **self.settings}

    @property
    def extractors(self) -> set[str]:
        """Every feature network that its metrics use."""
        return {want.extractor or self.extractor for want in parse_metrics(self.metrics) if want.metric.output}

    @property
    def frechet(self) -> list[str]:
        """The extractors of its Fréchet distances to the reference, in its order."""
        wants = [
            want
            for want in parse_metrics(self.metrics)
            if want.metric.compute is measures.frechet and want.metric.reference == "statistics"
        ]
        return [want.extractor or self.extractor for want in wants if want.metric.output == "features"]


def contradictions(preset: Preset, given: Mapping[str, object]) -> list[tuple[str, str]]:
    """The options in `given` that contradict the protocol, each with what it has instead: ("--n 10000", "n 50000").

    Some of the protocol's metrics, instead of all, contradict nothing. What it does not settle (batch, device, solver)
    may be anything.
    """
    found = []
    for name, value in given.items():
        if name in preset.fixed and not _agree(name, preset.fixed[name], value):
            found.append((f"{option(name)} {as_written(value)}", f"{name} {as_written(preset.fixed[name])}"))
    return found


def apply_preset(preset: Preset, given: Mapping[str, object]) -> JsonObject:
    """`given` (only what the user gave explicitly, by the name of the option) with all that the protocol settles.

    UserError: options that contradict it, all of them; options that it needs (`needs`) and that are not there.
    """
    if wrong := contradictions(preset, given):
        what = (
            f"{', '.join(flag for flag, _ in wrong)} {'is' if len(wrong) == 1 else 'are'} not the protocol"
            f" {preset.name}"
        )
        hint = (
            f"leave {'the option' if len(wrong) == 1 else 'these options'} away; or leave --protocol away, and the"
            " result is not comparable"
        )
        raise UserError(f"{what} ({', '.join(wanted for _, wanted in wrong)})", hint)
    if missing := [f"--{name} ({what})" for name, what in preset.needs.items() if given.get(name) is None]:
        raise UserError(f"the protocol {preset.name} needs {' and '.join(missing)}")
    return {**preset.fixed, **given}


def _agree(name: str, wanted: object, value: object) -> bool:
    if name == "metrics" and isinstance(wanted, Sequence) and isinstance(value, Sequence):
        return set(value) <= set(wanted)
    return wanted == value


def as_written(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
