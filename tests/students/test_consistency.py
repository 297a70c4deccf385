"""Students of consistency models: the published two-step sampling, on the command line too; an image is a function of
its seed."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import d2o
from d2o.cli.app import main
from d2o.diffusion.noise import noise_for_seeds
from d2o.errors import UserError
from d2o.interop.safetensors_io import load_file, save_file
from d2o.losses.consistency import jump, karras_time
from d2o.networks.second_time import CHANNELS, second_time, with_second_time
from d2o.students.base import build_student, save_student
from d2o.students.consistency import MIDDLE, ConsistencyStudent
from d2o.students.multistep import OwnNoise
from tests.helpers import SPEC, tiny_network

LABELS = torch.tensor([3, 7, 0, 3])


def student(form: str = "cd", steps: int = 1, clamp: bool = False, spec=SPEC) -> ConsistencyStudent:
    network = tiny_network(1, precond="consistency" if form == "cd" else "edm")
    if form == "ctm":
        network = with_second_time(network)
        with torch.no_grad():
            network.model.map_augment.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(2))
    return ConsistencyStudent(network, spec, form=form, steps=steps, clamp=clamp).eval().requires_grad_(False)


def level(value: float) -> torch.Tensor:
    return torch.full((4,), value)


def test_the_network_is_the_identity_at_the_lowest_level():
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(student().network(x, level(0.002), LABELS), x)
    assert not torch.allclose(student().network(x, level(0.01), LABELS), x, atol=1e-4)


def test_one_and_two_steps_of_a_consistency_model():
    model, noise = student(), torch.randn(4, 1, 8, 8)
    one = model(noise, LABELS)
    assert torch.equal(one, model.network(80 * noise, level(80.0), LABELS)) and model.nfe == 1
    two = model.with_steps(2)
    # point 22 of 40 from the top
    tau = (80 ** (1 / 7) + 22 / 39 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert two.nfe == 2 and two.grid()[1] == pytest.approx(tau, rel=1e-9) == pytest.approx(1.382, abs=1e-3)
    again = model.network(one + (tau**2 - 0.002**2) ** 0.5 * OwnNoise(noise)(1, 8, 8), level(tau), LABELS)
    assert torch.allclose(two(noise, LABELS), again, atol=1e-5)
    assert two.with_steps(1)(noise, LABELS).equal(one) and two.with_steps(2) is two
    assert torch.equal(
        two(noise, LABELS, randn=lambda *shape: torch.zeros(4, *shape)),
        model.network(one, level(two.grid()[1]), LABELS),
    )


def test_a_trajectory_model_lands_on_the_way():
    model, noise = student("ctm"), torch.randn(4, 1, 8, 8)

    def hop(x, t, s):
        return jump(x, model.network(x, level(t), LABELS, second_time(level(s))), level(t), level(s))

    assert torch.allclose(model(noise, LABELS), hop(80 * noise, 80.0, 0.002), atol=1e-5)
    tau = karras_time(torch.tensor(MIDDLE), 1).item()
    assert torch.allclose(model.with_steps(2)(noise, LABELS), hop(hop(80 * noise, 80.0, tau), tau, 0.002), atol=1e-5)
    x = torch.randn(4, 1, 8, 8)
    here, there = (model.network(x, level(2.0), LABELS, second_time(level(s))) for s in (1.0, 0.1))
    assert not torch.allclose(here, there, atol=1e-4)  # it does ask where to


def test_a_network_that_is_told_where_to_begins_as_it_was():
    old, x = tiny_network(3, augment_dim=9), torch.randn(4, 1, 8, 8)
    new = with_second_time(old)
    assert new.config["augment_dim"] == CHANNELS == second_time(level(0.5)).shape[1]
    assert torch.equal(new(x, level(2.0), LABELS, second_time(level(0.5))), old(x, level(2.0), LABELS))


def test_a_progressively_distilled_student_walks_its_grid():
    model, noise = student("pd", steps=4), torch.randn(4, 1, 8, 8)
    x, grid = 80 * noise, karras_time(torch.arange(5), 4).tolist()[::-1]
    for t, s in pairwise(grid):
        x = x + (t - s) / t * (model.network(x, level(t), LABELS) - x)
    assert model.nfe == 4 and torch.allclose(model(noise, LABELS), x, atol=1e-5)
    with pytest.raises(UserError, match="distilled to 4 steps"):
        model.with_steps(2)


@pytest.mark.parametrize(("form", "steps"), [("cd", 1), ("cd", 2), ("pd", 4), ("ctm", 2)])
def test_estimates_are_clamped_at_every_call(form, steps):
    """As Song et al.'s sampler: not only the last one, which decoding clamps anyway; never latents, which have no such
    range."""
    noise, asked = torch.randn(4, 1, 8, 8), []

    def loud(network):  # estimates far outside of [-1, 1]
        network.register_forward_hook(lambda module, args, out: (asked.append(args[0].clone()), 5 * out)[1])

    model, free, latent = (
        student(form, steps, True),
        student(form, steps, False),
        student(form, steps, True, replace(SPEC, space="unnamed")),
    )
    for each in (model, free, latent):
        loud(each.network)

    def quiet(*shape):
        return torch.zeros(4, *shape)

    found = model(noise, LABELS, randn=quiet)
    calls = list(asked)
    x, grid = 80 * noise, model.grid()
    for i, (t, s) in enumerate(pairwise(grid)):
        torch.testing.assert_close(calls[i], x, rtol=1e-4, atol=1e-4)
        to = second_time(level(s)) if form == "ctm" else None
        f = (
            model.network(calls[i], level(t), LABELS, to)
            if to is not None
            else model.network(calls[i], level(t), LABELS)
        )
        f = f.clamp(-1, 1) if form != "ctm" or i == steps - 1 else f
        x = f if form == "cd" else jump(calls[i], f, level(t), level(s))
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)
    assert float(found.abs().max()) < 1.02  # pd: with what noise is left at 0.002
    unclamped = free(noise, LABELS, randn=quiet)
    assert float(unclamped.abs().max()) > 1.1 and torch.equal(latent(noise, LABELS, randn=quiet), unclamped)
    if form in ("cd", "pd") and steps > 1:  # the last call's clamp alone is another image
        assert not torch.allclose(unclamped.clamp(-1, 1), found, atol=1e-3)


def test_students_of_before_the_switch_go_on_as_they_were(tmp_path):
    save_student(tmp_path / "s.safetensors", student("cd", 2))
    tensors, meta = load_file(tmp_path / "s.safetensors")
    record = {key: value for key, value in meta["student"].items() if key != "clamp"}
    save_file(tmp_path / "old.safetensors", tensors, {**meta, "student": record})
    old, noise = d2o.load_student(tmp_path / "old.safetensors"), 3 * torch.randn(4, 1, 8, 8)
    assert old.clamp is False and torch.equal(old(noise, LABELS), student("cd", 2)(noise, LABELS))


@pytest.mark.parametrize("form", ["cd", "ctm"])
def test_an_image_depends_on_its_own_seed_alone(form):
    model, noise, labels = student(form, 2), noise_for_seeds(range(40, 46), SPEC.shape), torch.arange(6)
    together = model(noise, labels)
    assert torch.allclose(model(noise.flip(0), labels.flip(0)).flip(0), together, atol=1e-5)
    assert torch.allclose(model(noise[3:4], labels[3:4])[0], together[3], atol=1e-5)


@pytest.mark.parametrize(("form", "steps"), [("cd", 2), ("pd", 4), ("ctm", 1)])
def test_checkpoints_state_the_kind_and_bring_it_back(tmp_path, form, steps):
    model, noise = student(form, steps, clamp=True), torch.randn(4, 1, 8, 8)
    save_student(tmp_path / "s.safetensors", model)
    again = d2o.load_student(tmp_path / "s.safetensors")
    assert isinstance(again, ConsistencyStudent) and torch.equal(again(noise, LABELS), model(noise, LABELS))
    assert again.record == {
        "kind": "consistency",
        "form": form,
        "sigma": 80.0,
        "steps": steps,
        "middle": MIDDLE,
        "clamp": True,
    }
    rebuilt = build_student(again.config, SPEC)
    rebuilt.network.load_state_dict(again.network.state_dict())
    assert torch.equal(rebuilt(noise, LABELS), model(noise, LABELS))
    tensors, meta = load_file(tmp_path / "s.safetensors")
    save_file(tmp_path / "odd.safetensors", tensors, {**meta, "student": {**meta["student"], "form": "ct"}})
    with pytest.raises(UserError, match="unknown form of a consistency student 'ct'"):
        d2o.load_student(tmp_path / "odd.safetensors")


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_student(tmp_path / "s.safetensors", student(), recipe={}, teacher={"name": "tiny"}, provenance=[])
    save_student(tmp_path / "pd.safetensors", student("pd", 4), recipe={}, teacher={"name": "tiny"}, provenance=[])

    def call(*words):
        with pytest.raises(SystemExit) as end:
            main([str(word) for word in (*words, "--device", "cpu")])
        return end.value.code, capsys.readouterr().err

    return call


def test_sampling_in_two_steps_on_the_command_line(run, tmp_path):
    for out, more, calls in (
        ("1.npz", (), "1 network call "),
        ("2.npz", ("--steps", 2), "2 network calls "),
        ("4.npz", (), "4 network calls "),
    ):
        code, err = run(
            "sample", "pd.safetensors" if out == "4.npz" else "s.safetensors", "--n", 6, "--out", out, *more
        )
        assert code == 0 and calls in err
    assert (tmp_path / "1.npz").read_bytes() != (tmp_path / "2.npz").read_bytes()
    code, err = run("sample", "s.safetensors", "--n", 6, "--out", "2.npz", "--steps", 1)
    assert code == 2 and "holds samples of other settings" in err and "'steps': 2" in err
    for name, steps, words in (("s", 3, "in 1 or 2 network calls"), ("pd", 1, "distilled to 4 steps")):
        code, err = run("sample", f"{name}.safetensors", "--n", 6, "--out", "x.npz", "--steps", steps)
        assert code == 2 and words in err and "Traceback" not in err and not (tmp_path / "x.npz").exists()


def test_measuring_two_steps_on_the_command_line(run, tmp_path):
    small = ["--n", 32, "--batch", 16, "--against", "real:digits", "--no-teacher-distance"]
    for steps in (1, 2):
        code, err = run("eval", "s.safetensors", *small, "--steps", steps, "--json", f"{steps}.json")
        assert code == 0, err
    one, two = (json.loads((tmp_path / f"{steps}.json").read_text()) for steps in (1, 2))
    assert (one["x"]["nfe"], two["x"]["nfe"]) == (1, 2) and two["name"] == "s, 2 steps"
    assert one["metrics"]["fd"] != two["metrics"]["fd"]
    code, err = run("eval", "s.safetensors", *small, "--steps", 5)
    assert code == 2 and "in 1 or 2 network calls" in err
