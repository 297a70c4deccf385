"""What `d2o eval` was asked for, and the command line that asks for it again."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from d2o.evaluation.extractor import Device
from d2o.evaluation.presets import Preset
from d2o.evaluation.protocol import Settings, option
from d2o.evaluation.reference import Reference


@dataclass(frozen=True)
class Request:
    """What the user asked for. None: the default that fits X."""

    xs: Sequence[str]
    against: str | None = None
    metrics: Sequence[str] = ()
    extractor: str | None = None
    weights: Sequence[str] = ()
    teacher: str | None = None
    teacher_distance: bool = True
    names: Sequence[str] = ()
    reference_needed: bool = True
    on_bad: str = "refuse"
    grid: bool = True
    latency: bool = False
    neighbours: int = 0
    device: Device = "cpu"
    preset: Preset | None = None
    work: Path | None = None
    paper: Sequence[dict[str, float]] = field(default_factory=tuple)  # for each X: what a paper printed
    steps_typed: bool = False  # by the user, for this X: where it means nothing it is refused


def command(request: Request, settings: Settings, x: str, reference: Reference | None) -> str:
    """The command line that measures `x` again."""
    words = ["d2o", "eval", x]
    against = request.against or (reference.name if reference and not request.preset else None)
    given: dict[str, str | None] = {
        "protocol": request.preset.name if request.preset else None,
        "against": against,
        "extractor": request.extractor,
        "teacher": request.teacher,
        "metrics": None if request.preset else ",".join(request.metrics),
    }
    words += [word for key, value in given.items() if value for word in (f"--{key}", value)]
    words += [word for text in request.weights for word in ("--weights", text)]
    words += ["--no-teacher-distance"] * (not request.teacher_distance) + ["--latency"] * request.latency
    words += ["--neighbours", str(request.neighbours)] if request.neighbours else []
    defaults, fixed = asdict(Settings()), request.preset.settings if request.preset else {}
    for key, value in asdict(settings).items():
        if key == "prompts" and isinstance(value, tuple):
            words += [word for prompt in value for word in ("--prompt", prompt)]
        elif value != defaults[key] and key not in fixed:
            words += [option(key), str(value)]
    return shlex.join(words)
