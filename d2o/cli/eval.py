"""`d2o eval`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape

from d2o.cli import complete, console
from d2o.cli.eval_run import Targets, check_asked, measured
from d2o.errors import UserError
from d2o.inputs import JsonObject
from d2o.runtime import worker

WHAT, MAKING, NUMBERS, OUT = "What is measured", "How images are made", "How numbers are taken", "Results"


def _option(
    panel: str,
    *names: str,
    help: str,
    default: object = None,
    metavar: str | None = None,
    autocompletion: Callable[..., complete.Offer] | None = None,
) -> Any:  # noqa: ANN401 (it stands where the option's value does)
    shown = default not in (None, [], False)
    return typer.Option(
        default,
        *names,
        help=help,
        metavar=metavar,
        rich_help_panel=panel,
        show_default=shown,
        autocompletion=autocompletion,
    )


_what, _making, _numbers, _out = (partial(_option, panel) for panel in (WHAT, MAKING, NUMBERS, OUT))

X = typer.Argument(
    None,
    help=(
        "What to measure: a student's or teacher's .safetensors, a run folder (its best checkpoint, else its last), a"
        " teacher by name (digits), images (folder, zip, tar, npz, real:digits, real:digits/a), a pair store, or"
        " statistics (.npz, .pkl). Several give one table."
    ),
    show_default=False,
    autocompletion=complete.subjects,
)
AGAINST = _what(
    "--against",
    help=(
        "The reference: images, statistics, a published one (edm-cifar10), or what X can be. Default for "
        "what comes of digits: real:digits; of cifar16: d2o-cifar10-16."
    ),
    autocompletion=complete.references,
)
METRICS = _what(
    "--metrics",
    default=[],
    help=(
        "fd (default), fid, fid-clean, sfid, fd-dinov2, clip-fid, kid, is, pr, dc, prdc, fd-class, rel-fd, rel-fid,"
        " clip-score, lpips, dreamsim, dreamdiv; separated by commas; NAME@EXTRACTOR: over that."
    ),
    autocompletion=complete.metrics,
)
PROTOCOL = _what(
    "--protocol",
    help="Measure as a paper did: sida_cifar10, d2g_coco2014, ... Options that differ are refused.",
    autocompletion=complete.of("protocols"),
)
TABLE = _what(
    "--table",
    help=(
        "Measure the rows of a paper's table (recipes/tables/*.yaml, by name or path) and put the paper's numbers"
        " beside."
    ),
    autocompletion=complete.tables,
)
RUNS = _what(
    "--runs",
    help="With --table: the folder in which its runs lie (`d2o train --table ... --out DIR`; default: runs).",
    metavar="DIR",
)
EXTRACTOR = _what(
    "--extractor",
    help=(
        "Feature extractor of metrics that name none: digits, lite0, inception, dinov2_vitl14, clip, vgg16-fc2, ... or "
        "an own classifier's .safetensors. Default: digits for 8x8 grey images, cifar16 for what comes of that teacher,"
        " lite0 for other ones in colour."
    ),
    autocompletion=complete.of("extractors", ".safetensors", paths=True),
)
WEIGHTS = _what(
    "--weights",
    default=[],
    help="Weights file of a network: [NAME=]PATH. Default: in $D2O_HOME/weights, else downloaded.",
)
TEACHER = _what(
    "--teacher",
    help=(
        "Teacher, student or run to measure the distance to, and rel-fd, rel-fid: from the same seeds and conditions."
        " Default: the teacher that the student names, if it is here."
    ),
    autocompletion=complete.subjects,
)
NO_DISTANCE = _what(
    "--no-teacher-distance", default=False, help="Leave out the distance to the teacher from equal noise."
)
LATENCY = _what(
    "--latency", default=False, help="Also time single images (text, network, decoding) and take the peak memory."
)
NEIGHBOURS = _what(
    "--neighbours",
    default=0,
    help="Show that many nearest images of the reference beside samples in the report (memorisation).",
)

N = _making("--n", "-n", default=4000, help="Generated images (a set of images is used whole).")
SEED = _making(
    "--seed",
    default=1_000_000,
    help="Seed of image 0; image i has seed + i. The default is away from the seeds of pairs.",
)
LABELS = _making(
    "--labels", help="random (default: from each image's seed), balanced, or class indices in turn: 0,1,2."
)
PROMPT = _making("--prompt", default=[], help="A prompt for generators that take text. Repeatable; in turn.")
PROMPTS = _making(
    "--prompts",
    metavar="FILE",
    help="Prompts for generators that take text (.txt, .jsonl, .parquet); image i has prompt i mod their number.",
)
PER_PROMPT = _making("--per-prompt", default=8, help="Images of one prompt for dreamdiv.")
BATCH = _making("--batch", default=250, help="Images per network call.")
SOLVER = _making(
    "--solver",
    help=(
        "Solver of a teacher as X: heun, euler, ddim or dpmpp; default: its usual. With euler, --steps 1 calls it once."
    ),
)
STEPS = _making(
    "--steps",
    help=(
        "Solver steps of a teacher as X; default: its usual number (digits: 18 of heun, 35 network calls). Of a "
        "consistency student as X: network calls, 1 or 2."
    ),
)
TEACHER_SOLVER = _making(
    "--teacher-solver", help="Solver of a teacher that X is measured against (rel-fd, distance); default: its usual."
)
TEACHER_STEPS = _making("--teacher-steps", help="Its steps; default: its usual number.")
TEACHER_N = _making("--teacher-n", help="Its images in rel-fd and rel-fid; default: as many as X's.")
TEACHER_SEED = _making(
    "--teacher-seed",
    help="Seed of the first of them, which may then be of other conditions; default: X's, so that noises are equal.",
)
CFG = _making(
    "--cfg",
    help=(
        "Guidance scale of teachers (default: 1, which is none; anything else doubles their forwards), and of students"
        " that are told it."
    ),
)
GUIDE = _making(
    "--guide",
    help=(
        "A second network by which teachers are guided at --cfg, as EDM2's are: edm2-img512-xs-uncond, or any teacher"
        " of the EDM family."
    ),
)
RESIZE = _making(
    "--resize",
    default="none",
    help=(
        "Before scoring: none, crop (sets of images: scale and centre-crop to what the extractor takes), "
        "or a size: 256, 256:bicubic (centre-crop, then Lanczos or bicubic). Recorded."
    ),
)
QUANTIZE = _making(
    "--quantize", default="edm_round", help="Generated images to 8 bits: edm_round, or dmd_trunc (GigaGAN, DMD2)."
)
ON_BAD = _making("--on-bad", default="refuse", help="Corrupt images: refuse or skip; either way they are named.")
DEVICE = _making("--device", help="cpu, cuda or cuda:N. Default: CUDA if there is one.")
WORK = _making(
    "--work",
    help=(
        "Folder for unfinished work, which is kept and found again by later evaluations. Default: in $D2O_HOME, removed"
        " when done. The same command again continues."
    ),
)

REPEATS = _numbers("--repeats", default=1, help="Runs over disjoint blocks of n seeds; every run is recorded.")
REPORT_AS = _numbers(
    "--report-as",
    default="mean",
    help="Of several runs: mean (with the deviation), or min, the best of them as EDM reports.",
)
BOOTSTRAP = _numbers("--bootstrap", default=0, help="Error bars of a single run: resample its images that often.")
DISTANCE_N = _numbers(
    "--distance-n", default=256, help="Images beside the teacher's from equal noise (distance, lpips, dreamsim)."
)
PR_K = _numbers("--pr-k", default=3, help="Neighbours of precision and recall.")
DC_K = _numbers("--dc-k", default=5, help="Neighbours of density and coverage.")
PR_DTYPE = _numbers(
    "--pr-dtype",
    default="float32",
    help="In which their features are kept: float32, float64, or float16 as SiD and ADM do.",
)
KID_SUBSETS = _numbers("--kid-subsets", default=100, help="Subsets of KID.")
KID_SIZE = _numbers("--kid-size", default=1000, help="Images in each.")
IS_SPLITS = _numbers("--is-splits", default=10, help="Splits of the Inception Score.")
IS_MODE = _numbers(
    "--is-mode",
    default="torch_fidelity",
    help="torch_fidelity (shuffled by seed 2020), edm_order, or adm (splits of 5,000).",
)
CLIP_MODEL = _numbers("--clip-model", default="clip-vit-g-14", help="Of clip-score: clip-vit-g-14 or clip-vit-b-32.")

JSON = _out(
    "--json",
    help=(
        "Write the result, with its protocol, to this file (a list for several X). -: to standard output, and the table"
        " to stderr."
    ),
)
CSV = _out("--csv", help="Write the table with all digits, one row for each X.")
MARKDOWN = _out("--markdown", help="Write the table as markdown (or LaTeX: FILE.tex).")
REPORT = _out("--report", help="Write a self-contained HTML page: table, sample grids, curves, protocols.")
SAVE_STATS = _out("--save-stats", help="Write X's feature statistics to this .npz; needs no reference.")
NAME = _out("--name", default=[], help="Row label; give one for each X, in their order.")
RUN = _out("--run", default=[], help="Run folder whose training curves the report shows. Repeatable.")
TITLE = _out("--title", default="d2o report", help="Title of the report.")
ACTIVATIONS = _out(
    "--activations",
    metavar="FILE.svg",
    help=(
        "Instead of metrics: how active each layer of X, a teacher, is over the noise levels of sampling (--steps, by"
        " default 256; --n 64), as a picture, and as FILE.json."
    ),
)
ACT_STAT = _numbers("--act-stat", default="mean_abs", help="With --activations: mean_abs, rms or mean of outputs.")
CURVES = _out(
    "--curves",
    metavar="FILE.svg",
    help=(
        "Measure nothing: draw the score that runs (--run, or those of a --table) logged over the images they had"
        " seen, in one picture. --metrics names another score than their first."
    ),
)
COMPARE = _out(
    "--compare",
    default=False,
    help="Measure nothing: the X are results (made with --json, or run folders with an eval.json).",
)


def evaluate(
    context: typer.Context,
    x: list[str] = X,
    against: str = AGAINST,
    metrics: list[str] = METRICS,
    protocol: str = PROTOCOL,
    table: str = TABLE,
    runs: str = RUNS,
    extractor: str = EXTRACTOR,
    weights: list[str] = WEIGHTS,
    teacher: str = TEACHER,
    no_teacher_distance: bool = NO_DISTANCE,
    latency: bool = LATENCY,
    neighbours: int = NEIGHBOURS,
    n: int = N,
    seed: int = SEED,
    labels: str = LABELS,
    prompt: list[str] = PROMPT,
    prompts: str = PROMPTS,
    per_prompt: int = PER_PROMPT,
    batch: int = BATCH,
    solver: str = SOLVER,
    steps: int = STEPS,
    teacher_solver: str = TEACHER_SOLVER,
    teacher_steps: int = TEACHER_STEPS,
    teacher_n: int = TEACHER_N,
    teacher_seed: int = TEACHER_SEED,
    cfg: float = CFG,
    guide: str = GUIDE,
    resize: str = RESIZE,
    quantize: str = QUANTIZE,
    on_bad: str = ON_BAD,
    device: str = DEVICE,
    work: Path = WORK,
    repeats: int = REPEATS,
    report_as: str = REPORT_AS,
    bootstrap: int = BOOTSTRAP,
    distance_n: int = DISTANCE_N,
    pr_k: int = PR_K,
    dc_k: int = DC_K,
    pr_dtype: str = PR_DTYPE,
    kid_subsets: int = KID_SUBSETS,
    kid_size: int = KID_SIZE,
    is_splits: int = IS_SPLITS,
    is_mode: str = IS_MODE,
    clip_model: str = CLIP_MODEL,
    json: Path = JSON,
    csv: Path = CSV,
    markdown: Path = MARKDOWN,
    report: Path = REPORT,
    save_stats: Path = SAVE_STATS,
    name: list[str] = NAME,
    run: list[Path] = RUN,
    title: str = TITLE,
    activations: Path = ACTIVATIONS,
    act_stat: str = ACT_STAT,
    curves: Path = CURVES,
    compare: bool = COMPARE,
) -> None:
    """Measure students, teachers and images, and say how it was measured.

    Every metric of the papers: Fréchet distances over a named feature extractor (FID, FD-DINOv2, ...), KID, Inception
    Score, precision, recall, density, coverage, CLIP score, perceptual distances to the teacher from equal noise;
    accuracy by class, samples/s, network calls (NFE). Every number comes with its protocol. Interrupted, the same
    command continues; under torchrun the processes share the work.
    """
    values = dict(context.params)
    given = {
        key
        for key in values
        if (source := context.get_parameter_source(key)) is not None and source.name == "COMMANDLINE"
    }
    if asked := values.pop("prompt"):
        if prompts:
            raise UserError("--prompt and --prompts are two ways to give the same", "give one of them")
        values["prompts"], given = tuple(asked), given | {"prompts"}
    if activations or curves:
        from d2o.cli.eval_figures import draw_activations, draw_curves

        return draw_activations(values, given) if activations else draw_curves(values, given)
    outputs = Targets(json, csv, markdown, report, run, title)
    check_asked(values)
    outputs.check(save_stats)
    with nullcontext(outputs.read(values["x"])) if compare else measured(values, given) as records:
        if worker()[0] == 0:
            outputs.write(records)
            show(records, console.err if outputs.piped else console.out)


def show(records: Sequence[JsonObject], to: Console = console.out) -> None:
    """The results as a table, with the protocol below."""
    from rich import box
    from rich.table import Table

    from d2o.reports.comparison import fold, results_table

    width = to.width if to.is_terminal else max(to.width, 160)  # in a file or pipe there is room
    target = to if to.is_terminal else Console(file=to.file, width=width, highlight=False)
    for piece in fold(results_table(list(records)), width - 4):
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for i, header in enumerate(piece.headers):
            table.add_column(
                escape(header),
                justify="right" if i else "left",
                no_wrap=i > 0,
                overflow="fold",
                min_width=0 if i else 16,
            )
        for i, row in enumerate(piece.rows):
            table.add_row(
                *(f"[bold]{escape(cell)}[/]" if (i, j) in piece.best else escape(cell) for j, cell in enumerate(row))
            )
        target.print(table)
        for line in piece.footer:
            to.print(escape(line), style="dim")
