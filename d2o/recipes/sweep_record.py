"""What is known of a sweep, read from its members' run folders: `sweep.json`, and the picture of all curves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from d2o.errors import UserError
from d2o.inputs import JsonObject, read_json
from d2o.interop.checkpoint_record import check_checkpoint
from d2o.interop.safetensors_io import atomic_path, atomic_write, read_meta
from d2o.recipes.changes import forbidden
from d2o.recipes.former import renewed_key
from d2o.recipes.schema import Recipe
from d2o.recipes.sweep import Sweep
from d2o.reports.curves import higher_is_better, read_curves
from d2o.reports.sweep_chart import Line, sweep_chart
from d2o.reports.sweep_previews import last_previews

FORMAT = {"format": "d2o-sweep", "version": 1}


def check_same(folder: Path, sweep: Sweep, start: Path | None) -> None:
    """UserError: the sweep in the folder is of another recipe, other keys, or from another student."""
    before = _read(folder)
    if before is None:
        return
    if before["keys"] != [axis.key for axis in sweep.axes]:
        keys = ", ".join(before["keys"])
        raise UserError(
            f"{folder} is a sweep over {keys}", "give the same keys in the same order, or choose another --out"
        )
    if before["from"] != (str(start) if start else None):
        raise UserError(
            f"{folder} was started from {before['from'] or 'no student'}",
            "give the same --from, or choose another --out",
        )
    if sweep.of_variants:  # the first one need not be the same; each is held against its run by `check_run`
        return
    changes = forbidden(before["recipe"], sweep.base.resolved(), 0)  # how far each member is: `check_run`
    if changes:
        what = f"the recipe differs from the one that {folder} was started with:\n  " + "\n  ".join(changes)
        raise UserError(what, "restore it, or choose another --out")


def update(folder: Path, sweep: Sweep, start: Path | None, failed: Mapping[str, str]) -> JsonObject:
    """Write sweep.json, sweep.svg (and one for each further metric) and, of runs with previews, sweep.png; returns the
    record. Members of
    earlier calls, with other values, stay in it."""
    metric = sweep.base.eval.metric if sweep.base.eval else "loss"
    names = [member.name for member in sweep.members]
    earlier = [] if (before := _read(folder)) is None else [m for m in before["members"] if m["name"] not in names]
    members = [_member(folder, m.name, dict(m.settings), m.recipe.images, metric, failed) for m in sweep.members]
    members += [_member(folder, m["name"], m["settings"], m["images"], metric, {}) for m in earlier]
    members = sorted(members, key=lambda m: [_order(value) for value in m["settings"].values()])
    better = "higher" if higher_is_better(metric) else "lower"
    scored = [m for m in members if m["best"] is not None]
    best = (max if higher_is_better(metric) else min)(scored, key=lambda m: m["best"]["value"], default=None)
    record = {
        **FORMAT,
        "name": sweep.name,
        "keys": [axis.key for axis in sweep.axes],
        "from": str(start) if start else None,
        "metric": metric,
        "better": better,
        "best": None if best is None else {"member": best["name"], "settings": best["settings"], **best["best"]},
        "members": members,
        "recipe": sweep.base.resolved(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / "sweep.json", json.dumps(record, indent=1) + "\n")
    lines = [
        Line(m["name"], [(x, y) for x, y in m["curve"]], best is not None and m["name"] == best["name"])
        for m in members
    ]
    words = "Fréchet distance" if metric == "fd" else metric
    picture = sweep_chart(sweep.title, lines, words, not higher_is_better(metric))
    if picture:
        atomic_write(folder / "sweep.svg", picture)
    if sweep.base.eval and sweep.base.eval.also:
        _draw_others(folder, sweep.title, metric, [m["name"] for m in members], best["name"] if best else None)
    if (sheet := last_previews([(m["name"], folder / m["folder"]) for m in members])) is not None:
        with atomic_path(folder / "sweep.png") as temporary:
            sheet.save(temporary, format="PNG")
    return record


def _draw_others(folder: Path, title: str, metric: str, names: Sequence[str], top: str | None) -> None:
    """A picture of each further metric (`eval.also`), sweep.KEY.svg; `top`: the best run by `metric`."""
    scores = {name: read_curves(folder / name).scores for name in names if (folder / name / "metrics.jsonl").exists()}
    for key in dict.fromkeys(key for curves in scores.values() for key in curves if key not in (metric, "accuracy")):
        lines = [Line(name, curves.get(key, []), name == top) for name, curves in scores.items()]
        if picture := sweep_chart(title, lines, key, not higher_is_better(key)):
            atomic_write(folder / f"sweep.{key}.svg", picture)


def _read(folder: Path) -> JsonObject | None:
    path = folder / "sweep.json"
    try:
        record = read_json(path) if path.exists() else None
    except UserError as error:
        raise UserError(error.message, "remove it: the runs beside it hold everything that it says") from error
    if record is None:
        return None
    if not isinstance(record, dict) or record.get("format") != FORMAT["format"]:
        raise UserError(f"{path} is not the record of a sweep", "choose another --out")
    return _renewed(record, path)


def _renewed(record: JsonObject, path: Path) -> JsonObject:
    """The record as this version writes it: settings that have come since at their defaults, keys as they are called
    now. UserError: the recipe in it is none."""
    recipe = record["recipe"]
    settings = [{renewed_key(key, recipe): v for key, v in m["settings"].items()} for m in record["members"]]
    return {
        **record,
        "keys": [renewed_key(key, recipe) for key in record["keys"]],
        "members": [{**m, "settings": now} for m, now in zip(record["members"], settings, strict=True)],
        "recipe": Recipe.from_dict(recipe, str(path)).resolved(),
    }


def _member(
    folder: Path, name: str, settings: Mapping[str, object], images: int, metric: str, failed: Mapping[str, str]
) -> JsonObject:
    """What a member's run folder says of it."""
    run = folder / name
    state, seen, curve = run / "checkpoints" / "state.safetensors", 0, []
    if state.exists():
        seen = check_checkpoint(read_meta(state), state)["images"]
    if (run / "metrics.jsonl").exists():
        curves = read_curves(run)
        curve = curves.scores.get(metric, []) if metric != "loss" else next(iter(curves.losses.values()), [])
        curve = [(x, y) for x, y in curve if x <= seen or not seen]
    finished = seen >= images and (run / "checkpoints" / "last.safetensors").exists()
    status = "failed" if name in failed else "finished" if finished else "begun" if run.exists() else "waiting"
    best = None
    if curve and metric != "loss":  # the least of a noisy loss says nothing
        x, y = (max if higher_is_better(metric) else min)(curve, key=lambda point: point[1])
        best = {"value": y, "images": x}
    return {
        "name": name,
        "folder": name,
        "settings": dict(settings),
        "state": status,
        "images": images,
        "seen": seen,
        "last": curve[-1][1] if curve else None,
        "best": best,
        "curve": curve,
        "error": failed.get(name),
    }


def _order(value: object) -> tuple[int, float]:
    """Numbers by size, before everything else as it was given."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return 0, value
    return 1, 0


def rows(record: JsonObject) -> Sequence[Sequence[str]]:
    """A table of the members: settings, state, images, last value, best value and when."""
    best = record["best"]["member"] if record["best"] else None
    found = []
    for m in record["members"]:
        seen = f"{m['seen']:,}" if m["seen"] >= m["images"] else f"{m['seen']:,} of {m['images']:,}"
        top = "" if m["best"] is None else f"{m['best']['value']:.4g}"
        at = "" if m["best"] is None else f"{m['best']['images']:,.0f}"
        last = "" if m["last"] is None else f"{m['last']:.4g}"
        found.append([m["name"] + (" *" if m["name"] == best else ""), m["state"], seen, last, top, at])
    return found
