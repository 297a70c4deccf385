"""The parts of a diffusers pipeline, written one by one."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor

from d2o.export.folder import save_part
from d2o.interop.safetensors_io import atomic_write

T = TypeVar("T")
if TYPE_CHECKING:
    from diffusers import AutoencoderKL, ModelMixin
    from transformers import PreTrainedModel

NONE = [None, None]
TEXT_PIPELINES: dict[str, dict[str, bool | list[None]]] = {
    "StableDiffusionPipeline": {
        "feature_extractor": NONE,
        "image_encoder": NONE,
        "requires_safety_checker": False,
        "safety_checker": NONE,
    },
    "StableDiffusionXLPipeline": {
        "feature_extractor": NONE,
        "force_zeros_for_empty_prompt": True,
        "image_encoder": NONE,
    },
    "StableDiffusion3Pipeline": {
        "feature_extractor": NONE,
        "image_encoder": NONE,
        "text_encoder_3": NONE,
        "tokenizer_3": NONE,
    },
}
"""Pipeline -> what its model_index.json says of parts that are not there."""


def write_index(folder: Path, pipeline: str, parts: Mapping[str, object]) -> None:
    """model_index.json; `parts`: the component of each name (of `transformers` if it has a vocabulary)."""
    import diffusers

    def named(part: object) -> list[str]:
        library = type(part).__module__.partition(".")[0]
        return [library if library in ("diffusers", "transformers") else "diffusers", type(part).__name__]

    index = {"_class_name": pipeline, "_diffusers_version": diffusers.__version__}
    index |= {**TEXT_PIPELINES.get(pipeline, {}), **{name: named(part) for name, part in parts.items()}}
    atomic_write(folder / "model_index.json", json.dumps(index, indent=2, sort_keys=True) + "\n")


def write_network(network: ModelMixin, folder: Path, dtype: str) -> None:
    """A network of diffusers', weights in `dtype`. UserError: values that `dtype` cannot hold."""
    network.save_config(folder)
    save_part(network.state_dict(), folder / "diffusion_pytorch_model.safetensors", dtype)


def write_text_encoder(encoder: PreTrainedModel, folder: Path, dtype: str) -> None:
    """A text encoder of transformers'. UserError as `write_network`."""
    kind = type(encoder).__name__
    config = {**json.loads(encoder.config.to_json_string(use_diff=True)), "architectures": [kind]}
    config = {key: value for key, value in config.items() if key not in ("dtype", "_name_or_path")}
    # Else transformers 5 keeps what is on disk, while diffusers makes float32 of the other parts.
    config["torch_dtype"] = "float32"
    atomic_write(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    save_part(published_names(encoder), folder / "model.safetensors", dtype)


def published_names(encoder: PreTrainedModel) -> dict[str, Tensor]:
    """A text encoder's weights by the names that all published CLIPs have; transformers 5 leaves `text_model.` away but
    reads it."""
    named: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in encoder.state_dict().items():
        if not tensor.is_floating_point() or tensor.data_ptr() in seen:  # T5 has its table of words twice
            continue
        seen.add(tensor.data_ptr())
        inside = type(encoder).__name__.startswith("CLIP") and not name.startswith("text_projection.")
        named["text_model." + name.removeprefix("text_model.") if inside else name] = tensor
    return named


def numbered(name: str, parts: Sequence[T | None]) -> dict[str, T]:
    """text_encoder, text_encoder_2, ... of those that are there."""
    return {f"{name}_{i + 1}" if i else name: part for i, part in enumerate(parts) if part is not None}


def rescaled(vae: AutoencoderKL, scale: float) -> AutoencoderKL:
    """The autoencoder for latents that come over `scale`."""
    if scale == 1:
        return vae
    other = copy.deepcopy(vae)
    other.register_to_config(scaling_factor=vae.config.scaling_factor / scale)
    return other
