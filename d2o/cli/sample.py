"""`d2o sample`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from d2o.cli import complete, console
from d2o.cli.opening import GUIDE, check_guide, open_device, open_teacher
from d2o.errors import UserError
from d2o.inputs import JsonObject

if TYPE_CHECKING:
    from d2o.students.base import Student
    from d2o.students.samplers import Sampler


def sample(
    checkpoint: Path = typer.Argument(
        None,
        help="A student's .safetensors checkpoint, or a run folder (its best, else last checkpoint).",
        show_default=False,
        autocompletion=complete.checkpoints,
    ),
    n: int = typer.Option(None, "--n", "-n", help="Number of images.", show_default=False),
    out: Path = typer.Option(
        None,
        "--out",
        help=(
            "Where to: a folder (no suffix), or a .zip, .tar or .npz file. Default: "
            "`samples/<name>-n<n>-seed<seed>.zip`."
        ),
        show_default=False,
    ),
    seed: int = typer.Option(0, "--seed", help="Seed of the first image; image i has seed + i."),
    labels: str = typer.Option(
        None,
        "--labels",
        help=(
            "Classes: random (default: from the image's seed), balanced, or indices in turn: 0,1,2; of "
            "prompts likewise (default: balanced)."
        ),
        show_default=False,
    ),
    batch: int = typer.Option(
        None, "--batch", help="Images per call (256); a begun output keeps its own.", show_default=False
    ),
    grid: Path = typer.Option(
        None,
        "--grid",
        metavar="FILE.png",
        help="Also write a picture of the first 64 images, with their classes.",
        show_default=False,
    ),
    teacher: str = typer.Option(
        None,
        "--teacher",
        help=(
            "Sample a teacher instead: any that `d2o pairs` takes. Equal seeds give equal noise, so "
            "that both can be compared."
        ),
        show_default=False,
        autocompletion=complete.teachers,
    ),
    solver: str = typer.Option(
        None,
        "--solver",
        help="Solver of the teacher: heun, euler, ddim or dpmpp. Default: its usual one.",
        show_default=False,
        autocompletion=complete.among("heun", "euler", "ddim", "dpmpp"),
    ),
    steps: int = typer.Option(
        None,
        "--steps",
        help=(
            "Solver steps of the teacher (default: its usual number); network calls of a consistency "
            "student, 1 or 2; pictures of a --path (9)."
        ),
        show_default=False,
    ),
    cfg: float = typer.Option(
        None,
        "--cfg",
        help=(
            "Guidance weight of the teacher (default: 1, which is none), or of a student that is told it, within the"
            " range that it was trained for."
        ),
        show_default=False,
    ),
    guide: str = GUIDE,
    prompt: list[str] = typer.Option(
        None,
        "--prompt",
        help=(
            "A prompt for a student or teacher that takes text; give it several times for several, which the "
            "images take in turn."
        ),
        show_default=False,
    ),
    prompts: str = typer.Option(
        None,
        "--prompts",
        metavar="FILE",
        help="The same from a .txt (one a line), .jsonl or .parquet file.",
        show_default=False,
    ),
    path: str = typer.Option(
        None,
        "--path",
        help=(
            "Walk through a style student's latents (SPI-GAN) instead: h, from noise to image; z, between "
            "two noises; w, between two styles. OUT: .png, a row for each of the n walks, or .gif."
        ),
        show_default=False,
    ),
    interpolation: str = typer.Option(
        "lerp", "--interpolation", help="Of --path z and w: lerp (straight) or slerp (on the sphere)."
    ),
    truncation: float = typer.Option(
        None,
        "--truncation",
        help="Of a style student: styles towards their mean by this factor (1: as they are).",
        show_default=False,
    ),
    device: str = typer.Option(
        None, "--device", help="cpu, cuda or cuda:N. Default: CUDA if there is one.", show_default=False
    ),
    threads: int = typer.Option(
        None, "--threads", help="CPU threads of torch. Default: torch's own.", show_default=False
    ),
    precision: str = typer.Option(
        "fp32",
        "--precision",
        help="fp32; bf16 or fp16 inside the network; or auto: bf16 where the processor computes in it.",
    ),
    channels_last: bool = typer.Option(
        None,
        "--channels-last/--no-channels-last",
        help="Channels-last memory order of the network. Default: where that is faster.",
        show_default=False,
    ),
    chunk: int = typer.Option(
        None,
        "--chunk",
        help="Images per part, the unit of work that an interruption can lose. Default 1024.",
        show_default=False,
    ),
) -> None:
    """Write images of a student (or of a teacher, for comparison) to a folder, zip, tar or npz.

    Image i depends on seed + i and its label alone; equal seeds give files of equal bytes. The same command again
    continues what was interrupted; with a larger --n it adds to what is there, which stays until the larger output
    takes its place. Several workers may run it at once (started twice, or under torchrun) and share the work.
    """
    example = "for example: d2o sample runs/quickstart --n 1000"
    if path is not None:
        _walk(checkpoint, path, n, out or grid, seed, 9 if steps is None else steps, interpolation, truncation, device)
        return
    if (checkpoint is None) == (teacher is None):
        raise UserError("give a student's checkpoint or --teacher, one of them", example)
    _check_given(checkpoint, teacher, n, prompt or prompts)
    for option, given in (("--solver", solver), ("--guide", guide)):
        if checkpoint is not None and given is not None:
            raise UserError(f"{option} is a teacher's", "leave it away")
    check_guide(guide, cfg not in (None, 1))
    if teacher is not None and guide is not None:
        from d2o.teachers.base import guided_name

        teacher = guided_name(teacher, guide)
    if prompt and prompts:
        raise UserError("--prompt and --prompts are two ways to give the same", "give one of them")
    if grid is not None and grid.suffix.lower() != ".png":
        raise UserError(f"--grid {grid}: expected the name of a .png file")

    from d2o.interop.outputs import check_output
    from d2o.runtime import stop_flag, worker
    from d2o.students.generate import SampleSettings, make_samples

    texts = prompts or prompt or None
    default = ""
    if out is None:
        out = _default_out(
            checkpoint or Path(str(teacher)),
            n,
            seed,
            solver=solver,
            steps=steps,
            cfg=None if cfg == 1 else cfg,
            labels=labels,
            truncation=truncation,
            prompts=prompts and Path(prompts).stem,
            prompt="+".join(prompt or ()) or None,
        )
        default = f"writing {out} (--out names another file or a folder)"
    check_output(out)
    if grid is not None:
        check_output(grid, folder=False)
    sampler, settings = (
        _sampler(checkpoint, teacher, solver, steps, cfg, texts, truncation, device),
        SampleSettings(n, seed, labels),
    )
    if default:
        console.say(default)
    with stop_flag() as stop, console.progress_bar("sample", "images") as progress:
        record = make_samples(
            sampler,
            out,
            settings,
            batch=batch,
            threads=threads,
            chunk=chunk,
            precision=precision,
            channels_last=channels_last,
            say=console.say,
            progress=progress,
            stop=stop,
        )
    if grid is not None and worker()[0] == 0:
        _write_grid(grid, sampler, record)
    made = sampler.record
    passes = f" ({made['forwards']} passes)" if made.get("forwards", made["nfe"]) != made["nfe"] else ""
    console.say(f"{out}: {n:,} images, {made['nfe']} network {'call' if made['nfe'] == 1 else 'calls'}{passes} each")


def _check_given(checkpoint: Path | None, teacher: str | None, n: int | None, texts: object) -> None:
    """UserError: what cannot be done without is missing; all of it, with an example for this checkpoint or teacher."""
    lacking = ["--n"] if n is None else []
    words = [f"d2o sample {checkpoint}"]
    text = False
    if teacher is not None:
        from d2o.teachers.kinds import expected_kind

        kind = expected_kind(teacher)
        text = kind is not None and kind.text
        words = [f"d2o sample --teacher {teacher}"]
    elif checkpoint is not None and checkpoint.exists():
        from d2o.interop.safetensors_io import read_meta, resolve_checkpoint

        spec = read_meta(resolve_checkpoint(checkpoint)).get("spec")
        text = isinstance(spec, dict) and spec.get("condition") == "text"
    if text:
        words.append('--prompt "a lighthouse at dawn"')
        lacking += [] if texts else ["--prompt (or --prompts FILE)"]
    if lacking:
        raise UserError(
            f"{' and '.join(lacking)} {'is' if len(lacking) == 1 else 'are'} missing",
            f"for example: {' '.join(words)} --n {n or 64}",
        )


def _default_out(source: Path, n: int, seed: int, **others: str | float | None) -> Path:
    """samples/NAME-n50000-seed0.zip; what else was chosen is part of the name, so that other choices make other
    files."""
    from d2o.data.pair_settings import short_name

    run = source.parent.parent.name if source.parent.name == "checkpoints" else ""
    words = [run, short_name(str(source.resolve() if source.name in ("", "..") else source))]
    for key, value in others.items():
        if value is not None:
            text = f"{value:g}" if isinstance(value, float) else str(value)
            words.append(
                re.sub(r"[^\w.+]+", "_", f"{'' if key in ('solver', 'prompts', 'prompt') else key}{text}")[:60]
            )
    return Path("samples") / "-".join([*filter(None, words), f"n{n}", f"seed{seed}.zip"])


def _sampler(
    checkpoint: Path | None,
    teacher: str | None,
    solver: str | None,
    steps: int | None,
    cfg: float | None,
    texts: str | list[str] | None,
    truncation: float | None,
    device: str | None,
) -> Sampler:
    from d2o.data.prompt_files import open_prompts
    from d2o.data.prompts import Prompts
    from d2o.export.loaded import find_checkpoint
    from d2o.students.base import load_student
    from d2o.students.samplers import student_sampler, teacher_sampler
    from d2o.teachers.registry import teacher_names

    prompts = None if texts is None else open_prompts(texts) if isinstance(texts, str) else Prompts.from_list(texts)
    if teacher is not None:
        model = open_teacher(teacher, device)
        return teacher_sampler(model, model.solver(solver, steps), 1.0 if cfg is None else cfg, prompts)
    assert checkpoint is not None
    if str(checkpoint) in teacher_names() and not checkpoint.exists():
        raise UserError(
            f"{checkpoint} is a teacher, not a student's checkpoint", f"d2o sample --teacher {checkpoint} samples it"
        )
    student = load_student(find_checkpoint(checkpoint), open_device(device))
    student = student if steps is None else student.with_steps(steps)
    student = student if truncation is None else _truncated(student, truncation, checkpoint)
    return student_sampler(student, prompts, cfg)


def _truncated(student: Student, truncation: float, checkpoint: Path) -> Student:
    from d2o.students.style import StyleStudent

    if not isinstance(student, StyleStudent):
        raise UserError(
            f"{checkpoint} has no styles that could be truncated", "--truncation is for students of spi-gan"
        )
    student.truncation = truncation
    return student


def _walk(
    checkpoint: Path | None,
    path: str,
    n: int | None,
    out: Path | None,
    seed: int,
    steps: int,
    interpolation: str,
    truncation: float | None,
    device: str | None,
) -> None:
    """`d2o sample --path`."""
    example = "for example: d2o sample runs/spi_gan_digits --path h --steps 9 --n 8 --out path.png"
    if checkpoint is None or out is None:
        raise UserError("--path needs a student's checkpoint and --out FILE.png or .gif", example)
    from d2o.export.loaded import find_checkpoint
    from d2o.interop.outputs import check_output
    from d2o.students.base import load_student
    from d2o.students.paths import path_images, save_path, walk_names
    from d2o.students.style import StyleStudent

    if out.suffix.lower() not in (".png", ".gif"):
        raise UserError(f"--out {out}: a path is written as .png or .gif", example)
    check_output(out, folder=False)
    student = load_student(find_checkpoint(checkpoint), open_device(device))
    if not isinstance(student, StyleStudent):
        raise UserError(
            f"{checkpoint} has no latent path: it is a student of another kind", "--path is for students of spi-gan"
        )
    if truncation is not None:
        student.truncation = truncation
    save_path(path_images(student, path, n or 8, steps, seed, interpolation), out, walk_names(path, n or 8, seed))
    console.say(f"wrote {out}")


def _write_grid(path: Path, sampler: Sampler, record: JsonObject) -> None:
    from d2o.data.pictures import draw_sheet, lay_out
    from d2o.interop.safetensors_io import atomic_path
    from d2o.students.generate import first_images

    images, labels = first_images(sampler, record, 64)
    classes = None if labels is None else labels.tolist()
    names = (
        dict(zip(classes, sampler.prompts.many(classes), strict=True))
        if sampler.prompts is not None and classes is not None
        else None
    )
    picture = draw_sheet([("", images)], lay_out(len(images), classes, names))
    with atomic_path(path) as temporary:
        picture.save(temporary, "png")
    console.say(f"wrote {path}")
