"""`d2o export`."""

from __future__ import annotations

from pathlib import Path

import typer

from d2o.cli import complete, console

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
        "onnx (for onnxruntime), program (torch.export, .pt2), safetensors (a d2o checkpoint in another precision) or"
        " diffusers (a folder for its pipelines: a text-to-image teacher, or a one-call student of a teacher in that"
        " format; of a LoRA student its LoRA)."
    ),
    autocompletion=complete.among("onnx", "program", "safetensors", "diffusers"),
)
OUT = typer.Option(
    None,
    "--out",
    help=(
        "File (.onnx, .pt2, .safetensors) or existing folder; for diffusers the folder itself. Default: the"
        " checkpoint's name, beside it."
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
        "Precision of the weights, for safetensors and diffusers: fp32, fp16 or bf16. Default: fp32 for safetensors,"
        " fp16 for diffusers."
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
) -> None:
    """Write a student as ONNX, as a torch.export program or as weights in another precision, compare it with the
    student, add a model card.

    The batch size stays free. A teacher exports as its denoiser D(x, sigma, label), a text-to-image teacher as a
    diffusers pipeline. Above --tolerance the file is not kept.
    """
    from d2o.export.exporter import export_checkpoint

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
    for line in lines:
        console.out.print(line, markup=False)
