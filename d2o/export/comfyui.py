"""A text student as ComfyUI's checkpoints are: U-Net, autoencoder and text encoders in one .safetensors file, with the
names of Stable Diffusion's original files, which other tools read, too."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from d2o.diffusion.levels import DiscreteLevels
from d2o.diffusion.schedules import DiscreteSchedule
from d2o.errors import UserError
from d2o.export.folder import cast_to
from d2o.export.ldm_names import text_names, unet_names, vae_names
from d2o.export.loaded import Loaded
from d2o.export.one_call import OneCall, one_call
from d2o.export.parity import Parity
from d2o.export.pipeline import numbered, published_names
from d2o.export.pipeline_parity import compare_pipeline, pipeline_parts
from d2o.inputs import JsonObject
from d2o.networks.edm_view import EDMView, lowest_level
from d2o.students.base import Student
from d2o.students.consistency import ConsistencyStudent
from d2o.students.few_step import FewStepStudent
from d2o.teachers.diffusers_parts import quiet

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

XL_DEPTHS = ([0, 2, 10], [0, 2, 4], [0, 1, 2], [0, 2, 5], [0, 2, 6])
"""Layers of attention of SDXL, SSD-1B, Segmind Vega and the KOALAs, by block."""
SCALES = {"Stable Diffusion 1": 0.18215, "Stable Diffusion XL": 0.13025}
"""Model family -> what ComfyUI takes its latents to be multiplied by."""


@dataclass(frozen=True)
class ComfySettings:
    """How ComfyUI has to call a student. `family`: what it takes the file for, "" if it knows no model of these sizes;
    `sigmas`: the noise levels of its steps; `prediction`: of its node ModelSamplingDiscrete, "" where none is needed;
    `top`: whether the first is the highest of its own; `noise`: its first noise over the student's."""

    family: str
    sigmas: list[float]
    prediction: str
    top: bool
    noise: float


def settings_of(student: Student) -> ComfySettings:
    """UserError: a student whose images ComfyUI would not make."""
    view = student.network
    assert isinstance(view, EDMView) and isinstance(view.levels, DiscreteLevels)
    family = _family(view.net.config)
    scale = float(student.space.autoencoder.config.scaling_factor)
    if family and abs(scale / SCALES[family] - 1) > 1e-4:
        what = f"ComfyUI takes latents of {family} to be scaled by {SCALES[family]}; this student's are by {scale:g}"
        raise UserError(what, "--format diffusers writes it")
    top = student.sigma >= 0.9999 * float(view.sigma_max)  # from which it begins as DDIM does, elsewhere as EDM
    begun = student.sigma * ((1 + student.sigma**-2) ** 0.5 if top else 1)
    end = lowest_level(view) if isinstance(student, ConsistencyStudent) else 0.0
    levels = student.levels if isinstance(student, FewStepStudent) else (student.sigma,)
    told = {"epsilon": "", "v_prediction": "v_prediction", "sample": "x0"}[view.prediction]
    marked = family == "Stable Diffusion XL" and told == "v_prediction"  # the file says so
    return ComfySettings(family, [*levels, end], "" if marked else told, top, begun / student.factor)


def check_comfyui(source: Loaded) -> OneCall:
    """The student's call in diffusers. UserError: no text student of Stable Diffusion 1 or XL; one that is told its
    guidance, for which the original network has no input; another noise schedule."""
    if source.kind != "student" or source.spec.condition != "text":
        what = f"{source.path} is no student that takes prompts, as ComfyUI's checkpoints do"
        raise UserError(what, "--format onnx, program and safetensors write students of all kinds")
    view = source.network
    call = one_call(source.student, source.path)
    assert isinstance(view, EDMView)
    encoders: list[Any] = source.student.text.encoders
    if view.kind != "UNet2DConditionModel":
        raise UserError(
            f"{source.path}: ComfyUI's names are those of U-Nets, not of a {view.kind}", "--format diffusers"
        )
    if source.guidance is not None:
        raise UserError(f"{source.path} is told a guidance scale, for which ComfyUI's U-Net has no input")
    if len(encoders) == 1 and view.net.config.use_linear_projection:
        what = (
            f"{source.path} is a student of Stable Diffusion 2; only those of Stable Diffusion 1 and XL are supported"
        )
        raise UserError(what, "--format diffusers writes it")
    if len(encoders) == 2 and encoders[1].config.projection_dim != encoders[1].config.hidden_size:
        raise UserError(
            f"{source.path}: its second text encoder projects to another width, unlike Stable Diffusion XL's"
        )
    ours = DiscreteSchedule.from_config(view.config["schedule"]).alphas_cumprod
    theirs = DiscreteSchedule.scaled_linear().alphas_cumprod
    if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-4):
        what = f"{source.path} has another noise schedule than Stable Diffusion, whose ComfyUI takes every file to have"
        raise UserError(what, "--format diffusers keeps it")
    settings_of(source.student)
    return call


def write_comfyui(
    source: Loaded, call: OneCall, path: Path, record: JsonObject, dtype: str, check_n: int, tolerance: float
) -> Parity:
    """Write the file, read it with diffusers' own converters, and compare images. UserError: values that `dtype` cannot
    hold, or a difference."""
    parts = pipeline_parts(call, source.student)
    tensors = {**unet_names(call.network.state_dict(), call.network.config)}
    tensors |= vae_names(parts["vae"].state_dict(), parts["vae"].config)
    tensors |= text_names([published_names(encoder) for encoder in source.student.text.encoders])
    if _family(call.network.config) == "Stable Diffusion XL" and source.network.prediction == "v_prediction":
        tensors["v_pred"] = torch.zeros(0)  # by which ComfyUI knows
    header = {"d2o_export": json.dumps(record, sort_keys=True)}  # several keys would come in no fixed order
    path.write_bytes(save(cast_to(tensors, dtype, source.path.name), header))
    return compare_pipeline(source, open_comfyui(path, call, source.student), parts, dtype, check_n, tolerance)


def open_comfyui(path: Path, call: OneCall, student: Student) -> DiffusionPipeline:
    """The pipeline of the file, its weights named by diffusers."""
    with quiet():
        import diffusers
        from diffusers.loaders import single_file_utils as single

        parts = {name: copy.deepcopy(part) for name, part in pipeline_parts(call, student).items()}
        tensors = load_file(path)
        found = {
            "unet": single.convert_ldm_unet_checkpoint(dict(tensors), parts["unet"].config),
            "vae": single.convert_ldm_vae_checkpoint(dict(tensors), parts["vae"].config),
        }
        for name in parts:
            if name == "text_encoder":
                found[name] = _as_loaded(parts[name], single.convert_ldm_clip_checkpoint(dict(tensors)))
            if name == "text_encoder_2":
                prefix = "conditioner.embedders.1.model."
                found[name] = _as_loaded(parts[name], single.convert_open_clip_checkpoint(parts[name], tensors, prefix))
        for name, part in parts.items():
            part.load_state_dict(found[name])
        tokenizers = numbered("tokenizer", student.text.tokenizers)
        if len(tokenizers) == 2:
            pipeline = diffusers.StableDiffusionXLPipeline(
                **parts, **tokenizers, scheduler=call.scheduler, add_watermarker=False
            )
        else:
            absent = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
            pipeline = diffusers.StableDiffusionPipeline(**parts, **tokenizers, scheduler=call.scheduler, **absent)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def comfy_usage(student: Student, file_name: str) -> str:
    """What to set in ComfyUI, for the model card."""
    given = settings_of(student)
    shape, factor = student.spec.shape, 2 ** (len(student.space.autoencoder.config.block_out_channels) - 1)
    sigmas = ", ".join(f"{sigma:.6g}" for sigma in given.sigmas)
    lines = [
        f"1. Put `{file_name}` into `models/checkpoints` and load it with the node Load Checkpoint.",
        f"2. Empty Latent Image: {shape[2] * factor} x {shape[1] * factor} (width x height).",
        f"3. SamplerCustom: cfg 1.0, sampler `euler` (KSamplerSelect), sigmas `{sigmas}` (ManualSigmas).",
    ]
    if given.prediction:
        lines.insert(1, f"   ModelSamplingDiscrete behind it: `{given.prediction}`.")
    if len(given.sigmas) == 2 and given.sigmas[1] == 0 and given.top:
        lines.append("   KSampler does the same: steps 1, cfg 1.0, `euler`, scheduler `sgm_uniform`, denoise 1.0.")
    text = "\n".join(lines)
    if not given.family:
        known = "Stable Diffusion 1, XL, SSD-1B, Segmind Vega, KOALA"
        text += (
            f"\n\nComfyUI knows models by their sizes, and none of these sizes ({known}): it will not load this one."
        )
    return (
        text + "\n\n`from_single_file` of diffusers' pipelines reads the file, too, with the `config` of its teacher."
    )


def limitations(student: Student) -> list[str]:
    """What ComfyUI does differently, for the model card."""
    noise = settings_of(student).noise
    if abs(noise - 1) < 1e-6:
        return []
    return [
        f"ComfyUI's first noise is {noise:.5f} times that of the student, which was trained without the difference."
    ]


def _family(config: Mapping[str, Any]) -> str:
    """What ComfyUI knows a U-Net for, by its sizes."""
    first, width, linear = (
        config["block_out_channels"][0],
        config["cross_attention_dim"],
        config["use_linear_projection"],
    )
    if (first, width, bool(linear)) == (320, 768, False) and config["addition_embed_type"] is None:
        return "Stable Diffusion 1"
    kinds, depth = config["down_block_types"], config["transformer_layers_per_block"]
    depths = [
        (depth if isinstance(depth, int) else depth[i]) if "CrossAttn" in kind else 0 for i, kind in enumerate(kinds)
    ]
    sizes = (320, 2048, True, 2816)
    xl = (first, width, bool(linear), config["projection_class_embeddings_input_dim"]) == sizes
    return "Stable Diffusion XL" if xl and depths in XL_DEPTHS else ""


def _as_loaded(encoder: torch.nn.Module, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By the names of this transformers, with its buffers, which files do not hold."""
    flat = {name.removeprefix("text_model."): tensor for name, tensor in named.items()}
    buffers = dict(encoder.named_buffers())
    return {
        name: buffers[name] if name in buffers else flat[name.removeprefix("text_model.")]
        for name in encoder.state_dict()
    }
