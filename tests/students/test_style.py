"""Style students: one synthesis pass, images that depend on their own noise alone, walks through latents."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from d2o.data.draws import draw
from d2o.data.images import to_uint8
from d2o.errors import UserError
from d2o.export.exporter import export_checkpoint
from d2o.networks.build import build_network
from d2o.students.base import load_student, save_student
from d2o.students.multistep import MultistepStudent
from d2o.students.paths import path_images, save_path, walk_names
from d2o.students.style import StyleStudent, interpolate
from d2o.teachers.base import Spec

CONFIG = {
    "arch": "style_generator",
    "img_resolution": 8,
    "img_channels": 1,
    "h_dim": 16,
    "synthesis": {"base": 64, "max_channels": 8},
}


def style_student(step: float = 0.1, **options) -> StyleStudent:
    torch.manual_seed(0)
    network = build_network({**CONFIG, "mapping": {"step": step}})
    with torch.no_grad():
        for name, p in network.named_parameters():
            if name.endswith("noise_strength"):
                p.fill_(0.3)
        network.mapping.w_avg.normal_()
    return StyleStudent(network, Spec("s", (1, 8, 8)), **options).eval().requires_grad_(False)


def noise(n: int, seed: int = 0) -> torch.Tensor:
    return draw(seed, 0, n, (1, 8, 8), 0, "none")[0]


def test_one_pass_whatever_the_batch() -> None:
    student, calls = style_student(), []
    student.network.synthesis.register_forward_hook(lambda *_: calls.append(1))
    images = student(noise(6))
    assert len(calls) == 1 and images.shape == (6, 1, 8, 8)
    torch.testing.assert_close(torch.cat([student(z[None]) for z in noise(6)]), images, rtol=1e-4, atol=1e-5)
    assert not torch.equal(images[0], images[1])


def test_noise_inputs() -> None:
    z = noise(2)
    own, const, none = (style_student(noise=mode)(z) for mode in ("own", "const", "none"))
    assert not torch.allclose(own, const) and not torch.allclose(const, none)
    with pytest.raises(UserError, match="noise input"):
        style_student(noise="loud")


def test_truncation_moves_styles_to_their_mean() -> None:
    z = noise(4)
    near = style_student(truncation=0.0, noise="const")(z)
    torch.testing.assert_close(near[0], near[1])  # all the mean style
    assert not torch.allclose(style_student(noise="const")(z)[0], near[0])


def test_the_checkpoint_says_what_it_is(tmp_path: Path) -> None:
    student = style_student(truncation=0.7)
    save_student(tmp_path / "s.safetensors", student, recipe={}, teacher=None)
    loaded = load_student(tmp_path / "s.safetensors")
    assert isinstance(loaded, StyleStudent) and loaded.truncation == 0.7 and loaded.nfe == 1
    assert torch.equal(loaded(noise(3)), student(noise(3)))


def test_interpolations_keep_their_ends_and_slerp_the_norm() -> None:
    a, b = noise(3), noise(3, seed=9)
    for mode in ("lerp", "slerp"):
        points = interpolate(a, b, 5, mode)
        torch.testing.assert_close(points[0], a)
        torch.testing.assert_close(points[-1], b, rtol=1e-4, atol=1e-5)
    middle = {mode: interpolate(a, b, 3, mode)[1].flatten(1).norm(dim=1) for mode in ("lerp", "slerp")}
    assert bool((middle["lerp"] < 0.85 * a.flatten(1).norm(dim=1)).all())
    torch.testing.assert_close(
        middle["slerp"], (a.flatten(1).norm(dim=1) + b.flatten(1).norm(dim=1)) / 2, rtol=0.1, atol=0
    )
    with pytest.raises(UserError, match="unknown interpolation"):
        interpolate(a, b, 3, "nlerp")
    with pytest.raises(UserError, match="at least 2 steps"):
        interpolate(a, b, 1)


@pytest.mark.parametrize("path", ["h", "z", "w"])
def test_paths_end_where_they_say(path: str) -> None:
    student = style_student(noise="const")
    walks = path_images(student, path, 3, 4, seed=7)
    assert walks.shape == (3, 4, 1, 8, 8) and walks.dtype == torch.uint8
    z = noise(6, seed=7)
    clean = to_uint8(student.decode(student(z)))
    assert int((walks[:, -1].int() - (clean[:3] if path == "h" else clean[3:]).int()).abs().max()) <= 1
    if path != "h":
        assert int((walks[:, 0].int() - clean[:3].int()).abs().max()) <= 1
    assert not torch.equal(walks[:, 0], walks[:, -1])


def test_paths_as_pictures(tmp_path: Path) -> None:
    walks = path_images(style_student(), "h", 4, 5)
    save_path(walks, tmp_path / "p.png", walk_names("z", 4, seed=2))
    save_path(walks, tmp_path / "p.gif")
    assert walk_names("z", 4, seed=2)[1] == "seed 3 to 7" and walk_names("h", 4, seed=2)[1] == "seed 3"
    with Image.open(tmp_path / "p.png") as picture, Image.open(tmp_path / "p.gif") as film:
        assert picture.width > picture.height and film.n_frames == 8  # there and back
    with pytest.raises(UserError, match="written as .png"):
        save_path(walks, tmp_path / "p.jpg")
    with pytest.raises(UserError, match="unknown path"):
        path_images(style_student(), "x", 2, 3)


@pytest.mark.long
@pytest.mark.parametrize("file_format", ["program", "onnx"])
def test_an_exported_student_has_constant_noise_inputs(
    file_format: str, one_graph_a_network: None, tmp_path: Path
) -> None:
    student = style_student(step=0.5)  # few steps: a graph holds each of them
    save_student(tmp_path / "s.safetensors", student, recipe={}, teacher={"name": "none", "licence": "CC0-1.0"})
    made = export_checkpoint(tmp_path / "s.safetensors", file_format, check_n=3)
    assert made.parity.difference < 1e-4 and "constant ones" in made.card.read_text()


def test_a_student_that_draws_noise_between_its_calls_is_copied(tmp_path: Path) -> None:
    network = build_network(
        {
            "arch": "ddgan",
            "img_resolution": 8,
            "img_channels": 1,
            "nf": 16,
            "channel_mult": (1,),
            "num_res_blocks": 1,
            "attn_resolutions": (),
            "nz": 8,
            "zdim": 16,
            "n_mlp": 1,
        }
    )
    save_student(
        tmp_path / "m.safetensors",
        MultistepStudent(network, Spec("m", (1, 8, 8)), 2),
        recipe={},
        teacher={"name": "none"},
    )
    assert export_checkpoint(tmp_path / "m.safetensors", "safetensors", tmp_path / "copy.safetensors").path.exists()
    assert load_student(tmp_path / "copy.safetensors").nfe == 2
