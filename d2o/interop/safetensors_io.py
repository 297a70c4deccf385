"""Safetensors files with one JSON metadata record, written atomically. Every checkpoint, shard and training state goes
through here."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import textwrap
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as _serialise

from d2o.errors import UserError
from d2o.inputs import JsonObject, check_input, parse_json
from d2o.interop import seal
from d2o.interop.temporary import temporary_file

META_KEY = "d2o"  # a single key: the format keeps several in no fixed order, and equal content must give equal bytes


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed to disk and takes `path`'s name, on failure it is
    removed.

    Raises UserError when the folder cannot be written or the disk is full.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_file(path) as temporary:
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_UMASK)
            os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        raise write_error(path, error) from error


def _sync(folder: Path) -> None:
    """Let the folder's new name reach the disk too, where the file system can do that."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _read_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


_UMASK = _read_umask()


def write_error(path: str | os.PathLike, error: OSError) -> UserError:
    """The one-line form of a failed write."""
    reasons = {
        errno.ENOSPC: "the disk is full",
        errno.EDQUOT: "the disk quota is used up",
        errno.EACCES: "permission denied",
        errno.EPERM: "permission denied",
        errno.EROFS: "the file system is read-only",
        errno.ENOTDIR: "a part of the path is a file",
        errno.EEXIST: "a file of that name is in the way",
        errno.EISDIR: "a folder of that name is in the way",
    }
    reason = reasons.get(error.errno or 0, error.strerror or str(error))
    return UserError(f"cannot write {path}: {reason}", "choose another --out, or make room and run again")


def atomic_write(path: str | os.PathLike, data: bytes | str) -> None:
    """Write the whole file or nothing. Names of files that are no valid UTF-8 become escapes, which JSON reads back."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data)


def save_file(path: str | os.PathLike, tensors: dict[str, torch.Tensor], meta: JsonObject) -> str:
    """Write tensors and a JSON-able record, and return the file's sha256. Equal content gives equal bytes."""
    pieces = _pieces(tensors, meta)
    digest = hashlib.sha256()
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        for piece in pieces:
            file.write(piece)
            digest.update(piece)
    return digest.hexdigest()


def to_bytes(tensors: dict[str, torch.Tensor], meta: JsonObject) -> bytes:
    """The bytes of the file that `save_file` writes."""
    return b"".join(_pieces(tensors, meta))


def _pieces(tensors: dict[str, torch.Tensor], meta: JsonObject) -> list[bytes | memoryview]:
    plain = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    return seal.sealed(_serialise(plain, {META_KEY: json.dumps({**meta, **seal.BLANK}, sort_keys=True)}))


def read_meta(path: str | os.PathLike) -> JsonObject:
    """The JSON record of a file that d2o wrote. UserError: missing, truncated, or not one of ours."""
    return _unsealed(_record(path))


def load_file(
    path: str | os.PathLike, device: str = "cpu", prefix: str = ""
) -> tuple[dict[str, torch.Tensor], JsonObject]:
    """All tensors, or those whose names begin with `prefix`, and the JSON record, after a look at all of the file's
    bytes. Errors as `read_meta`, or: the bytes have changed."""
    record = _record(path)
    seal.check_digest(path, record)
    with _open(path, device) as file:
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 (not a dict)
        return {name: file.get_tensor(name) for name in names}, _unsealed(record)


def check_file(path: str | os.PathLike) -> None:
    """UserError: not a file of d2o's, or its bytes are not those that were written."""
    seal.check_digest(path, _record(path))


def _record(path: str | os.PathLike) -> JsonObject:
    with _open(path) as file:
        metadata = file.metadata() or {}
    if META_KEY not in metadata:
        raise UserError(
            f"{path} is a safetensors file, but not one of d2o's (no {META_KEY!r} metadata)",
            "expected a file made by `d2o`",
        )
    try:
        record = parse_json(metadata[META_KEY])
    except ValueError as error:
        raise UserError(f"{path}: its {META_KEY!r} metadata is not JSON ({error})") from error
    if not isinstance(record, dict):
        raise UserError(f"{path}: its {META_KEY!r} metadata is not a record (a JSON object)")
    seal.check_sealed_size(path, record)
    return record


def _unsealed(record: JsonObject) -> JsonObject:
    return {key: value for key, value in record.items() if key not in seal.BLANK}


@contextlib.contextmanager
def _open(path: str | os.PathLike, device: str = "cpu") -> Iterator[safe_open]:
    check_input(path, "a .safetensors file")
    try:
        with safe_open(path, framework="pt", device=device) as file:
            yield file
    except SafetensorError as error:
        why = textwrap.shorten(str(error), 200)  # it may quote the whole of a header
        raise UserError(
            f"{path} is truncated or not a safetensors file ({why})", "make it again, or check the download"
        ) from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def resolve_checkpoint(path: str | os.PathLike) -> Path:
    """A checkpoint's own path, or of a run folder its `best` checkpoint, else its `last`. UserError: a folder that is
    no run."""
    path = Path(path)
    if not path.is_dir():
        return path
    for name in ("best", "last"):
        if (file := path / "checkpoints" / f"{name}.safetensors").is_file():
            return file
    what = f"{path} is a folder without a checkpoint (checkpoints/best.safetensors or last.safetensors)"
    raise UserError(what, "expected a .safetensors file, or a folder that `d2o train` wrote")


def file_sha256(path: str | os.PathLike) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(seal.CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def tensors_sha256(tensors: dict[str, torch.Tensor]) -> str:
    """Hex digest of names, dtypes, shapes and values, in sorted order: the fingerprint of a network."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu").contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
