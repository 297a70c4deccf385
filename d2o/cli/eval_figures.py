"""`d2o eval --activations FILE.svg` and `--curves FILE.svg`: a paper's figures instead of its numbers."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from d2o.cli import console
from d2o.cli.eval_run import STDOUT, Values, open_meter
from d2o.cli.opening import open_device, open_teacher
from d2o.errors import UserError, unknown
from d2o.runtime import stop_flag, worker

if TYPE_CHECKING:
    from d2o.data.prompts import Prompts
    from d2o.teachers.base import Teacher

LAYERS = {"x", "activations", "act_stat", "n", "seed", "labels", "prompt", "prompts", "batch", "solver", "steps"}
LAYERS |= {"device", "work", "json", "name"}
CURVES = {"curves", "run", "table", "runs", "metrics", "name", "json", "title"}


def draw_activations(values: Values, given: set[str]) -> None:
    """Sample a teacher, and write how active its layers were: the picture, and the numbers beside it.

    UserError: options that are not for it, no teacher, a network without a U-Net, outputs that hold something else.
    """
    from d2o.evaluation.activations import ActivationSettings, measure_activations
    from d2o.evaluation.results import compact_json
    from d2o.evaluation.workplace import Workplace
    from d2o.interop.safetensors_io import atomic_write
    from d2o.networks.unet_layers import last_convolutions
    from d2o.reports.activation_chart import activation_chart

    _only(given, LAYERS, "--activations")
    if len(values["x"] or []) != 1:
        raise UserError("--activations takes one X, a teacher", "for example: d2o eval digits --activations layers.svg")
    picture = values["activations"]
    numbers = values["json"] or picture.with_suffix(".json")
    _check_picture(picture, "--activations")
    if numbers != STDOUT:
        _check_numbers(numbers)
    named = {"n": "n", "seed": "seed", "labels": "labels", "batch": "batch", "solver": "solver", "steps": "steps"}
    chosen = {key: values[option] for key, option in named.items() if option in given}
    settings = ActivationSettings(**chosen, stat=values["act_stat"])
    (source,) = values["x"]
    teacher = _teacher(source, values["device"])
    name = values["name"][0] if values["name"] else None
    last_convolutions(teacher.network, name or source)
    prompts = _prompts(teacher, values["prompts"])
    device = open_device(values["device"])
    with stop_flag() as stop, Workplace(values["work"], stop=stop, say=console.say) as place:
        record = measure_activations(
            teacher, source, settings, name=name, prompts=prompts, device=device, place=place, meter=open_meter
        )
        if record is None:
            return
        record["command"] = _command(values, given)
        atomic_write(picture, activation_chart(record))
        if numbers == STDOUT:
            console.out.file.write(compact_json(record))
            console.out.file.flush()
        else:
            atomic_write(numbers, compact_json(record))
    for layer in record["layers"] if numbers != STDOUT else []:
        at = ", ".join(f"{m['sigma']:.3g} ({m['height']:.2f})" for m in layer["maxima"][:3])
        console.out.print(f"{layer['part']} {layer['depth']:>2}  {layer['name']}: greatest at sigma {at}", markup=False)
    console.say(f"wrote {picture}" + ("" if numbers == STDOUT else f" and {numbers}"))


def draw_curves(values: Values, given: set[str]) -> None:
    """The scores that several runs logged while they were trained, over the images they had seen, in one picture; of a
    table also what the paper prints of that score for rows without a run here, as levels.

    UserError: options that are not for it, runs without a log, a score that none of them has.
    """
    from d2o.evaluation.results import compact_json
    from d2o.interop.safetensors_io import atomic_write
    from d2o.reports.curves import higher_is_better
    from d2o.reports.sweep_chart import Level, Line, sweep_chart

    _only(given, CURVES, "--curves")
    if bool(values["run"]) == bool(values["table"]):
        raise UserError("--curves draws what runs logged", "name them: --run DIR --run DIR, or --table NAME")
    picture, numbers = values["curves"], values["json"]
    _check_picture(picture, "--curves")
    if numbers is not None and numbers != STDOUT:
        _check_numbers(numbers)
    runs, title, printed = _table_runs(values) if values["table"] else (_named_runs(values), "", {})
    title = values["title"] if "title" in given else title or f"{len(runs)} runs"
    metric, found = _scores(runs, [m for text in values["metrics"] for m in text.split(",")])
    if worker()[0] != 0:
        return
    best = higher_is_better(metric)
    ends = {name: (max if best else min)(y for _, y in points) for name, points in found.items()}
    top = (max if best else min)(ends.values())
    lines = [Line(name, points, ends[name] == top) for name, points in found.items()]
    levels = [Level(name, paper[metric]) for name, paper in printed.items() if metric in paper]
    words = "Fréchet distance" if metric == "fd" else metric.upper() if metric.startswith("fid") else metric
    atomic_write(picture, sweep_chart(title, lines, words, not best, levels))
    record = {
        "format": "d2o-curves",
        "version": 1,
        "title": title,
        "metric": metric,
        "curves": [
            {"name": name, "run": str(runs[name]), "images": [x for x, _ in points], "values": [y for _, y in points]}
            for name, points in found.items()
        ],
        "paper": [{"name": level.name, "value": level.value} for level in levels],
    }
    if numbers == STDOUT:
        console.out.file.write(compact_json(record))
        console.out.file.flush()
    elif numbers is not None:
        atomic_write(numbers, compact_json(record))
    for name, points in found.items():
        console.say(f"{name}: {metric} {ends[name]:.4g} at best, {points[-1][1]:.4g} after {points[-1][0]:,.0f} images")
    for level in levels:
        console.say(f"{level.name}: {metric} {level.value:.4g}, as the paper prints it")
    console.say(f"wrote {picture}" + ("" if numbers in (None, STDOUT) else f" and {numbers}"))


def _command(values: Values, given: set[str]) -> str:
    """The command line that measures the layers again."""
    words = ["d2o", "eval", values["x"][0], "--activations", str(values["activations"])]
    asked = values["prompts"]
    for name in sorted(given - {"x", "activations", "json", "work", "prompt", "prompts"}):
        value = values[name][0] if name == "name" else values[name]
        words += [f"--{name.replace('_', '-')}", str(value)]
    for prompt in asked if isinstance(asked, tuple) else ():
        words += ["--prompt", prompt]
    return shlex.join(words + (["--prompts", asked] if isinstance(asked, str) else []))


def _only(given: set[str], allowed: set[str], what: str) -> None:
    for name in sorted(given - allowed):
        option = "X" if name == "x" else f"--{name.replace('_', '-')}"
        raise UserError(f"{option} is not for {what}, which measures no metric", "leave it away")


def _check_picture(path: Path, option: str) -> None:
    from d2o.interop.outputs import check_output

    check_output(path, folder=False)
    if path.suffix != ".svg":
        raise UserError(f"{option} {path}: expected a name that ends in .svg")
    if path.exists() and path.stat().st_size and b"<svg" not in path.read_bytes()[:64]:
        raise UserError(f"{path} exists and is no picture of d2o: it is not overwritten", "choose another name")


def _check_numbers(path: Path) -> None:
    from d2o.inputs import read_json
    from d2o.interop.outputs import check_output

    check_output(path, folder=False)
    if not path.exists() or not path.stat().st_size:
        return
    try:
        found = read_json(path)
    except UserError:
        found = None
    if not isinstance(found, dict) or found.get("format") not in ("d2o-activations", "d2o-curves"):
        raise UserError(f"{path} exists and holds something else: it is not overwritten", "choose another with --json")


def _teacher(source: str, device: str | None) -> Teacher:
    """UserError: a student, which is called at one noise level, or what is no model."""
    from d2o.evaluation.subjects import check_there
    from d2o.interop.safetensors_io import read_meta, resolve_checkpoint

    check_there(source)
    path = Path(source)
    if path.suffix == ".safetensors" or (path / "checkpoints").is_dir():
        kind = read_meta(resolve_checkpoint(path)).get("kind")
        if kind != "teacher":
            raise UserError(
                f"{source} holds a {kind or 'foreign object'}, not a teacher: --activations follows the many steps of"
                " a diffusion model",
                "name the teacher that it comes from",
            )
    elif source.startswith("real:"):
        raise UserError(f"{source} is a set of images, not a teacher", "--activations looks into a diffusion model")
    return open_teacher(source, device)


def _prompts(teacher: Teacher, asked: str | tuple[str, ...] | None) -> Prompts | None:
    from d2o.evaluation.protocol import Settings
    from d2o.evaluation.subjects import prompts_for

    if asked is not None and teacher.spec.condition != "text":
        raise UserError(f"{teacher.spec.name!r} takes no prompts", "leave --prompt and --prompts away")
    return prompts_for(Settings(prompts=asked), teacher.spec)


def _named_runs(values: Values) -> dict[str, Path]:
    runs, names = values["run"], values["name"]
    if names and len(names) != len(runs):
        raise UserError(f"{len(names)} --name for {len(runs)} --run", "give one --name for each, in their order")
    found = dict(zip(names or [path.resolve().name for path in runs], runs, strict=True))
    if len(found) < len(runs):
        raise UserError("several runs have one name", "tell them apart: --name, once for each --run, in their order")
    return found


def _table_runs(values: Values) -> tuple[dict[str, Path], str, dict[str, dict[str, float]]]:
    """The runs of a table's rows that are here, by the rows' names; the table's title; and of the other rows what the
    paper prints, by their names and the key of the number."""
    from d2o.reports.paper_tables import absent, load_table, measured_runs

    table, under = load_table(values["table"]), values["runs"]
    if values["name"]:
        raise UserError("--name is for --run: the rows of a --table have names", "leave it away")
    found: dict[str, Path] = {}
    printed: dict[str, dict[str, float]] = {}
    for row in table.rows:
        runs = measured_runs(table, row, under)
        if not runs and (reason := absent(row, under)) is not None:
            console.say(f"not drawn: {row.name}: {reason}")
        for run in runs:
            found[row.name if run.seed is None else f"{row.name}, seed {run.seed}"] = Path(run.folder)
        if not runs:
            printed[row.name] = {
                key: value[0] if isinstance(value, list) else value for key, value in row.paper.items()
            }
    if not found:
        raise UserError(f"{values['table']}: none of its runs is here", f"d2o train --table {values['table']}")
    return found, table.title, printed


def _scores(runs: Mapping[str, Path], asked: Sequence[str]) -> tuple[str, dict[str, list[tuple[float, float]]]]:
    """The score that is drawn, by its name in the logs, and its curves: the one that is asked for, else the first of
    those that most runs have. Runs without it are named and left out."""
    from d2o.reports.curves import read_curves

    if len(asked) > 1:
        raise UserError("--curves draws one score", "give one with --metrics")
    logs = {name: read_curves(path).scores for name, path in runs.items()}
    known = list(dict.fromkeys(key for scores in logs.values() for key in scores))
    if not known:
        raise UserError(
            f"{' and '.join(map(str, runs.values()))}: not measured while trained: there are no scores in the log",
            "a recipe's section `eval:` asks for that",
        )
    if asked and asked[0] not in known:
        raise unknown("score of these runs", asked[0], known)
    metric = asked[0] if asked else max(known, key=lambda key: sum(key in scores for scores in logs.values()))
    for name, scores in logs.items():
        if metric not in scores:
            has = f"its log has {', '.join(scores)}" if scores else "it was not measured while it was trained"
            console.say(f"not drawn: {name}: no {metric} ({has})")
    return metric, {name: scores[metric] for name, scores in logs.items() if metric in scores}
