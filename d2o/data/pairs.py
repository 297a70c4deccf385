"""The pair store: (noise, condition, teacher's output), a folder of `manifest.json` + `shard-00000.safetensors`, ...

A sample is a function of its seed and condition alone. A shard holds `target` [n, C, H, W] in the chosen dtype; `label`
int64 [n] or the prompts (`prompt_bytes`, `prompt_ends`) where the teacher takes one; `guidance` float32 [n] where each
pair has a guidance scale of its own; `image` uint8 if it was made with
--decode; and `noise` [n, C, H, W]
float32 only if asked for: otherwise readers derive the noise from the seeds again, and the manifest's checksums show
whether they got the same. Nothing in a shard depends on when, where or in which order it was made.

`manifest.json`: "settings" (what was asked for), "teacher" (name, sha256 of the weights, licence), "spec", "prompts"
(path, sha256, count), "compute" (what the last bits depend on), "noise_probe" (the first numbers of the first noise),
"shards" (file, start, n, bytes, sha256, noise_sha256). `timing/` is for `d2o pairs --stats`. Making stores is the
business of d2o/teachers/generate.py, which can call a teacher.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from d2o.condition import Condition
from d2o.data.pair_files import open_store, shard_prompts
from d2o.data.pair_reading import read_shard
from d2o.data.pair_settings import check_probe
from d2o.data.pair_tools import verify_store
from d2o.diffusion.noise import noise_for_seeds
from d2o.errors import UserError
from d2o.inputs import JsonObject


class PairStore:
    """A finished pair store, for reading at random; training streams it (`data.stream`). `path`: a folder or any fsspec
    URL, whose shards are copied into the cache ($D2O_HOME) when they are touched. Threads may share it.

    len(store), store[i] -> (noise [C, H, W] float32, class index, prompt or None, target [C, H, W] float32),
    store.batch(indices) -> (noise, `Condition`, target) for many, memory-mapped.
    `n`: only the first n pairs, which need be all that is finished. UserError: no store, damaged, unfinished, fewer
    than n pairs, or made by a torch that draws other noise. A shard that is damaged, or holds a value that is not
    finite, is refused when it is first touched.
    """

    def __init__(self, path: str | Path, n: int | None = None):
        self.path = path
        self.folder, self.manifest, self.settings = open_store(path)
        if n is not None:
            self.settings = self.settings.first(n, path)
        self.units = self.settings.units()
        if left := self.folder.left(self.units):
            hint = f"continue it: {self.settings.command(path)}"
            raise UserError(f"{path} is not finished: {len(left)} of {len(self.units)} shards are missing", hint)
        check_probe(self.manifest, path)
        self.spec: JsonObject = self.manifest["spec"]
        self.shape = tuple(self.spec["shape"])
        self.has_prompts = self.settings.labels == "text"
        self._entries = {entry["file"]: entry for entry in self.manifest["shards"]}
        self._shards: dict[int, dict[str, Tensor]] = {}
        self._labelled = self.settings.labels not in ("none", "text")

    def __len__(self) -> int:
        return self.settings.n

    def __getitem__(self, index: int) -> tuple[Tensor, int | str | None, Tensor]:
        index = range(len(self))[index]  # counts from the end when negative; raises IndexError
        noise, condition, target = self.batch([index])
        asked = condition.prompts[0] if condition.prompts else None
        return noise[0], asked if condition.labels is None else int(condition.labels[0]), target[0]

    def batch(self, indices: Sequence[int] | Tensor | np.ndarray) -> tuple[Tensor, Condition, Tensor]:
        """(noise [k, C, H, W] float32, what they were asked to be, target [k, C, H, W] float32), in the order of
        `indices`.

        Negative indices count from the end. IndexError: out of range.
        """
        index = self._index(indices)
        noise, found, target = self._gather(index)
        texts = tuple(self.prompts(index)) if self.has_prompts else None
        return noise, Condition(len(index), found.get("label"), texts, found.get("guidance")), target

    def prompts(self, indices: Sequence[int] | Tensor | np.ndarray) -> list[str]:
        """The prompts of these pairs. UserError: the store has none."""
        if not self.has_prompts:
            raise UserError(f"{self.path} has no prompts: its teacher takes {self.spec['condition']}")
        index = self._index(indices)
        found: dict[int, str] = {}
        for number in (index // self.settings.shard_size).unique().tolist():
            mine = index[index // self.settings.shard_size == number]
            found |= dict(
                zip(mine.tolist(), shard_prompts(self.shard(number), mine - number * self.settings.shard_size))
            )
        return [found[i] for i in index.tolist()]

    def images(self, indices: Sequence[int] | Tensor | np.ndarray) -> Tensor:
        """uint8 [k, 3, H, W], the decoded targets. UserError: the store was made without --decode."""
        if not self.settings.decode:
            raise UserError(f"{self.path} holds no images", "they are kept by `d2o pairs --decode`")
        index, size = self._index(indices), self.settings.shard_size
        return torch.stack([self.shard(i // size)["image"][i % size] for i in index.tolist()])

    def shard(self, number: int) -> dict[str, Tensor]:
        """The tensors of shard `number`, mapped: a page is read from the disk when it is touched."""
        if number not in self._shards:
            unit = self.units[number]
            self._shards[number] = read_shard(self.folder, self.manifest, unit, self._entries[unit.file])[0]
        return self._shards[number]

    def forget(self, number: int) -> None:
        """Let go of a shard, for readers that pass through the store once."""
        self._shards.pop(number, None)

    @property
    def fingerprint(self) -> str:
        """sha256 over the teacher's weights and the shards' checksums, whatever the folder is called."""
        content = [self.manifest["teacher"]["sha256"], *(self._entries[unit.file]["sha256"] for unit in self.units)]
        return hashlib.sha256(json.dumps([self.settings.seed, content]).encode()).hexdigest()

    def verify(self) -> list[str]:
        """Check everything on disk against the checksums; one line per problem."""
        return verify_store(self.path)

    def _index(self, indices: Sequence[int] | Tensor | np.ndarray) -> Tensor:
        index = torch.as_tensor(indices, dtype=torch.int64).reshape(-1)
        if len(index) and (int(index.min()) < -len(self) or int(index.max()) >= len(self)):
            raise IndexError(f"the store has {len(self)} pairs; asked for {int(index.min())} to {int(index.max())}")
        return torch.where(index < 0, index + len(self), index)

    def _gather(self, index: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Noise, labels and guidance scales as far as there are any, target."""
        target = torch.empty(len(index), *self.shape)
        stored = self.settings.store_noise
        noise = (
            torch.empty_like(target) if stored else noise_for_seeds((self.settings.seed + index).tolist(), self.shape)
        )
        found = {"label": torch.empty(len(index), dtype=torch.int64)} if self._labelled else {}
        found |= {"guidance": torch.empty(len(index))} if isinstance(self.settings.cfg, tuple) else {}
        shards = index // self.settings.shard_size
        for number in shards.unique().tolist():
            shard, mine = self.shard(number), (shards == number).nonzero()[:, 0]
            rows = index[mine] - number * self.settings.shard_size
            target[mine] = shard["target"][rows].float()
            for name, values in found.items():
                values[mine] = shard[name][rows]
            if stored:
                noise[mine] = shard["noise"][rows]
        return noise, found, target
