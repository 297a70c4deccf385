"""One image file -> 8-bit pixels of the asked channels and size. What a file needed on the way is named, so that it can
be counted.

Choices, the same everywhere:
- images that carry an EXIF orientation are turned upright first;
- alpha (a channel, or a transparent colour) is composited on white;
- 16-bit grey and RGB keep their high byte; 32-bit pixels have no fixed range and are refused;
- colour becomes grey by the ITU-R 601 luma, grey becomes colour by repetition;
- of an animation the first frame is taken;
- colour profiles are ignored.

What a file lost before it came here (JPEG, lossy WebP) is named as well: it changes every metric.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from d2o.inputs import MAX_PIXELS, check_size

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
# Only these decoders are tried: some of PIL's others start outside programs.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
FILTERS = {
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "box": Image.Resampling.BOX,
}
ORDERS = ("resize_crop", "crop_resize")
"""Resize the short side, then cut out the centre (EDM, StyleGAN); or cut out the centre square, then resize it
(GigaGAN, DMD2)."""
HEADER_BYTES = 1 << 16

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_GREY = ("1", "L", "LA", "La", "I", "F")  # and every "I;16..."


class ImageHead(NamedTuple):
    """What the header says: (width, height) once upright, whether it is grey, and the conversions decoding will
    make."""

    size: tuple[int, int]
    grey: bool
    traits: tuple[str, ...]


def open_picture(data: bytes) -> Image.Image:
    """The PIL image of a file's bytes, pixels not yet decoded. Raises ValueError or PIL's errors."""
    if not data:
        raise ValueError("empty file (0 bytes)")
    picture = Image.open(io.BytesIO(data), formats=FORMATS)
    check_size("its header", picture.width * picture.height, MAX_PIXELS, "pixels")
    return picture


def read_head(read: Callable[[int | None], bytes]) -> ImageHead:
    """The header of a file; `read(n)` gives its first n bytes (None: all). The first 64 KiB nearly always suffice."""
    start = read(HEADER_BYTES)
    try:
        picture = open_picture(start)
        if len(start) < HEADER_BYTES or picture.format in ("JPEG", "MPO", "PNG", "BMP", "PPM"):
            return head_of(picture, start)
    except Exception:
        if len(start) < HEADER_BYTES:
            raise
    return head_of(open_picture(read(None)), start)  # these formats keep part of what we ask for at the end of the file


def head_of(picture: Image.Image, start: bytes = b"") -> ImageHead:
    """The head of an opened picture; `start`: the first bytes of its file, for what PIL does not tell."""
    turn = _orientation(picture)
    width, height = picture.size
    if turn >= 5 and picture.format != "TIFF":  # PIL turns TIFFs itself and says the upright size
        width, height = height, width
    mode = picture.mode
    traits = []
    if turn != 1:
        traits.append("turned upright as EXIF says")
    if _has_alpha(picture):
        traits.append("with alpha composited on white")
    if mode in ("P", "PA"):
        traits.append("expanded from a palette")
    if _sixteen_bit(picture):
        traits.append("reduced from 16 to 8 bits")
    if mode == "1":
        traits.append("widened from 1 to 8 bits")
    if mode in ("CMYK", "YCbCr", "LAB", "HSV"):
        traits.append(f"converted from {mode} to RGB")
    if loss := _loss(picture, start):
        traits.append(f"compressed with loss ({loss})")
    if picture.format != "MPO" and getattr(picture, "is_animated", False):  # MPO: a photo and its preview
        traits.append("cut to the first frame of an animation")
    return ImageHead((width, height), mode in _GREY or mode.startswith("I;16"), tuple(traits))


def decode(
    picture: Image.Image, channels: int, resolution: int | None, resize: str, order: str = "resize_crop"
) -> np.ndarray:
    """uint8 [C, H, W]. With a resolution: a square of it, made by the antialiased filter `resize` and a centre crop in
    this `order`."""
    turn = _orientation(picture)
    if "transparency" in picture.info and _sixteen_bit(picture):  # PIL compares it with the 8 bits that are left
        raise ValueError("16-bit pixels with a transparent colour are not supported")
    picture.load()
    if turn != 1 and picture.format != "TIFF":
        picture = picture.transpose(_UPRIGHT[turn])
    picture = _eight_bit(picture, "L" if channels == 1 else "RGB")
    if resolution is not None and picture.size != (resolution, resolution):
        picture = (
            fit_square(picture, resolution, resize)
            if order == "resize_crop"
            else crop_first(picture, resolution, resize)
        )
    pixels = np.asarray(picture)
    if pixels.ndim == 3:
        return pixels.transpose(2, 0, 1)
    return np.broadcast_to(pixels, (channels, *pixels.shape))


def fit_square(picture: Image.Image, resolution: int, resize: str) -> Image.Image:
    """Short side to `resolution`, the other in proportion (rounded), then the centre square (left and top rounded
    down)."""
    width, height = picture.size
    short = min(width, height)
    if max(width, height) > 100 * short:  # resized it could fill the memory, and no crop of it shows anything
        raise ValueError(f"{width}x{height} is too long a strip to resize and crop")
    if short != resolution:
        size = (round(width * resolution / short), round(height * resolution / short))
        picture = picture.resize(size, FILTERS[resize])
    left, top = (picture.width - resolution) // 2, (picture.height - resolution) // 2
    return picture.crop((left, top, left + resolution, top + resolution))


def crop_first(picture: Image.Image, resolution: int, resize: str) -> Image.Image:
    """The centre square of the short side, then resized to `resolution`. Left and top are halves rounded to even, as
    torchvision's center_crop takes them, so that GigaGAN's evaluation sees the same pixels."""
    short = min(picture.size)
    left, top = round((picture.width - short) / 2), round((picture.height - short) / 2)
    square = picture.crop((left, top, left + short, top + short))
    return square if short == resolution else square.resize((resolution, resolution), FILTERS[resize])


def reason(error: Exception) -> str:
    """Why a file could not be decoded, in words."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or a kind of one that is not read"
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def _eight_bit(picture: Image.Image, mode: str) -> Image.Image:
    """Grey stays "L" whatever is asked (its caller repeats it: cheaper, and the same pixels); all else becomes
    `mode`."""
    if picture.mode.startswith("I;16") or (picture.mode == "I" and _sixteen_bit(picture)):
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError("32-bit pixels have no fixed range")
    grey = picture.mode in _GREY
    if _has_alpha(picture):
        full = picture.convert("RGBA")
        picture = Image.composite(full.convert("RGB"), Image.new("RGB", full.size, "white"), full.getchannel("A"))
        if grey:
            picture = picture.getchannel("R")
    wanted = "L" if grey else mode
    return picture if picture.mode == wanted else picture.convert(wanted)


def _has_alpha(picture: Image.Image) -> bool:
    return picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info


def _sixteen_bit(picture: Image.Image) -> bool:
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM")):
        return True
    for codec, _, _, options in getattr(picture, "tile", []):  # empty once decoded, which is too late to ask
        last = options[-1] if isinstance(options, tuple) and options else options
        if ";16" in str(options) or (codec.startswith("ppm") and isinstance(last, int) and last > 255):
            return True
    return False


def _loss(picture: Image.Image, start: bytes) -> str:
    """The format that rounded the pixels when the file was written, or "". WebP says so in the name of its first chunk
    of pixels."""
    if picture.format == "WEBP":
        place = 12
        while start[place : place + 4] in (b"VP8X", b"ICCP", b"ALPH", b"EXIF", b"XMP "):
            size = int.from_bytes(start[place + 4 : place + 8], "little")
            place += 8 + size + size % 2
        return "WebP" if start[place : place + 4] == b"VP8 " else ""
    jpeg = picture.format in ("JPEG", "MPO") or (
        picture.format == "TIFF" and picture.info.get("compression") in ("jpeg", "tiff_jpeg")
    )
    return "JPEG" if jpeg else ""


def _orientation(picture: Image.Image) -> int:
    if picture.format == "PNG" and "exif" not in picture.info:
        return 1  # asking would decode the whole file, to look for a block behind the pixels
    try:
        turn = picture.getexif().get(0x0112, 1)
    except Exception:  # a damaged EXIF block is not a damaged image
        return 1
    return turn if turn in _UPRIGHT else 1
