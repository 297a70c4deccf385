"""`d2o export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from d2o.cli import complete, console

if TYPE_CHECKING:
    from d2o.export.exporter import Exported

CHECKPOINT = typer.Argument(
    help=(
        "A student's or teacher's .safetensors checkpoint, a run folder (its best checkpoint, else its last), or a"
        " builtin teacher."
    ),
    show_default=False,
    autocompletion=complete.checkpoints,
)
FORMAT = typer.Option(
    "onnx",
    "--format",
    help=(
        "onnx (for onnxruntime), program (torch.export, .pt2), safetensors (a d2o checkpoint in another precision),"
        " comfyui (one file with the names of Stable Diffusion's original ones, which ComfyUI and others read: students"
        " of Stable Diffusion 1 and XL) or diffusers (a folder for its pipelines: a text-to-image teacher, or a student"
        " of a teacher in that format; of a LoRA student its LoRA). Of a student that takes prompts, onnx and program"
        " are a folder of three files: text encoder, student, decoder."
    ),
    autocompletion=complete.among("onnx", "program", "safetensors", "comfyui", "diffusers"),
)
OUT = typer.Option(
    None,
    "--out",
    help=(
        "File (.onnx, .pt2, .safetensors) or existing folder; where the export is a folder, that one itself. Default:"
        " the checkpoint's name, beside it."
    ),
    show_default=False,
)
OPSET = typer.Option(
    None,
    "--opset",
    min=1,
    help="ONNX operator set, 18 or later. Default: 18, which most runtimes read.",
    show_default=False,
)
DTYPE = typer.Option(
    None,
    "--dtype",
    help=(
        "Precision of the weights, for all formats but program: fp32, fp16 or (not onnx) bf16; of onnx it is"
        " that of the arithmetic, too. Default: fp32, of comfyui fp16."
    ),
    show_default=False,
)
STUDENT_SIGMA = typer.Option(
    None,
    "--student-sigma",
    help=(
        "The checkpoint is a published one-step student in a pickle of NVIDIA's kind, which does not say so, called at"
        " this noise level: SiD and SiDA 2.5, GDD 80. With --format safetensors it becomes a student that d2o samples,"
        " measures and trains further."
    ),
    show_default=False,
)
CHECK_N = typer.Option(
    16, "--check-n", min=1, help="Samples compared with the network, in one batch; one sample is compared alone, too."
)
TOLERANCE = typer.Option(
    None,
    "--tolerance",
    help=(
        "Largest accepted absolute difference of outputs of -1 to 1; of larger ones in proportion. Default: 1e-4; of"
        " weights rounded to fp16 0.031, to bf16 0.25 (32 times their spacing at 1)."
    ),
    show_default=False,
)
MERGED = typer.Option(
    False,
    "--merged",
    help=(
        "For --format diffusers of a LoRA student: the whole model with the adapters in its weights, instead of the"
        " adapters alone."
    ),
)
FORCE = typer.Option(False, "--force", help="Overwrite another file or model card of that name.")
PUSH = typer.Option(
    None,
    "--push",
    metavar="OWNER/NAME",
    help=(
        "Then upload it with its card to this repository of the Hugging Face hub, in one commit; a new one is private."
        " Needs a token (`hf auth login`). What fails the comparison is never uploaded."
    ),
    show_default=False,
)
DRY_RUN = typer.Option(False, "--dry-run", help="With --push: say what would be uploaded, and upload nothing.")
PUBLIC = typer.Option(False, "--public", help="With --push: a new repository is public.")


def export(
    checkpoint: str = CHECKPOINT,
    format_: str = FORMAT,
    out: Path = OUT,
    opset: int = OPSET,
    dtype: str = DTYPE,
    student_sigma: float = STUDENT_SIGMA,
    check_n: int = CHECK_N,
    tolerance: float = TOLERANCE,
    merged: bool = MERGED,
    force: bool = FORCE,
    push: str = PUSH,
    dry_run: bool = DRY_RUN,
    public: bool = PUBLIC,
) -> None:
    """Write a student as ONNX, as a torch.export program, for diffusers or ComfyUI, or as weights in another precision,
    compare it with the student, add a model card.

    The batch size stays free. A teacher exports as its denoiser D(x, sigma, label), a text-to-image teacher as a
    diffusers pipeline. Above --tolerance the file is not kept.
    """
    from d2o.errors import UserError
    from d2o.export.exporter import export_checkpoint

    if push:
        from d2o.export.push import check_push

        check_push(push, dry_run)
    elif dry_run or public:
        raise UserError(f"{'--dry-run' if dry_run else '--public'} is for --push OWNER/NAME, which is not given")
    done = export_checkpoint(
        checkpoint,
        format_,
        out,
        opset=opset,
        dtype=dtype,
        student_sigma=student_sigma,
        check_n=check_n,
        tolerance=tolerance,
        merged=merged,
        force=force,
        say=console.say,
    )
    lines = [
        f"{'unchanged' if done.unchanged else 'wrote'} {done.path} ({done.size / 1e6:.1f} MB)",
        f"card {done.card}",
        f"parity: {done.parity}",
        f"licence: {done.licence} (teacher: {done.teacher})",
    ]
    if push:
        lines += _pushed(done, push, dry_run, public)
    for line in lines:
        console.out.print(line, markup=False)


def _pushed(done: Exported, repo: str, dry_run: bool, public: bool) -> list[str]:
    """Upload it, or say what would be."""
    from d2o.export.push import contents, push

    files = {name: path.stat().st_size for name, path in contents(done).items()}
    listed = [f"  {name} ({size / 1e6:.3f} MB)" for name, size in files.items()]
    total = f"{len(files)} files, {sum(files.values()) / 1e6:.1f} MB"
    if dry_run:
        kept = "public" if public else "private"
        head = f"would upload {total} to {repo} (if it is new: {kept}); the card is its README.md"
        return [head, *listed, "", done.card.read_text(encoding="utf-8").rstrip()]
    console.say(f"uploading {total} to {repo}")
    return [f"uploaded {total} to {repo}: {push(done, repo, public)}"]
