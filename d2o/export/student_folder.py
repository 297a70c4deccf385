"""A one-call student of a diffusers network as a diffusers folder, which needs nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from d2o.export.card import card
from d2o.export.folder import beside, check_target, keep, open_pipeline
from d2o.export.loaded import Loaded
from d2o.export.one_call import OneCall, one_call
from d2o.export.parity import Parity
from d2o.export.pipeline import numbered, write_index, write_network, write_text_encoder
from d2o.export.pipeline_parity import compare_pipeline, pipeline_parts
from d2o.interop.safetensors_io import atomic_write
from d2o.students.base import Student

PIPELINES = {"UNet2DModel": "ConsistencyModelPipeline", "SD3Transformer2DModel": "StableDiffusion3Pipeline"}
"""Kind of network -> the pipeline that calls it. Of U-Nets on pixels this is the one that scales its noise, takes class
labels, and makes one step by default; it is written for another scheduler, but asks of one what all have."""


def write_student(
    source: Loaded, target: Path, dtype: str, check_n: int, tolerance: float, force: bool
) -> tuple[Parity, bool]:
    """Write the student as the folder `target`, weights in `dtype`; it is read back by diffusers and compared. Returns
    the comparison, and whether the same folder was there already. UserError: as `one_call` and `write_diffusers`; or
    the folder is another model than the student even with its weights unrounded."""
    student = source.student
    call = one_call(student, source.path)
    check_target(target)
    with beside(target) as folder:
        _write(call, student, folder, dtype)
        parts = pipeline_parts(call, student)
        parity = compare_pipeline(source, open_pipeline(folder), parts, dtype, check_n, tolerance)
        text = card(source, target.name, "diffusers", dtype, parity, source.path.name)
        atomic_write(folder / "README.md", text)
        return parity, keep(folder, target, force)


def _write(call: OneCall, student: Student, folder: Path, dtype: str) -> None:
    parts = pipeline_parts(call, student)
    network = "transformer" if "transformer" in parts else "unet"
    pipeline = PIPELINES.get(type(call.network).__name__, "StableDiffusionPipeline")
    write_network(call.network, folder / network, dtype)
    call.scheduler.save_pretrained(folder / "scheduler")
    tokenizers: dict[str, Any] = {}
    if student.spec.condition == "text":
        encoders = {name: part for name, part in parts.items() if name.startswith("text_encoder")}
        tokenizers = numbered("tokenizer", student.text.tokenizers)
        pipeline = "StableDiffusionXLPipeline" if network == "unet" and len(encoders) == 2 else pipeline
        write_network(parts["vae"], folder / "vae", dtype)
        for name, encoder in encoders.items():
            write_text_encoder(encoder, folder / name, dtype)
        for name, tokenizer in tokenizers.items():
            tokenizer.save_pretrained(folder / name)
    write_index(folder, pipeline, {**parts, **tokenizers, "scheduler": call.scheduler})
