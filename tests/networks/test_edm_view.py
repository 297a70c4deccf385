"""Networks of three other families as denoisers D(x; sigma): the teacher's own denoiser, trainable, in a checkpoint."""

from __future__ import annotations

import copy

import pytest
import torch

from d2o.condition import Condition
from d2o.diffusion.levels import levels_of
from d2o.diffusion.schedules import DiscreteSchedule, FlowSchedule
from d2o.errors import UserError
from d2o.networks.build import build_network, network_config, set_checkpointing, set_dropout
from d2o.networks.edm_view import called_at
from d2o.networks.precond import set_disc_map
from d2o.networks.second_time import second_time, with_second_time
from d2o.students.base import Student, load_student, save_student
from d2o.teachers.in_edm import ViewTeacher, in_edm
from tests.helpers import tiny_teacher
from tests.teachers.families import FAMILIES, tiny


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    return {name: tiny(name, tmp_path_factory.mktemp(name)) for name in FAMILIES}


def given(teacher, n=3):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, *teacher.spec.shape, generator=generator)
    prompts = (
        teacher.embed(Condition.of_prompts(["a cat", "", "two dogs"][:n])) if teacher.spec.condition == "text" else None
    )
    return x, torch.arange(n) % teacher.spec.classes if teacher.spec.classes else prompts


@pytest.mark.parametrize("name", FAMILIES)
def test_the_view_is_the_teachers_denoiser_at_equal_points(teachers, name):
    teacher = teachers[name]
    view, (x, condition) = in_edm(teacher), given(teacher)
    times = [0.02, 0.4, 0.9] if isinstance(teacher.schedule, FlowSchedule) else [0, 400, 999]
    for t in torch.tensor(times):
        alpha, sigma_t = teacher.schedule.alpha(t.float()), teacher.schedule.sigma(t.float())
        expected = teacher.denoise(alpha * x, t.float(), condition)
        found = view.denoise(x, sigma_t / alpha, condition)
        if name == "ddpm":  # whose solvers clip
            assert float(expected.abs().max()) <= 1
            found = found.clamp(-1, 1)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    low, high = view.spec.sigma_min, view.spec.sigma_max
    assert view.network.sigma_min == low < high and view.fingerprint == teacher.fingerprint


@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_trained_and_its_options_are_kept(teachers, name):
    teacher = teachers[name]
    view, (x, condition) = copy.deepcopy(in_edm(teacher).network).train().requires_grad_(True), given(teacher)
    assert set_checkpointing(view, True)
    x.requires_grad_(True)
    view(x, torch.tensor([0.3, 1.0, 5.0]), condition).square().mean().backward()
    grads = [p.grad for p in view.parameters()]
    assert x.grad is not None and x.grad.abs().sum() > 0
    assert sum(g is not None and bool(g.abs().sum() > 0) for g in grads) > 0.8 * len(grads)
    assert all(p.grad is None for p in teacher.network.parameters())
    set_checkpointing(view, False)
    if name == "sd3":
        with pytest.raises(UserError, match="no residual blocks with dropout"):
            set_dropout(view, 0.5)
        return
    set_dropout(view, 0.5)
    again = build_network(network_config(view))
    assert again.dropout == view.dropout == 0.5 and network_config(again) == network_config(view)
    assert not torch.equal(view(x, torch.tensor(1.0), condition), view(x, torch.tensor(1.0), condition))


@pytest.mark.parametrize("name", FAMILIES)
def test_maps_and_the_second_time(teachers, name):
    teacher = teachers[name]
    view, (x, condition) = in_edm(teacher).network, given(teacher)
    sigma = torch.tensor([0.5])
    plain = view(x, sigma, condition)
    for kind in ("enc_last_mean", "mid_mean"):
        set_disc_map(view, kind)
        found, both = view(x, sigma, condition, part="encoder"), view(x, sigma, condition, part="encoder_decoder")
        assert torch.equal(found, both[1]) and torch.equal(both[0], plain)
        assert found.shape == (3, 1, 4, 4) and found.dtype == torch.float32
    grown = with_second_time(view)
    s = second_time(torch.tensor([0.1, 0.2, 0.3]))
    torch.testing.assert_close(grown(x, sigma, condition, s), plain)
    torch.nn.init.normal_(grown.map_augment.weight)
    assert not torch.allclose(grown(x, sigma, condition, s), plain)
    torch.testing.assert_close(grown(x, sigma, condition), plain)  # no hook stays behind


@pytest.mark.parametrize("name", ["ddpm", "ddpm-labels"])
def test_students_of_it_are_checkpoints(teachers, name, tmp_path):
    teacher = in_edm(teachers[name])
    x, condition = given(teacher)
    student = Student(copy.deepcopy(teacher.network), teacher.spec, 2.5).eval()
    save_student(tmp_path / "s.safetensors", student)
    again = load_student(tmp_path / "s.safetensors")
    assert torch.equal(again(x, condition), student(x, condition))
    assert (
        again.sigma == pytest.approx(2.5, rel=0.01)
        and again.sigma == student.sigma == called_at(again.network, again.sigma) != 2.5
    )


def test_students_are_not_called_above_what_their_network_knows(teachers):
    teacher = in_edm(teachers["sd"])
    top = teacher.spec.sigma_max
    assert called_at(teacher.network, 14.61) == called_at(teacher.network, top) == top
    with pytest.raises(UserError, match="called at sigma 80, and its network knows noise levels up to 14.61"):
        Student(teacher.network, teacher.spec, 80.0)


def test_consistency_ends_at_the_lowest_level(teachers):
    teacher = in_edm(teachers["ddpm"])
    view, (x, _) = copy.deepcopy(teacher.network), given(teacher)
    low, high = torch.tensor([view.sigma_min]), torch.tensor([view.sigma_max])
    view.precond = "consistency"
    torch.testing.assert_close(view(x, low), x)
    torch.testing.assert_close(view(x, high), teacher.network(x, high), rtol=0.01, atol=0.01)
    config = {**network_config(view), "precond": "consistency"}
    assert build_network(config).precond == "consistency"


def test_schedules_are_recorded_as_they_are():
    made = DiscreteSchedule.scaled_linear()
    only_numbers = DiscreteSchedule(made.alphas_cumprod)
    for schedule in (made, only_numbers):
        torch.testing.assert_close(
            DiscreteSchedule.from_config(schedule.record()).alphas_cumprod, made.alphas_cumprod, rtol=1e-12, atol=0
        )
    assert "trained_betas" not in made.record()
    levels = levels_of(made.record())
    sigmas = ((1 - made.alphas_cumprod) / made.alphas_cumprod).sqrt()
    torch.testing.assert_close(levels.time(sigmas[[0, 1, 500, 999]]), torch.tensor([0.0, 1.0, 500.0, 999.0]))
    between = (sigmas[10] * sigmas[11]).sqrt()
    assert float(levels.time(between)) == pytest.approx(10.5)
    assert levels.time(torch.tensor([1e-4, 1e4])).tolist() == [0, 999]
    assert float(levels.nearest(sigmas[500] * 1.0001)) == float(sigmas[500])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"net": {"class": "VQModel"}}, "network.net.class"),
        ({"prediction": "velocity"}, "does not go with that schedule"),
        ({"prediction": "x"}, "network.prediction"),
        ({"precond": "vp"}, "preconditioning"),
        ({"schedule": {"trained_betas": [0.5]}}, "do not rise"),
        ({"schedule": {"beta_schedule": "x"}}, "beta_schedule"),
        ({"net": {"class": "UNet2DModel", "sample_sise": 8}}, "did you mean 'sample_size'"),
    ],
)
def test_what_is_no_view_is_refused(teachers, change, words):
    with pytest.raises(UserError, match=words):
        build_network({**network_config(in_edm(teachers["ddpm"]).network), **change})


def test_the_edm_family_is_its_own_view(tmp_path):
    teacher = tiny_teacher(tmp_path / "t.safetensors")
    assert in_edm(teacher) is teacher and teacher.edm_view() is teacher.network


def test_guidance_and_prompts_are_the_teachers(teachers):
    teacher = teachers["sd"]
    view, (x, condition) = in_edm(teacher), given(teacher)
    assert isinstance(view, ViewTeacher) and in_edm(view) is view
    t = torch.tensor(500.0)
    alpha, sigma = teacher.schedule.alpha(t), teacher.schedule.sigma(t) / teacher.schedule.alpha(t)
    expected = teacher.guided(alpha * x, t, condition, 3.0)
    torch.testing.assert_close(view.guided(x, sigma, condition, 3.0), expected, rtol=1e-3, atol=5e-3)
    torch.testing.assert_close(view.decode(x), teacher.decode(x))


def test_where_stable_diffusions_students_are_called():
    """G = (x_T - sigma_T eps) / alpha_T (Kang et al. 2024, eq. 7 and 8) as a denoiser called at sigma_T / alpha_T."""
    levels = levels_of(DiscreteSchedule.scaled_linear().record())
    for t, one_over_alpha, ratio, snr in (
        (999, 14.648814, 14.614641, 0.00468192),
        (981, 13.158464, 13.120411, 0.00580905),
        (0, 1.000425, 0.029167, 1175.47),
    ):
        sigma = levels.sigmas[t]
        assert float(sigma) == pytest.approx(ratio, rel=2e-5) and float(sigma**-2) == pytest.approx(snr, rel=1e-5)
        assert float(1 / levels.alpha(sigma)) == pytest.approx(one_over_alpha, rel=1e-6)
        assert int(levels.time(sigma.reshape(1)).round()) == t
        near = levels.nearest(torch.tensor([ratio], dtype=torch.float64))  # as a recipe would write it
        assert float(near) == float(sigma)
    assert torch.equal(levels.time(levels.sigmas[-1:]), torch.tensor([999.0]))


def test_a_student_called_at_the_last_step_is_the_noise_prediction_of_x_t(teachers):
    """With x_T = z sigma_T, which is nearly z: 0.9977 of it at T = 999."""
    teacher = teachers["sd"]
    x, text = given(teacher)
    for t, sigma in ((999, 14.614641), (981, 13.120411)):
        student = Student(in_edm(teacher).network, teacher.spec, sigma)
        alpha, sigma_t = (
            float(v) for v in (teacher.schedule.alpha(torch.tensor(t)), teacher.schedule.sigma(torch.tensor(t)))
        )
        eps = teacher.network(sigma_t * x, torch.full((len(x),), t), text.states).sample
        found, expected = student(x, text), (sigma_t * x - sigma_t * eps) / alpha
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
