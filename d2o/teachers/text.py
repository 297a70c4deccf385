"""The text side of teachers: prompts -> `Text`, every distinct prompt encoded once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2o.condition import Condition, Embedded, Text
from d2o.errors import UserError
from d2o.inputs import JsonObject
from d2o.interop.safetensors_io import tensors_sha256
from d2o.spaces.load import device_name
from d2o.teachers.base import Spec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CACHE_BYTES = 256 * 2**20
T5_LENGTH = 256
"""Tokens of T5, of which Stable Diffusion 3 was trained on 77 and is sampled with 256 by diffusers."""
EncodeOne = Callable[[str], Text]
"""One prompt -> Text of length 1."""


class PromptCache:
    """Prompts -> Text, by way of a store of the prompts seen last, at most `limit` bytes of it (and always one).

    Prompts go through the text encoder one at a time: in a batch, the last bits of an embedding depend on how many
    others there are and on its place among them, and two workers who meet a prompt in different company must get the
    same bytes. Against the network calls of a sample this costs little.
    """

    def __init__(self, encode_one: EncodeOne, limit: int = CACHE_BYTES):
        self.encode_one, self.limit, self.usual = encode_one, limit, limit
        self.encoded = 0  # prompts that the text encoder was called for
        self._kept: OrderedDict[str, Text] = OrderedDict()
        self._bytes = 0
        self._empty: Text | None = None

    def __call__(self, prompts: Sequence[str]) -> Text:
        """UserError: a single str in place of a list, something that is no str, or nothing at all."""
        if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
            raise UserError("prompts must be a list of strings")
        if not prompts:
            raise UserError("no prompts: there is nothing to encode")
        row = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        found = [self._get(prompt) for prompt in row]
        pooled = (
            None if found[0].pooled is None else torch.cat([text.pooled for text in found if text.pooled is not None])
        )
        return Text(torch.cat([text.states for text in found]), pooled)[
            torch.tensor([row[prompt] for prompt in prompts])
        ]

    @property
    def empty(self) -> Text:
        """The encoded empty prompt, kept for good."""
        if self._empty is None:
            self._empty = self._encode("")
        return self._empty

    def _get(self, prompt: str) -> Text:
        if prompt == "":
            return self.empty
        if prompt in self._kept:
            self._kept.move_to_end(prompt)
            return self._kept[prompt]
        text = self._kept[prompt] = self._encode(prompt)
        self._bytes += _size(text)
        while self._bytes > self.limit and len(self._kept) > 1:
            self._bytes -= _size(self._kept.popitem(last=False)[1])
        return text

    def _encode(self, prompt: str) -> Text:
        self.encoded += 1
        # Sampling runs in inference mode, whose tensors are of no use to a student in training; what is kept must serve
        # both.
        with torch.inference_mode(False), torch.no_grad():
            return self.encode_one(prompt)


class TextEncoders:
    """The text encoders of a model: prompts -> Text, each distinct one encoded once, on the device, float32.

    `name`: of the model that they are part of, as `d2o.teachers.text_encoders.load_text` takes it; `encode_one`: how
    that model's family reads one prompt. All in this process who take prompts of one model share them.
    """

    def __init__(
        self,
        name: str,
        encoders: Sequence[nn.Module],
        encode_one: EncodeOne,
        device: str | torch.device = "cpu",
        cache_bytes: int = CACHE_BYTES,
        revision: str | None = None,
        tokenizers: Sequence[PreTrainedTokenizerBase] = (),
    ):
        self.name, self.revision, self.device = name, revision, torch.device(device)
        self.tokenizers = list(tokenizers)  # one for each encoder
        self.encoders = [encoder.to(self.device).eval().requires_grad_(False) for encoder in encoders]
        self.prompts = PromptCache(encode_one, cache_bytes)
        self._sha256 = ""

    def __deepcopy__(self, memo: object) -> TextEncoders:
        return self  # frozen, and shared by all who copy what holds it

    def __call__(self, prompts: Sequence[str]) -> Text:
        """UserError: nothing at all."""
        return self.prompts(prompts)

    @property
    def reader(self) -> Reader:
        """How they read a prompt."""
        assert isinstance(self.prompts.encode_one, Reader)
        return self.prompts.encode_one

    def weights(self) -> dict[str, Tensor]:
        """All tensors, by encoder and name."""
        return {
            f"text{i}.{key}": value
            for i, encoder in enumerate(self.encoders)
            for key, value in encoder.state_dict().items()
        }

    @property
    def record(self) -> JsonObject:
        """What a file says of them that needs them: name, revision, sha256 of the weights."""
        if not self._sha256:
            self._sha256 = tensors_sha256(self.weights())
        return {"name": self.name, "revision": self.revision, "sha256": self._sha256}

    def check(self, record: JsonObject, who: str) -> None:
        """UserError: these are not those that `record` is of."""
        if (wanted := record.get("sha256")) and wanted != self.record["sha256"]:
            raise UserError(
                f"{who} takes the text encoders of {record['name']} with sha256 {wanted[:12]}; those that are here have"
                f" {self.record['sha256'][:12]}",
                "put those that it was trained with in their place",
            )


_texts: WeakValueDictionary[tuple[str, str], TextEncoders] = WeakValueDictionary()


def keep_text(text: TextEncoders) -> TextEncoders:
    """The text encoders, which all who ask for their name and device find from now on, as long as somebody keeps
    them."""
    _texts[(text.name, device_name(text.device))] = text
    return text


def kept_text(name: str, device: str | torch.device | None = None) -> TextEncoders | None:
    """Those of that name that somebody in this process keeps, on that device or on any that holds weights; else
    None."""
    on = None if device is None else device_name(device)
    for (known, where), text in list(_texts.items()):
        if known == name and (where == on or (on is None and where != "meta")):
            return text
    return None


def clip_text(
    name: str,
    encoders: Sequence[PreTrainedModel],
    tokenizers: Sequence[PreTrainedTokenizerBase],
    device: str | torch.device = "cpu",
    cache_bytes: int = CACHE_BYTES,
    revision: str | None = None,
) -> TextEncoders:
    """Those of Stable Diffusion 1 and 2 (one CLIP), or XL (two)."""
    on = torch.device(device)
    one = last_states(encoders[0], tokenizers[0], on) if len(encoders) == 1 else joined_states(encoders, tokenizers, on)
    return TextEncoders(name, encoders, one, device, cache_bytes, revision, tokenizers)


def clip_and_t5_text(
    name: str,
    encoders: Sequence[PreTrainedModel | None],
    tokenizers: Sequence[PreTrainedTokenizerBase],
    width: int,
    device: str | torch.device = "cpu",
    t5_length: int = T5_LENGTH,
    cache_bytes: int = CACHE_BYTES,
    revision: str | None = None,
) -> TextEncoders:
    """Those of Stable Diffusion 3: two CLIPs and a T5, or None in its place (its states are zeros then); states of
    `width`. UserError: another number of them."""
    there = [encoder for encoder in encoders if encoder is not None]
    clips = [encoder for encoder in encoders[:2] if encoder is not None]
    if len(encoders) != 3 or len(tokenizers) != 3 or len(clips) != 2:
        raise UserError(f"{name}: Stable Diffusion 3 takes two CLIP text encoders and a T5 (or None in its place)")
    t5 = None if encoders[2] is None else (encoders[2], tokenizers[2])
    one = joined_states_and_t5(clips, tokenizers[:2], t5, width, t5_length, torch.device(device))
    return TextEncoders(name, there, one, device, cache_bytes, revision, tokenizers[: len(there)])


def check_text(spec: Spec, text: Embedded, batch: int) -> Text:
    """The encoded prompts if there is one for each of the batch. UserError otherwise."""
    if not isinstance(text, Text):
        raise UserError(f"{spec.name!r} is conditioned on text; it takes prompts, '' for none")
    if len(text) != batch:
        raise UserError(f"{len(text)} prompts for a batch of {batch}")
    return text


def embed_prompts(spec: Spec, condition: Condition | Embedded, encode: Callable[[Sequence[str]], Text]) -> Embedded:
    """Of a network that takes text: the prompts of a `Condition`, encoded; what is embedded already comes back as it
    is. UserError: class labels, or nothing."""
    if not isinstance(condition, Condition):
        return condition
    if condition.prompts is None:
        what = "not class labels" if condition.labels is not None else "'' for none"
        raise UserError(f"{spec.name!r} is conditioned on text; it takes prompts, {what}")
    return encode(condition.prompts)


def _size(text: Text) -> int:
    return text.states.nbytes + (0 if text.pooled is None else text.pooled.nbytes)


def token_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, length: int) -> tuple[Tensor, Tensor]:
    """Token indices and mask [1, length], padded and cut to `length`."""
    found = tokenizer([prompt], padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return found["input_ids"], found["attention_mask"]


def clip_length(encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """77 for CLIP as published. A tokenizer that does not say takes what its encoder has positions for. UserError: one
    that says something else than a number."""
    most = tokenizer.model_max_length
    if not isinstance(most, int | float):
        raise UserError(f"the tokenizer {tokenizer.name_or_path} cannot be loaded: model_max_length is {most!r}")
    return min(int(most), encoder.config.max_position_embeddings)


TokenPair = tuple[Tensor, Tensor]
"""Token indices and mask [B, L] of one text encoder."""


@dataclass(frozen=True)
class Reader:
    """How a model reads a prompt: `tokenizers` with the `lengths` of what they give, and `read`, which is all that the
    text encoders do: the tokens of each -> Text."""

    tokenizers: Sequence[PreTrainedTokenizerBase]
    lengths: Sequence[int]
    read: Callable[[Sequence[TokenPair]], Text]
    device: torch.device

    def tokens(self, prompt: str) -> list[TokenPair]:
        pairs = zip(self.tokenizers, self.lengths, strict=True)
        found = [token_ids(tokenizer, prompt, length) for tokenizer, length in pairs]
        return [(ids.to(self.device), mask.to(self.device)) for ids, mask in found]

    def __call__(self, prompt: str) -> Text:
        return self.read(self.tokens(prompt))


def last_states(encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> Reader:
    """Stable Diffusion 1 and 2: the last hidden states with the final norm, [B, 77, D]."""
    masked = getattr(encoder.config, "use_attention_mask", False)

    def read(tokens: Sequence[TokenPair]) -> Text:
        ids, mask = tokens[0]
        return Text(encoder(ids, attention_mask=mask if masked else None)[0].float())

    return Reader([tokenizer], [clip_length(encoder, tokenizer)], read, device)


def penultimate(encoder: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Tensor | None]:
    """The last hidden states but one [B, 77, D], and the projected vector [B, P] of an encoder that has one."""
    out = encoder(ids, output_hidden_states=True)
    pooled = getattr(out, "text_embeds", None)
    return out.hidden_states[-2].float(), None if pooled is None else pooled.float()


def joined_states(
    encoders: Sequence[PreTrainedModel], tokenizers: Sequence[PreTrainedTokenizerBase], device: torch.device
) -> Reader:
    """SDXL: the penultimate states of both encoders side by side, [B, 77, D_1 + D_2], and the second one's projected
    vector."""

    def read(tokens: Sequence[TokenPair]) -> Text:
        found = [penultimate(encoder, ids) for encoder, (ids, _) in zip(encoders, tokens, strict=True)]
        return Text(torch.cat([states for states, _ in found], dim=-1), found[-1][1])

    return Reader(tokenizers, [clip_length(*pair) for pair in zip(encoders, tokenizers, strict=True)], read, device)


def joined_states_and_t5(
    encoders: Sequence[PreTrainedModel],
    tokenizers: Sequence[PreTrainedTokenizerBase],
    t5: tuple[nn.Module, PreTrainedTokenizerBase] | None,
    width: int,
    length: int,
    device: torch.device,
) -> Reader:
    """SD3: both CLIPs' penultimate states side by side, filled up with zeros to `width`, followed by `length` states of
    T5 (zeros without one): [B, 77 + length, width]; both projected vectors side by side (Esser et al. 2024, appendix
    B.3 and figure 2)."""

    def read(tokens: Sequence[TokenPair]) -> Text:
        clip = [penultimate(encoder, ids) for encoder, (ids, _) in zip(encoders, tokens)]
        states = torch.cat([states for states, _ in clip], dim=-1)
        states = F.pad(states, (0, width - states.shape[-1]))
        if t5 is None:
            more = states.new_zeros(len(states), length, width)
        else:
            more = t5[0](tokens[-1][0])[0].float()
        return Text(
            torch.cat([states, more], dim=1), torch.cat([pooled for _, pooled in clip if pooled is not None], dim=-1)
        )

    lengths = [clip_length(*pair) for pair in zip(encoders, tokenizers, strict=True)]
    if t5 is None:
        return Reader(tokenizers, lengths, read, device)
    return Reader([*tokenizers, t5[1]], [*lengths, length], read, device)
