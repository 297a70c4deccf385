"""What becomes a graph: one module of a student that makes images, three of a student that takes prompts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from d2o.errors import UserError
from d2o.export.any_batch import for_any_batch
from d2o.export.loaded import Loaded, prompts
from d2o.export.parity import Runner
from d2o.spaces.base import LatentSpace
from d2o.teachers.text import TextEncoders

GraphRunner = Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]
"""A graph's file, loaded back: inputs -> outputs, both in its order."""


@dataclass(frozen=True)
class Graph:
    """`module(*example(n))`, of which all inputs and outputs begin with the batch. `strict`: traced by Dynamo, which
    keeps len(x) symbolic; False: by running it, for code that Dynamo does not understand."""

    module: nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    example: Callable[[int], tuple[Tensor, ...]]
    strict: bool = True
    nested: bool = False  # whether the module takes its inputs as *inputs

    @property
    def size(self) -> int:
        """Bytes of the weights, in float32 as they are."""
        return sum(t.numel() * t.element_size() for t in self.module.state_dict().values())


def graph_of(source: Loaded) -> Graph:
    """The checkpoint's one module (`d2o.export.loaded.for_graph` has to come first)."""
    nested = bool(getattr(source.call, "names", ()))
    return Graph(source.call, source.inputs, (source.output,), source.example, nested=nested)


class EncodeTokens(nn.Module):
    """forward(token indices [N, L] int64 of each text encoder) -> states [N, L, D] and, where there is one, pooled
    [N, P], float32."""

    def __init__(self, text: TextEncoders):
        super().__init__()
        self.encoders, self._text = nn.ModuleList(text.encoders), [text]  # the list hides it from the module

    def forward(self, *ids: Tensor) -> tuple[Tensor, ...]:
        text = self._text[0].reader.read([(tokens, torch.ones_like(tokens)) for tokens in ids])
        return (text.states,) if text.pooled is None else (text.states, text.pooled)


class DecodeLatent(nn.Module):
    """forward(latent [N, c, h, w]) -> image [N, 3, H, W] in [-1, 1]."""

    def __init__(self, space: LatentSpace):
        super().__init__()
        self.autoencoder = copy.copy(space.autoencoder)  # without the half of it that encodes
        parts = self.autoencoder._modules.items()
        kept = {name: part for name, part in parts if name not in ("encoder", "quant_conv")}
        self.autoencoder._modules = copy.deepcopy(kept)
        for_any_batch(self.autoencoder)
        self._space = LatentSpace(space.name, space.numbers, lambda: self.autoencoder)
        _ = self._space.autoencoder  # loaded now, not while it is traced

    def forward(self, latent: Tensor) -> Tensor:
        return self._space.pixels(latent).clamp(-1, 1)


def text_graphs(source: Loaded) -> dict[str, Graph]:
    """A text student's text encoder, its own call, and the decoder of its latents, by the name of their file: three,
    because prompts are encoded once for many images, and so that each stays below ONNX's 2 GB for longer. UserError:
    text encoders that look at a mask."""
    student, text = source.student, source.student.text
    for encoder in text.encoders:
        if getattr(encoder.config, "use_attention_mask", False):
            raise UserError(
                f"{source.path}: its text encoder takes a mask, which no graph here has", "--format diffusers"
            )
    names = token_names(len(text.reader.tokenizers))
    states = tuple(name for name in source.inputs if name in ("states", "pooled"))

    def tokens(n: int) -> tuple[Tensor, ...]:
        found = [text.reader.tokens(prompt) for prompt in prompts(n)]
        return tuple(torch.cat([each[i][0] for each in found]) for i in range(len(names)))

    def latents(n: int) -> tuple[Tensor, ...]:
        return (source.example(n)[0],)

    return {
        "text_encoder": Graph(EncodeTokens(text).eval(), names, states, tokens, strict=False, nested=True),
        "student": Graph(source.call, source.inputs, ("latent",), source.example, nested=True),
        "decoder": Graph(DecodeLatent(student.space).eval(), ("latent",), ("image",), latents, strict=False),
    }


def token_names(count: int) -> tuple[str, ...]:
    """Inputs of the text encoder, one for each tokenizer."""
    return tuple(f"input_ids{f'_{i + 1}' if i else ''}" for i in range(count))


def whole_student(
    source: Loaded, graphs: Mapping[str, Graph], runs: Mapping[str, GraphRunner]
) -> tuple[Runner, Callable[..., Tensor]]:
    """From the student's own inputs to images in [-1, 1]: by the three files in a row, from tokens, and by the student
    itself."""

    def found(inputs: tuple[Tensor, ...]) -> Tensor:
        encode = graphs["text_encoder"]
        text = dict(zip(encode.outputs, runs["text_encoder"](encode.example(len(inputs[0])))))
        given = {**dict(zip(source.inputs, inputs)), **text}
        (latent,) = runs["student"](tuple(given[name] for name in source.inputs))
        return runs["decoder"]((latent,))[0]

    def expected(*inputs: Tensor) -> Tensor:
        return source.student.decode(source.call(*inputs))

    return found, expected
