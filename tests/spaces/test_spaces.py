"""Latent spaces: their numbers, and what autoencoders make of images and latents."""

import copy
from dataclasses import replace

import pytest
import torch

from d2o.data.images import open_images
from d2o.errors import UserError
from d2o.networks.edm2_unet import EDM2Precond
from d2o.spaces.base import PIXELS, UNNAMED, LatentSpace, numbers_of
from d2o.spaces.load import SOURCES, SPACES, keep_space, load_space
from d2o.students.base import Student, load_student, save_student
from d2o.teachers.base import Spec, Teacher
from tests.latent import tiny_autoencoder, tiny_text_to_image, tiny_vae

EDM2 = SPACES["edm2"]


@pytest.fixture(scope="module")
def vae():
    return tiny_vae()


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_published_numbers_of_edm2():
    """raw * scale + bias with scale = 0.5 / [4.17, 4.62, 3.71, 3.28], bias = -[5.81, 3.25, 0.12, -2.15] * scale
    (EDM2)."""
    raw = torch.ones(1, 4, 1, 1, dtype=torch.float64)
    expected = [0.5 * (1 - 5.81) / 4.17, 0.5 * (1 - 3.25) / 4.62, 0.5 * (1 - 0.12) / 3.71, 0.5 * (1 + 2.15) / 3.28]
    torch.testing.assert_close(EDM2.normalise(raw).flatten(), torch.tensor(expected, dtype=torch.float64))
    mean, std = torch.tensor([5.81, 3.25, 0.12, -2.15]), torch.tensor([4.17, 4.62, 3.71, 3.28])
    latents = mean.view(1, 4, 1, 1) + std.view(1, 4, 1, 1) * noise(64, 4, 32, 32, seed=0)
    x = EDM2.normalise(latents)
    assert x.mean().abs() < 0.01 and abs(x.std() - 0.5) < 0.01  # sigma_data


@pytest.mark.parametrize("name", SPACES)
def test_raw_undoes_normalise(name):
    numbers = SPACES[name]
    raw = noise(2, numbers.channels, 3, 5)
    torch.testing.assert_close(numbers.raw(numbers.normalise(raw)), raw)
    with pytest.raises(ValueError, match=rf"\[B, {numbers.channels}, h, w\], not \[{numbers.channels}, 8, 8\]"):
        numbers.normalise(torch.zeros(numbers.channels, 8, 8))


@pytest.mark.parametrize(("name", "low"), [("edm2", 0), ("sd15", -1)])
def test_decoding_is_the_autoencoder_s(vae, name, low):
    space = LatentSpace(name, SPACES[name], lambda: vae)
    x = noise(3, 4, 8, 8) * 0.5
    images = space.decode(x)
    assert images.shape == (3, 3, 16, 16) and images.dtype == torch.float32 and images.abs().max() <= 1
    with torch.no_grad():
        pixels = vae.decode(space.numbers.raw(x)).sample
    torch.testing.assert_close(images, pixels.clamp(0, 1) * 2 - 1 if low == 0 else pixels.clamp(-1, 1))
    assert (pixels < low).any()  # so that the clamp is put to the test
    torch.testing.assert_close(LatentSpace(name, SPACES[name], lambda: copy.deepcopy(vae).double()).decode(x), images)


@pytest.mark.parametrize(("name", "low"), [("edm2", 0), ("sd15", -1)])
def test_a_loss_gets_gradients_through_the_decoder(vae, name, low):
    space = LatentSpace(name, SPACES[name], lambda: vae)
    x = (noise(2, 4, 8, 8) * 0.5).requires_grad_()
    images = space.pixels(x)
    images[0].sum().backward()
    assert images.abs().max() > 1 and torch.equal(images.detach().clamp(-1, 1), space.decode(x))
    assert x.grad[0].abs().min() > 0 and torch.equal(x.grad[1], torch.zeros(4, 8, 8))
    assert all(p.grad is None for p in vae.parameters())


@pytest.mark.parametrize(("name", "low"), [("edm2", 0), ("sd15", -1)])
def test_encoding_is_the_autoencoder_s(vae, name, low):
    space, eps = LatentSpace(name, SPACES[name], lambda: vae), noise(2, 4, 8, 8, seed=3)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1
    with torch.no_grad():
        expected = vae.encode((images + 1) / 2 if low == 0 else images).latent_dist
    mean, std = space.moments(images)
    torch.testing.assert_close(mean, expected.mean)
    torch.testing.assert_close(std, expected.std)
    drawn = space.encode(images, eps)
    torch.testing.assert_close(space.numbers.raw(drawn), mean + std * eps)
    torch.testing.assert_close(space.encode(torch.cat([mean, std], dim=1), eps), drawn)  # stored latents
    assert not drawn.is_inference() and not drawn.requires_grad
    assert space.encode(images, torch.empty(2, 4, 8, 8, device="meta")).shape == (2, 4, 8, 8)
    assert space.image_shape((4, 8, 8)) == (3, 64, 64)


def test_pixels_are_a_space_too():
    space, images = load_space(PIXELS), noise(2, 1, 8, 8)
    assert torch.equal(space.encode(images), images) and space.decode(9 * images).abs().max() == 1
    assert space.image_shape((1, 8, 8)) == (1, 8, 8)


def test_a_space_is_loaded_once_and_not_before_it_is_used(tmp_path):
    first = load_space("edm2")
    assert load_space("edm2") is first and first._autoencoder is None and copy.deepcopy(first) is first
    assert first.record == {"name": "edm2", "revision": "31f26fdeee1355a5c34592e401dd41e45d25a493"}
    for wrong, message in (
        ("sd155", "unknown latent space 'sd155'.*'sd15'"),
        (UNNAMED, "does not say how they become images"),
    ):
        with pytest.raises(UserError, match=message):
            load_space(wrong)


def test_every_published_space_has_an_autoencoder(tmp_path, monkeypatch):
    """Stable Diffusion 2.1's is 1.5's; FLUX's lies in a folder of a repository, without convolutions around the
    latents."""
    monkeypatch.setenv("D2O_HOME", str(tmp_path))
    monkeypatch.setenv("D2O_OFFLINE", "1")
    assert set(SOURCES) == set(SPACES)
    assert load_space("sd21").record == {**load_space("sd15").record, "name": "sd21"}
    channels = {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159}
    flux = tiny_vae(**channels, use_quant_conv=False, use_post_quant_conv=False)
    assert numbers_of(flux.config, "flux") == replace(SPACES["flux"], factor=2)
    with pytest.raises(UserError) as error:
        load_space("flux").decode(torch.zeros(1, 16, 8, 8))
    assert "black-forest-labs/FLUX.1-schnell" in error.value.message
    assert '--include "vae/*"' in error.value.hint and "files of its folder vae into" in error.value.hint
    flux.save_pretrained(tmp_path / "teachers" / "flux-vae")
    x = noise(1, 16, 4, 4)
    with torch.no_grad():
        expected = flux.decode(x / 0.3611 + 0.1159).sample
    torch.testing.assert_close(load_space("flux").decode(x), expected.clamp(-1, 1))


def test_spaces_of_folders_and_checkpoints(tmp_path, vae):
    tiny_autoencoder(tmp_path / "vae.safetensors")
    model = tiny_text_to_image(tmp_path / "model.safetensors")
    vae.save_pretrained(tmp_path / "folder")
    x = noise(1, 4, 8, 8)
    for name, scale in (("vae.safetensors", 0.18215), ("model.safetensors", 0.5), ("folder", 0.18215)):
        space = load_space(str(tmp_path / name))
        assert (space.numbers.scale, space.numbers.factor, space.numbers.channels) == (scale, 2, 4)
        assert space.record["sha256"] == space.sha256 and len(space.sha256) == 64
        if name == "model.safetensors":
            with torch.no_grad():
                torch.testing.assert_close(space.decode(x), model.decode(x).clamp(-1, 1))
    scaled = copy.deepcopy(vae.config)
    with pytest.raises(UserError, match="scales latents per channel"):
        numbers_of(type("Config", (), {**scaled, "latents_mean": [0.0] * 4})(), "x")


def test_students_of_latents_make_images_without_their_teacher(vae, tmp_path, capsys):
    from d2o.cli.app import main

    space = keep_space(LatentSpace("edm2", EDM2, lambda: vae))
    torch.manual_seed(0)
    network = EDM2Precond(
        8, 4, 3, model_channels=16, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[], channels_per_head=16
    )
    teacher = Teacher(network, Spec("tiny-edm2", (4, 8, 8), "edm2", "label", 3))
    made = {"recipe": {}, "teacher": {"name": "tiny-edm2"}, "metrics": {}, "provenance": []}
    save_student(tmp_path / "s.safetensors", Student(network, teacher.spec, 2.5), **made)
    student = load_student(tmp_path / "s.safetensors")
    assert student.spec == teacher.spec and student.meta["needs"]["space"]["name"] == "edm2"
    x, labels = noise(5, 4, 8, 8), torch.tensor([0, 1, 2, 0, 1])
    with (
        torch.no_grad(),
        torch.autocast("cpu", torch.bfloat16),
    ):  # as in training: the autoencoder's own precision stays
        images = student.decode(x)
    assert images.shape == (5, 3, 16, 16)
    torch.testing.assert_close(images, space.decode(x), rtol=0, atol=1e-6)
    torch.testing.assert_close(images, teacher.decode(x), rtol=0, atol=1e-6)
    with pytest.raises(SystemExit) as done:
        main(
            ["sample", str(tmp_path / "s.safetensors"), "--n", "3", "--out", str(tmp_path / "x.zip"), "--device", "cpu"]
        )
    assert done.value.code == 0 and open_images(tmp_path / "x.zip").shape == (3, 16, 16)
    silent = Student(network, replace(teacher.spec, space=UNNAMED), 2.5)
    with pytest.raises(UserError, match="a student of tiny-edm2 makes latents, and its checkpoint does not say how"):
        silent.decode(silent(x, labels))


def test_another_autoencoder_than_the_student_s_is_refused(tmp_path, vae):
    vae.save_pretrained(tmp_path / "folder")
    spec = Spec("tiny", (4, 8, 8), str(tmp_path / "folder"))
    network = EDM2Precond(
        8, 4, 0, model_channels=16, channel_mult=[1], num_blocks=1, attn_resolutions=[], channels_per_head=16
    )
    save_student(tmp_path / "s.safetensors", Student(network, spec, 2.5))
    assert load_student(tmp_path / "s.safetensors").decode(noise(1, 4, 8, 8)).shape == (1, 3, 16, 16)
    other = copy.deepcopy(vae)
    with torch.no_grad():
        other.decoder.conv_out.bias += 1
    other.save_pretrained(tmp_path / "folder")
    with pytest.raises(UserError, match="the student of tiny makes latents of an autoencoder .* with sha256"):
        load_student(tmp_path / "s.safetensors").decode(noise(1, 4, 8, 8))


def test_records_of_older_versions_are_read():
    """They said "pixel", or "latent" and, of EDM2's alone, whose."""
    spec = Spec("tiny", (4, 8, 8), "edm2", "label", 3)
    record = spec.to_dict()
    assert (record["space"], record["latents"]) == ("latent", "edm2") and "text" not in record
    assert Spec.from_dict(record) == spec
    unnamed = Spec.from_dict({**record, "latents": ""})
    assert unnamed.space == UNNAMED and unnamed.latent and unnamed.to_dict() == {**record, "latents": ""}
    pixels = Spec("tiny", (1, 8, 8))
    assert pixels.to_dict()["space"] == "pixel" and Spec.from_dict(pixels.to_dict()) == pixels
    text = replace(spec, condition="text", classes=0, space="tiny-sd", text="tiny-sd")
    assert Spec.from_dict(text.to_dict()) == text
