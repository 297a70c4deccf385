"""CLIP: its image embeddings for CLIP-FID (Kynkäänniemi et al. 2023, as clean-fid computes it), and the network for the
CLIP score."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from d2o.errors import unknown
from d2o.features.base import Features, placed
from d2o.features.common import bicubic, filled, fit, normalise, package, token_map, watch
from d2o.interop.safetensors_io import file_sha256
from d2o.interop.torch_files import read_tensors
from d2o.interop.weights import find_weights
from d2o.networks.config import Config

if TYPE_CHECKING:
    from open_clip import CLIP

MODELS = {"clip-vit-b-32": "ViT-B-32-quickgelu", "clip-vit-g-14": "ViT-g-14"}
"""open_clip's name of the network behind each of ours. OpenAI's weights need the "quick" GELU that they were trained
with."""
NAMES = (*MODELS, "clip")
""""clip" is "clip-vit-b-32", in short."""
SIZE = 224
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PUBLISHED = {
    "clip-vit-b-32": "OpenAI's ViT-B-32.pt",
    "clip-vit-g-14": "LAION's CLIP-ViT-g-14-laion2B-s12B-b42K (.bin or .safetensors)",
}
NO_WEIGHTS = (
    "input_resolution",
    "context_length",
    "vocab_size",
    "attn_mask",
)  # constants that TorchScript stores beside them


class ClipFeatures(Features):
    """Vector: the image embedding after the projection, not normalised, as clean-fid has it (in half precision on a
    GPU; this computes in single precision). Maps: the tokens of places after a quarter, a half, three quarters and all
    of the blocks. Images: short side to 224, torch's bicubic with antialiasing, central square; the
    published numbers have Pillow's instead, rounded (the evaluation's extractors)."""

    network: CLIP

    def __init__(self, name: str, network: CLIP, sha256: str = ""):
        super().__init__(name, network, network.visual.output_dim, sha256, resize=f"bicubic{SIZE}+center_crop")

    def from_pixels(self, pixels: Tensor) -> Tensor:
        height, width = pixels.shape[2:]
        short = min(height, width)
        x = bicubic(pixels, (SIZE * height // short, SIZE * width // short))
        top, left = (round((side - SIZE) / 2) for side in x.shape[2:])
        return normalise(x[:, :, top : top + SIZE, left : left + SIZE], MEAN, STD)

    def taps(self, x: Tensor) -> list[Tensor]:
        transformer = self.network.visual.transformer
        tokens = watch(transformer.resblocks, lambda: self.network.encode_image(x))
        if not getattr(transformer, "batch_first", False):  # older releases of open_clip
            tokens = [t.transpose(0, 1) for t in tokens]
        return [token_map(t, 1) for t in tokens]

    def outputs(self, x: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        return {"features": self.network.encode_image(x)}


def load(name: str, weights: Path | None = None, device: str | torch.device = "cpu") -> Features:
    """The features `name` with the weights in `weights`, else those that `find_weights` has.

    UserError: unknown name; no weights to be had; a file of another network; open_clip is not installed.
    """
    name = full_name(name)
    network, sha256 = filled(name, lambda: build_clip(configuration(name)), partial(read_clip, name), weights, device)
    return placed(ClipFeatures(name, network, sha256), device)


def load_clip(name: str, weights: Path | None = None) -> tuple[CLIP, str]:
    """open_clip's network of both towers on the CPU, frozen, in single precision, and the sha256 of its file. Errors as
    `load`."""
    name = full_name(name)
    package("open_clip")  # before a file of gigabytes is fetched
    path = find_weights(name, weights)
    return read_clip(name, path), file_sha256(path)


def full_name(name: str) -> str:
    """The name in MODELS. UserError: not one of NAMES."""
    if name not in NAMES:
        raise unknown("CLIP network", name, NAMES)
    return "clip-vit-b-32" if name == "clip" else name


def tokenizer() -> Callable[[list[str], int], Tensor]:
    """OpenAI's byte-pair encoding, which open_clip brings: (texts, length) -> token ids [n, length]."""
    return package("open_clip.tokenizer").SimpleTokenizer()


def read_clip(name: str, path: Path) -> CLIP:
    """The network with the weights of OpenAI's TorchScript file or of open_clip's .bin or .safetensors. UserError: as
    `load`."""
    name = full_name(name)
    tensors = {plain_name(key): tensor for key, tensor in read_tensors(path).items()}
    tensors = {
        key: tensor for key, tensor in tensors.items() if key not in NO_WEIGHTS and not key.endswith(".attn_mask")
    }
    hint = f"expected {PUBLISHED[name]}; without --weights {name}=PATH, d2o finds or fetches it"
    with torch.device("meta"):
        network = build_clip(configuration(name))
    network = fit(network, tensors, path, f"the CLIP network {name}", hint)
    # The one thing in the network that is in no file: each word of a text sees those before it.
    length = network.context_length
    network.attn_mask = torch.full((length, length), -torch.inf).triu_(1)
    return network


def plain_name(name: str) -> str:
    """Without what open_clip's training puts before the names."""
    return name.removeprefix("state_dict.").removeprefix("module.")


def configuration(name: str) -> Config:
    """open_clip's description of the network."""
    return package("open_clip").get_model_config(MODELS[name])


def build_clip(config: Config) -> CLIP:
    """open_clip's network of a configuration, untrained."""
    return package("open_clip").CLIP(**config)
