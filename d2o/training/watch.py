"""Whether adversarial training goes well: one line from the scalars of the log, with the first iteration at which it
did not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median

from d2o.inputs import JsonObject

NEEDS = {"loss_d", "logit_real"}
"""Scalars that tell a method with a critic."""

WINDOW = 5
"""Lines of the log whose median is judged, and before the first verdict: three of five have to be bad, so that an
outlier is not news."""

SATURATED = 0.05
"""loss_d: 1.39 where the critic guesses (hinge: 2); at 0.05 it is right with 97.5 % certainty on average, and little is
left to learn from it."""
MISTAKEN = 3.0
"""loss_d: more than twice that of guessing. A critic that does worse than guessing diverges, or lags far behind the
generator."""
LOST = 8.0
"""loss_g: to the critic, a fake is real with a probability of 0.03 % (e^-8) on average. Healthy runs on digits stay
below 2."""
COLLAPSED = 0.25
"""diversity: the spread of fakes against that of real images. A healthy batch comes near to 1; a quarter means copies
of one image, or almost."""
BURST = 5.0
"""diversity: a fresh generator's fakes may spread three times as far as real images, a trained one's as far. Beyond
this they leave their range."""
EXPLODED = 30.0
"""Gradient norm against its median so far. On digits it drifts by a factor of three over a healthy run; a learning rate
that breaks the run gives 100 and more for a while."""
LEAKING = 0.8
"""ADA p: up to here augmentations do not leak into the samples in practice (Karras et al. 2020, arXiv 2006.06676,
section 2.2)."""

SETTLED = 20
"""Lines before gradients are compared with their past: the first ones are far from what is usual later (warm-up, layers
that start at zero)."""
HISTORY = 64
"""Norms kept of a network's past; when there are as many, every second one goes and every second one is taken from then
on."""


@dataclass(frozen=True)
class Fault:
    """Bad when the median of `key` passes `limit`, gone when it is back beyond `clear`: the gap keeps the verdict from
    flickering."""

    name: str
    key: str
    limit: float
    clear: float
    says: str  # of the median, `{value}`

    def bad(self, value: float, already: bool) -> bool:
        limit = self.clear if already else self.limit
        return value > limit if self.limit > self.clear else value < limit

    def words(self, since: int, value: float) -> str:
        text = self.says.format(value=_short(value))
        joint = ":" if text and text[0] != "(" else ""
        return f"{self.name} since iteration {since:,}{joint} {text}".rstrip()


FAULTS = (
    Fault("losses not finite", "not_finite", 0.5, 0.4, ""),
    Fault(
        "collapse",
        "diversity",
        COLLAPSED,
        1.2 * COLLAPSED,
        "fakes of a batch differ {value} times as much as real ones",
    ),
    Fault("fakes out of range", "diversity", BURST, 0.8 * BURST, "they differ {value} times as much as real images"),
    Fault("critic saturated", "loss_d", SATURATED, 2 * SATURATED, "(loss_d {value})"),
    Fault("critic diverges", "loss_d", MISTAKEN, 0.8 * MISTAKEN, "it does worse than guessing (loss_d {value})"),
    Fault("generator loses", "loss_g", LOST, 0.8 * LOST, "the critic is certain of its fakes (loss_g {value})"),
    Fault("ADA p too high", "ada_p", LEAKING, 0.95 * LEAKING, "at {value}, augmentation will leak into the samples"),
)


class Watch:
    """Fed with every line of the log of a method with a critic; others get no verdict.

    `state` is all there is to it, plain numbers and text, for the record that a resumed run continues from.
    """

    def __init__(self, state: JsonObject | None = None):
        self.state: JsonObject = state or {
            "lines": 0,
            "recent": {},
            "norms": {},
            "bad": {},
            "was": None,
            "times": 0,
        }

    @staticmethod
    def applies(keys: Iterable[str]) -> bool:
        return set(keys) >= NEEDS

    @property
    def started(self) -> bool:
        return self.state["lines"] > 0

    def see(self, iteration: int, values: Mapping[str, float]) -> None:
        """Take in the means of the scalars up to `iteration`."""
        if not self.applies(values):
            return
        numbers = {key: float(f"{value:.6g}") for key, value in values.items()}
        seen: dict[str, float] = {
            "not_finite": float(
                not all(math.isfinite(v) for k, v in numbers.items() if k.startswith(("loss", "grad_")))
            )
        }
        for key, value in numbers.items():
            if math.isfinite(value):
                if key.startswith("grad_"):
                    if (ratio := self._against_past(key, value)) is not None:
                        seen[key] = ratio
                elif any(fault.key == key for fault in FAULTS):
                    seen[key] = value
        recent = self.state["recent"]
        for key, value in seen.items():
            recent[key] = [*recent.get(key, []), [iteration, value]][-WINDOW:]
        self.state["lines"] += 1
        for fault in self._faults():
            self._judge(fault, iteration)

    def _faults(self) -> list[Fault]:
        return [*FAULTS, *(_explosion(key) for key in sorted(self.state["recent"]) if key.startswith("grad_"))]

    def _judge(self, fault: Fault, iteration: int) -> None:
        points = self.state["recent"].get(fault.key, [])
        if len(points) < WINDOW:
            return
        bad, name = self.state["bad"], fault.name
        middle = median(value for _, value in points)
        if fault.bad(middle, name in bad):
            since = bad[name]["since"] if name in bad else next(at for at, value in points if fault.bad(value, False))
            bad[name] = {"since": since, "value": middle, "worst": self._worse(fault, middle)}
        elif name in bad:
            gone = bad.pop(name)
            self.state["times"] += 1
            if self.state["was"] is None:
                self.state["was"] = [fault.words(gone["since"], gone["worst"]), iteration]

    def _worse(self, fault: Fault, value: float) -> float:
        before = self.state["bad"].get(fault.name, {}).get("worst", value)
        return max(before, value) if fault.limit > fault.clear else min(before, value)

    def _against_past(self, key: str, value: float) -> float | None:
        """The norm against the median of its past, which takes in usual values only: an explosion never becomes what is
        usual."""
        past = self.state["norms"].setdefault(key, {"values": [], "every": 1, "lines": 0})
        usual = median(past["values"]) if past["values"] and past["lines"] >= SETTLED else None
        if usual is None or value <= EXPLODED * usual:
            if past["lines"] % past["every"] == 0:
                past["values"].append(value)
                if len(past["values"]) >= HISTORY:
                    past["values"], past["every"] = past["values"][::2], 2 * past["every"]
            past["lines"] += 1
        return value / usual if usual else None

    @property
    def verdict(self) -> str | None:
        """None: no critic, or too few lines yet. "stable", with what was wrong before; else what is wrong, the first
        fault first."""
        if self.state["lines"] < WINDOW:
            return None
        if self.state["bad"]:
            return "; ".join(fault.words(now["since"], now["value"]) for fault, now in self._now())
        if self.state["was"] is None:
            return "stable"
        words, until = self.state["was"]
        more = self.state["times"] - 1
        return f"stable; was: {words}, recovered at iteration {until:,}" + (f", and {more} more" if more else "")

    @property
    def brief(self) -> str:
        """The verdict for a line of progress; empty where there is none."""
        if self.state["bad"]:
            return ", ".join(fault.name for fault, _ in self._now())
        return "stable" if self.verdict else ""

    def _now(self) -> list[tuple[Fault, JsonObject]]:
        bad = self.state["bad"]
        return sorted(
            ((fault, bad[fault.name]) for fault in self._faults() if fault.name in bad),
            key=lambda pair: pair[1]["since"],
        )


def _explosion(key: str) -> Fault:
    return Fault(
        f"gradients of {key.removeprefix('grad_')} explode",
        key,
        EXPLODED,
        0.5 * EXPLODED,
        "{value} times their median before",
    )


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2g}"
