"""Images that would spoil a metric silently: each is refused in words, or converted as stated. On real files of every
such kind."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from d2o.data import images as reader
from d2o.data.images import open_images
from d2o.errors import UserError
from d2o.evaluation.prepare import parse_preparation

RNG = np.random.default_rng(0)
DEEP = {channels: RNG.integers(0, 65536, (6, 5, channels), dtype=np.uint16) for channels in (1, 3, 4)}
DEEP[4][..., 3] = 65535


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png16(pixels: np.ndarray, more: bytes = b"") -> bytes:
    """A PNG of uint16 [H, W, C], which PIL cannot write."""
    height, width, channels = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + more + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


def tiff(pixels: np.ndarray, order: str = "<", deflate: bool = False, photometric: int | None = None) -> bytes:
    """A TIFF of uint8, uint16 or uint32 [H, W, C] in either byte order, likewise. `photometric` 5: CMYK."""
    height, width, channels = pixels.shape
    bits = pixels.dtype.itemsize * 8
    data = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()  # type: ignore[arg-type]
    data = zlib.compress(data) if deflate else data
    kind = photometric or (1 if channels == 1 else 2)
    words = {259: 8 if deflate else 1, 262: kind, 277: channels, 284: 1}
    longs = {256: width, 257: height, 273: 0, 278: height, 279: len(data)}
    if channels == 4 and kind == 2:
        words[338] = 2  # the fourth is alpha
    tags = sorted([*words, *longs, 258])
    behind = 8 + 2 + 12 * len(tags) + 4
    longs[273] = behind + 2 * channels
    out = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(tags))
    for tag in tags:
        if tag == 258:
            depths = struct.pack(order + "HH", bits, 0) if channels == 1 else struct.pack(order + "I", behind)
            out += struct.pack(order + "HHI", 258, 3, channels) + depths
        elif tag in words:
            out += struct.pack(order + "HHIHH", tag, 3, 1, words[tag], 0)
        else:
            out += struct.pack(order + "HHII", tag, 4, 1, longs[tag])
    return out + struct.pack(order + "I", 0) + struct.pack(order + "H" * channels, *[bits] * channels) + data


def opened(folder: Path, **files: bytes) -> reader.ImageSet:
    for name, data in files.items():
        (folder / name.replace("_", ".")).write_bytes(data)
    return open_images(folder)


def pixels_of(found: reader.ImageSet) -> np.ndarray:
    return found.images([0])[0].permute(1, 2, 0).numpy()


def soft(size: tuple[int, int] = (16, 16), seed: int = 0, mode: str = "RGB") -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).convert(mode)


# ---- depth and colour ----


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("kind", ["png", "tiff <", "tiff >", "tiff < deflate", "tiff > deflate"])
def test_16_bits_keep_their_high_byte(tmp_path: Path, channels: int, kind: str) -> None:
    data = png16(DEEP[channels]) if kind == "png" else tiff(DEEP[channels], kind[5], "deflate" in kind)
    found = opened(tmp_path, **{"a_png" if kind == "png" else "a_tif": data})
    assert np.array_equal(pixels_of(found), DEEP[channels][..., : min(channels, 3)] >> 8)
    assert "1 image reduced from 16 to 8 bits" in found.notes
    assert ("1 image with alpha composited on white" in found.notes) == (channels == 4)


def test_deep_pixels_that_have_no_fixed_meaning_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="32-bit pixels have no fixed range"):
        opened(tmp_path, a_tif=tiff(RNG.integers(0, 2**32, (6, 5, 1), dtype=np.uint32)))
    (tmp_path / "a.tif").unlink()
    for channels in (1, 3):
        transparent = chunk(b"tRNS", DEEP[channels][0, 0].astype(">u2").tobytes())
        with pytest.raises(UserError, match="16-bit pixels with a transparent colour"):
            opened(tmp_path, a_png=png16(DEEP[channels], transparent))


def test_cmyk(tmp_path: Path) -> None:
    """A photograph for print: inks that are stored inverted, as Adobe's and PIL's JPEGs have them, come out in the
    right colours."""
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    found = opened(tmp_path, a_jpg=encoded(red, "JPEG", quality=95))
    assert np.array_equal(pixels_of(found), np.broadcast_to([255, 0, 0], (16, 16, 3)))
    assert found.notes == ["1 image converted from CMYK to RGB", "1 image compressed with loss (JPEG)"]
    (tmp_path / "a.jpg").unlink()
    inks = RNG.integers(0, 256, (6, 5, 4), dtype=np.uint8)
    eight, deep = (
        opened(tmp_path, a_tif=tiff(inks, photometric=5)),
        opened(tmp_path, a_tif=tiff(inks.astype(np.uint16) * 257, photometric=5)),
    )
    assert np.array_equal(pixels_of(eight), pixels_of(deep)) and "1 image converted from CMYK to RGB" in eight.notes
    by_hand = (255 - inks[..., :3].astype(int)) * (255 - inks[..., 3:].astype(int)) / 255
    assert np.abs(pixels_of(eight) - by_hand).max() <= 1


def test_grey_alpha_and_palette_files_in_one_set(tmp_path: Path) -> None:
    colour = soft()
    clear = colour.copy()
    clear.putalpha(Image.new("L", clear.size, 0))
    palette = colour.quantize(16)
    found = opened(
        tmp_path,
        a_png=encoded(soft(mode="L"), "PNG"),
        b_png=encoded(clear, "PNG"),
        c_png=encoded(palette, "PNG"),
        d_png=encoded(colour, "PNG"),
    )
    wanted = [
        np.array(soft(mode="L").convert("RGB")),
        np.full((16, 16, 3), 255),
        np.array(palette.convert("RGB")),
        np.array(colour),
    ]
    assert np.array_equal(found.images(range(4)).permute(0, 2, 3, 1).numpy(), np.stack(wanted))
    assert found.notes == [
        "1 image with alpha composited on white",
        "1 image expanded from a palette",
        "1 image repeated from grey to 3 channels",
    ]


# ---- loss ----


@pytest.mark.parametrize(
    ("suffix", "kind", "options", "loss"),
    [
        ("jpg", "JPEG", {}, "JPEG"),
        ("tif", "TIFF", {"compression": "jpeg"}, "JPEG"),
        ("webp", "WEBP", {}, "WebP"),
        ("webp", "WEBP", {"icc_profile": bytes(101)}, "WebP"),
        ("webp", "WEBP", {"lossless": True}, None),
        ("webp", "WEBP", {"lossless": True, "icc_profile": bytes(101)}, None),
        ("tif", "TIFF", {}, None),
        ("png", "PNG", {}, None),
    ],
)
def test_lossy_files_are_counted(
    tmp_path: Path, suffix: str, kind: str, options: dict[str, object], loss: str | None
) -> None:
    files = {f"{i}_{suffix}": encoded(soft(seed=i), kind, **options) for i in range(3)}
    assert opened(tmp_path, **files).notes == ([f"3 images compressed with loss ({loss})"] if loss else [])


# ---- sizes ----


def test_images_of_different_sizes_are_refused_unless_a_preparation_is_named(tmp_path: Path) -> None:
    sizes = [(40, 30), (30, 40), (25, 25), (64, 33)]
    files = {f"{i}_png": encoded(soft(size, i), "PNG") for i, size in enumerate(sizes)}
    with pytest.raises(UserError, match=r"differ in size: 0\.png is 40x30, 1\.png is 30x40") as error:
        opened(tmp_path, **files)
    assert "resolution" in error.value.hint
    found = open_images(tmp_path, **parse_preparation("16").reading())
    assert found.shape == (3, 16, 16) and found.notes == [
        "3 images cropped to the centre square",
        "4 images shrunk to a short side of 16 (lanczos)",
    ]


# ---- copies ----


@pytest.mark.parametrize("at_once", [1 << 30, 0])
def test_copies_of_an_image_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(reader, "DECODE_AT_ONCE", at_once)
    plain, again = encoded(soft(seed=0), "PNG"), encoded(soft(seed=0), "PNG", compress_level=1)
    assert plain != again
    files = {
        "0_png": plain,
        "1_png": encoded(soft(seed=1), "PNG"),
        "2_bmp": encoded(soft(seed=0), "BMP"),
        "3_png": again,
    }
    found = opened(tmp_path, **files)
    if at_once == 0:
        assert found.duplicates == 0  # none has been read
        found.images([0, 1])
        assert found.duplicates == 0
        found.images([0, 1, 2, 0])
        assert found.duplicates == 1
        found.images(range(4))
    assert found.duplicates == 2  # whatever the files' bytes are
    assert open_images("real:digits").duplicates == 0
    np.savez(tmp_path / "x.npz", np.zeros((5, 4, 4, 3), np.uint8))
    assert open_images(tmp_path / "x.npz").duplicates == 4


# ---- order ----


def test_a_zip_in_another_order_than_its_names(tmp_path: Path) -> None:
    """Inception Scores and KID depend on the order: it is that of the names, not that of the archive."""
    names = [f"{i:02d}.png" for i in range(12)]
    for where, order in (("sorted.zip", range(12)), ("shuffled.zip", np.random.default_rng(0).permutation(12))):
        with zipfile.ZipFile(tmp_path / where, "w") as archive:
            for i in order:
                archive.writestr(names[i], encoded(soft(seed=int(i)), "PNG"))
    one, other = open_images(tmp_path / "sorted.zip"), open_images(tmp_path / "shuffled.zip")
    assert one.names == other.names == names and one.fingerprint == other.fingerprint
    assert torch.equal(one.images(range(12)), other.images(range(12)))
    assert torch.equal(other.images([3])[0].permute(1, 2, 0), torch.from_numpy(np.array(soft(seed=3))))
