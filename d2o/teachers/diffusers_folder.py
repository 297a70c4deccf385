"""Teachers from a folder in diffusers' format: model_index.json and one folder per component. No code from the folder
is run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from d2o.condition import Condition
from d2o.diffusion.schedules import SPACINGS, DiscreteSchedule, FlowSchedule
from d2o.errors import UserError, unknown
from d2o.interop.hub import INDEX
from d2o.networks.budget import check_numbers
from d2o.spaces.base import LatentSpace
from d2o.spaces.load import kept_space
from d2o.teachers.base import UNSTATED, Spec, Teacher
from d2o.teachers.diffusers_parts import CLASSES, DDPM, SD3, Components, quiet, read_config, words
from d2o.teachers.flow import StableDiffusion3Teacher
from d2o.teachers.prediction import PREDICTIONS
from d2o.teachers.stable_diffusion import StableDiffusionTeacher
from d2o.teachers.text import TextEncoders, clip_and_t5_text, clip_text, kept_text
from d2o.teachers.unconditional import UNet2DTeacher

if TYPE_CHECKING:
    from diffusers import ModelMixin
    from diffusers.configuration_utils import FrozenDict

BETA_SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "LMSDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
)
"""Schedulers that state the betas of a discrete schedule. Which of them a folder has matters for nothing else: d2o has
its own solvers."""
CLIPPING = ("DDIMScheduler", "DDPMScheduler")
NOT_TEACHERS = {
    "Inpaint": "it fills in images",
    "Img2Img": "it starts from images",
    "ControlNet": "it needs control images",
    "Upscale": "it enlarges images",
    "Pix2Pix": "it edits images",
    "Consistency": "it is distilled already",
    "Onnx": "its network is ONNX",
    "LDMPipeline": "latents of a VQ autoencoder are not supported",
    "ScoreSdeVe": "its network has continuous time",
}


def load_diffusers(
    path: str | Path,
    name: str,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    *,
    licence: str = UNSTATED,
    sdxl_uncond: str | None = None,
    origin: str | None = None,
    space: str | None = None,
) -> Teacher:
    """The teacher in a diffusers folder (or hub snapshot): Stable Diffusion 1, 2, XL and 3, or DDPM's UNets in pixel
    space.

    Weights come from safetensors files only and are held in float32; `dtype` bfloat16 or float16 computes under
    autocast. `device` "meta": a plan's, without the weights, of which only the heads are read. `sdxl_uncond` as for
    `StableDiffusionTeacher` (by default as the folder says). `origin`: how others find its text encoders again,
    `space`: its latent space; the folder's own path if left away. UserError: another kind of pipeline, a class that d2o
    does not know, a component that is missing, damaged or has no safetensors file, a scheduler that d2o does not have.
    """
    path = Path(path)
    index = read_config(path / INDEX)
    kind = index.get("_class_name")
    if not isinstance(kind, str) or kind not in CLASSES:
        why = next((why for word, why in NOT_TEACHERS.items() if word in str(kind)), None)
        hint = f"known pipelines: {', '.join(CLASSES)}"
        raise UserError(
            f"{path} holds a {kind if isinstance(kind, str) else 'pipeline with code of its own'}"
            + (f": {why}" if why else ""),
            hint,
        )
    bare = torch.device(device).type == "meta"
    folder, origin = Components(path, index, bare), origin or str(path.resolve())
    with quiet():
        teacher: Teacher
        if CLASSES[kind] is DDPM:
            teacher = _unet2d(folder, name, device, dtype, licence)
        elif CLASSES[kind] is SD3:
            teacher = _stable_diffusion_3(folder, name, device, dtype, licence, origin, space or origin)
        else:
            teacher = _stable_diffusion(folder, name, device, dtype, licence, sdxl_uncond, origin, space or origin)
        _try_out(teacher, path)
    teacher.meta = {
        "format": "diffusers",
        "kind": "teacher",
        "pipeline": kind,
        "scheduler": folder.scheduler,
        "spec": teacher.spec.to_dict(),
    }
    return teacher


def _try_out(teacher: Teacher, path: Path) -> None:
    """One step on the smallest possible noise, so that what is wrong with a folder shows now. UserError: it fails."""
    config: FrozenDict = teacher.network.config
    channels, height, width = teacher.spec.shape
    side = 2 ** len(config.block_out_channels) if "block_out_channels" in config else 2 * config.patch_size
    condition = Condition.of_labels([0]) if teacher.spec.classes else Condition.none(1)
    if teacher.spec.condition == "text":
        condition = Condition.of_prompts([""])
    try:
        noise = torch.zeros(1, channels, min(side, height), min(side, width), device=teacher.device)
        x = teacher.sample(noise, condition, steps=1)
    except UserError:
        raise
    except Exception as error:  # whatever its parts make of each other's wrong numbers
        raise UserError(
            f"{path}: its parts do not work together ({words(error)})", "check the download, or whoever made it"
        ) from error
    if x.device.type != "meta" and not bool(x.isfinite().all()):
        raise UserError(
            f"{path}: the network gives values that are not finite", "the weights may be damaged: check the download"
        )


def _stable_diffusion(
    folder: Components,
    name: str,
    device: str | torch.device,
    dtype: torch.dtype | None,
    licence: str,
    sdxl_uncond: str | None,
    origin: str,
    space: str,
) -> StableDiffusionTeacher:
    xl = folder.index["_class_name"] == "StableDiffusionXLPipeline"
    schedule, prediction, clip = discrete_schedule(folder)
    if clip is not None:
        raise UserError(
            f"{folder.path}: its scheduler clips the prediction to [-{clip:g}, {clip:g}], which makes no sense for"
            " latents",
            "set clip_sample to false in scheduler/scheduler_config.json",
        )
    config = folder.config("unet")
    if (channels := config.get("in_channels", 4)) != config.get("out_channels", 4):
        raise UserError(
            f"{folder.path}: a UNet with {channels} input channels; inpainting and editing UNets are no teachers"
        )
    for key, why in (
        ("class_embed_type", "classes"),
        ("num_class_embeds", "classes"),
        ("time_cond_proj_dim", "the guidance scale (LCM)"),
        ("encoder_hid_dim_type", "projected text or images"),
    ):
        if config.get(key) is not None:
            raise UserError(
                f"{folder.path}: its UNet takes {why} as an input ({key} {config[key]!r}), which d2o does not support"
            )
    if (
        xl
        and config.get("addition_embed_type") == "text_time"
        and config.get("projection_class_embeddings_input_dim") == 2560
    ):
        raise UserError(
            f"{folder.path} holds SDXL's refiner, which improves images and makes none",
            "the teacher is stable-diffusion-xl-base-1.0",
        )
    uncond = sdxl_uncond or ("zeros" if folder.index.get("force_zeros_for_empty_prompt", True) else "encode_empty")
    text, unet = _text(folder, origin, device), folder.model("unet")
    spec = Spec(name, _shape(folder, unet), condition="text", licence=licence, solver="ddim", steps=50)
    latents = kept_space(space, device) or LatentSpace.of(space, folder.model("vae"), device)
    return StableDiffusionTeacher(
        unet, latents, text, schedule, spec, device, dtype, prediction=prediction, sdxl_uncond=uncond
    )


def text_of(path: Path, origin: str, device: str | torch.device) -> TextEncoders:
    """The text encoders of a diffusers folder alone. UserError as `load_diffusers`, or it takes no prompts."""
    index = read_config(path / INDEX)
    if CLASSES.get(str(index.get("_class_name")), DDPM) is DDPM:
        raise UserError(f"{path} holds no model that takes prompts")
    with quiet():
        return _text(Components(path, index, torch.device(device).type == "meta"), origin, device)


def _text(folder: Components, origin: str, device: str | torch.device) -> TextEncoders:
    if (found := kept_text(origin, device)) is not None:
        return found
    if CLASSES[folder.index["_class_name"]] is SD3:
        encoders, tokenizers = folder.text(("", "_2", "_3") if folder.has("text_encoder_3") else ("", "_2"))
        if len(encoders) == 2:
            encoders, tokenizers = [*encoders, None], [*tokenizers, None]
        width = folder.config("transformer").get("joint_attention_dim", 4096)
        return clip_and_t5_text(origin, encoders, tokenizers, width, device)
    xl = folder.index["_class_name"] == "StableDiffusionXLPipeline"
    return clip_text(origin, *folder.text(("", "_2") if xl else ("",)), device)


def _stable_diffusion_3(
    folder: Components,
    name: str,
    device: str | torch.device,
    dtype: torch.dtype | None,
    licence: str,
    origin: str,
    space: str,
) -> StableDiffusion3Teacher:
    config = folder.scheduler
    check_numbers(
        {key: value for key, value in config.items() if not key.startswith("_")},
        f"{folder.path / 'scheduler/scheduler_config.json'}",
    )
    if config["_class_name"] != "FlowMatchEulerDiscreteScheduler":
        raise UserError(
            f"{folder.path}: Stable Diffusion 3 with scheduler {config['_class_name']}; expected"
            " FlowMatchEulerDiscreteScheduler"
        )
    for key in (
        "use_dynamic_shifting",
        "shift_terminal",
        "use_karras_sigmas",
        "use_exponential_sigmas",
        "use_beta_sigmas",
        "invert_sigmas",
    ):
        if config.get(key):
            raise UserError(f"{folder.path}: its scheduler has {key} {config[key]!r}, which d2o does not support")
    try:
        schedule = FlowSchedule(float(config.get("shift", 1.0)), int(config.get("num_train_timesteps", 1000)))
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder.path}: the numbers in scheduler_config.json make no schedule ({error})") from error
    text, transformer = _text(folder, origin, device), folder.model("transformer")
    if transformer.config.in_channels != transformer.config.out_channels:
        raise UserError(
            f"{folder.path}: a transformer with {transformer.config.in_channels} input channels; inpainting ones are no"
            " teachers"
        )
    spec = Spec(name, _shape(folder, transformer), condition="text", licence=licence, solver="euler", steps=28)
    latents = kept_space(space, device) or LatentSpace.of(space, folder.model("vae"), device)
    return StableDiffusion3Teacher(transformer, latents, text, schedule, spec, device, dtype)


def _unet2d(
    folder: Components, name: str, device: str | torch.device, dtype: torch.dtype | None, licence: str
) -> UNet2DTeacher:
    schedule, prediction, clip = discrete_schedule(folder)
    config = folder.config("unet")
    if config.get("time_embedding_type", "positional") != "positional" or config.get("class_embed_type") is not None:
        raise UserError(
            f"{folder.path}: its UNet embeds"
            f" {'continuous time' if config.get('class_embed_type') is None else 'continuous labels'}, which d2o does"
            " not support"
        )
    unet = folder.model("unet")
    classes = unet.config.num_class_embeds or 0
    condition = "label" if classes else "none"
    spec = Spec(
        name, _shape(folder, unet), condition=condition, classes=classes, licence=licence, solver="ddim", steps=50
    )
    return UNet2DTeacher(unet, schedule, spec, device, dtype, prediction=prediction, clip=clip)


def _shape(folder: Components, network: ModelMixin) -> tuple[int, int, int]:
    size = network.config.sample_size
    sizes = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    if len(sizes) != 2 or not all(isinstance(side, int) and side > 0 for side in sizes):
        raise UserError(
            f"{folder.path}: the network's config.json has no sample_size",
            "add it: the size of its input, 64 for SD 1.5",
        )
    return network.config.in_channels, sizes[0], sizes[1]


def discrete_schedule(folder: Components) -> tuple[DiscreteSchedule, str, float | None]:
    """(schedule, prediction type, clipping range or None) of the folder's scheduler, whichever of the known ones it is.

    They are those of DDIMScheduler.from_config(that scheduler's config), but for one thing: only DDIM and DDPM clip
    where the config is silent.
    UserError: another scheduler, or an option that changes the noise levels or the prediction in another way.
    """
    config = folder.scheduler
    kind = config["_class_name"]
    if kind not in BETA_SCHEDULERS:
        raise UserError(f"{folder.path}: scheduler {kind} is not supported", f"known: {', '.join(BETA_SCHEDULERS)}")
    for key in ("thresholding", "use_flow_sigmas"):
        if config.get(key):
            raise UserError(f"{folder.path}: its scheduler has {key}, which d2o does not support")
    if config.get("timestep_spacing", "leading") not in SPACINGS:
        raise UserError(
            f"{folder.path}: its scheduler has timestep_spacing {config['timestep_spacing']!r}",
            f"known: {', '.join(SPACINGS)}",
        )
    check_numbers(
        {key: value for key, value in config.items() if not key.startswith("_")},
        f"{folder.path / 'scheduler/scheduler_config.json'}",
    )
    clips = config.get("clip_sample", kind in CLIPPING)
    try:
        schedule = DiscreteSchedule.from_config(config)
        clip = float(config.get("clip_sample_range", 1.0)) if clips else None
        if (prediction := config.get("prediction_type", "epsilon")) not in PREDICTIONS:
            raise unknown("prediction_type", str(prediction)[:40], PREDICTIONS)
    except UserError as error:
        raise UserError(f"{folder.path / 'scheduler/scheduler_config.json'}: {error.message}", error.hint) from error
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder.path}: the numbers in scheduler_config.json make no schedule ({error})") from error
    return schedule, prediction, clip
