"""The pair store: (noise, condition, teacher's output), a folder of `manifest.json` + `shard-00000.safetensors`, ...

A sample is a function of its seed and condition alone. A shard holds `target` [n, C, H, W] in the chosen dtype, `label` int64 [n] unless
the teacher is unconditional, and `noise` [n, C, H, W] float32 only if asked for: otherwise readers derive the noise from the seeds again,
and the manifest's checksums show whether they got the same. Nothing in a shard depends on when, where or in which order it was made.

`manifest.json`: "settings" (what was asked for), "teacher" (name, sha256 of the weights, licence), "spec", "compute" (what the last bits
depend on: batch, threads, device, torch, processor), "noise_probe" (the first numbers of the first noise), "shards" (file, start, n, bytes,
sha256, noise_sha256). Making stores is the business of d2o/teachers/generate.py, which can call a teacher.
"""

from __future__ import annotations

import hashlib
import json
import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2o import __version__
from d2o.data.draws import check_range, label_mode
from d2o.data.work import MANIFEST, Unit, WorkFolder, cut
from d2o.diffusion.noise import noise_for_seeds
from d2o.diffusion.solvers import nfe
from d2o.errors import UserError, unknown
from d2o.interop.safetensors_io import file_sha256, load_file, save_file

FORMAT = "d2o-pairs"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CACHE_BYTES = 2**30
"""Stores whose noises and targets take at most this many bytes in float32 are kept in memory."""


@dataclass(frozen=True)
class PairSettings:
    """What a store holds. `n` pairs with seeds `seed` .. `seed + n - 1`; `cfg` 1 is no guidance; `labels` as `draws.label_mode` takes it;
    `dtype` of the targets on disk: fp32, fp16 or bf16."""

    teacher: str
    n: int
    seed: int = 0
    solver: str = "heun"
    steps: int = 18
    cfg: float = 1.0
    labels: str = "random"
    shard_size: int = 1024
    dtype: str = "fp32"
    store_noise: bool = False

    def check(self) -> None:
        """UserError: a value out of range. (Whether `labels` fit is known only with the teacher.)"""
        check_range(self.n, self.seed)
        nfe(self.solver, self.steps)
        for name in ("steps", "shard_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not (math.isfinite(self.cfg) and self.cfg >= 0):
            raise UserError(f"cfg must be a number from 0 up, not {self.cfg}", "1 is no guidance")
        if self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)

    @property
    def nfe(self) -> int:
        """Network evaluations for one pair; a guided step counts twice."""
        return nfe(self.solver, self.steps) * (1 if self.cfg == 1 else 2)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "nfe": self.nfe}

    @classmethod
    def from_manifest(cls, manifest: dict[str, Any]) -> PairSettings:
        """The settings that a store was made with."""
        return cls(**{field.name: manifest["settings"][field.name] for field in fields(cls)})

    def differences(self, other: PairSettings) -> list[str]:
        """Each setting in which `other` differs from these, as "steps: 18 -> 9". Teachers differ by weights: `differences` below."""
        names = [field.name for field in fields(self) if field.name != "teacher"]
        return [f"{name}: {getattr(self, name)} -> {getattr(other, name)}" for name in names if getattr(self, name) != getattr(other, name)]

    def command(self, out: str | Path) -> str:
        """The command line that makes or continues the store."""
        words = ["d2o", "pairs", "--teacher", self.teacher, "--n", str(self.n), "--out", str(out)]
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in ("teacher", "n") and value != field.default and not (field.name == "labels" and value == "none"):
                option = "--" + field.name.replace("_", "-")
                words += [option] if value is True else [option, f"{value:g}" if isinstance(value, float) else str(value)]
        return shlex.join(words)

    def units(self) -> list[Unit]:
        return cut(self.n, self.shard_size, "shard-{:05d}.safetensors")


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between two manifests that matters: other settings, or another teacher."""
    found = PairSettings.from_manifest(old).differences(PairSettings.from_manifest(new))
    was, now = old["teacher"], new["teacher"]
    if was["sha256"] != now["sha256"]:
        name = f"{was['name']} -> {now['name']}" if was["name"] != now["name"] else was["name"]
        found.insert(0, f"teacher: {name} (weights {was['sha256'][:12]} -> {now['sha256'][:12]})")
    return found


def new_manifest(settings: PairSettings, teacher: dict[str, Any], spec: dict[str, Any], compute: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a store without any shards yet. `teacher`: name, sha256, licence."""
    return {
        "format": FORMAT,
        "version": 1,
        "d2o": __version__,
        "settings": {**settings.to_dict(), "labels": label_mode(settings.labels, spec["classes"], teacher["name"])},
        "teacher": teacher,
        "spec": spec,
        "compute": compute,
        "noise_probe": probe(settings.seed, spec["shape"]),
        "shards": [],
    }


def store_folder(path: str | Path) -> WorkFolder:
    return WorkFolder(path, FORMAT, "shards")


def probe(seed: int, shape: Sequence[int]) -> list[float]:
    """The first few numbers of the first sample's noise."""
    return noise_for_seeds([seed], shape).flatten()[:8].tolist()


def check_probe(manifest: dict[str, Any], path: str | Path) -> None:
    """UserError when this torch draws other random numbers than the one that made the store. Rounding (another processor) is no matter."""
    settings = PairSettings.from_manifest(manifest)
    now = probe(settings.seed, manifest["spec"]["shape"])
    if not settings.store_noise and not np.allclose(now, manifest["noise_probe"], rtol=0, atol=1e-4):
        maker = manifest["compute"]["torch"]
        raise UserError(
            f"{path} was made by torch {maker}; this torch, {torch.__version__}, draws other noise from the store's seeds",
            "use that torch, or make the store again (with --store-noise the noise is kept and never derived)",
        )


def shard_record(manifest: dict[str, Any], unit: Unit) -> dict[str, Any]:
    """The metadata of a shard: what its content depends on, nothing else (not the teacher's path, nor how many pairs follow)."""
    settings, compute = manifest["settings"], manifest["compute"]
    made = {name: settings[name] for name in ("seed", "solver", "steps", "cfg", "labels", "dtype", "store_noise")}
    made |= {name: compute[name] for name in ("batch", "threads", "device")}
    made |= {"start": unit.start, "n": unit.n, "teacher_sha256": manifest["teacher"]["sha256"]}
    return {"format": FORMAT + "-shard", "version": 1, **made}


def write_shard(folder: WorkFolder, manifest: dict[str, Any], unit: Unit, made: tuple[Tensor, Tensor | None, Tensor]) -> dict[str, Any]:
    """Write the shard from (noise, labels, target); returns its entry for the manifest."""
    noise, labels, target = made
    tensors = {"target": target}
    if labels is not None:
        tensors["label"] = labels
    if manifest["settings"]["store_noise"]:
        tensors["noise"] = noise
    save_file(folder.path / unit.file, tensors, shard_record(manifest, unit))
    return _entry(folder.path / unit.file, unit, noise)


def adopt_shard(folder: WorkFolder, manifest: dict[str, Any], unit: Unit) -> dict[str, Any] | None:
    """The entry of a shard whose file is there but not recorded (its worker was killed in between); None if missing or not trusted."""
    path = folder.path / unit.file
    try:
        tensors, meta = load_file(path)
    except UserError:
        return None
    shape, dtype = (unit.n, *manifest["spec"]["shape"]), DTYPES[manifest["settings"]["dtype"]]
    target = tensors.get("target")
    if meta != shard_record(manifest, unit) or target is None or tuple(target.shape) != shape or target.dtype != dtype:
        return None
    noise = _noise(manifest, unit)
    if "noise" in tensors and not torch.equal(tensors["noise"], noise):
        return None
    return _entry(path, unit, noise)


def _entry(path: Path, unit: Unit, noise: Tensor) -> dict[str, Any]:
    sums = {"bytes": path.stat().st_size, "sha256": file_sha256(path), "noise_sha256": _sha256(noise)}
    return {"file": unit.file, "start": unit.start, "n": unit.n, **sums}


def _noise(manifest: dict[str, Any], unit: Unit) -> Tensor:
    first = manifest["settings"]["seed"] + unit.start
    return noise_for_seeds(range(first, first + unit.n), manifest["spec"]["shape"])


def _sha256(noise: Tensor) -> str:
    return hashlib.sha256(noise.contiguous().numpy().data).hexdigest()


def verify(path: str | Path, progress: Callable[[int, int, str], None] | None = None) -> list[str]:
    """Read everything and compare it with the manifest's checksums. Returns one line per problem, beginning with the shard's name.

    UserError: no store there, or its manifest is damaged.
    """
    folder, manifest, settings = _open(path)
    problems = []
    recorded, done = folder.recorded(), 0
    for unit in settings.units():
        entry = recorded.get(unit.file)
        problem = "not made yet" if entry is None else _problem(folder.path / unit.file, manifest, unit, entry)
        if problem:
            problems.append(f"{unit.file}: {problem}")
        done += unit.n
        if progress is not None:
            progress(done, settings.n, "")
    return problems


def _problem(path: Path, manifest: dict[str, Any], unit: Unit, entry: dict[str, Any]) -> str | None:
    if not path.exists():
        return "missing"
    if path.stat().st_size != entry["bytes"]:
        return f"{path.stat().st_size} bytes instead of {entry['bytes']}"
    if file_sha256(path) != entry["sha256"]:
        return "its checksum differs from the manifest's"
    if not manifest["settings"]["store_noise"] and _sha256(_noise(manifest, unit)) != entry["noise_sha256"]:
        return "its noise, derived from the seeds here, differs from the one it was made from (another torch or processor)"
    return None


def _open(path: str | Path) -> tuple[WorkFolder, dict[str, Any], PairSettings]:
    folder = store_folder(path)
    manifest = folder.manifest()
    if manifest is None:
        raise UserError(f"{path} is not a pair store (no {MANIFEST})", f"make one: d2o pairs --teacher digits --n 8192 --out {path}")
    try:
        return folder, manifest, PairSettings.from_manifest(manifest)
    except (KeyError, TypeError) as error:
        raise UserError(f"{Path(path) / MANIFEST} is damaged ({type(error).__name__}: {error})") from error


class PairStore:
    """A finished pair store, for reading. Threads may share it.

    len(store), store[i] -> (noise [C, H, W] float32, class index or None, target [C, H, W] float32), store.batch(indices) for many.
    Stores up to `cache_bytes` (noises and targets as float32) are read into memory by the first `batch`; larger ones are memory-mapped.
    UserError: no store, damaged, unfinished, or made by a torch that draws other noise.
    """

    def __init__(self, path: str | Path, cache_bytes: int = CACHE_BYTES):
        self.path = Path(path)
        folder, self.manifest, self.settings = _open(path)
        units = self.settings.units()
        left = folder.left(units)
        if left:
            hint = f"continue it: {self.settings.command(path)}"
            raise UserError(f"{path} is not finished: {len(left)} of {len(units)} shards are missing", hint)
        check_probe(self.manifest, path)
        self.spec: dict[str, Any] = self.manifest["spec"]
        self.shape = tuple(self.spec["shape"])
        self._files = [unit.file for unit in units]
        self._shards: dict[int, dict[str, Tensor]] = {}
        self._labelled = self.settings.labels != "none"
        self._fits = 8 * len(self) * math.prod(self.shape) <= cache_bytes
        self._cache: tuple[np.ndarray | None, ...] | None = None

    def __len__(self) -> int:
        return self.settings.n

    def __getitem__(self, index: int) -> tuple[Tensor, int | None, Tensor]:
        index = range(len(self))[index]  # counts from the end when negative; raises IndexError
        noise, labels, target = self._gather(torch.tensor([index]))
        return noise[0], None if labels is None else int(labels[0]), target[0]

    def batch(self, indices: Sequence[int] | Tensor | np.ndarray) -> tuple[Tensor, Tensor | None, Tensor]:
        """(noise [k, C, H, W] float32, class indices [k] int64 or None, target [k, C, H, W] float32), in the order of `indices`.

        Negative indices count from the end. IndexError: out of range.
        """
        index = torch.as_tensor(indices, dtype=torch.int64).reshape(-1)
        if len(index) and (int(index.min()) < -len(self) or int(index.max()) >= len(self)):
            raise IndexError(f"the store has {len(self)} pairs; asked for {int(index.min())} to {int(index.max())}")
        index = torch.where(index < 0, index + len(self), index)
        if not self._fits:
            return self._gather(index)
        if self._cache is None:
            # As numpy arrays: batches are read by a thread beside the one that computes, where torch would start OpenMP threads of its own.
            self._cache = tuple(None if t is None else t.numpy() for t in self._gather(torch.arange(len(self))))
        noise, labels, target = (None if t is None else torch.from_numpy(t[index.numpy()]) for t in self._cache)
        assert noise is not None and target is not None
        return noise, labels, target

    @property
    def fingerprint(self) -> str:
        """sha256 over the teacher's weights and the shards' checksums, whatever the folder is called."""
        content = [self.manifest["teacher"]["sha256"], *(entry["sha256"] for entry in self.manifest["shards"])]
        return hashlib.sha256(json.dumps([self.settings.seed, content]).encode()).hexdigest()

    def verify(self) -> list[str]:
        """Check everything on disk against the checksums; one line per problem."""
        return verify(self.path)

    def _gather(self, index: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        target = torch.empty(len(index), *self.shape)
        stored = self.settings.store_noise
        noise = torch.empty_like(target) if stored else noise_for_seeds((self.settings.seed + index).tolist(), self.shape)
        labels = torch.empty(len(index), dtype=torch.int64) if self._labelled else None
        shards = index // self.settings.shard_size
        for number in shards.unique().tolist():
            shard, mine = self._shard(number), (shards == number).nonzero()[:, 0]
            rows = index[mine] - number * self.settings.shard_size
            target[mine] = shard["target"][rows].float()
            if labels is not None:
                labels[mine] = shard["label"][rows]
            if stored:
                noise[mine] = shard["noise"][rows]
        return noise, labels, target

    def _shard(self, number: int) -> dict[str, Tensor]:
        """The shard's tensors, mapped: a page is read from the disk when it is touched."""
        if number not in self._shards:
            self._shards[number] = load_file(self.path / self._files[number])[0]
        return self._shards[number]
