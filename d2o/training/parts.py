"""The tensors of a state whose players are sharded: a folder of safetensors files, one of each process, written and
read by torch.distributed.checkpoint, which reads it on any number of processes.

There are two such folders, of which the committed state (`checkpoint.state_file`) names one, with the sha256 of each
of its files. The next state's parts go to the other; writing the state's record is the commit, after which the first is
removed (`drop`). Killed before it, the old record and its parts stand. No pickles: torch's own format has them.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from d2o.errors import UserError
from d2o.inputs import JsonObject
from d2o.interop.safetensors_io import file_sha256, write_error

PLACES = ("state-a", "state-b")

Parts = JsonObject
"""`{"folder": one of PLACES, "files": {name: sha256}}`, as the state's record has it."""


def write(checkpoints: Path, tensors: dict[str, Tensor], committed: Parts | None) -> Parts:
    """Write the parts of all processes beside the committed ones; all call this. UserError: it cannot be written."""
    from torch.distributed.checkpoint import HuggingFaceStorageWriter, save
    from torch.distributed.checkpoint.api import CheckpointException

    place = PLACES[1 if committed is not None and committed["folder"] == PLACES[0] else 0]
    folder = checkpoints / place
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        checkpoints.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    try:
        named = dict(sorted(tensors.items()))  # a resumed run has its moments in another order
        save(named, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values() if isinstance(cause, OSError)]
        raise write_error(folder, causes[0]) if causes else error from error
    mine = {}
    for path in sorted(folder.glob(f"shard-{dist.get_rank() + 1:05d}-*")):
        put_in_order(path)
        mine[path.name] = file_sha256(path)
    files: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(files, mine)
    return {"folder": place, "files": {name: digest for one in files for name, digest in one.items()}}


def put_in_order(path: Path) -> None:
    """Sort the entries of a safetensors file's metadata, in place: they are written in another order by every process,
    and equal content is to give equal bytes."""
    with path.open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length
        file.seek(8)
        file.write(text.ljust(length))
        file.flush()
        os.fsync(file.fileno())


def check_bytes(checkpoints: Path, parts: Parts) -> None:
    """UserError: not the files that the record names, or their bytes have changed."""
    folder = checkpoints / str(parts["folder"])
    for name, digest in parts["files"].items():
        path = folder / Path(name).name
        if not path.is_file():
            raise UserError(f"{path}, a part of the training state, is missing")
        if file_sha256(path) != digest:
            raise UserError(f"{path}, a part of the training state, has changed since it was written")


def read_parts(
    checkpoints: Path, parts: Parts, like: Callable[[str, torch.Size, torch.dtype], Tensor], prefix: str = ""
) -> dict[str, Tensor]:
    """All tensors of the state, or those whose names begin with `prefix`, as `like(name, whole shape, dtype)` makes
    room for them: whole, or this process's share of them."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    folder = checkpoints / str(parts["folder"])
    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    wanted = {name: held for name, held in found.items() if name.startswith(prefix)}
    tensors = {name: like(name, held.size, held.properties.dtype) for name, held in wanted.items()}  # type: ignore[union-attr]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*assuming the intent is to load in a single process")
        load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=not dist.is_initialized())
    return tensors


def drop(checkpoints: Path, committed: Parts | None) -> None:
    """Remove the parts that the committed state does not name."""
    for place in PLACES:
        if committed is None or committed["folder"] != place:
            shutil.rmtree(checkpoints / place, ignore_errors=True)
