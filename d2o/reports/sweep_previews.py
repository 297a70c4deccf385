"""The last previews of several runs in one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

HEAD, GAP = 26, 10
FONT = 15
LARGEST = 2**28
"""Pixels of a picture at most."""


def last_previews(runs: Sequence[tuple[str, Path]]) -> Image.Image | None:
    """The newest preview of each run (name, folder), one below another with the name above; None where none has any, or
    all together are too large."""
    found = [(name, newest) for name, run in runs if (newest := _newest(run / "previews")) is not None]
    if not found:
        return None
    width, height = max(p.width for _, p in found), sum(p.height + HEAD + GAP for _, p in found)
    if width * height > LARGEST:
        return None
    sheet = Image.new("RGB", (width, height), "white")
    pen, font, y = ImageDraw.Draw(sheet), ImageFont.load_default(FONT), 0
    for name, picture in found:
        pen.text((4, y + 4), name, fill="black", font=font)
        sheet.paste(picture, (0, y + HEAD))
        y += HEAD + picture.height + GAP
    return sheet


def _newest(folder: Path) -> Image.Image | None:
    """None where there is none that can be read: a kill may have left half of one."""
    for path in sorted(folder.glob("*.png"), reverse=True):
        try:
            with Image.open(path, formats=["PNG"]) as picture:
                return picture.convert("RGB")
        except (OSError, SyntaxError, Image.DecompressionBombError):
            continue
    return None
