"""The names that Stable Diffusion's original files have, of tensors as diffusers and transformers name them: what
`diffusers.loaders.single_file_utils` reads, the other way round, and with its tables."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from d2o.errors import UserError
from d2o.interop import torchvision_compat

Named = dict[str, Tensor]
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPENCLIP = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}


def unet_names(tensors: Named, config: Mapping[str, Any]) -> Named:
    """A UNet2DConditionModel under `model.diffusion_model.`; `config` is its own. UserError: a tensor that the original
    network does not have."""
    known = _table("unet")
    flat = {**known["layers"], **known["addition_embed_type"]}
    per_block = int(config["layers_per_block"]) + 1
    attends = ["CrossAttn" in kind for kind in config["up_block_types"]]

    def rename(name: str) -> str:
        if name in flat:
            return flat[name]
        match re.split(r"\.(?=resnets|attentions|downsamplers|upsamplers)", name):
            case [block, inner]:
                kind, i, rest = inner.split(".", 2)
                rest = _replaced(rest, RESNET) if kind == "resnets" else rest
                side, _, b = block.partition(".")
                if side == "mid_block":
                    return f"middle_block.{2 * int(i) + (kind == 'attentions')}.{rest}"
                first = per_block * int(b) + int(i)
                if kind == "downsamplers":
                    return f"input_blocks.{first + per_block}.0.{rest.replace('conv.', 'op.')}"
                if kind == "upsamplers":
                    return f"output_blocks.{first + per_block - 1}.{1 + attends[int(b)]}.{rest}"
                where = f"input_blocks.{first + 1}" if side == "down_blocks" else f"output_blocks.{first}"
                return f"{where}.{int(kind == 'attentions')}.{rest}"
        raise _unnamed("U-Net", name)

    return _under("model.diffusion_model.", tensors, rename)


def vae_names(tensors: Named, config: Mapping[str, Any]) -> Named:
    """An AutoencoderKL under `first_stage_model.`: its upper blocks are counted from the other end, its attention is
    made of 1 x 1 convolutions. UserError: as `unet_names`."""
    flat, last = _table("vae"), len(config["up_block_types"]) - 1

    def rename(name: str) -> str:
        if name in flat:
            return flat[name]
        rules: list[tuple[str, Callable[[re.Match[str]], str]]] = [
            (r"encoder\.down_blocks\.(\d+)\.resnets\.(.*)", lambda m: f"encoder.down.{m[1]}.block.{_shortcut(m[2])}"),
            (r"encoder\.down_blocks\.(\d+)\.downsamplers\.0\.(.*)", lambda m: f"encoder.down.{m[1]}.downsample.{m[2]}"),
            (
                r"decoder\.up_blocks\.(\d+)\.resnets\.(.*)",
                lambda m: f"decoder.up.{last - int(m[1])}.block.{_shortcut(m[2])}",
            ),
            (
                r"decoder\.up_blocks\.(\d+)\.upsamplers\.0\.(.*)",
                lambda m: f"decoder.up.{last - int(m[1])}.upsample.{m[2]}",
            ),
            (
                r"(\w+)\.mid_block\.resnets\.(\d)\.(.*)",
                lambda m: f"{m[1]}.mid.block_{int(m[2]) + 1}.{_shortcut(m[3])}",
            ),
            (r"(\w+)\.mid_block\.attentions\.0\.(.*)", lambda m: f"{m[1]}.mid.attn_1.{_replaced(m[2], VAE_ATTENTION)}"),
        ]
        for pattern, named in rules:
            if found := re.fullmatch(pattern, name):
                return named(found)
        raise _unnamed("autoencoder", name)

    convolved = {
        name: tensor[..., None, None] if ".attentions." in name and tensor.ndim == 2 else tensor
        for name, tensor in tensors.items()
    }
    return _under("first_stage_model.", convolved, rename)


def text_names(encoders: Sequence[Named]) -> Named:
    """CLIP text encoders with transformers' published names: one as Stable Diffusion 1 has it, or two as XL has them,
    the second in OpenCLIP's words."""
    if len(encoders) == 1:
        return _under("cond_stage_model.transformer.", encoders[0], str)
    first = _under("conditioner.embedders.0.transformer.", encoders[0], str)
    return {**first, **_under("conditioner.embedders.1.model.", _openclip(encoders[1]), str)}


def _openclip(tensors: Named) -> Named:
    """Queries, keys and values in one tensor, the projection for rows instead of columns."""
    flat, out = _table("openclip")["layers"], {}
    joined = {name for name in tensors if re.search(r"\.(q|k|v)_proj\.", name)}
    for name, tensor in tensors.items():
        if name in flat:
            out[flat[name]] = tensor.T if name == "text_projection.weight" else tensor
        elif name not in joined:
            out[_resblock(name)] = tensor
    for name in sorted(joined):
        if ".q_proj." in name:
            parts = [tensors[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            out[re.sub(r"\.q_proj\.(\w+)$", r".in_proj_\1", _resblock(name))] = torch.cat(parts)
    return out


def _resblock(name: str) -> str:
    found = re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.*)", name)
    if found is None:
        raise _unnamed("text encoder", name)
    return f"transformer.resblocks.{found[1]}.{_replaced(found[2].replace('self_attn.', 'attn.'), OPENCLIP)}"


def _table(part: str) -> dict[str, Any]:
    torchvision_compat.ensure()
    from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING

    return DIFFUSERS_TO_LDM_MAPPING[part]


def _shortcut(name: str) -> str:
    return name.replace("conv_shortcut", "nin_shortcut")


def _replaced(name: str, by: Mapping[str, str]) -> str:
    """`name` with the one of the words `by` that it begins with replaced."""
    begins: Iterable[str] = (word for word in by if name.startswith(f"{word}."))
    return next((by[word] + name[len(word) :] for word in begins), name)


def _under(prefix: str, tensors: Named, rename: Callable[[str], str]) -> Named:
    return {prefix + rename(name): tensor for name, tensor in tensors.items()}


def _unnamed(what: str, name: str) -> UserError:
    return UserError(
        f"the original Stable Diffusion has no name for {name} of this {what}", "--format diffusers writes the student"
    )
