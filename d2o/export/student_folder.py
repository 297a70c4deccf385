"""A one-call student of a diffusers network as a diffusers folder, which needs nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from d2o.condition import Condition
from d2o.export.card import card
from d2o.export.folder import beside, check_target, keep, open_pipeline
from d2o.export.loaded import Loaded
from d2o.export.one_call import OneCall, one_call, unclamped
from d2o.export.parity import Parity, compare
from d2o.export.pipeline import numbered, rescaled, write_index, write_network, write_text_encoder
from d2o.export.smaller import TOLERANCE
from d2o.interop.safetensors_io import atomic_write
from d2o.students.base import Student

PIPELINES = {"UNet2DModel": "ConsistencyModelPipeline", "SD3Transformer2DModel": "StableDiffusion3Pipeline"}
"""Kind of network -> the pipeline that calls it. Of U-Nets on pixels this is the one that scales its noise, takes class
labels, and makes one step by default; it is written for another scheduler, but asks of one what all have."""
PROMPTS = ("a photo of a dog", "")


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
        parity = _compare(source, call, folder, dtype, check_n, tolerance)
        text = card(source, target.name, "diffusers", dtype, parity, source.path.name)
        atomic_write(folder / "README.md", text)
        return parity, keep(folder, target, force)


def _denoiser(call: OneCall) -> str:
    """The network's name in its pipeline."""
    return "transformer" if type(call.network).__name__ == "SD3Transformer2DModel" else "unet"


def _write(call: OneCall, student: Student, folder: Path, dtype: str) -> None:
    network = _denoiser(call)
    parts = {network: call.network, "scheduler": call.scheduler}
    pipeline = PIPELINES.get(type(call.network).__name__, "StableDiffusionPipeline")
    write_network(call.network, folder / network, dtype)
    call.scheduler.save_pretrained(folder / "scheduler")
    if student.spec.condition == "text":
        encoders, tokenizers = (
            numbered("text_encoder", student.text.encoders),
            numbered("tokenizer", student.text.tokenizers),
        )
        pipeline = "StableDiffusionXLPipeline" if network == "unet" and len(encoders) == 2 else pipeline
        vae = rescaled(student.space.autoencoder, call.scale)
        write_network(vae, folder / "vae", dtype)
        for name, encoder in encoders.items():
            write_text_encoder(encoder, folder / name, dtype)
        for name, tokenizer in tokenizers.items():
            tokenizer.save_pretrained(folder / name)
        parts |= {"vae": vae, **encoders, **tokenizers}
    write_index(folder, pipeline, parts)


def _compare(source: Loaded, call: OneCall, folder: Path, dtype: str, n: int, tolerance: float) -> Parity:
    """Images of the pipeline against the student's, in [-1, 1]. Rounding hides little else: with the network's own
    weights in the place of the rounded ones they have to be the same."""
    import diffusers

    pipeline, student = open_pipeline(folder), unclamped(source.student)
    spec = student.spec

    def run(inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        noise = inputs[0]
        asked: dict[str, Any] = {"batch_size": len(noise)}
        if spec.condition == "text":
            told = scale(inputs)
            asked = {"prompt": prompts(len(noise)), "guidance_scale": 0.0 if told is None else told}
        if spec.condition == "label":
            asked["class_labels"] = inputs[1].tolist()
        steps = student.nfe
        return pipeline(latents=noise, num_inference_steps=steps, output_type="pt", **asked).images * 2 - 1

    def scale(inputs: tuple[torch.Tensor, ...]) -> float | None:
        """Pipelines are told one guidance scale: the lowest of a single image, else the highest."""
        return None if student.guidance is None else float(inputs[-1][-1])

    def expected(noise: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
        if spec.condition == "text":
            condition = Condition.of_prompts(prompts(len(noise))).guided(scale((noise, *given)))
            return student.decode(student(noise, condition))
        return student.decode(student(noise, given[0] if given else None))

    runtime = f"diffusers {diffusers.__version__} in float32 against the student, torch {torch.__version__}"
    parity = compare(source, run, n, tolerance, runtime, expected)
    if dtype == "fp32":
        return parity
    parts = {_denoiser(call): call.network}
    if spec.condition == "text":
        encoders = numbered("text_encoder", student.text.encoders)
        parts |= {"vae": rescaled(student.space.autoencoder, call.scale), **encoders}
    for name, part in parts.items():
        getattr(pipeline, name).load_state_dict(part.state_dict())
    exact = compare(source, run, n, TOLERANCE["fp32"], runtime, expected)
    return replace(parity, unrounded=exact.difference)


def prompts(n: int) -> list[str]:
    return [PROMPTS[i % 2] for i in range(n)]
