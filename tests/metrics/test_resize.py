"""Our resizes against the tools that define them."""

import pytest
import torch

from d2o.evaluation.resizing import clean_pil, clean_torch, torch_bilinear
from d2o.features.resize import tf_bilinear
from d2o.interop.torchvision_compat import ensure

ensure()
from cleanfid.resize import make_resizer  # noqa: E402
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x  # noqa: E402

SHAPES = [(32, 32), (64, 64), (299, 299), (512, 512), (45, 130), (1, 1)]


def noise(shape, count=2):
    return torch.randint(
        0, 256, (count, 3, *shape), generator=torch.Generator().manual_seed(shape[0]), dtype=torch.uint8
    )


def each(resizer, images):
    """clean-fid's resizers take one image [h, w, 3] at a time."""
    return torch.stack([torch.from_numpy(resizer(image.permute(1, 2, 0).numpy())).permute(2, 0, 1) for image in images])


def test_tensorflow_samples_at_the_corner_of_pixels():
    row = torch.tensor([[[[0.0, 1.0]]]]).expand(1, 1, 2, 2)
    assert tf_bilinear(row, 4)[0, 0].tolist() == [[0, 0.5, 1, 1]] * 4
    column = torch.tensor([[[[0.0], [1.0], [2.0], [4.0]]]]).expand(1, 1, 4, 4)
    assert tf_bilinear(column, 2)[0, 0].tolist() == [[0, 0], [2, 2]]  # every other pixel: no antialiasing


@pytest.mark.parametrize("shape", SHAPES)
def test_tf_bilinear_is_torch_fidelitys_to_the_bit(shape):
    images = noise(shape).float()
    kept = images.clone()
    assert torch.equal(
        tf_bilinear(images, 299), interpolate_bilinear_2d_like_tensorflow1x(images, (299, 299), align_corners=False)
    )
    assert torch.equal(images, kept)


@pytest.mark.parametrize("shape", SHAPES)
def test_clean_pil_is_clean_fids_to_the_bit(shape):
    images = noise(shape)
    found = clean_pil(images, 299)
    assert found.dtype == torch.float32 and torch.equal(
        found, each(make_resizer("PIL", False, "bicubic", (299, 299)), images)
    )
    if shape == (32, 32):
        assert (
            found.min() == 0 and found.max() == 255 and (found != found.round()).any()
        )  # overshoot is clipped, nothing is rounded


@pytest.mark.parametrize("shape", SHAPES)
def test_clean_torch_is_near_clean_pil(shape):
    images = noise(shape)
    assert (clean_torch(images, 299) - clean_pil(images, 299)).abs().max() < 0.01


@pytest.mark.parametrize("shape", SHAPES)
def test_torch_bilinear_is_pytorch_fids(shape):
    images = noise(shape)
    legacy = each(make_resizer("PyTorch", False, "bilinear", (299, 299)), images)
    torch.testing.assert_close(torch_bilinear(images.float() / 255, 299) * 255, legacy, rtol=0, atol=1e-3)


def test_several_threads_keep_images_and_channels_in_order():
    images = torch.arange(12, dtype=torch.uint8).view(4, 3, 1, 1).expand(4, 3, 8, 8)
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        assert clean_pil(images, 16)[:, :, 3, 3].round().flatten().tolist() == list(range(12))
    finally:
        torch.set_num_threads(threads)
