"""Two-alternative forced choices: a reference, two distorted copies of it, and which is nearer (BAPPS, Zhang et al.
2018).

A folder in the layout of BAPPS has `ref/`, `p0/` and `p1/` with images of the same names, and `judge/` with an `.npy`
for each: the share of people who found p1 nearer. Or it has sub-folders of that kind (`traditional/`, `cnn/`, ...).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from d2o.data.distortions import MADE, made_triplets
from d2o.data.images import ImageSet, open_images, set_name
from d2o.errors import MissingImages, UserError
from d2o.interop.npz import read_npy

SIDES = ("ref", "p0", "p1")
JUDGE = "judge"
LAYOUT = (
    "a folder with ref/, p0/, p1/ and judge/, as BAPPS has them, or with sub-folders of that kind; or one of the made"
    f" sets {', '.join(MADE)}"
)


class TripletSet:
    """Triplets as images: reference, first and second copy, one behind the other in the channels; with the attributes
    of `ImageSet`.

    shape          (3 C, H, W)
    judgements     float32 [n] in [0, 1]: the share that finds the second copy nearer
    groups         name of a kind of distortion -> the rows [m] that are of it, in order
    """

    def __init__(
        self,
        name: str,
        fingerprint: str,
        parts: Sequence[tuple[str, Sequence[Tensor | ImageSet], Tensor]],
        notes: Sequence[str] = (),
    ):
        self.name, self.fingerprint, self.notes = name, fingerprint, [*notes]
        self._parts = [sides for _, sides, _ in parts]
        self.judgements = torch.cat([judged for _, _, judged in parts]).float()
        lengths = [len(judged) for _, _, judged in parts]
        self._starts = np.cumsum([0, *lengths])
        ends = zip(parts, self._starts[:-1].tolist(), self._starts[1:].tolist(), strict=True)
        self.groups = {part[0]: torch.arange(start, stop) for part, start, stop in ends}
        channels, height, width = self._parts[0][0].shape[-3:]
        self.shape: tuple[int, int, int] = (3 * channels, height, width)
        self.labels: Tensor | None = None
        self.classes, self.class_names = 0, list[str]()
        self.bad: list[tuple[str, str]] = []

    def __len__(self) -> int:
        return len(self.judgements)

    def images(self, indices: Sequence[int] | Tensor | np.ndarray) -> Tensor:
        """uint8 [k, 3 C, H, W], in the order asked for."""
        wanted = np.asarray(torch.as_tensor(indices).reshape(-1))
        out = torch.empty(len(wanted), *self.shape, dtype=torch.uint8)
        which = np.searchsorted(self._starts, wanted, side="right") - 1
        for part in np.unique(which).tolist():
            places = np.flatnonzero(which == part)
            rows = torch.from_numpy(wanted[places] - self._starts[part])
            sides = [side[rows] if isinstance(side, Tensor) else side.images(rows) for side in self._parts[part]]
            out[torch.from_numpy(places)] = torch.cat(sides, 1)
        return out


def open_triplets(
    path: str,
    *,
    resolution: int | None = None,
    channels: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    on_bad: str = "refuse",
    resize: str = "lanczos",
    order: str = "resize_crop",
) -> TripletSet:
    """Those in a folder, or made ones (`real:digits-2afc/a`), whose distortions are drawn by `seed`. Images as
    `open_images` reads them, whose options the others are; `limit`: the first so many of each kind of distortion.
    UserError: MissingImages where nothing is; another layout; names or judgements that do not fit."""
    if path.startswith("real:"):
        made = made_triplets(path, resolution, channels, limit, seed)
        digest = hashlib.sha256()
        for _, tensors, answers in made:
            for tensor in (*tensors, answers):
                digest.update(tensor.numpy().tobytes())
        return TripletSet(set_name(path), digest.hexdigest(), made, ["the copies were distorted by d2o"])
    folder = Path(os.path.expanduser(path))
    if not folder.exists():
        raise MissingImages(f"no such folder: {path}", LAYOUT)
    kinds = [folder] if _is_kind(folder) else sorted(f for f in folder.iterdir() if f.is_dir() and _is_kind(f))
    if not kinds:
        raise UserError(f"{path} holds no triplets", LAYOUT)
    opened: list[tuple[str, list[ImageSet], Tensor]] = []
    prints: list[str] = []
    notes: list[str] = []
    for kind in kinds:
        read = partial(
            open_images,
            resolution=resolution,
            channels=channels,
            limit=limit,
            on_bad=on_bad,
            resize=resize,
            order=order,
        )
        sides = [read(kind / side) for side in SIDES]
        for side, found in zip(SIDES[1:], sides[1:], strict=True):
            if [Path(n).stem for n in found.names] != [Path(n).stem for n in sides[0].names]:
                raise UserError(f"{kind / side} has not the images of {kind / SIDES[0]}: their names differ", LAYOUT)
            if found.shape != sides[0].shape:
                raise UserError(
                    f"{kind / side} has images of {list(found.shape)}, {SIDES[0]} of {list(sides[0].shape)}",
                    "give data.resolution and data.channels",
                )
        judged = torch.tensor([_judgement(kind / JUDGE / f"{Path(name).stem}.npy") for name in sides[0].names])
        opened.append((kind.name, sides, judged))
        prints += [*(side.fingerprint for side in sides), hashlib.sha256(judged.numpy().tobytes()).hexdigest()]
        notes += [f"{kind.name}: {len(judged)} triplets"]
    shapes = {sides[0].shape for _, sides, _ in opened}
    if len(shapes) > 1:
        raise UserError(f"the images of {path} differ in shape", "give data.resolution and data.channels")
    return TripletSet(set_name(path), hashlib.sha256("".join(prints).encode()).hexdigest(), opened, notes)


def _is_kind(folder: Path) -> bool:
    return all((folder / side).is_dir() for side in (*SIDES, JUDGE))


def _judgement(path: Path) -> float:
    if not path.is_file():
        raise UserError(f"no judgement {path}", LAYOUT)
    try:
        values = read_npy(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no readable .npy: {error}") from error
    if values.size != 1 or values.dtype.kind not in "fiub" or not 0 <= float(values.reshape(-1)[0]) <= 1:
        raise UserError(f"{path} holds {values.dtype} {list(values.shape)}, not one number from 0 to 1")
    return float(values.reshape(-1)[0])
