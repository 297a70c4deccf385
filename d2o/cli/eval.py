"""`d2o eval`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from d2o.cli import console
from d2o.cli.pairs import open_device
from d2o.errors import UserError
from d2o.runtime import worker

if TYPE_CHECKING:
    from d2o.metrics.run import Request

_optional = partial(typer.Option, None, show_default=False)

X = typer.Argument(
    help="What to measure: a student's or teacher's .safetensors, a run folder (its best checkpoint, else its last), a builtin teacher "
    "(digits), images (folder, zip, tar, npz, real:digits, real:digits/a), a pair store, or statistics (.npz). Several give one table.",
    show_default=False,
)
AGAINST = _optional("--against", help="The reference: images, statistics, or anything else X can be. Default for what comes of digits: real:digits.")
N = typer.Option(4000, "--n", help="Generated images (a set of images is used whole).")
SEED = typer.Option(1_000_000, "--seed", help="Seed of image 0; image i has seed + i. The default is away from the seeds of pairs.")
LABELS = _optional("--labels", help="random (default: from each image's seed), balanced, or class indices in turn: 0,1,2.")
BATCH = typer.Option(250, "--batch", help="Images per network call.")
SOLVER = typer.Option("heun", "--solver", help="Solver of a teacher as X: heun, euler, ddim or dpmpp. With euler, --steps 1 calls it once.")
STEPS = typer.Option(18, "--steps", help="Solver steps of a teacher as X; 18 of heun are 35 network calls.")
CFG = typer.Option(1.0, "--cfg", help="Guidance scale of teachers; 1 is none, anything else doubles their forwards.")
EXTRACTOR = _optional(
    "--extractor", help="Feature extractor: a name (digits) or an own classifier's .safetensors. Default for 8x8 grey images: digits."
)
TEACHER = _optional("--teacher", help="Teacher to measure the distance to. Default: the builtin one that the student names.")
NO_DISTANCE = typer.Option(False, "--no-teacher-distance", help="Leave out the distance to the teacher from equal noise.")
DISTANCE_N = typer.Option(256, "--distance-n", help="Images of the distance to the teacher (which samples them with heun, 18 steps).")
REPEATS = typer.Option(1, "--repeats", help="Runs over disjoint blocks of n seeds; mean and deviation are shown, every run is recorded.")
RESIZE = typer.Option("none", "--resize", help="Sets of images of another size: none refuses them, crop scales and centre-crops. Recorded.")
ON_BAD = typer.Option("refuse", "--on-bad", help="Corrupt images: refuse or skip; either way they are named.")
JSON = _optional("--json", help="Write the result, with its protocol, to this file (a list for several X).")
SAVE_STATS = _optional("--save-stats", help="Write X's feature statistics to this .npz; needs no reference.")
NAME = typer.Option([], "--name", help="Row label; give one for each X, in their order.", show_default=False)
DEVICE = _optional("--device", help="cpu, cuda or cuda:N. Default: CUDA if there is one.")
COMPARE = typer.Option(False, "--compare", help="Measure nothing: the X are results (made with --json, or run folders with an eval.json).")
REPORT = _optional("--report", help="Write a self-contained HTML page: table, sample grids, curves, protocols.")
RUN = typer.Option([], "--run", help="Run folder whose training curves the report shows. Repeatable.", show_default=False)
TITLE = typer.Option("d2o report", "--title", help="Title of the report.")


def evaluate(
    x: list[str] = X, against: str = AGAINST, n: int = N, seed: int = SEED, labels: str = LABELS, batch: int = BATCH, solver: str = SOLVER,
    steps: int = STEPS, cfg: float = CFG, extractor: str = EXTRACTOR, teacher: str = TEACHER, no_teacher_distance: bool = NO_DISTANCE,
    distance_n: int = DISTANCE_N, repeats: int = REPEATS, resize: str = RESIZE, on_bad: str = ON_BAD, json: Path = JSON,
    save_stats: Path = SAVE_STATS, name: list[str] = NAME, device: str = DEVICE, compare: bool = COMPARE, report: Path = REPORT,
    run: list[Path] = RUN, title: str = TITLE,
) -> None:  # fmt: skip
    """Measure students, teachers and images, and say how it was measured.

    Fréchet distance over a named feature extractor, accuracy by class, samples/s, network calls (NFE), and the distance of a student to its
    teacher from equal noise. Every number comes with its protocol.
    """
    if worker()[0] != 0:
        return
    _check_outputs(x, json, save_stats, report, run, repeats, compare)
    if compare:
        from d2o.metrics.records import load_records

        records = [record for path in x for record in load_records(path)]
    else:
        from d2o.metrics.protocol import Settings
        from d2o.metrics.run import Request

        settings = Settings(n, seed, labels, batch, solver, steps, cfg, repeats, distance_n, resize)
        request = Request(
            x, against, extractor, teacher, not no_teacher_distance, name, save_stats is None, on_bad, bool(json or report), open_device(device)
        )
        records = _measure(request, settings, save_stats)
    if json:
        from d2o.metrics.records import save_records

        save_records(json, records)
        console.say(f"wrote {json}")
    if report:
        from d2o.metrics.report import write_report

        write_report(report, records, run, title)
        console.say(f"wrote {report}")
    show(records)


def show(records: list[dict[str, Any]]) -> None:
    """The results as a table, with the protocol below."""
    from d2o.metrics.table import results_table

    cells = results_table(records)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, header in enumerate(cells.headers):
        table.add_column(escape(header), justify="right" if i else "left", no_wrap=i > 0, overflow="fold", min_width=0 if i else 16)
    for row in cells.rows:
        table.add_row(*map(escape, row))
    wide = Console(file=console.out.file, width=max(console.out.width, 160), highlight=False)
    (console.out if console.out.is_terminal else wide).print(table)  # in a file or pipe nothing needs folding
    for line in cells.footer:
        console.out.print(escape(line), style="dim")


def _measure(request: Request, settings: Any, save_stats: Path | None) -> list[dict[str, Any]]:
    from d2o.metrics.run import evaluate_all
    from d2o.metrics.statistics import save_statistics

    records = []
    for result in evaluate_all(request, settings, _meter):
        records.append(result.record)
        if save_stats:
            save_statistics(save_stats, result.statistics)
            console.say(f"wrote {save_stats} (n = {result.statistics.n:,}, {result.statistics.dim} features)")
    return records


@contextmanager
def _meter(title: str, total: int) -> Iterator[Any]:
    done = 0
    with console.meter(title, total) as bar:

        def progress(more: int) -> None:
            nonlocal done
            done += more
            bar.update(done)

        yield progress


def _check_outputs(
    x: list[str], json: Path | None, save_stats: Path | None, report: Path | None, runs: list[Path], repeats: int, compare: bool
) -> None:
    """Refuse what cannot end well before anything is measured."""
    if runs and not report:
        raise UserError("--run shows training curves in a report", "add --report FILE.html")
    if save_stats and (len(x) > 1 or repeats > 1 or compare):
        raise UserError("--save-stats takes one X, measured once")
    if not (json or save_stats or report):
        return
    from d2o.metrics.records import check_json_target, check_target
    from d2o.metrics.report import check_report_target
    from d2o.metrics.statistics import is_statistics

    if json:
        check_json_target(json)
    if report:
        check_report_target(report)
        for folder in runs:
            if not (folder / "metrics.jsonl").exists():
                raise UserError(f"{folder} is not a run folder: it holds no metrics.jsonl", "--run takes what `d2o train --out` wrote")
    if save_stats:
        check_target(save_stats)
        if save_stats.suffix != ".npz":
            raise UserError(f"--save-stats {save_stats}: statistics are an .npz file")
        if save_stats.exists() and not is_statistics(save_stats):
            raise UserError(f"{save_stats} exists and holds no statistics: it is not overwritten", "choose another name for --save-stats")
