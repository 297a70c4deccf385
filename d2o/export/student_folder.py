"""A one-call student of a diffusers network as a diffusers folder, which needs nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from d2o.export.card import card
from d2o.export.folder import beside, check_target, keep, open_pipeline, save_part
from d2o.export.loaded import Loaded
from d2o.export.one_call import OneCall, one_call, unclamped
from d2o.export.parity import Parity, compare
from d2o.interop.safetensors_io import atomic_write
from d2o.students.base import Student

PIPELINES = {"UNet2DModel": "ConsistencyModelPipeline"}
"""Kind of network -> the pipeline that calls it. Of U-Nets on pixels this is the one that scales its noise, takes class
labels, and makes one step by default; it is written for another scheduler, but asks of one what all have."""


def write_student(
    source: Loaded, target: Path, dtype: str, check_n: int, tolerance: float, force: bool
) -> tuple[Parity, bool]:
    """Write the student as the folder `target`, weights in `dtype`; it is read back by diffusers and compared. Returns
    the comparison, and whether the same folder was there already. UserError: as `one_call` and `write_diffusers`."""
    student = source.student
    call = one_call(student, source.path)
    check_target(target)
    with beside(target) as folder:
        _write(call, folder, dtype)
        parity = _compare(source, folder, check_n, tolerance)
        text = card(source, target.name, "diffusers", dtype, parity, source.path.name)
        atomic_write(folder / "README.md", text)
        return parity, keep(folder, target, force)


def _write(call: OneCall, folder: Path, dtype: str) -> None:
    import diffusers

    kind = type(call.network).__name__
    index: dict[str, Any] = {
        "_class_name": PIPELINES[kind],
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", type(call.scheduler).__name__],
        "unet": ["diffusers", kind],
    }
    atomic_write(folder / "model_index.json", json.dumps(index, indent=2, sort_keys=True) + "\n")
    call.scheduler.save_pretrained(folder / "scheduler")
    call.network.save_config(folder / "unet")
    save_part(call.network.state_dict(), folder / "unet" / "diffusion_pytorch_model.safetensors", dtype)


def _compare(source: Loaded, folder: Path, n: int, tolerance: float) -> Parity:
    """Images of the pipeline against the student's, in [-1, 1]."""
    import diffusers

    pipeline, student = open_pipeline(folder), unclamped(source.student)

    def run(inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        noise, *labels = inputs
        asked = {"class_labels": labels[0].tolist()} if labels else {}
        found = pipeline(batch_size=len(noise), latents=noise, num_inference_steps=1, output_type="pt", **asked)
        return found.images * 2 - 1

    runtime = f"diffusers {diffusers.__version__} in float32 against the student, torch {torch.__version__}"
    return compare(source, run, n, tolerance, runtime, expected=lambda *given: images(student, *given))


def images(student: Student, *given: Any) -> torch.Tensor:
    return student.decode(student(*given))
