"""Prompts, and how they are stored beside samples."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from d2o.errors import UserError

MAX_PROMPT_BYTES = 2**16
"""Of one prompt: text encoders read some hundred tokens of it."""


class Prompts(ABC):
    """len(prompts), prompts[i] (counted from the end when negative), prompts.many(indices). Threads may share it; it
    can be pickled.

    `path` is the file, or None; `sha256` the checksum of its bytes (without a file, of what `pack` makes of the
    prompts).
    """

    path: Path | None
    sha256: str

    @staticmethod
    def from_list(prompts: Sequence[str]) -> Prompts:
        """Prompts that are in no file. UserError: none, or not strings."""
        return _Listed(prompts)

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def many(self, indices: Iterable[int]) -> list[str]:
        """The prompts of these numbers, in their order. IndexError: out of range."""

    def __getitem__(self, index: int) -> str:
        return self.many([index])[0]

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), 1024):
            yield from self.many(range(first, min(first + 1024, len(self))))

    def __reduce__(self) -> tuple[Callable[..., Prompts], tuple[object, ...]]:
        return type(self), (self.path,)

    def _numbers(self, indices: Iterable[int]) -> list[int]:
        whole = range(len(self))
        return [whole[int(index)] for index in indices]


class _Listed(Prompts):
    path = None

    def __init__(self, prompts: Sequence[str]):
        if isinstance(prompts, str) or not len(prompts) or not all(isinstance(prompt, str) for prompt in prompts):
            raise UserError("prompts: expected a list of at least one string")
        self._tensors = pack(prompts)
        digest = hashlib.sha256()
        for tensor in self._tensors.values():
            digest.update(tensor.numpy().tobytes())
        self.sha256 = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._tensors["prompt_ends"])

    def many(self, indices: Iterable[int]) -> list[str]:
        return unpack(self._tensors, self._numbers(indices))

    def __reduce__(self) -> tuple[Callable[..., Prompts], tuple[object, ...]]:
        return Prompts.from_list, (list(self),)


def pack(prompts: Sequence[str]) -> dict[str, Tensor]:
    """Prompts as a shard holds them: `prompt_bytes` uint8, all their UTF-8 one after the other, and `prompt_ends` int64
    [n], where each ends."""
    texts = [whole_text(prompt, f"prompt {i}").encode() for i, prompt in enumerate(prompts)]
    ends = np.cumsum([len(text) for text in texts], dtype=np.int64)
    return {
        "prompt_bytes": torch.from_numpy(np.frombuffer(b"".join(texts), np.uint8).copy()),
        "prompt_ends": torch.from_numpy(ends),
    }


def unpack(tensors: dict[str, Tensor], indices: Iterable[int] | Tensor | np.ndarray) -> list[str]:
    """The prompts with these numbers (from 0 up) of what `pack` made; other tensors may be beside them."""
    data, ends = tensors["prompt_bytes"].numpy(), tensors["prompt_ends"].numpy()
    index = np.asarray(indices if isinstance(indices, (Tensor, np.ndarray)) else list(indices), dtype=np.int64)
    stops = ends[index]
    starts = np.where(index > 0, ends[index - 1], 0)
    return [data[start:stop].tobytes().decode() for start, stop in zip(starts.tolist(), stops.tolist())]


def whole_text(prompt: str, where: str) -> str:
    """UserError: half a character, which JSON can spell and UTF-8 cannot; too long."""
    try:
        size = len(prompt.encode())
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: not Unicode text ({error.reason})") from error
    if size > MAX_PROMPT_BYTES:
        raise too_long(where, size, MAX_PROMPT_BYTES)
    return prompt


def too_long(where: str, size: int, limit: int) -> UserError:
    return UserError(
        f"{where}: a prompt of {size:,} bytes; the limit is {limit:,}",
        "text encoders read some hundred words: shorten it",
    )
