"""A student's pipeline in diffusers against the student: the same images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from d2o.condition import Condition
from d2o.export.loaded import Loaded, prompts
from d2o.export.one_call import OneCall, unclamped
from d2o.export.parity import Parity, compare
from d2o.export.pipeline import numbered, rescaled
from d2o.export.smaller import TOLERANCE
from d2o.students.base import Student

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def pipeline_parts(call: OneCall, student: Student) -> dict[str, Any]:
    """What has weights, by its name in the pipeline: the network, of text students also autoencoder and text
    encoders."""
    parts: dict[str, Any] = {
        "transformer" if type(call.network).__name__ == "SD3Transformer2DModel" else "unet": call.network
    }
    if student.spec.condition == "text":
        encoders = numbered("text_encoder", student.text.encoders)
        parts |= {"vae": rescaled(student.space.autoencoder, call.scale), **encoders}
    return parts


def compare_pipeline(
    source: Loaded, pipeline: DiffusionPipeline, parts: Mapping[str, Any], dtype: str, n: int, tolerance: float
) -> Parity:
    """Images of the pipeline against the student's, in [-1, 1]. Rounding hides little else: with the network's own
    weights (`parts`) in the place of those rounded to `dtype` they have to be the same. UserError: as `compare`."""
    import diffusers

    student = unclamped(source.student)
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
    for name, part in parts.items():
        getattr(pipeline, name).load_state_dict(part.state_dict())
    exact = compare(source, run, n, TOLERANCE["fp32"], runtime, expected)
    return replace(parity, unrounded=exact.difference)
