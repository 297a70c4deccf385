"""EDM2's latent space: the published statistics, and the autoencoder on pixels in [0, 1]."""

from dataclasses import replace

import pytest
import torch

from d2o.data.images import open_images
from d2o.errors import UserError
from d2o.networks.edm2_unet import EDM2Precond
from d2o.students.base import Student, load_student, save_student
from d2o.teachers import edm2_latents
from d2o.teachers.base import Spec
from d2o.teachers.edm2_latents import decode, draw, encode, from_diffusion, to_diffusion
from tests.latent import tiny_vae


@pytest.fixture(scope="module")
def vae():
    return tiny_vae()


def test_the_published_numbers():
    """raw * scale + bias with scale = 0.5 / [4.17, 4.62, 3.71, 3.28], bias = -[5.81, 3.25, 0.12, -2.15] * scale
    (EDM2)."""
    raw = torch.ones(1, 4, 1, 1, dtype=torch.float64)
    expected = [0.5 * (1 - 5.81) / 4.17, 0.5 * (1 - 3.25) / 4.62, 0.5 * (1 - 0.12) / 3.71, 0.5 * (1 + 2.15) / 3.28]
    torch.testing.assert_close(to_diffusion(raw).flatten(), torch.tensor(expected, dtype=torch.float64))
    mean, std = torch.tensor([5.81, 3.25, 0.12, -2.15]), torch.tensor([4.17, 4.62, 3.71, 3.28])
    latents = mean.view(1, 4, 1, 1) + std.view(1, 4, 1, 1) * torch.randn(
        64, 4, 32, 32, generator=torch.Generator().manual_seed(0)
    )
    x = to_diffusion(latents)
    assert x.mean().abs() < 0.01 and abs(x.std() - 0.5) < 0.01  # sigma_data
    torch.testing.assert_close(from_diffusion(x), latents)


def test_decoding(vae):
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)) * 0.5
    images = decode(vae, x)
    assert images.shape == (2, 3, 16, 16) and images.dtype == torch.float32 and images.min() >= -1 and images.max() <= 1
    with torch.no_grad():
        pixels = vae.decode(
            from_diffusion(x)
        ).sample  # the autoencoder's own range here is [0, 1]; its scaling factor plays no part
    torch.testing.assert_close(images, pixels.clamp(0, 1) * 2 - 1)
    assert (pixels < 0).any()  # so that the clamp is put to the test
    torch.testing.assert_close(decode(vae.to(torch.float64), x), images)
    vae.to(torch.float32)


def test_encoding(vae):
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1
    mean, std = encode(vae, images)
    with torch.no_grad():
        expected = vae.encode((images + 1) / 2).latent_dist
    torch.testing.assert_close(mean, expected.mean)
    torch.testing.assert_close(std, expected.std)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(from_diffusion(draw(mean, std, noise)), mean + std * noise)


def test_latents_of_another_shape():
    with pytest.raises(ValueError, match=r"\[B, 4, h, w\], not \[4, 8, 8\]"):
        to_diffusion(torch.zeros(4, 8, 8))


def test_students_of_latents_make_images_without_their_teacher(vae, tmp_path, monkeypatch, capsys):
    from d2o.cli.app import main

    monkeypatch.setattr(edm2_latents, "autoencoder", lambda device: vae)
    torch.manual_seed(0)
    network = EDM2Precond(
        8, 4, 3, model_channels=16, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[], channels_per_head=16
    )
    teacher = edm2_latents.EDM2LatentTeacher(network, Spec("tiny-edm2", (4, 8, 8), "latent", "label", 3))
    assert teacher.spec.latents == "edm2"
    made = {"recipe": {}, "teacher": {"name": "tiny-edm2"}, "metrics": {}, "provenance": []}
    save_student(tmp_path / "s.safetensors", Student(network, teacher.spec, 2.5), **made)
    student = load_student(tmp_path / "s.safetensors")
    noise, labels = torch.randn(5, 4, 8, 8), torch.tensor([0, 1, 2, 0, 1])
    with (
        torch.no_grad(),
        torch.autocast("cpu", torch.bfloat16),
    ):  # as in training: the autoencoder's own precision stays
        images = student.decode(noise)
    assert images.shape == (5, 3, 16, 16)
    torch.testing.assert_close(images, decode(vae, noise), rtol=0, atol=1e-6)
    torch.testing.assert_close(images, teacher.decode(noise), rtol=0, atol=1e-6)
    with pytest.raises(SystemExit) as done:
        main(
            ["sample", str(tmp_path / "s.safetensors"), "--n", "3", "--out", str(tmp_path / "x.zip"), "--device", "cpu"]
        )
    assert done.value.code == 0 and open_images(tmp_path / "x.zip").shape == (3, 16, 16)
    silent = Student(network, replace(teacher.spec, latents=""), 2.5)
    with pytest.raises(UserError, match="a student of tiny-edm2 makes latents, and its checkpoint does not say how"):
        silent.decode(silent(noise, labels))
