"""A byte-level BPE vocabulary in CLIP's form, made for given words: each of them is one token, any other text falls
into smaller ones."""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from d2o.errors import UserError
from d2o.interop import torchvision_compat

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

BOS, EOS, END = "<|startoftext|>", "<|endoftext|>", "</w>"
LENGTH = 77
"""Tokens of a prompt, with the two marks and the padding, as in CLIP."""
WORD = re.compile(r"[^\W\d_]+")


def byte_letters() -> dict[int, str]:
    """A printable character for each of the 256 bytes, in CLIP's order: the printable ones stand for themselves, the
    others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}


@dataclass(frozen=True)
class Tokens:
    """`vocab` token -> id, `merges` in order of rank: the contents of vocab.json and merges.txt."""

    vocab: dict[str, int]
    merges: list[tuple[str, str]]

    def files(self) -> dict[str, str]:
        """The tokenizer's files as transformers reads them, by name."""
        special = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS, "unk_token": EOS}
        config = {
            **special,
            "model_max_length": LENGTH,
            "do_lower_case": True,
            "errors": "replace",
            "add_prefix_space": False,
            "tokenizer_class": "CLIPTokenizer",
        }
        return {
            "vocab.json": json.dumps(self.vocab, ensure_ascii=False),
            "merges.txt": "\n".join(["#version: 0.2", *(f"{a} {b}" for a, b in self.merges)]) + "\n",
            "special_tokens_map.json": json.dumps(special, indent=2) + "\n",
            "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
        }

    @cached_property
    def tokenizer(self) -> CLIPTokenizer:
        """transformers' CLIPTokenizer of this vocabulary."""
        torchvision_compat.ensure()
        from transformers import CLIPTokenizer

        with (
            tempfile.TemporaryDirectory() as folder
        ):  # files are the one way in that all versions of transformers share
            for name, text in self.files().items():
                (Path(folder) / name).write_text(text, encoding="utf-8")
            return CLIPTokenizer.from_pretrained(folder)

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Token ids [n, 77] int64: start mark, tokens (cut to fit), end marks to the end."""
        done = self.tokenizer(
            list(prompts), padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt"
        )
        return done.input_ids.to(torch.int64)


def build_tokens(words: Iterable[str]) -> Tokens:
    """The vocabulary: 256 byte letters, the same at a word's end, the merges that make each word one token, and the two
    marks.

    The merges are those of BPE's own training on the words, the most frequent pair first, so that no merge spoils
    another word.
    UserError: a "word" that is none (only letters make one; a digit is a token anyway).
    """
    words = sorted(set(words))
    for word in words:
        if not WORD.fullmatch(word) or word != word.lower():
            raise UserError(f"{word!r} is not a word of lower-case letters; a vocabulary is made of such words")
    letters = byte_letters()
    split = [[letters[byte] for byte in word.encode()] for word in words]
    split = [[*parts[:-1], parts[-1] + END] for parts in split]
    merges: list[tuple[str, str]] = []
    while any(len(parts) > 1 for parts in split):
        pairs = Counter(pair for parts in split for pair in pairwise(parts))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        split = [_merge(parts, best) for parts in split]
    order = [*letters.values(), *(letter + END for letter in letters.values()), *(a + b for a, b in merges), BOS, EOS]
    return Tokens({token: i for i, token in enumerate(order)}, merges)


def _merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for part in parts:
        if out and (out[-1], part) == pair:
            out[-1] += part
        else:
            out.append(part)
    return out
