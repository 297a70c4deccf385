"""Images are brought to size as the papers' code does it, whether they come as files or as tensors, and results say
how."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from d2o.data import images as reader
from d2o.data.images import open_images
from d2o.errors import UserError
from d2o.evaluation.prepare import parse_preparation, quantize
from d2o.interop.torchvision_compat import ensure

SIZES = [(40, 27), (27, 41), (64, 64), (33, 36), (19, 50), (70, 73), (16, 16), (17, 20)]


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    return Image.fromarray(
        (np.asarray(small).astype(int) + rng.integers(-20, 20, (size[1], size[0], 3))).clip(0, 255).astype(np.uint8)
    )


def tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def gigagan(image: Image.Image, size: int, resample: Image.Resampling) -> torch.Tensor:
    """GigaGAN's transform: torchvision's centre crop to the short side, then PIL."""
    ensure()
    from torchvision.transforms import functional

    return tensor(functional.center_crop(image, min(image.size)).resize((size, size), resample))


@pytest.mark.parametrize(
    ("text", "resample"), [("16", "LANCZOS"), ("16:lanczos", "LANCZOS"), ("16:bicubic", "BICUBIC"), ("48", "LANCZOS")]
)
@pytest.mark.parametrize("at_once", [1 << 30, 0])
def test_files_of_all_sizes_as_gigagan_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, resample: str, at_once: int
) -> None:
    monkeypatch.setattr(reader, "DECODE_AT_ONCE", at_once)
    pictures = [picture(size, i) for i, size in enumerate(SIZES)]
    for i, image in enumerate(pictures):
        image.save(tmp_path / f"{i}.png")
    way = parse_preparation(text)
    found = open_images(tmp_path, **way.reading())
    size = int(text.partition(":")[0])
    wanted = torch.stack([gigagan(image, size, getattr(Image.Resampling, resample)) for image in pictures])
    assert torch.equal(found.images(range(len(SIZES))), wanted)
    assert way.describe() == f"center_crop+{resample.lower()}{size}"
    for image, result in zip(pictures, wanted, strict=True):  # tensors take the same way
        assert torch.equal(way.apply(tensor(image)[None])[0], result)


def test_the_order_matters_and_is_stated(tmp_path: Path) -> None:
    picture((61, 40)).save(tmp_path / "a.png")
    first, then = (open_images(tmp_path, resolution=16, order=order) for order in ("crop_resize", "resize_crop"))
    assert not torch.equal(first.images([0]), then.images([0]))
    assert (first.images([0]).int() - then.images([0]).int()).abs().float().mean() < 12  # the same region
    assert (
        first.notes
        == list(reversed(then.notes))
        == ["1 image cropped to the centre square", "1 image shrunk to a short side of 16 (lanczos)"]
    )
    with pytest.raises(UserError, match="unknown order of resizing and cropping 'resize': did you mean"):
        open_images(tmp_path, order="resize")


def test_a_strip_is_cropped_before_it_can_fill_the_memory(tmp_path: Path) -> None:
    picture((4000, 8)).save(tmp_path / "a.png")
    assert open_images(tmp_path, resolution=256, order="crop_resize").shape == (3, 256, 256)


def test_batches_of_one_size_and_grey() -> None:
    way = parse_preparation("16")
    batch = torch.stack([tensor(picture((40, 27), i)) for i in range(9)])
    assert torch.equal(
        way.apply(batch), torch.stack([gigagan(picture((40, 27), i), 16, Image.Resampling.LANCZOS) for i in range(9)])
    )
    assert way.apply(batch[:0, :, :16, :16]).shape == (0, 3, 16, 16)
    grey = batch[:, :1]
    assert way.apply(grey).shape == (9, 1, 16, 16)
    fits = batch[:, :, :16, :16]
    assert way.apply(fits) is fits
    with pytest.raises(TypeError, match="uint8"):
        way.apply(batch.float())


def test_none_leaves_everything_as_it_is() -> None:
    way = parse_preparation("none")
    batch = tensor(picture((40, 27)))[None]
    assert way.apply(batch) is batch and way.reading() == {} and way.describe() == "none" and not way.changes
    assert way.sized((3, 8, 8)) is way


def test_crop_takes_the_size_of_the_extractor(tmp_path: Path) -> None:
    for i, size in enumerate(SIZES):
        picture(size, i).save(tmp_path / f"{i}.png")
    way = parse_preparation("crop").sized((1, 8, 8))
    found, plain = open_images(tmp_path, **way.reading()), open_images(tmp_path, resolution=8, channels=1)
    assert (
        found.shape == (1, 8, 8)
        and torch.equal(found.images(range(8)), plain.images(range(8)))
        and way.describe() == "lanczos+centre_crop"
    )
    assert torch.equal(way.apply(tensor(picture(SIZES[0], 0))[None]), found.images([0]))
    with pytest.raises(UserError, match="takes any size"):
        parse_preparation("crop").sized(None)
    with pytest.raises(UserError, match="makes squares"):
        parse_preparation("crop").sized((3, 8, 9))
    with pytest.raises(ValueError, match="sized"):
        parse_preparation("crop").reading()


@pytest.mark.parametrize(
    "text", ["", "cropped", "256:nearest", "256 lanczos", "-256", "0", "1e2", "5000", "99999999", "256:", "２５６"]
)
def test_other_words_are_refused_with_the_forms(text: str) -> None:
    with pytest.raises(UserError) as error:
        parse_preparation(text)
    assert "256:bicubic" in error.value.hint and repr(text) in error.value.message


def test_quantisation_of_both_schools() -> None:
    levels = torch.arange(256)
    middle = (levels.double() - 127.5) / 127.5  # what a level stands for
    assert torch.equal(quantize(middle.float() + 1e-4), levels.to(torch.uint8))
    x = torch.linspace(-1.2, 1.2, 4801)
    edm, dmd = quantize(x, "edm_round").int(), quantize(x, "dmd_trunc").int()
    assert torch.equal(edm, (x * 127.5 + 128).clip(0, 255).int()) and torch.equal(
        dmd, ((x + 1) * 127.5).clip(0, 255).int()
    )
    inside = x.abs() < 0.99
    assert 0.45 < (edm - dmd)[inside].float().mean() < 0.55  # half a level
    assert quantize(torch.tensor([-9.0, 9.0]), "dmd_trunc").tolist() == [0, 255]
    with pytest.raises(UserError, match="unknown quantisation 'round'"):
        quantize(x, "round")
