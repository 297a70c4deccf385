"""Many calls of a text-conditioned UNet without the work that is the same in every call, or in both halves of a guided
batch.

The text's keys and values do not depend on x_t or t, and ahead of the first attention to text the conditional and the
unconditional half of a batch are alike. Nothing here changes the UNet: processors are exchanged and hooks set for the
time of a call, which makes it a matter of one thread at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2o.condition import Text

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import Attention

BLOCKS = (
    "CrossAttnDownBlock2D",
    "DownBlock2D",
    "CrossAttnUpBlock2D",
    "UpBlock2D",
    "UNetMidBlock2DCrossAttn",
    "UNetMidBlock2D",
    None,
)


class Prepared(Text):
    """Encoded prompts for many calls, with every layer's keys and values from the first call on. With `empty`, the
    empty prompt (of length 1), it is for guided batches: B images with `text` and the same number with `empty`, whose
    vectors are in `pooled`; their states are only in the keys and values."""

    def __init__(self, text: Text, empty: Text | None = None):
        pooled = text.pooled
        if empty is not None and pooled is not None and empty.pooled is not None:
            pooled = torch.cat([pooled, empty.pooled.expand_as(pooled)])
        super().__init__(text.states, pooled)
        self.text, self.empty = text, empty
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._guided: Prepared | None = None

    def __len__(self) -> int:
        return len(self.text) * (1 if self.empty is None else 2)

    def guided(self, empty: Text) -> Prepared:
        """The same prompts for guided batches, made once."""
        if self._guided is None:
            self._guided = Prepared(self.text, empty)
        return self._guided

    def keys_values(self, attn: Attention) -> tuple[Tensor, Tensor]:
        """The layer's keys and values of the text, [B, heads, L, d]."""
        if id(attn) not in self.kept:
            self.kept[id(attn)] = (self._project(attn.to_k, attn.heads), self._project(attn.to_v, attn.heads))
        return self.kept[id(attn)]

    def _project(self, linear: nn.Module, heads: int) -> Tensor:
        rows = linear(self.text.states)
        if self.empty is not None:
            rows = torch.cat([rows, linear(self.empty.states).expand_as(rows)])
        return _split(rows, heads).contiguous()


class GivenText:
    """An attention processor that attends to `key` and `value`, whatever text it is given. Without parameters, and gone
    after the call. Plain attributes of a lasting object are inputs of a compiled network: other texts need no other
    compilation."""

    def __init__(self) -> None:
        self.key: Tensor | None = None
        self.value: Tensor | None = None

    def __call__(self, attn: Attention, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        query = _split(attn.to_q(hidden_states), attn.heads)
        out = F.scaled_dot_product_attention(query, self.key, self.value).transpose(1, 2).flatten(2)  # type: ignore[arg-type]
        return attn.to_out[0](out) / attn.rescale_output_factor


def _split(x: Tensor, heads: int) -> Tensor:
    """[B, N, heads * d] -> [B, heads, N, d]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def text_attentions(unet: UNet2DConditionModel) -> list[Attention] | None:
    """The layers of a UNet2DConditionModel that attend to text; None where it has other than the plain kind of Stable
    Diffusion 1, 2 and XL."""
    from diffusers.models.attention_processor import AttnProcessor2_0

    config = unet.config
    if any(kind not in BLOCKS for kind in (*config.down_block_types, config.mid_block_type, *config.up_block_types)):
        return None
    if config.only_cross_attention or config.dual_cross_attention or config.attention_type != "default":
        return None
    layers = [block.attn2 for block in unet.modules() if getattr(block, "attn2", None) is not None]
    odd = ("spatial_norm", "group_norm", "norm_q", "norm_k", "norm_cross", "residual_connection", "added_kv_proj_dim")
    if any(
        type(attn.processor) is not AttnProcessor2_0 or any(getattr(attn, name, None) for name in odd)
        for attn in layers
    ):
        return None
    return layers


@contextmanager
def given_text(layers: list[Attention], processors: list[GivenText], prepared: Prepared) -> Iterator[None]:
    """Within the block, `layers` attend to `prepared`, by way of `processors`."""
    before = [attn.processor for attn in layers]
    try:
        for attn, processor in zip(layers, processors, strict=True):
            processor.key, processor.value = prepared.keys_values(attn)
            attn.processor = processor
        yield
    finally:
        for attn, processor in zip(layers, before, strict=True):
            attn.processor = processor


def shared_layers(unet: UNet2DConditionModel) -> list[nn.Module]:
    """The layers ahead of the first attention to text, alike in both halves of a guided batch. In XL the text reaches
    even the time embedding, so that only the first convolution is."""
    first = unet.down_blocks[0]
    if unet.config.addition_embed_type is not None or not getattr(first, "has_cross_attention", False):
        return [unet.conv_in]
    attention = first.attentions[0]
    if not len(attention.transformer_blocks):
        return [unet.conv_in]
    block = attention.transformer_blocks[0]
    return [
        unet.conv_in,
        first.resnets[0],
        attention.norm,
        attention.proj_in,
        block.norm1,
        block.attn1,
        block.norm2,
        block.attn2.to_q,
    ]


@contextmanager
def once_for_both_halves(layers: list[nn.Module]) -> Iterator[None]:
    """Within the block, `layers` compute the first half of their batch and repeat it for the second."""
    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(_halve, with_kwargs=True).remove)
            stack.callback(layer.register_forward_hook(_repeat).remove)
        yield


def _halve(layer: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> tuple[tuple, dict[str, object]]:
    def half(x: object) -> object:
        return x[: len(x) // 2] if isinstance(x, Tensor) else x

    return tuple(half(x) for x in args), {name: half(x) for name, x in kwargs.items()}


def _repeat(layer: nn.Module, args: tuple[object, ...], out: Tensor) -> Tensor:
    return torch.cat([out, out])
