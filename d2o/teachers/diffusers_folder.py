"""Teachers from a folder in diffusers' format: model_index.json and one folder per component. No code from the folder is run."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from d2o.diffusion.schedules import SPACINGS, DiscreteSchedule, FlowSchedule
from d2o.errors import UserError
from d2o.interop import torchvision_compat
from d2o.teachers.base import Spec, Teacher
from d2o.teachers.flow import StableDiffusion3Teacher
from d2o.teachers.stable_diffusion import StableDiffusionTeacher
from d2o.teachers.unconditional import UNet2DTeacher

INDEX = "model_index.json"
TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
Classes = dict[str, tuple[str, ...]]
SD: Classes = {"unet": ("UNet2DConditionModel",), "vae": ("AutoencoderKL",), "text_encoder": ("CLIPTextModel",), "tokenizer": TOKENIZERS}
XL: Classes = {**SD, "text_encoder_2": ("CLIPTextModelWithProjection",), "tokenizer_2": TOKENIZERS}
SD3: Classes = {
    "transformer": ("SD3Transformer2DModel",), "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModelWithProjection",), "text_encoder_2": ("CLIPTextModelWithProjection",), "text_encoder_3": ("T5EncoderModel",),
    "tokenizer": TOKENIZERS, "tokenizer_2": TOKENIZERS, "tokenizer_3": ("T5Tokenizer", "T5TokenizerFast"),
}  # fmt: skip
DDPM: Classes = {"unet": ("UNet2DModel",)}
CLASSES = {
    "StableDiffusionPipeline": SD, "StableDiffusionXLPipeline": XL, "StableDiffusion3Pipeline": SD3,
    "DDPMPipeline": DDPM, "DDIMPipeline": DDPM, "PNDMPipeline": DDPM,
}  # fmt: skip
"""Pipeline -> component -> the classes that it may have."""
BETA_SCHEDULERS = (
    "DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "LMSDiscreteScheduler",
    "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler",
)  # fmt: skip
"""Schedulers that state the betas of a discrete schedule. Which of them a folder has matters for nothing else: d2o has its own solvers."""
CLIPPING = ("DDIMScheduler", "DDPMScheduler")
NOT_TEACHERS = {
    "Inpaint": "it fills in images", "Img2Img": "it starts from images", "ControlNet": "it needs control images", "Upscale": "it enlarges images",
    "Pix2Pix": "it edits images", "LatentConsistency": "it is distilled already", "Onnx": "its network is ONNX",
    "LDMPipeline": "latents of a VQ autoencoder are not supported", "ScoreSdeVe": "its network has continuous time",
}  # fmt: skip
WEIGHTS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}


def is_diffusers_folder(path: str | Path) -> bool:
    """True for a folder with a model_index.json."""
    return (Path(path) / INDEX).is_file()


def load_diffusers(
    path: str | Path, name: str, device: str | torch.device = "cpu", dtype: torch.dtype | None = None, *, licence: str = "unstated",
    sdxl_uncond: str | None = None,
) -> Teacher:  # fmt: skip
    """The teacher in a diffusers folder (or hub snapshot): Stable Diffusion 1, 2, XL and 3, or DDPM's UNets in pixel space.

    Weights come from safetensors files only and are held in float32; `dtype` bfloat16 or float16 computes under autocast. `sdxl_uncond`
    as for `StableDiffusionTeacher` (by default as the folder says). UserError: another kind of pipeline, a class
    that d2o does not know, a component that is missing, damaged or has no safetensors file, a scheduler that d2o does not have.
    """
    path = Path(path)
    index = read_json(path / INDEX)
    kind = index.get("_class_name")
    if not isinstance(kind, str) or kind not in CLASSES:
        why = next((why for word, why in NOT_TEACHERS.items() if word in str(kind)), None)
        hint = f"known pipelines: {', '.join(CLASSES)}"
        raise UserError(f"{path} holds a {kind if isinstance(kind, str) else 'pipeline with code of its own'}" + (f": {why}" if why else ""), hint)
    folder = Folder(path, index)
    with quiet():
        teacher: Teacher
        if CLASSES[kind] is DDPM:
            teacher = _unet2d(folder, name, device, dtype, licence)
        elif CLASSES[kind] is SD3:
            teacher = _stable_diffusion_3(folder, name, device, dtype, licence)
        else:
            teacher = _stable_diffusion(folder, name, device, dtype, licence, sdxl_uncond)
    teacher.meta = {"format": "diffusers", "kind": "teacher", "pipeline": kind, "scheduler": folder.scheduler, "spec": teacher.spec.to_dict()}
    return teacher


def _stable_diffusion(
    folder: Folder, name: str, device: Any, dtype: torch.dtype | None, licence: str, sdxl_uncond: str | None
) -> StableDiffusionTeacher:
    xl = folder.index["_class_name"] == "StableDiffusionXLPipeline"
    suffixes = ("", "_2") if xl else ("",)
    schedule, prediction, clip = discrete_schedule(folder)
    if clip is not None:
        raise UserError(f"{folder.path}: its scheduler clips the prediction to [-{clip:g}, {clip:g}], which makes no sense for latents",
                        "set clip_sample to false in scheduler/scheduler_config.json")  # fmt: skip
    config = folder.config("unet")
    if config.get("in_channels", 4) != config.get("out_channels", 4):
        raise UserError(f"{folder.path}: a UNet with {config['in_channels']} input channels; inpainting and editing UNets are no teachers")
    for key, why in (("class_embed_type", "classes"), ("num_class_embeds", "classes"), ("time_cond_proj_dim", "the guidance scale (LCM)"),
                     ("encoder_hid_dim_type", "projected text or images")):  # fmt: skip
        if config.get(key) is not None:
            raise UserError(f"{folder.path}: its UNet takes {why} as an input ({key} {config[key]!r}), which d2o does not support")
    if xl and config.get("addition_embed_type") == "text_time" and config.get("projection_class_embeddings_input_dim") == 2560:
        raise UserError(f"{folder.path} holds SDXL's refiner, which improves images and makes none", "the teacher is stable-diffusion-xl-base-1.0")
    uncond = sdxl_uncond or ("zeros" if folder.index.get("force_zeros_for_empty_prompt", True) else "encode_empty")
    encoders, tokenizers = folder.text(suffixes)
    unet, vae = folder.model("unet"), folder.vae()
    spec = Spec(name, _shape(folder, unet), space="latent", condition="text", licence=licence, solver="ddim", steps=50)
    return StableDiffusionTeacher(
        unet, vae, encoders, tokenizers, schedule, spec, device, dtype, prediction=prediction, scaling_factor=vae.config.scaling_factor,
        shift_factor=vae.config.shift_factor or 0.0, sdxl_uncond=uncond,
    )  # fmt: skip


def _stable_diffusion_3(folder: Folder, name: str, device: Any, dtype: torch.dtype | None, licence: str) -> StableDiffusion3Teacher:
    config = folder.scheduler
    if config["_class_name"] != "FlowMatchEulerDiscreteScheduler":
        raise UserError(f"{folder.path}: Stable Diffusion 3 with scheduler {config['_class_name']}; expected FlowMatchEulerDiscreteScheduler")
    for key in ("use_dynamic_shifting", "shift_terminal", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas"):
        if config.get(key):
            raise UserError(f"{folder.path}: its scheduler has {key} {config[key]!r}, which d2o does not support")
    schedule = FlowSchedule(float(config.get("shift", 1.0)), config.get("num_train_timesteps", 1000))
    encoders, tokenizers = folder.text(("", "_2", "_3") if folder.has("text_encoder_3") else ("", "_2"))
    if len(encoders) == 2:
        encoders, tokenizers = [*encoders, None], [*tokenizers, None]
    transformer, vae = folder.model("transformer"), folder.vae()
    if transformer.config.in_channels != transformer.config.out_channels:
        raise UserError(f"{folder.path}: a transformer with {transformer.config.in_channels} input channels; inpainting ones are no teachers")
    spec = Spec(name, _shape(folder, transformer), space="latent", condition="text", licence=licence, solver="euler", steps=28)
    return StableDiffusion3Teacher(
        transformer, vae, encoders, tokenizers, schedule, spec, device, dtype, scaling_factor=vae.config.scaling_factor,
        shift_factor=vae.config.shift_factor or 0.0,
    )  # fmt: skip


def _unet2d(folder: Folder, name: str, device: Any, dtype: torch.dtype | None, licence: str) -> UNet2DTeacher:
    schedule, prediction, clip = discrete_schedule(folder)
    config = folder.config("unet")
    if config.get("time_embedding_type", "positional") != "positional" or config.get("class_embed_type") is not None:
        raise UserError(f"{folder.path}: its UNet embeds {'continuous time' if config.get('class_embed_type') is None else 'continuous labels'}, "
                        "which d2o does not support")  # fmt: skip
    unet = folder.model("unet")
    classes = unet.config.num_class_embeds or 0
    condition = "label" if classes else "none"
    spec = Spec(name, _shape(folder, unet), condition=condition, classes=classes, licence=licence, solver="ddim", steps=50)
    return UNet2DTeacher(unet, schedule, spec, device, dtype, prediction=prediction, clip=clip)


def _shape(folder: Folder, network: Any) -> tuple[int, int, int]:
    size = network.config.sample_size
    height, width = (size, size) if isinstance(size, int) else tuple(size or (0, 0))
    if not height or not width:
        raise UserError(f"{folder.path}: the network's config.json has no sample_size", "add it: the size of its input, 64 for SD 1.5")
    return network.config.in_channels, height, width


def discrete_schedule(folder: Folder) -> tuple[DiscreteSchedule, str, float | None]:
    """(schedule, prediction type, clipping range or None) of the folder's scheduler, whichever of the known ones it is.

    They are those of DDIMScheduler.from_config(that scheduler's config), but for one thing: only DDIM and DDPM clip where the config is silent.
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
        raise UserError(f"{folder.path}: its scheduler has timestep_spacing {config['timestep_spacing']!r}", f"known: {', '.join(SPACINGS)}")
    try:
        schedule = DiscreteSchedule.from_config(config)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder.path}: the numbers in scheduler_config.json make no schedule ({error})") from error
    clips = config.get("clip_sample", kind in CLIPPING)
    return schedule, config.get("prediction_type", "epsilon"), float(config.get("clip_sample_range", 1.0)) if clips else None


class Folder:
    """The components of a diffusers folder. Only those that a family asks for are looked at, and only known classes are made."""

    def __init__(self, path: Path, index: dict[str, Any]):
        self.path, self.index = path, index
        for key in index:
            if "/" in key or "\\" in key or ".." in key:
                raise UserError(f"{path / INDEX} names a component {key!r}, which leads out of the folder", "get the folder from somewhere else")
        scheduler = self.file("scheduler", "scheduler_config.json")
        self.scheduler = read_json(scheduler)
        if not isinstance(self.scheduler.get("_class_name"), str):
            raise UserError(f"{scheduler} does not say which scheduler it is (_class_name)")

    def has(self, component: str) -> bool:
        entry = self.index.get(component)
        return isinstance(entry, list) and len(entry) == 2 and entry[1] is not None

    def class_name(self, component: str) -> tuple[str, str]:
        """(library, class) of a component. UserError: missing, or not one of those that it may be."""
        if not self.has(component):
            raise UserError(f"{self.path} has no {component} (it is not in {INDEX})", "download the whole repository")
        library, kind = self.index[component]
        known = CLASSES[self.index["_class_name"]][component]
        wanted = "diffusers" if component in ("unet", "transformer", "vae") else "transformers"
        if library != wanted or kind not in known:
            raise UserError(f"{self.path}: {component} is a {library}.{kind}, which d2o does not load", f"known: {', '.join(known)} of {wanted}")
        return library, kind

    def where(self, component: str) -> Path:
        """Its folder; the oldest repositories keep their only network at the top."""
        return self.path / component if (self.path / component).is_dir() else self.path

    def file(self, component: str, name: str) -> Path:
        file = self.where(component) / name
        if not file.is_file():
            raise UserError(f"{self.path} has no {component} ({component}/{name} is missing)", "download the whole repository")
        return file

    def config(self, component: str) -> dict[str, Any]:
        return read_json(self.file(component, "config.json"))

    def model(self, component: str) -> Any:
        """A network with its weights, float32. UserError as `load_diffusers`."""
        import diffusers
        import transformers

        library, kind = self.class_name(component)
        self.config(component)
        where = self.where(component)
        options = {"use_safetensors": True, "variant": variant(where, WEIGHTS[library]), "local_files_only": True, "output_loading_info": True}
        if library == "diffusers":
            options["low_cpu_mem_usage"] = False  # the other way needs a package that d2o does not, and has no word for missing weights
        try:
            model, info = getattr(diffusers if library == "diffusers" else transformers, kind).from_pretrained(where, **options)
        except Exception as error:  # whatever a damaged file makes these libraries raise
            raise UserError(f"{where} cannot be loaded as a {kind}: {_words(error)}", "check the download") from error
        wrong = sorted({*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])})
        if wrong:
            raise UserError(f"{where}: the weights do not fit config.json ({len(wrong)} missing or of another size, {wrong[0]} first)")
        return model.float()

    def text(self, suffixes: Sequence[str]) -> tuple[list[Any], list[Any]]:
        """Text encoders and their tokenizers. UserError as `model`, and a tokenizer with words that its encoder does not know."""
        encoders, tokenizers = [self.model(f"text_encoder{s}") for s in suffixes], [self.tokenizer(f"tokenizer{s}") for s in suffixes]
        for suffix, encoder, tokenizer in zip(suffixes, encoders, tokenizers, strict=True):
            words, known = len(tokenizer), encoder.config.vocab_size
            if words > known:
                raise UserError(f"{self.path}: tokenizer{suffix} has {words} words, but text_encoder{suffix} knows {known}", "check the download")
        return encoders, tokenizers

    def vae(self) -> Any:
        vae = self.model("vae")
        if getattr(vae.config, "latents_mean", None) is not None or getattr(vae.config, "latents_std", None) is not None:
            raise UserError(f"{self.path}: its autoencoder scales latents per channel (latents_mean), which d2o does not support")
        return vae

    def tokenizer(self, component: str) -> Any:
        import transformers

        _, kind = self.class_name(component)
        where = self.path / component
        # Without its files, transformers makes a tokenizer that knows no words.
        if not any((where / name).is_file() for name in ("tokenizer.json", "vocab.json", "spiece.model")):
            raise UserError(f"{self.path} has no {component} ({component}/tokenizer.json or vocab.json is missing)", "download the whole repository")
        try:
            return getattr(transformers, kind).from_pretrained(where, local_files_only=True)
        except Exception as error:
            raise UserError(f"{where} cannot be loaded as a {kind}: {_words(error)}", "check the download") from error


def variant(folder: Path, stem: str) -> str | None:
    """None for weights in full precision, "fp16" where a folder has only those. UserError: only pickles, or no weights at all."""
    for choice, files in (
        (None, (f"{stem}.safetensors", f"{stem}.safetensors.index.json")),
        ("fp16", (f"{stem}.fp16.safetensors", f"{stem}.safetensors.index.fp16.json", f"{stem}.fp16.safetensors.index.json")),
    ):
        for name in files:
            if not (folder / name).is_file():
                continue
            if name.endswith(".json"):
                parts = read_json(folder / name).get("weight_map", {})
                if not isinstance(parts, dict) or any("/" in str(part) or "\\" in str(part) for part in parts.values()):
                    raise UserError(f"{folder / name} names weights outside of the folder", "get the folder from somewhere else")
            return choice
    if any(folder.glob("*.bin")):
        raise UserError(f"{folder} has its weights only as a pickle (.bin), which can run code; d2o reads safetensors",
                        "get the repository's .safetensors files, or convert it with diffusers' save_pretrained")  # fmt: skip
    raise UserError(f"{folder} has no weights ({stem}.safetensors)", "download the whole repository")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. UserError: missing, damaged, or something else."""
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: not JSON ({_words(error)})", "check the download") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: not a JSON object", "check the download")
    return found


def _words(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines()]
    return " ".join(lines[:2])[:250] or type(error).__name__


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """diffusers and transformers say nothing, and draw no bars, while they load."""
    torchvision_compat.ensure()
    import diffusers
    import transformers

    logs = (diffusers.utils.logging, transformers.utils.logging)
    before = [log.get_verbosity() for log in logs]
    bars = [log.is_progress_bar_enabled() if hasattr(log, "is_progress_bar_enabled") else True for log in logs]
    for log in logs:
        log.set_verbosity_error()
        log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level, bar in zip(logs, before, bars, strict=True):
            log.set_verbosity(level)
            if bar:
                log.enable_progress_bar()
