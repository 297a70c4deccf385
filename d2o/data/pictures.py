"""Pictures of many images for people: scaled up, labelled, without holes. Every sheet that d2o writes is drawn here."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SIDE = 64
"""Pixels of an image at least; smaller ones are enlarged by a whole factor, every pixel a square."""
GAP, BETWEEN = 4, 20
FONT, LINE, TITLE = 12, 15, 24
MARGIN = 150
"""Pixels of the labels of rows at most."""
ROWS = 16
"""Classes, to which a row each is given at most."""


@dataclass(frozen=True)
class Layout:
    """`order` of the images (indices), `columns`, and what stands beside rows ("" for none) or else below each
    image."""

    order: list[int]
    columns: int
    rows: list[str] | None = None
    captions: list[str] | None = None


def lay_out(n: int, labels: Sequence[int] | None = None, names: Mapping[int, str] | None = None) -> Layout:
    """How n images are shown best: those of few classes in rows of their own, for which up to an eighth of the images
    is left out so that all have equally many; else in the order of the classes, each with its name. `names` of the
    classes (prompts); else "class 3".
    """
    if labels is None:
        return Layout(list(range(n)), columns_for(n))
    order = sorted(range(n), key=lambda i: labels[i])
    members = {label: [i for i in order if labels[i] == label] for label in sorted(set(labels))}
    shown = {label: names[label] if names is not None else f"class {label}" for label in members}
    each = min(map(len, members.values()))
    columns = columns_for(each, whole=True)
    if columns > 1 and len(members) <= ROWS and each * len(members) >= n - n // 8:
        beside = [name if row == 0 else "" for name in shown.values() for row in range(each // columns)]
        return Layout([i for some in members.values() for i in some[:each]], columns, rows=beside)
    return Layout(order, columns_for(n), captions=[shown[labels[i]] for i in order])


def columns_for(n: int, whole: bool = False) -> int:
    """A number of columns that leaves no cell of the last row empty, or as few as can be, and the sheet about as wide
    as high. `whole`: none is empty, if need be in one column."""
    if whole:
        return max(c for c in range(1, ROWS + 1) if n % c == 0)
    first = math.isqrt(max(n, 1) - 1) + 1
    return min(range(first, min(n, 2 * first) + 1), key=lambda c: (-n % c, c), default=1)


def draw_sheet(blocks: Sequence[tuple[str, Tensor]], layout: Layout, heads: Sequence[str] = ()) -> Image.Image:
    """Blocks side by side, each a title ("" for none) and images uint8 [n, C, H, W] (C 1 or 3) in the layout's order;
    `heads` stand above the columns. Grey (mode L) if all images are."""
    sheets = [np.stack([_enlarged(images[i]) for i in layout.order]) for _, images in blocks]
    if len({sheet.shape[-1] for sheet in sheets}) > 1:
        sheets = [np.broadcast_to(sheet, (*sheet.shape[:-1], 3)) for sheet in sheets]
    n, height, width, channels = sheets[0].shape
    columns, lines = layout.columns, -(-n // layout.columns)
    left = GAP + (min(MARGIN, max(_length(text) for text in layout.rows)) + 2 * GAP if layout.rows else 0)
    top = GAP + (TITLE if any(title for title, _ in blocks) else 0) + (LINE if heads else 0)
    below = min(2, max(len(_wrapped(text, width, 2)) for text in layout.captions)) * LINE if layout.captions else 0
    tall, block = height + below + GAP, columns * (width + GAP) - GAP
    size = (left + len(blocks) * block + (len(blocks) - 1) * BETWEEN + GAP, top + lines * tall)
    picture = Image.new("L" if channels == 1 else "RGB", size, "white")
    pen = ImageDraw.Draw(picture)
    for row, text in enumerate(layout.rows or []):
        beside = _wrapped(text, MARGIN, max(1, height // LINE))
        y = top + row * tall + (height - LINE * len(beside)) // 2
        for i, line in enumerate(beside):
            pen.text((GAP, y + i * LINE), line, fill="black", font=_font(FONT))
    for number, ((title, _), sheet) in enumerate(zip(blocks, sheets, strict=True)):
        x0 = left + number * (block + BETWEEN)
        pen.text((x0, GAP), shortened(title, block, FONT + 2), fill="black", font=_font(FONT + 2))
        for column, head in enumerate(heads):
            pen.text(
                (x0 + column * (width + GAP), top - LINE - 2), shortened(head, width), fill="black", font=_font(FONT)
            )
        for i, image in enumerate(sheet):
            x, y = x0 + i % columns * (width + GAP), top + i // columns * tall
            picture.paste(Image.fromarray(image[:, :, 0] if channels == 1 else np.ascontiguousarray(image)), (x, y))
            for j, line in enumerate(_wrapped(layout.captions[i], width, 2) if layout.captions else []):
                pen.text((x, y + height + 1 + j * LINE), line, fill="black", font=_font(FONT))
    return picture


def enlargement(height: int, width: int) -> int:
    """The whole factor by which images of that size are enlarged."""
    return max(1, -(-SIDE // min(height, width)))


def shortened(text: str, width: int, size: int = FONT) -> str:
    """The text on one line of at most `width` pixels, with an ellipsis where it is cut."""
    text = " ".join(text.split())[:1000]
    if _length(text, size) <= width:
        return text
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _length(text[:middle].rstrip() + "…", size) <= width else (low, middle - 1)
    return text[:low].rstrip() + "…" if low else ""


def to_png(images: Tensor, columns: int) -> str:
    """uint8 [n, C, H, W] as they are, without gaps, in one PNG, base64: what results keep."""
    n, channels, height, width = images.shape
    columns = min(columns, n)
    lines = -(-n // columns)
    cells = images.new_zeros(lines * columns, channels, height, width)
    cells[:n] = images
    sheet = (
        cells.reshape(lines, columns, channels, height, width)
        .permute(0, 3, 1, 4, 2)
        .reshape(lines * height, columns * width, channels)
    )
    data = io.BytesIO()
    pixels = sheet.cpu().numpy()
    Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels).save(data, format="PNG", optimize=True)
    return base64.b64encode(data.getvalue()).decode()


def from_png(png: str, n: int, columns: int) -> list[str]:
    """The images of such a sheet, each a PNG of its own, base64. ValueError: no such sheet."""
    columns = min(columns, n)
    try:
        with Image.open(io.BytesIO(base64.b64decode(png, validate=True)), formats=["PNG"]) as sheet:
            width, height = sheet.width // max(columns, 1), sheet.height // max(-(-n // max(columns, 1)), 1)
            if not (n > 0 and columns > 0 and width > 0 and height > 0 and sheet.width * sheet.height <= 2**26):
                raise ValueError(f"{sheet.width}x{sheet.height} pixels are no sheet of {n} images in {columns} columns")
            sheet.load()
            parts = []
            for i in range(n):
                x, y, data = i % columns * width, i // columns * height, io.BytesIO()
                sheet.crop((x, y, x + width, y + height)).save(data, format="PNG", optimize=True)
                parts.append(base64.b64encode(data.getvalue()).decode())
            return parts
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(str(error)) from error


def _enlarged(image: Tensor) -> np.ndarray:
    pixels = image.cpu().numpy().transpose(1, 2, 0)
    factor = enlargement(*pixels.shape[:2])
    return pixels.repeat(factor, 0).repeat(factor, 1)


@lru_cache(maxsize=4)
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)  # type: ignore[return-value]


def _length(text: str, size: int = FONT) -> int:
    return math.ceil(_font(size).getlength(text))


def _wrapped(text: str, width: int, lines: int) -> list[str]:
    """The text in at most that many lines, the last one shortened."""
    words, found = " ".join(text.split())[:1000].split(" "), list[str]()
    while words and len(found) < lines - 1:
        taken = 1
        while taken < len(words) and _length(" ".join(words[: taken + 1])) <= width:
            taken += 1
        found.append(shortened(" ".join(words[:taken]), width))
        words = words[taken:]
    return found + ([shortened(" ".join(words), width)] if words else [])
