"""Writing images as a folder, zip, tar or npz, in parts that are made in any order and joined without looking at the
pixels again.

    folder  00000/img00000000.png ..., dataset.json (labels, as EDM writes them), samples.json
    zip     the same, as stored (not compressed again) entries
    tar     img00000000.png, img00000000.cls, ... (WebDataset), .samples.json
    npz     arr_0 uint8 [n, H, W, C], labels int64 [n], samples (the text of samples.json)

`samples.json` records what made the images. Nothing depends on the clock: equal images and records give equal bytes.
A part is a dict of tensors, so that it can be kept as a .safetensors file until all are there. Parts are handled with
numpy: they are made in threads of their own, where the first parallel torch operation would start a second set of
OpenMP threads, which then spins beside the one that computes (measured: a third of the speed).
"""

from __future__ import annotations

import errno
import json
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from d2o.data.images import save_png_bytes
from d2o.errors import UserError, unknown
from d2o.inputs import JsonObject, check_size, json_object, parse_json, read_json
from d2o.interop.npz import read_npz

Part = dict[str, torch.Tensor]
RECORD = "samples.json"
PARTIAL = ".partial"
"""End of the name of a file that is being written into a folder; only one worker at a time makes it, and another after
it is killed."""
PER_FOLDER = 1000
MAX_RECORD = 1 << 24  # bytes of samples.json
DOS_DATE = 33  # 1980-01-01, the first day that a zip can name
LOCAL, CENTRAL = "<4s5H3I2H", "<4s6H3I5H2I"
MANY, LARGE = 0xFFFF, 0xFFFFFFFF  # from here on a zip needs its 64-bit records


class Archive:
    """One format. `out` is what the user asked for; `record` goes into the archive."""

    in_place = False
    """Whether `encode` writes into `out`; else only `join` makes the file."""

    def __init__(self, out: Path):
        self.out = out

    def encode(self, start: int, images: torch.Tensor, labels: torch.Tensor | None) -> Part:
        """Images start .. start + k - 1 (uint8 [k, C, H, W], labels int64 [k] or None) as a part."""
        return self.pack(start, _pngs(images), labels)

    def pack(self, start: int, files: list[bytes], labels: torch.Tensor | None) -> Part:
        """`encode` for images that are PNG files already."""
        raise NotImplementedError

    def join(
        self,
        target: Path,
        parts: Callable[[], Iterator[Part]],
        labels: torch.Tensor | None,
        n: int,
        record: JsonObject,
    ) -> None:
        """Write the file that becomes `out` (in place: its record) to `target`. `parts()` yields all in order; labels
        int64 [n] or None."""
        raise NotImplementedError

    def read_record(self) -> JsonObject | None:
        """The record in `out`; None if it holds none. Any exception: not a file of this format."""
        raise NotImplementedError


class ZipArchive(Archive):
    def pack(self, start: int, files: list[bytes], labels: torch.Tensor | None) -> Part:
        crcs = [zlib.crc32(file) for file in files]
        entries = [
            _zip_local(png_path(i), crc, file) for i, (crc, file) in enumerate(zip(crcs, files, strict=True), start)
        ]
        return {
            "body": _bytes(entries),
            "crc": torch.tensor(crcs),
            "length": torch.tensor([len(file) for file in files]),
        }

    def join(
        self,
        target: Path,
        parts: Callable[[], Iterator[Part]],
        labels: torch.Tensor | None,
        n: int,
        record: JsonObject,
    ) -> None:
        directory: list[bytes] = []
        offset = 0

        def list_entry(name: bytes, crc: int, length: int) -> None:
            nonlocal offset
            directory.append(_zip_central(name, crc, length, offset))
            offset += struct.calcsize(LOCAL) + len(name) + length

        with open(target, "wb") as file:
            for part in parts():
                file.write(part["body"].numpy().data)
                for crc, length in zip(part["crc"].tolist(), part["length"].tolist(), strict=True):
                    list_entry(png_path(len(directory)), crc, length)
            for name, data in ((b"dataset.json", _dataset_json(labels)), (RECORD.encode(), _record_json(record))):
                crc = zlib.crc32(data)
                file.write(_zip_local(name, crc, data))
                list_entry(name, crc, len(data))
            listing = b"".join(directory)
            file.write(listing + _zip_end(len(directory), len(listing), offset))

    def read_record(self) -> JsonObject | None:
        with zipfile.ZipFile(self.out) as file:
            if RECORD not in file.namelist():
                return None
            check_size(RECORD, file.getinfo(RECORD).file_size, MAX_RECORD)
            return json_object(parse_json(file.read(RECORD)), RECORD)


class TarArchive(Archive):
    def pack(self, start: int, files: list[bytes], labels: torch.Tensor | None) -> Part:
        entries = []
        for i, file in enumerate(files):
            entries.append(_tar_entry(f"img{start + i:08d}.png", file))
            if labels is not None:
                entries.append(_tar_entry(f"img{start + i:08d}.cls", str(int(labels[i])).encode()))
        return {"body": _bytes(entries)}

    def join(
        self,
        target: Path,
        parts: Callable[[], Iterator[Part]],
        labels: torch.Tensor | None,
        n: int,
        record: JsonObject,
    ) -> None:
        with open(target, "wb") as file:
            # First, where it is found at once; with a dot, since WebDataset readers take every other name for a sample.
            file.write(_tar_entry("." + RECORD, _record_json(record)))
            for part in parts():
                file.write(part["body"].numpy().data)
            file.write(bytes(2 * tarfile.BLOCKSIZE))

    def read_record(self) -> JsonObject | None:
        with tarfile.open(self.out, "r:") as file:
            first = file.next()
            content = file.extractfile(first) if first is not None and first.name == "." + RECORD else None
            return None if content is None else json_object(parse_json(content.read(MAX_RECORD)), RECORD)


class Npz(Archive):
    def encode(self, start: int, images: torch.Tensor, labels: torch.Tensor | None) -> Part:
        pixels = np.ascontiguousarray(images.numpy().transpose(0, 2, 3, 1))
        return {"body": torch.from_numpy(pixels.reshape(-1)), "shape": torch.tensor([pixels.shape[1:]])}

    def join(
        self,
        target: Path,
        parts: Callable[[], Iterator[Part]],
        labels: torch.Tensor | None,
        n: int,
        record: JsonObject,
    ) -> None:
        shape = (n, *next(parts())["shape"][0].tolist())
        more = {"samples": np.array(_record_json(record).decode())}
        if labels is not None:
            more["labels"] = labels.numpy()
        with zipfile.ZipFile(target, "w") as archive:
            with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
                for part in parts():
                    file.write(part["body"].numpy().data)
            for name in sorted(more):
                with archive.open(zipfile.ZipInfo(name + ".npy"), "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, more[name], allow_pickle=False)

    def read_record(self) -> JsonObject | None:
        arrays = read_npz(self.out, lambda name: name == "samples")
        return json_object(parse_json(str(arrays["samples"])), RECORD) if arrays else None


class FolderArchive(Archive):
    in_place = True

    def pack(self, start: int, files: list[bytes], labels: torch.Tensor | None) -> Part:
        for k in range(start // PER_FOLDER, (start + len(files) - 1) // PER_FOLDER + 1):
            (self.out / f"{k:05d}").mkdir(parents=True, exist_ok=True)
        grows = (
            self.out / RECORD
        ).exists()  # what is finished stays so until all are there: `join` gives the new images their names
        for i, file in enumerate(files, start):
            path = self.out / png_path(i).decode()
            hidden = path.with_name(f".{path.name}{PARTIAL}")
            hidden.write_bytes(file)
            if not grows:
                os.replace(hidden, path)
        return {}

    def join(
        self,
        target: Path,
        parts: Callable[[], Iterator[Part]],
        labels: torch.Tensor | None,
        n: int,
        record: JsonObject,
    ) -> None:
        for hidden in sorted(self.out.glob(f"*/.img*{PARTIAL}")):
            os.replace(hidden, hidden.with_name(hidden.name[1:].removesuffix(PARTIAL)))
        listing = self.out / f".dataset.json{PARTIAL}"
        listing.write_bytes(_dataset_json(labels))
        os.replace(listing, self.out / "dataset.json")
        target.write_bytes(_record_json(record))

    def read_record(self) -> JsonObject | None:
        path = self.out / RECORD
        return json_object(read_json(path, MAX_RECORD), RECORD) if path.exists() else None


FORMATS: dict[str, type[Archive]] = {"": FolderArchive, ".zip": ZipArchive, ".tar": TarArchive, ".npz": Npz}


def archive_for(out: str | Path) -> Archive:
    """The format by suffix; no suffix, or a folder that exists, is a folder. UserError: unknown suffix (with the
    list)."""
    out = Path(out)
    suffix = "" if out.is_dir() else out.suffix
    if suffix not in FORMATS:
        raise unknown("output format", suffix, ["a folder (no suffix)", ".zip", ".tar", ".npz"])
    return FORMATS[suffix](out)


def join_pieces(pieces: list[Part]) -> Part:
    """Parts that follow each other, as one."""
    return {name: torch.from_numpy(np.concatenate([piece[name].numpy() for piece in pieces])) for name in pieces[0]}


def check_free(archive: Archive) -> JsonObject | None:
    """None when `out` is free; the record of a finished archive of ours there. UserError: something else is in the
    way."""
    out = archive.out
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if out.is_dir() != archive.in_place:
        raise UserError(f"{out} is a {'folder' if out.is_dir() else 'file'}", "choose another --out")
    try:
        record = archive.read_record()
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EIO):
            raise UserError(f"cannot read {out}: {os.strerror(error.errno)}") from error
        record = None
    except Exception:  # a foreign file may raise anything: zipfile, tarfile, numpy and json have no common error
        record = None
    if not isinstance(record, dict) or record.get("format") != "d2o-samples":
        raise UserError(
            f"{out} exists and holds no samples that d2o made; it is left as it is",
            "choose another --out, or move it away",
        )
    return record


def _pngs(images: torch.Tensor) -> list[bytes]:
    if images.shape[1] not in (1, 3):
        raise UserError(f"images of {images.shape[1]} channels cannot be PNG files", "write .npz")
    return [save_png_bytes(image) for image in images]


def _bytes(pieces: list[bytes]) -> torch.Tensor:
    return torch.frombuffer(bytearray(b"".join(pieces)), dtype=torch.uint8)


def png_path(i: int) -> bytes:
    return b"%05d/img%08d.png" % (i // PER_FOLDER, i)


def _dataset_json(labels: torch.Tensor | None) -> bytes:
    rows = None if labels is None else [[png_path(i).decode(), label] for i, label in enumerate(labels.tolist())]
    return json.dumps({"labels": rows}).encode()


def _record_json(record: JsonObject) -> bytes:
    return (json.dumps(record, indent=1, sort_keys=True) + "\n").encode()


def _zip_local(name: bytes, crc: int, data: bytes) -> bytes:
    """A stored entry (PKWARE APPNOTE 4.3.7); it does not say where it stands, so parts can be joined as they are."""
    return struct.pack(LOCAL, b"PK\3\4", 20, 0, 0, 0, DOS_DATE, crc, len(data), len(data), len(name), 0) + name + data


def _zip_central(name: bytes, crc: int, length: int, offset: int) -> bytes:
    """The entry's line in the central directory (4.3.12), with the 64-bit offset as an extra field where it needs
    one."""
    extra = struct.pack("<2HQ", 1, 8, offset) if offset >= LARGE else b""
    made_by, needs, mode = 3 << 8 | 45, 45 if extra else 20, 0o100644 << 16  # 3: Unix
    fields = (
        made_by,
        needs,
        0,
        0,
        0,
        DOS_DATE,
        crc,
        length,
        length,
        len(name),
        len(extra),
        0,
        0,
        0,
        mode,
        min(offset, LARGE),
    )
    return struct.pack(CENTRAL, b"PK\1\2", *fields) + name + extra


def _zip_end(count: int, length: int, offset: int) -> bytes:
    """The end of the central directory (4.3.14 to 4.3.16)."""
    end = struct.pack(
        "<4s4H2IH", b"PK\5\6", 0, 0, min(count, MANY), min(count, MANY), min(length, LARGE), min(offset, LARGE), 0
    )
    if count < MANY and length < LARGE and offset < LARGE:
        return end
    record = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, length, offset)
    return record + struct.pack("<4sIQI", b"PK\6\7", 0, offset + length, 1) + end


def _tar_entry(name: str, data: bytes) -> bytes:
    """A regular file, mode 644, of nobody and 1970 (POSIX ustar), padded to whole blocks; several times faster than
    tarfile's header."""
    header = bytearray(tarfile.BLOCKSIZE)
    nobody, length, time = b"0000000", b"%011o" % len(data), b"%011o" % 0
    struct.pack_into(
        "100s8s8s8s12s12s8sc", header, 0, name.encode(), b"0000644", nobody, nobody, length, time, b" " * 8, b"0"
    )
    header[257:265] = b"ustar\x0000"
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data + bytes(-len(data) % tarfile.BLOCKSIZE)
