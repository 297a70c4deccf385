"""The images of a finished archive as parts of a larger one, as they are: nothing is decoded but pixels that lie there
plainly."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Callable

import torch
from PIL import Image

from d2o.data.archive import Archive, FolderArchive, Npz, Part, TarArchive, ZipArchive, png_path
from d2o.data.images import open_images


class Finished:
    """The first `n` images of a finished archive of ours, held open: what is read later is of the file that was there,
    whatever takes its place."""

    def __init__(self, archive: Archive, n: int):
        self.archive, self.n = archive, n
        self.images = open_images(archive.out) if isinstance(archive, Npz) else None
        self.read = _reader(archive)

    def part(self, start: int, n: int, labels: torch.Tensor | None) -> Part:
        """Images start .. start + n - 1 as `archive.encode` would give them. Any exception: they are not as they were
        written."""
        if self.images is not None:
            return self.archive.encode(start, self.images.images(range(start, start + n)), labels)
        files = [self._file(i) for i in range(start, start + n)]
        return {} if isinstance(self.archive, FolderArchive) else self.archive.pack(start, files, labels)

    def _file(self, i: int) -> bytes:
        data = self.read(i)
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            image.verify()  # the checksums that a PNG has of its own
        return data


def _reader(archive: Archive) -> Callable[[int], bytes]:
    """Image number -> the bytes of its file; a zip or tar is open for as long as this is kept."""
    if isinstance(archive, ZipArchive):
        images = zipfile.ZipFile(archive.out)
        return lambda i: images.read(png_path(i).decode())
    if isinstance(archive, TarArchive):
        shard = tarfile.open(archive.out, "r:")  # noqa: SIM115 (see above)
        members = {member.name: member for member in shard}

        def read(i: int) -> bytes:
            file = shard.extractfile(members[f"img{i:08d}.png"])
            assert file is not None
            return file.read()

        return read
    return lambda i: (archive.out / png_path(i).decode()).read_bytes()


def take_over(archive: Archive, n: int) -> Finished | None:
    """The first n images of the archive; None if it cannot be read."""
    try:
        return Finished(archive, n)
    except Exception:  # zipfile, tarfile and numpy have no common error; what is not taken over is made again
        return None
