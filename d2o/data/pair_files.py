"""The shards of a pair store: what is in one, how it is written, and how one is recognised that a killed worker left
behind."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from d2o.condition import Condition
from d2o.data.pair_reading import first_not_finite, misfit
from d2o.data.pair_record import check_manifest
from d2o.data.pair_settings import FORMAT, PairSettings
from d2o.data.prompts import pack, unpack
from d2o.diffusion.noise import noise_for_seeds
from d2o.errors import UserError
from d2o.inputs import JsonObject
from d2o.interop.safetensors_io import load_file
from d2o.work.base import SharedFolder
from d2o.work.folder import MANIFEST, Unit
from d2o.work.remote import open_folder


@dataclass
class ShardContent:
    """The content of a shard of n pairs: `noise` [n, C, H, W] float32, `target` [n, C, H, W] in the store's dtype,
    what they were asked to be, and `image` uint8 [n, 3, H, W] if decoded."""

    noise: Tensor
    target: Tensor
    condition: Condition
    image: Tensor | None = None


def store_folder(path: object) -> SharedFolder:
    return open_folder(str(path), FORMAT, "shards")


def open_store(path: str | Path) -> tuple[SharedFolder, JsonObject, PairSettings]:
    """(folder, manifest, settings) of a store, finished or not. UserError: no store there, or its manifest is
    damaged."""
    folder = store_folder(path)
    manifest = folder.manifest()
    if manifest is None:
        raise UserError(
            f"{path} is not a pair store (no {MANIFEST})", f"make one: d2o pairs --teacher digits --n 8192 --out {path}"
        )
    check_manifest(manifest, f"{folder.url}/{MANIFEST}")
    return folder, manifest, PairSettings.from_manifest(manifest)


def shard_record(manifest: JsonObject, unit: Unit) -> JsonObject:
    """The metadata of a shard: what its content depends on, nothing else (not the teacher's path, nor how many pairs
    follow)."""
    settings, compute = PairSettings.from_manifest(manifest), manifest["compute"]
    made: JsonObject = {"solver": settings.ode.to_dict()}
    made |= {name: getattr(settings, name) for name in ("seed", "labels", "rewire", "dtype", "store_noise", "decode")}
    made["cfg"] = list(settings.cfg) if isinstance(settings.cfg, tuple) else settings.cfg
    made |= {name: compute[name] for name in compute if name not in ("torch", "processor")}
    made |= {"start": unit.start, "n": unit.n, "teacher_sha256": manifest["teacher"]["sha256"]}
    if "prompts" in manifest:
        made |= {"prompts_sha256": manifest["prompts"]["sha256"], "per_prompt": settings.per_prompt}
    if settings.sdxl_uncond is not None:
        made["sdxl_uncond"] = settings.sdxl_uncond
    if settings.rewire != "none":
        made["permuted"] = settings.n  # the permutation is over all pairs
    return {"format": FORMAT + "-shard", "version": 1, **made}


def write_shard(folder: SharedFolder, manifest: JsonObject, unit: Unit, made: ShardContent) -> JsonObject:
    """Write the shard; returns its entry for the manifest."""
    tensors = {"target": made.target}
    if made.condition.labels is not None:
        tensors["label"] = made.condition.labels
    if made.condition.prompts is not None:
        tensors |= pack(made.condition.prompts)
    if made.condition.guidance is not None:
        tensors["guidance"] = made.condition.guidance
    if made.image is not None:
        tensors["image"] = made.image
    if manifest["settings"]["store_noise"]:
        tensors["noise"] = made.noise
    return _entry(unit, folder.save(unit.file, tensors, shard_record(manifest, unit)), made.noise)


def adopt_shard(folder: SharedFolder, manifest: JsonObject, unit: Unit) -> JsonObject | None:
    """The entry of a shard whose file is there but not recorded (its worker was killed in between); None if missing or
    not trusted."""
    if folder.size(unit.file) < 0:
        return None
    try:
        path = folder.local(unit.file)
        tensors, meta = load_file(path)
    except UserError:
        return None
    if meta != shard_record(manifest, unit) or misfit(manifest, tensors, unit) or first_not_finite(tensors) is not None:
        return None
    noise = unit_noise(manifest, unit)
    if "noise" in tensors and not torch.equal(tensors["noise"], noise):
        return None
    return _entry(unit, {"bytes": path.stat().st_size, "sha256": folder.sha256(unit.file)}, noise)


def _entry(unit: Unit, saved: JsonObject, noise: Tensor) -> JsonObject:
    return {"file": unit.file, "start": unit.start, "n": unit.n, **saved, "noise_sha256": noise_sha256(noise)}


def unit_noise(manifest: JsonObject, unit: Unit) -> Tensor:
    """The noise of the unit's pairs, derived from their seeds."""
    first = manifest["settings"]["seed"] + unit.start
    return noise_for_seeds(range(first, first + unit.n), manifest["spec"]["shape"])


def noise_sha256(noise: Tensor) -> str:
    return hashlib.sha256(noise.contiguous().numpy().data).hexdigest()


def shard_prompts(tensors: dict[str, Tensor], rows: Tensor | None = None) -> list[str]:
    """The prompts of a shard's rows (all by default)."""
    return unpack(tensors, torch.arange(len(tensors["prompt_ends"])) if rows is None else rows)
