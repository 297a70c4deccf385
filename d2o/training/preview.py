"""Sample grids during training: the same noises every time, the reference beside the product."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from d2o.data.images import ImageSet, image_grid, to_uint8
from d2o.diffusion.noise import noise_and_labels
from d2o.interop.safetensors_io import atomic_path
from d2o.methods.base import Generate
from d2o.teachers.base import Spec, Teacher

PREVIEW_SEED = 3_000_000  # away from the seeds of pairs (from 0) and of metrics


class Preview:
    """Left: the teacher's samples from these noises (or real images where there is no teacher); right: the product's."""

    def __init__(self, folder: Path, spec: Spec, count: int, teacher: Teacher | None, images: ImageSet | None, steps: int, device: torch.device):
        self.folder, self.columns = folder, max(int(count**0.5), 1)
        noise, labels = noise_and_labels(range(PREVIEW_SEED, PREVIEW_SEED + count), spec.shape, spec.classes)
        if spec.classes:
            labels = (torch.arange(count) * spec.classes) // max(count, 1)  # class by class, so that the rows read well
        self.noise, self.labels = noise.to(device), labels.to(device) if spec.classes else None
        self.left = None
        if teacher is not None:
            self.left = to_uint8(teacher.decode(teacher.sample(self.noise, self.labels, "heun", steps)))
        elif images is not None:
            self.left = images.images(_matching(images, self.labels, count))

    def write(self, images_seen: int, generate: Generate) -> Path:
        """previews/<images seen>.png; returns its path."""
        right = to_uint8(generate(self.noise, self.labels)).cpu()
        grids = [image_grid(right, self.columns)]
        if self.left is not None:
            grids.insert(0, image_grid(self.left.cpu(), self.columns))
        height, gap = max(g.height for g in grids), 8
        white = 255 if grids[0].mode == "L" else (255, 255, 255)
        sheet = Image.new(grids[0].mode, (sum(g.width for g in grids) + gap * (len(grids) - 1), height), white)
        x = 0
        for grid in grids:
            sheet.paste(grid, (x, 0))
            x += grid.width + gap
        scale = max(1, 512 // height)
        path = self.folder / f"{images_seen:09d}.png"
        with atomic_path(path) as temporary:
            sheet.resize((sheet.width * scale, sheet.height * scale), 0).save(temporary, format="PNG")
        return path



def _matching(images: ImageSet, labels: Tensor | None, count: int) -> Tensor:
    """Indices of real images of these classes, in this order; any images where there are no classes."""
    if labels is None or images.labels is None:
        return torch.arange(count) % len(images)
    places = {c: (images.labels == c).nonzero()[:, 0] for c in labels.unique().tolist()}
    seen = dict.fromkeys(places, 0)
    chosen = []
    for c in labels.tolist():
        chosen.append(places[c][seen[c] % len(places[c])] if len(places[c]) else torch.tensor(0))
        seen[c] += 1
    return torch.stack(chosen)
