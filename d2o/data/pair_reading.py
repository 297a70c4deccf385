"""Reading a shard of a pair store: its bytes are those of the manifest, its tensors those of the settings, its numbers
finite."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from d2o.data.pair_settings import DTYPES, PairSettings
from d2o.errors import UserError
from d2o.inputs import JsonObject
from d2o.interop.safetensors_io import load_file
from d2o.interop.seal import check_against
from d2o.work.base import MANIFEST, SharedFolder
from d2o.work.folder import Unit

ROWS_BYTES = 2**24
"""Bytes of a shard that are looked at at a time."""
PATIENCE = 3
"""Looks at a manifest that names another content than a shard has: it may be another worker's that has just been
written."""

_finite: set[tuple[str, str]] = set()


def read_shard(
    folder: SharedFolder, manifest: JsonObject, unit: Unit, entry: JsonObject
) -> tuple[dict[str, Tensor], JsonObject]:
    """The tensors (mapped) and the record of a shard that the manifest lists as `entry`, with at least the unit's
    pairs.

    All its bytes are read when it is first touched in this process. UserError, with the file and the way to repair it:
    missing, not the bytes that were written, other tensors than the store's settings say, a value that is not finite
    (with the first pair that holds one).
    """
    path = folder.local(unit.file)
    if not path.exists():
        raise bad_shard(manifest, folder, unit, "missing")
    entry = _as_written(folder, manifest, unit, path, entry)
    tensors, record = load_file(path)
    if why := misfit(manifest, tensors, replace(unit, n=entry["n"])):
        raise bad_shard(manifest, folder, unit, why)
    if (key := (str(path), entry["sha256"])) not in _finite:
        if (row := first_not_finite(tensors)) is not None:
            raise bad_shard(
                manifest, folder, unit, f"pair {unit.start + row} holds values that are not finite (NaN or infinite)"
            )
        _finite.add(key)
    return tensors, record


def _as_written(folder: SharedFolder, manifest: JsonObject, unit: Unit, path: Path, entry: JsonObject) -> JsonObject:
    """The entry that the file's bytes agree with: this one, or a later one of a store that has grown meanwhile."""
    for look in range(PATIENCE):
        if check_against(path, entry["sha256"]):
            return entry
        time.sleep(0.2 * look)
        entry = folder.recorded().get(unit.file, entry)
        path = folder.local(unit.file)
    raise bad_shard(manifest, folder, unit, f"its checksum (sha256) differs from that in {MANIFEST}")


def bad_shard(manifest: JsonObject, folder: SharedFolder, unit: Unit, why: str) -> UserError:
    """The refusal of a shard, and how it is made again."""
    command = PairSettings.from_manifest(manifest).command(folder.url)
    return UserError(f"{folder.url}/{unit.file} is damaged: {why}", f"to repair: delete it, and run: {command}")


def misfit(manifest: JsonObject, tensors: dict[str, Tensor], unit: Unit) -> str | None:
    """What of the unit's shard is not as the store's settings say; None if nothing is."""
    settings, spec, n = manifest["settings"], manifest["spec"], unit.n
    shape = (n, *spec["shape"])
    wanted: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"target": (shape, DTYPES[settings.get("dtype", "fp32")])}
    if settings.get("store_noise"):
        wanted["noise"] = (shape, torch.float32)
    if settings.get("labels", "random") not in ("none", "text"):
        wanted["label"] = ((n,), torch.int64)
    if isinstance(settings.get("cfg"), (list, tuple)):
        wanted["guidance"] = ((n,), torch.float32)
    if "prompts" in manifest:
        wanted["prompt_ends"] = ((n,), torch.int64)
        wanted["prompt_bytes"] = (
            tuple(tensors["prompt_bytes"].shape[:1]) if "prompt_bytes" in tensors else (),
            torch.uint8,
        )
    for name, (size, dtype) in wanted.items():
        found = tensors.get(name)
        if found is None or tuple(found.shape) != size or found.dtype != dtype:
            held = "no tensor" if found is None else f"{str(found.dtype).removeprefix('torch.')} {list(found.shape)}"
            return f"it holds {held} as {name}; expected {str(dtype).removeprefix('torch.')} {list(size)}"
    if settings.get("decode") and (
        "image" not in tensors or tensors["image"].dtype != torch.uint8 or len(tensors["image"]) != n
    ):
        return "it holds no images, which the store was made with"
    if "label" in wanted and not _within(tensors["label"].numpy(), spec["classes"]):
        return f"a class is out of range; the teacher has 0 to {spec['classes'] - 1}"
    if "guidance" in wanted:
        scales = PairSettings.from_manifest(manifest).scales(unit.start, n)
        if scales is None or not np.array_equal(tensors["guidance"].numpy(), scales.numpy()):
            return "its guidance scales are not those of its pairs' seeds"
    if "prompts" in manifest and not _ends_fit(tensors["prompt_ends"].numpy(), len(tensors["prompt_bytes"])):
        return "its prompts do not end where it says"
    return None


def _within(labels: np.ndarray, classes: int) -> bool:
    return bool(((labels >= 0) & (labels < classes)).all())


def _ends_fit(ends: np.ndarray, size: int) -> bool:
    return bool((np.diff(ends, prepend=0) >= 0).all() and ends[-1] == size)


def first_not_finite(tensors: dict[str, Tensor]) -> int | None:
    """The first row of targets or noises that holds a NaN or an infinite number. By numpy, since it runs in threads,
    see `data.stream`."""
    rows = []
    for name in ("target", "noise"):
        if name in tensors:
            values = _bits(tensors[name])
            step = max(1, ROWS_BYTES // max(values[:1].nbytes, 1))
            for first in range(0, len(values), step):
                bad = _not_finite(values[first : first + step])
                if bad.any():
                    rows.append(first + int(np.flatnonzero(bad)[0]))
                    break
    return min(rows, default=None)


def _bits(tensor: Tensor) -> np.ndarray:
    return tensor.view(torch.int16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def _not_finite(values: np.ndarray) -> np.ndarray:
    """Which rows hold one. bfloat16 comes as its bits, whose exponent is all ones then."""
    bad = (values & 0x7F80) == 0x7F80 if values.dtype == np.int16 else ~np.isfinite(values)
    return bad.reshape(len(values), -1).any(axis=1)
