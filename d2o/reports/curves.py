"""A run's metrics.jsonl as lines for charts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from d2o.errors import UserError
from d2o.inputs import MAX_LOG_BYTES, JsonObject, parse_json, read_file


@dataclass
class Curves:
    """What a run logged over the images it has seen: name -> [(images, value)]. `signs` tell whether adversarial
    training goes well, and `watch` is the last verdict on it."""

    name: str
    losses: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    scores: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    signs: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    watch: str = ""


def higher_is_better(score: str) -> bool:
    """Of a score that training takes on the way: accuracy, or a key of a metric (`is`, `is@lite0`, `recall`)."""
    from d2o.evaluation.known_metrics import HIGHER, METRICS

    key = score.partition("@")[0]
    return key == "accuracy" or any(metric.keys.get(key) == HIGHER for metric in METRICS.values())


SIGNS = ("logit_", "diversity", "ada_p", "grad_")


def read_curves(run: str | Path) -> Curves:
    """Losses (keys that say so) and scores (the "eval" records). A line that a kill cut short is passed over.
    UserError: no such log."""
    path = Path(run) / "metrics.jsonl"
    try:
        lines = read_file(path, MAX_LOG_BYTES).decode("utf-8", "replace").splitlines()
    except UserError as error:
        what = f"{run} is not a run folder: no readable metrics.jsonl ({error.message})"
        raise UserError(what, "--run takes what `d2o train --out` wrote") from None
    curves = Curves(Path(run).resolve().name)
    for line in lines:
        try:
            record = parse_json(line)
        except ValueError:
            continue
        if not isinstance(record, dict) or not isinstance(record.get("images"), (int, float)):
            continue
        _collect(curves.losses, {k: v for k, v in record.items() if "loss" in k.lower()}, record["images"])
        _collect(curves.signs, {k: v for k, v in record.items() if k.startswith(SIGNS)}, record["images"])
        if isinstance(record.get("watch"), str):
            curves.watch = record["watch"]
        if isinstance(record.get("eval"), dict):
            _collect(curves.scores, record["eval"], record["images"])
    return curves


def _collect(into: dict[str, list[tuple[float, float]]], values: JsonObject, images: float) -> None:
    for key, value in values.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            into.setdefault(key, []).append((float(images), float(value)))
