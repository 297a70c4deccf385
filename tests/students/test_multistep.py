"""Students of several calls: image i is a function of its own start noise, in any batch; checkpoints say what they
are."""

import pytest
import torch

import d2o
from d2o.data.images import open_images, to_uint8
from d2o.diffusion.ddgan import DDGANProcess
from d2o.diffusion.noise import noise_for_seeds
from d2o.errors import UserError
from d2o.interop.safetensors_io import load_file, save_file
from d2o.students.base import build_student, save_student
from d2o.students.generate import SampleSettings, make_samples
from d2o.students.multistep import MultistepStudent, OwnNoise
from d2o.students.samplers import student_sampler
from d2o.teachers.base import Spec
from tests.networks.test_ncsnpp_z import generator

SPEC = Spec(name="tiny", shape=(1, 8, 8))


def student(steps: int = 3) -> MultistepStudent:
    return MultistepStudent(generator(), SPEC, steps).eval().requires_grad_(False)


def test_sampling_is_the_process_backwards_with_fresh_latents():
    model, noise, process, calls = student(), torch.randn(4, 1, 8, 8), DDGANProcess(3), []
    model.network.register_forward_hook(lambda module, args, out: calls.append(args))
    x = model(noise)
    assert [args[1].tolist() for args in calls] == [[2] * 4, [1] * 4, [0] * 4]
    assert len({float(z[0, 0]) for _, _, z, _ in calls}) == 3 and torch.equal(calls[0][0], noise)
    randn, y = OwnNoise(noise), noise
    for step in (2, 1, 0):
        t = torch.full((4,), step)
        x0 = model.network(y, t, randn(8), None)
        y = process.posterior(x0, y, t, randn(1, 8, 8))
    assert torch.equal(x, y) and x.abs().max() <= 1


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_an_image_depends_on_its_own_seed_alone(steps):
    model, noise = student(steps), noise_for_seeds(range(40, 46), SPEC.shape)
    together = model(noise)
    assert torch.equal(together, model(noise))
    for i in (0, 3, 5):
        assert torch.allclose(model(noise[i : i + 1])[0], together[i], atol=1e-5)
    assert torch.allclose(model(noise.flip(0)).flip(0), together, atol=1e-5)
    torch.manual_seed(9)  # neither does it read or move the global generator
    state = torch.get_rng_state()
    assert torch.equal(model(noise), together) and torch.equal(torch.get_rng_state(), state)


def test_own_noise_is_standard_normal_and_differs_between_samples_and_draws():
    start = torch.randn(64, 1, 8, 8)
    randn = OwnNoise(start)
    first, second = randn(1, 8, 8), randn(1, 8, 8)
    for x in (first, second):
        assert x.mean().abs() < 0.05 and x.std().item() == pytest.approx(1, abs=0.05)
    for a, b in ((first, second), (first, start), (first[:-1], first[1:])):
        assert (a * b).mean().abs() < 0.06
    assert torch.equal(OwnNoise(start[5:6])(1, 8, 8)[0], first[5])


def test_the_caller_may_give_the_noise():
    model, noise = student(), torch.randn(2, 1, 8, 8)
    shapes = []

    def zeros(*shape):
        shapes.append(shape)
        return torch.zeros(2, *shape)

    assert not torch.allclose(model(noise, randn=zeros), model(noise), atol=1e-3)
    assert shapes == [(8,), (1, 8, 8), (8,), (1, 8, 8), (8,)]


def test_checkpoints_state_the_kind_and_bring_it_back(tmp_path):
    model, noise = student(), torch.randn(2, 1, 8, 8)
    save_student(tmp_path / "s.safetensors", model)
    again = d2o.load_student(tmp_path / "s.safetensors")
    assert (
        isinstance(again, MultistepStudent)
        and again.nfe == 3
        and again.meta["student"] == {"kind": "multistep", "steps": 3}
    )
    assert torch.equal(again(noise), model(noise)) and again.fingerprint == model.fingerprint
    rebuilt = build_student(again.config, SPEC)
    rebuilt.network.load_state_dict(again.network.state_dict())
    assert torch.equal(rebuilt(noise), model(noise))
    tensors, meta = load_file(tmp_path / "s.safetensors")
    save_file(tmp_path / "odd.safetensors", tensors, {**meta, "student": {"kind": "multistp", "steps": 3}})
    with pytest.raises(UserError, match=r"unknown kind of student in \S+ 'multistp': did you mean 'multistep'"):
        d2o.load_student(tmp_path / "odd.safetensors")


def test_files_of_samples_do_not_depend_on_the_batch(tmp_path):
    sampler = student_sampler(student())
    for name, batch, chunk in (("a.npz", 4, 8), ("b.npz", 4, 4)):
        make_samples(sampler, tmp_path / name, SampleSettings(12, seed=7), batch=batch, threads=1, chunk=chunk)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    found = open_images(tmp_path / "a.npz").images(range(12)).int()
    assert (found - to_uint8(student()(noise_for_seeds(range(7, 19), SPEC.shape))).int()).abs().max() <= 1
    with pytest.raises(UserError, match="unconditional"):
        student()(torch.randn(2, 1, 8, 8), torch.tensor([0, 1]))
