"""DreamSim's ensemble (Fu et al. 2023): three vision transformers with low-rank adapters, whose joint embedding is
close where people see likeness.

The transformers are the classes of the package `dreamsim`; the weights are read from the released files, never fetched
by the package.
"""

from __future__ import annotations

import re
import tempfile
import zipfile
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from d2o.errors import UserError
from d2o.features import clip
from d2o.features.base import Features, placed
from d2o.features.common import IMAGENET_MEAN, IMAGENET_STD, bicubic, standardise, token_map, watch
from d2o.inputs import check_unpacked, json_object, read_json
from d2o.interop import torchvision_compat
from d2o.interop.npz import DAMAGED
from d2o.interop.safetensors_io import tensors_sha256
from d2o.interop.torch_files import read_tensors
from d2o.interop.weights import WEIGHTS, find_weights
from d2o.networks.fill import fill_network

if TYPE_CHECKING:
    from dreamsim.feature_extraction.vision_transformer import VisionTransformer

NAMES = ("dreamsim",)

SIZE = 224
CLIP, OPEN_CLIP, ADAPTER = "clip_vitb16_pretrain.pth.tar", "open_clip_vitb16_pretrain.pth.tar", "ensemble_lora"
DINO = WEIGHTS["dreamsim-dino"].file
HINT = f"expected {WEIGHTS['dreamsim'].file} of DreamSim's release v0.2.0-checkpoints, or the folder it was unpacked to"

IMAGENET = IMAGENET_MEAN, IMAGENET_STD
OPENAI = clip.MEAN, clip.STD
"""Mean and deviation of the pixels in [0, 1] that each transformer was trained with."""


class Ensemble(nn.Module):
    """DINO's class token after the last block, CLIP's and OpenCLIP's image embeddings, one after another; not
    normalised."""

    def __init__(
        self,
        dino: VisionTransformer,
        clip: VisionTransformer,
        open_clip: VisionTransformer,
        *,
        projections: list[Tensor],
    ):
        """The three transformers, and the projections [width, embedding] of the last two."""
        super().__init__()
        self.dino, self.clip, self.open_clip = dino, clip, open_clip
        self.projections = nn.ParameterList(projections)
        self.dim = dino.embed_dim + sum(p.shape[1] for p in projections)

    def forward(self, x: Tensor) -> Tensor:
        """Images [n, 3, 224, 224] in [0, 1] -> [n, dim]."""
        tokens = self.dino.prepare_tokens(standardise(x, *IMAGENET))
        for block in self.dino.blocks:
            tokens = block(tokens)
        x = standardise(x, *OPENAI)
        return torch.cat(
            [tokens[:, 0], self.clip(x) @ self.projections[0], self.open_clip(x) @ self.projections[1]], dim=1
        )


class DreamSim(Features):
    """Vector: the ensemble's embedding less its own mean over the dimensions, of length one; 1 - cosine is the DreamSim
    distance. Maps: the tokens of places after the last block of each of the three, 14 x 14. Images: torch's bicubic to
    224 x 224 with antialiasing; in the published numbers it is Pillow's (the evaluation's extractor)."""

    network: Ensemble

    def __init__(self, ensemble: Ensemble, sha256: str = ""):
        super().__init__("dreamsim", ensemble, ensemble.dim, sha256, resize=f"bicubic{SIZE}")

    def from_pixels(self, pixels: Tensor) -> Tensor:
        return bicubic(pixels, SIZE) / 255

    def taps(self, x: Tensor) -> list[Tensor]:
        ensemble = self.network
        last = [part.blocks[-1:] for part in (ensemble.dino, ensemble.clip, ensemble.open_clip)]
        tokens = watch([block for blocks in last for block in blocks], lambda: ensemble(x))
        return [token_map(t, 1) for t in tokens]

    def outputs(self, x: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        return {"features": centred_unit(self.network(x))}


def centred_unit(x: Tensor) -> Tensor:
    """Embeddings [n, D] less the mean of each, then of length one, as the package's later releases have it. (Its first
    one had the two steps the other way round; the cosine of a pair is the same.)"""
    x = x - x.mean(1, keepdim=True)
    return x / x.norm(dim=1, keepdim=True)


def load(name: str, weights: Path | None = None, device: str | torch.device = "cpu") -> Features:
    """The features "dreamsim" from the release's archive or the folder it was unpacked to (the package's `cache_dir`).

    DINO's own weights are not in the archive: they are looked for beside it, in the folder, and where `find_weights`
    looks. `sha256` is that of all tensors, so it does not tell the archive from the folder. UserError: a file is
    missing, damaged or another network's; the package `dreamsim` is not installed.
    """
    path = weights if weights is not None and weights.is_dir() else find_weights("dreamsim", weights)
    dino = _find_dino(path)
    if path.is_dir():
        return _load(path, dino, device)
    with tempfile.TemporaryDirectory() as folder:
        _unpack(path, Path(folder))
        return _load(Path(folder), dino, device)


def _find_dino(path: Path) -> Path:
    """In the folder or beside the archive; in its `checkpoints`, where torch.hub puts it for the package; else as any
    other weights."""
    folder = path if path.is_dir() else path.parent
    for place in (folder / DINO, folder / "checkpoints" / DINO):
        if place.is_file():
            return place
    try:
        return find_weights("dreamsim-dino")
    except UserError as error:
        hint = f"fetch {WEIGHTS['dreamsim-dino'].url} by other means and put it at {folder / DINO}"
        raise UserError(f"DreamSim also needs the weights of DINO: {error.message}", hint) from error


def _unpack(path: Path, folder: Path) -> None:
    """What is read of the archive, under its names. UserError: no such archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                if member in (CLIP, OPEN_CLIP) or re.fullmatch(
                    rf"{ADAPTER}/adapter_(config\.json|model\.(safetensors|bin))", member
                ):
                    info = archive.getinfo(member)
                    check_unpacked(member, info.file_size, info.compress_size)
                    archive.extract(member, folder)
    except DAMAGED as error:
        raise UserError(f"{path} is truncated or no zip archive ({error})", HINT) from error


def _load(folder: Path, dino: Path, device: str | torch.device) -> Features:
    files = {"dino": dino, "clip": folder / CLIP, "open_clip": folder / OPEN_CLIP}
    if missing := [file.name for file in files.values() if not file.is_file()]:
        raise UserError(f"the weights of DreamSim lack {', '.join(missing)}", HINT)
    adapter, scale = read_adapter(folder / ADAPTER)
    source = {f"adapter.{name}": value for name, value in adapter.items()} | {"adapter.scale": torch.tensor(scale)}
    networks, projections = [], []
    for i, (kind, file) in enumerate(files.items()):
        tensors = read_tensors(file) if kind == "dino" else _state(read_tensors(file), file)
        source |= {f"{kind}.{name}": value for name, value in tensors.items()}
        if kind != "dino":
            projections.append(tensors.pop("proj").float())
        networks.append(build_trunk(kind, tensors, file))
        merge_adapter(networks[i], adapter, f"extractor_list.{i}.model.", scale)
    if adapter:
        raise UserError(
            f"{ADAPTER} of DreamSim's weights adapts what the ensemble does not have: {next(iter(adapter))}", HINT
        )
    ensemble = Ensemble(*networks, projections=projections).requires_grad_(False)
    return placed(DreamSim(ensemble, tensors_sha256(source)), device)


def _state(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    found = {
        name.removeprefix("state_dict."): value for name, value in tensors.items() if name.startswith("state_dict.")
    }
    if found.get("proj", torch.zeros(0)).ndim != 2:
        raise UserError(f"{path.name} of DreamSim's weights holds no image encoder with a projection", HINT)
    return found


def build_trunk(kind: str, tensors: dict[str, Tensor], path: Path) -> VisionTransformer:
    """The package's `VisionTransformer` of the sizes that `tensors` have, with heads of 64. `kind`: "dino", "clip" or
    "open_clip".

    UserError: the package is missing, or `tensors` are not those of such a network.
    """
    torchvision_compat.ensure()
    try:
        from dreamsim.feature_extraction.load_clip_as_dino import QuickGELU
        from dreamsim.feature_extraction.vision_transformer import VisionTransformer
    except ImportError as error:
        raise UserError(f"DreamSim needs the package dreamsim ({error})", "pip install dreamsim") from error
    patches, position = tensors.get("patch_embed.proj.weight"), tensors.get("pos_embed")
    tokens = 0 if position is None or position.ndim != 3 else position.shape[1]
    if patches is None or patches.ndim != 4 or tokens != (SIZE // patches.shape[2]) ** 2 + 1 or patches.shape[0] % 64:
        raise UserError(f"{path.name} holds no vision transformer for images of {SIZE} pixels, as DreamSim's are", HINT)
    width, blocks = patches.shape[0], {name.split(".")[1] for name in tensors if name.startswith("blocks.")}
    norm = partial(nn.LayerNorm, eps=1e-6 if kind == "dino" else 1e-5)
    sizes = {"patch_size": patches.shape[2], "embed_dim": width, "depth": len(blocks), "num_heads": width // 64}
    network = VisionTransformer(**sizes, qkv_bias=True, norm_layer=norm)
    if kind != "dino":
        network.pos_drop = norm(width)  # CLIP normalises before the first block, too
    if kind == "clip":
        for block in network.blocks:
            block.mlp.act = QuickGELU()
    return fill_network(network, {name: value.float() for name, value in tensors.items()}, path)


def read_adapter(folder: Path) -> tuple[dict[str, Tensor], float]:
    """The low-rank matrices by name ("extractor_list.0.model.blocks.0.attn.qkv.lora_A.weight"), and the factor of their
    products.

    UserError: missing or damaged, or an adapter of another kind than a plain LoRA.
    """
    try:
        config = json_object(read_json(folder / "adapter_config.json"), "it")
        scale = float(config["lora_alpha"]) / int(config["r"])
    except (UserError, ValueError, KeyError, TypeError, ZeroDivisionError, OverflowError) as error:
        raise UserError(
            f"{ADAPTER}/adapter_config.json of DreamSim's weights is no configuration of a LoRA ({error!r})", HINT
        ) from error
    other = [
        key
        for key in ("use_rslora", "use_dora", "fan_in_fan_out", "modules_to_save", "rank_pattern", "alpha_pattern")
        if config.get(key)
    ]
    if other or config.get("bias", "none") != "none":
        raise UserError(
            f"{ADAPTER}/adapter_config.json of DreamSim's weights asks for {', '.join(other or ['bias'])}, which is not"
            " read",
            HINT,
        )
    file = next((f for f in (folder / "adapter_model.safetensors", folder / "adapter_model.bin") if f.is_file()), None)
    if file is None:
        raise UserError("the weights of DreamSim lack the adapter's adapter_model.safetensors", HINT)
    return {name.rpartition("base_model.model.")[2]: value.float() for name, value in read_tensors(file).items()}, scale


def merge_adapter(network: VisionTransformer, adapter: dict[str, Tensor], prefix: str, scale: float) -> None:
    """Add scale * B A to the query-key-value weights of every block, taking the matrices out of `adapter`. UserError:
    one is missing or misshapen."""
    for i, block in enumerate(network.blocks):
        name = f"{prefix}blocks.{i}.attn.qkv."
        try:
            down, up = adapter.pop(f"{name}lora_A.weight"), adapter.pop(f"{name}lora_B.weight")
            with torch.no_grad():
                block.attn.qkv.weight += scale * (up @ down)
        except (KeyError, RuntimeError) as error:
            raise UserError(f"{ADAPTER} of DreamSim's weights has nothing that fits {name} ({error})", HINT) from error
