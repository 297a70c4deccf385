"""Walks through a style student's latents, as pictures: SPI-GAN's latent path, and interpolations (Choi et al. 2022,
Figs. 9 to 11)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from d2o.data.draws import check_range, draw
from d2o.data.images import to_uint8
from d2o.data.pictures import Layout, columns_for, draw_sheet
from d2o.errors import UserError, unknown
from d2o.interop.safetensors_io import atomic_path
from d2o.students.style import StyleStudent, interpolate

PATHS = {
    "h": "the latent path of a noise, h(0) to h(1): noise is removed, the object may change (Fig. 9)",
    "z": "between two noises (Fig. 10)",
    "w": "between the styles h(1) of two noises (Fig. 11)",
}
BATCH = 64
FRAME_MS = 120


@torch.inference_mode()
def path_images(student: StyleStudent, path: str, n: int, steps: int, seed: int = 0, mode: str = "lerp") -> Tensor:
    """uint8 [n, steps, C, R, R]. Walk i starts at the noise of seed + i and, for "z" and "w", ends at that of seed + n
    + i; `mode` as for `interpolate`. The noise inputs are constant, so that only the style changes. UserError: unknown
    path or mode, fewer than 2 steps.
    """
    if path not in PATHS:
        raise unknown("path", path, PATHS)
    if steps < 2:
        raise UserError(f"a path needs at least 2 steps, not {steps}")
    check_range(n if path == "h" else 2 * n, seed)
    device = next(student.parameters()).device
    noise = draw(seed, 0, n if path == "h" else 2 * n, student.spec.shape, 0, "none")[0].to(device)
    if path == "h":
        styles = student.latent_path(noise, torch.linspace(0, 1, steps).tolist())
    elif path == "z":
        points = interpolate(noise[:n], noise[n:], steps, mode)
        styles = torch.stack([student.latent(z) for z in points])
    else:
        styles = interpolate(student.latent(noise[:n]), student.latent(noise[n:]), steps, mode)
    flat = styles.transpose(0, 1).flatten(0, 1)  # walk after walk
    images = torch.cat([to_uint8(student.decode(student.decode_style(part))) for part in flat.split(BATCH)])
    return images.cpu().reshape(n, steps, *images.shape[1:])


def save_path(images: Tensor, out: str | Path, names: Sequence[str] | None = None) -> None:
    """Walks [n, steps, C, R, R] as a picture (.png: a row for each walk, with its name) or an animation (.gif: there
    and back).

    UserError: another suffix.
    """
    out = Path(out)
    n, steps = images.shape[:2]
    if out.suffix.lower() == ".png":
        heads = [f"{i / (steps - 1):.2f}" for i in range(steps)]
        layout = Layout(list(range(n * steps)), steps, list(names) if names else None)
        with atomic_path(out) as temporary:
            draw_sheet([("", images.flatten(0, 1))], layout, heads).save(temporary, "png")
    elif out.suffix.lower() == ".gif":
        layout = Layout(list(range(n)), columns_for(n), captions=list(names) if names else None)
        frames = [
            draw_sheet([("", images[:, i])], layout).convert("P", palette=Image.Palette.ADAPTIVE) for i in range(steps)
        ]
        frames += frames[-2:0:-1]
        with atomic_path(out) as temporary:
            frames[0].save(temporary, "gif", save_all=True, append_images=frames[1:], duration=FRAME_MS, loop=0)
    else:
        raise UserError(f"{out}: a path is written as .png (a row for each walk) or .gif")


def walk_names(path: str, n: int, seed: int) -> list[str]:
    """What the walks of `path_images` are between."""
    return [f"seed {seed + i}" + ("" if path == "h" else f" to {seed + n + i}") for i in range(n)]
