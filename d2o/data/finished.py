"""The images of a finished archive as parts of a larger one, as they are: nothing is decoded but pixels that lie there
plainly."""

from __future__ import annotations

import io
import tarfile
import zipfile
from typing import Any

import torch
from PIL import Image

from d2o.data.archive import Archive, FolderArchive, Npz, Part, TarArchive, ZipArchive, png_path
from d2o.data.images import open_images


class Finished:
    """The first `n` images of a finished archive of ours, held open: what is read later is of the file that was there,
    whatever takes its place."""

    def __init__(self, archive: Archive, n: int):
        self.archive, self.n = archive, n
        self.source: Any = None  # the opened archive, of any of three kinds
        if isinstance(archive, ZipArchive):
            self.source = zipfile.ZipFile(archive.out)
        elif isinstance(archive, TarArchive):
            self.source = tarfile.open(archive.out, "r:")  # noqa: SIM115 (closed with this object)
            self.members = {member.name: member for member in self.source}
        elif isinstance(archive, Npz):
            self.source = open_images(archive.out)

    def part(self, start: int, n: int, labels: torch.Tensor | None) -> Part:
        """Images start .. start + n - 1 as `archive.encode` would give them. Any exception: they are not as they were
        written."""
        if isinstance(self.archive, Npz):
            return self.archive.encode(start, self.source.images(range(start, start + n)), labels)
        files = [self._file(i) for i in range(start, start + n)]
        return {} if isinstance(self.archive, FolderArchive) else self.archive.pack(start, files, labels)

    def _file(self, i: int) -> bytes:
        name = png_path(i).decode()
        if isinstance(self.archive, ZipArchive):
            data = self.source.read(name)
        elif isinstance(self.archive, FolderArchive):
            data = (self.archive.out / name).read_bytes()
        else:
            data = self.source.extractfile(self.members[f"img{i:08d}.png"]).read()
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            image.verify()  # the checksums that a PNG has of its own
        return data


def take_over(archive: Archive, n: int) -> Finished | None:
    """The first n images of the archive; None if it cannot be read."""
    try:
        return Finished(archive, n)
    except Exception:  # zipfile, tarfile and numpy have no common error; what is not taken over is made again
        return None
