"""`eval:` of a recipe, read by `scoring`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

from pydantic import Field, ValidationInfo, field_validator

from d2o.errors import UserError
from d2o.settings.section import BatchSize, Count, NonEmpty, Section, Seed, field
from d2o.settings.wording import show

if TYPE_CHECKING:
    from d2o.evaluation.presets import Preset


class Distance(NamedTuple):
    """A Fréchet distance, and what else is measured of the same samples, as an `eval:` section asks for it."""

    extractor: str
    reference: str
    protocol: str | None
    also: tuple[str, ...] = ()

    def extractors(self) -> list[str]:
        """Of the other metrics, where they are not measured over the Fréchet distance's."""
        from d2o.evaluation.quick import wants_of

        return [want.extractor for want in wants_of(self.also) if want.extractor]


class EvalSection(Section):
    """A metric measured on the way; the best checkpoint is chosen by it."""

    every: Count = field(..., "images between two measurements")
    metric: Literal["fd", "accuracy", "distance"] = field(
        "fd",
        "fd: Fréchet distance; accuracy, distance: what the method validates by, the one if higher is better, the other"
        " if lower",
    )
    protocol: NonEmpty | None = field(
        None,
        "a protocol of `d2o eval --protocol`; extractor, n and reference are its own, the seeds are not: what a "
        "checkpoint is chosen by is not what it is reported on",
    )
    extractor: NonEmpty | None = field(
        None,
        "feature extractor of the Fréchet distance, by name or path (default none: the protocol's)",
        validate_default=True,
    )
    n: Annotated[int, Field(ge=2)] | None = field(
        None, "generated samples per measurement (default none: the protocol's, else 1000)", validate_default=True
    )
    reference: NonEmpty | None = field(
        None,
        "what to compare with: `data`, the recipe's own images as training reads them, or images or "
        "statistics, as `d2o eval --against` takes it (default none: the protocol's)",
        validate_default=True,
    )
    also: list[NonEmpty] = field(
        [],
        "further metrics of the same samples, as `d2o eval --metrics` names them: is, prdc, kid@lite0, ...; they are"
        " logged, and choose nothing",
    )
    cfg: Annotated[float, Field(ge=0)] | None = field(
        None, "guidance scale of the samples, for students that are told it (`pairs.cfg: [1, 8]`)"
    )
    seed: Seed = field(2_000_000, "seed of the first sample; away from those of the pairs")
    batch: BatchSize = field(250, "samples per network call")

    @field_validator("protocol")
    @classmethod
    def _has_a_distance(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None:
            return None
        preset = _preset(value)
        if info.data.get("metric") != "fd":
            raise ValueError(f"metric {info.data.get('metric')} has no protocol")
        if not preset.frechet or "prompts" in preset.needs:
            why = "needs prompts" if preset.frechet else f"measures {', '.join(preset.metrics)} and no Fréchet distance"
            raise ValueError(f"{value} {why}: it cannot be measured on the way")
        return value

    @field_validator("extractor", "n", "reference")
    @classmethod
    def _as_the_protocol(cls, value: object, info: ValidationInfo) -> object:
        """What the protocol says, or 1000 samples; a distance without a network or a reference is refused."""
        key = str(info.field_name)
        if not {"metric", "protocol"} <= info.data.keys():  # they are wrong themselves
            return value
        name = info.data["protocol"]
        if name is None:
            if value is None and key != "n" and info.data["metric"] == "fd":
                raise ValueError("missing; metric fd needs it")
            return 1000 if value is None and key == "n" else value
        preset = _preset(name)
        allowed = {
            "extractor": preset.frechet,
            "n": [preset.settings["n"]],
            "reference": [preset.reference] if preset.reference else [],
        }[key]
        if value is None and not allowed:
            raise ValueError(
                f"missing; protocol {name} is measured against {preset.needs['against']}, which you have to name"
            )
        if value is not None and allowed and value not in allowed:
            raise ValueError(
                f"expected {' or '.join(map(show, allowed))} as protocol {name} has it, or nothing, got {show(value)}"
            )
        return allowed[0] if value is None else value

    @field_validator("also")
    @classmethod
    def _can_be_measured(cls, value: list[str], info: ValidationInfo) -> list[str]:
        from d2o.evaluation.quick import wants_of

        try:
            wants_of(value)
        except UserError as error:
            raise ValueError(f"{error.message} ({error.hint})") from error
        if value and "extractor" in info.data and info.data["extractor"] is None:
            raise ValueError("is measured beside a Fréchet distance, and there is none")
        return value

    @property
    def samples(self) -> int:
        """`n`, which stands in every section that was validated."""
        assert self.n is not None
        return self.n

    @property
    def distance(self) -> Distance | None:
        """What is measured beside what the method validates by; None: nothing (`metric: accuracy`, no extractor)."""
        if self.extractor is None or self.reference is None:
            return None
        return Distance(self.extractor, self.reference, self.protocol, tuple(self.also))


def _preset(name: str) -> Preset:
    from d2o.evaluation.paper_protocols import find_preset

    try:
        return find_preset(name)
    except UserError as error:
        raise ValueError(f"{error.message} ({error.hint})") from error
