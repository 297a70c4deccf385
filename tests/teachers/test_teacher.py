import copy

import pytest
import torch

from d2o.condition import Condition
from d2o.diffusion.schedules import DiscreteSchedule, EDMSchedule, FlowSchedule
from d2o.diffusion.solvers import Solver
from d2o.errors import UserError
from d2o.interop.safetensors_io import load_file, save_file
from d2o.students.base import load_student
from d2o.teachers.base import Spec, Teacher
from d2o.teachers.registry import load_teacher, teacher_names
from tests.diffusion.mixture import PLANE, MixtureTeacher
from tests.helpers import SPEC, tiny_student, tiny_teacher

SCHEDULES = {"edm": EDMSchedule(), "sd": DiscreteSchedule.scaled_linear(), "flow": FlowSchedule(3.0)}


def test_a_checkpoint_round_trip_gives_the_same_teacher(tmp_path):
    teacher = tiny_teacher(tmp_path / "t.safetensors")
    again = load_teacher(tmp_path / "t.safetensors")
    noise, labels = torch.randn(2, 1, 8, 8), torch.tensor([3, 4])
    assert again.spec == SPEC and again.fingerprint == teacher.fingerprint
    assert torch.equal(again.sample(noise, labels, steps=3), teacher.sample(noise, labels, steps=3))
    assert Spec.from_dict(SPEC.to_dict()) == SPEC


def test_guidance_extrapolates_from_the_unconditional_denoiser():
    teacher = tiny_teacher()
    x, labels = torch.randn(3, 1, 8, 8), torch.tensor([1, 2, 3])
    d_c, d_u = teacher.denoise(x, 2.0, labels), teacher.denoise(x, 2.0, torch.full((3,), -1))
    assert torch.allclose(teacher.guided(x, 2.0, labels, 3.0), d_u + 3 * (d_c - d_u), atol=1e-5)
    assert torch.equal(teacher.guided(x, 2.0, labels), d_c)
    assert not torch.allclose(
        teacher.sample(x, labels, steps=2, cfg=3.0), teacher.sample(x, labels, steps=2), atol=1e-3
    )
    with pytest.raises(UserError, match="needs a condition"):
        teacher.guided(x, 2.0, None, 3.0)


def test_labels_are_checked():
    teacher, x = tiny_teacher(), torch.randn(2, 1, 8, 8)
    with pytest.raises(UserError, match="conditioned on 10 classes"):
        teacher.denoise(x, 1.0)
    with pytest.raises(UserError, match="label 10 is out of range"):
        teacher.denoise(x, 1.0, torch.tensor([0, 10]))
    with pytest.raises(UserError, match="1 labels for a batch of 2"):
        teacher.denoise(x, 1.0, torch.tensor([0]))
    student = tiny_student()
    with pytest.raises(UserError, match="conditioned"):
        student(x)


def test_unknown_and_unfit_files_are_refused_in_words(tmp_path):
    with pytest.raises(UserError) as error:
        load_teacher("digit")
    assert "did you mean 'digits'" in str(error.value) and "digits" in teacher_names()
    with pytest.raises(UserError, match="no such file"):
        load_teacher(tmp_path / "absent.safetensors")
    with pytest.raises(UserError, match="folder without a checkpoint"):
        load_teacher(tmp_path)
    tiny_student(tmp_path / "s.safetensors")
    with pytest.raises(UserError, match="holds a student, not a teacher"):
        load_teacher(tmp_path / "s.safetensors")
    tiny_teacher(tmp_path / "t.safetensors")
    with pytest.raises(UserError, match="holds a teacher, not a student"):
        load_student(tmp_path / "t.safetensors")
    whole = (tmp_path / "t.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="truncated or not a safetensors file"):
        load_teacher(tmp_path / "cut.safetensors")
    tensors, meta = load_file(tmp_path / "t.safetensors")
    meta["network"]["model_channels"] = 32
    save_file(tmp_path / "odd.safetensors", tensors, meta)
    with pytest.raises(UserError, match="do not fit the network"):
        load_teacher(tmp_path / "odd.safetensors")


def test_decode_clips_and_bfloat16_is_close():
    teacher = tiny_teacher()
    assert teacher.decode(torch.tensor([-3.0, 0.5, 2.0])).tolist() == [-1.0, 0.5, 1.0]
    half = Teacher(teacher.network, SPEC, dtype=torch.bfloat16)
    x, labels = torch.randn(4, 1, 8, 8), torch.arange(4)
    difference = (half.denoise(x, 1.0, labels) - teacher.denoise(x, 1.0, labels)).abs().max()
    assert 0 < difference < 0.05


@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_teacher_denoises_at_its_schedules_times(kind):
    schedule, t = SCHEDULES[kind], {"edm": 2.5, "sd": 600, "flow": 0.7}[kind]
    teacher, labels = MixtureTeacher(schedule=schedule), torch.tensor([0, 1, 2, -1])
    x = torch.randn(4, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    time = torch.full((4,), float(t))
    expected = PLANE.posterior(x, schedule.alpha(time), schedule.sigma(time), labels)[0].float()
    for given in (t, torch.tensor(t), time):
        d = teacher.denoise(x, given, labels)
        assert d.dtype == torch.float32 and torch.allclose(d, expected, atol=1e-5)
    each = time * torch.tensor([1.0, 0.5, 0.25, 0.1])  # every sample at its own time
    for cfg in (1.0, 2.0):
        alone = [teacher.guided(x[i : i + 1], each[i], labels[i : i + 1], cfg) for i in range(4)]
        assert torch.allclose(teacher.guided(x, each, labels, cfg), torch.cat(alone), atol=1e-5)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_guidance_is_one_call_of_twice_the_size(kind):
    teacher, labels = MixtureTeacher(schedule=SCHEDULES[kind]), torch.tensor([0, 1, 2, 2, 0])
    noise = torch.randn(5, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    solver = Solver("euler", 6)
    plain = teacher.sample(noise, labels, solver)
    assert teacher.calls == [5] * solver.forwards() and torch.equal(
        teacher.sample(noise, labels, solver, cfg=1.0), plain
    )
    teacher.calls.clear()
    guided = teacher.sample(noise, labels, solver, cfg=2.0)
    assert teacher.calls == [10] * solver.nfe and sum(teacher.calls) / len(noise) == solver.forwards(2.0) == 12
    assert teacher.guided(noise, 0.5, labels, 0.0).allclose(
        teacher.denoise(noise, 0.5, torch.full((5,), -1)), atol=1e-5
    )

    def by_hand(x, t):
        d_c, d_u = (PLANE.denoiser(SCHEDULES[kind], which)(x, t) for which in (labels, torch.full((5,), -1)))
        return d_u + 2.0 * (d_c - d_u)

    assert torch.allclose(
        guided, solver.run(by_hand, noise, SCHEDULES[kind]).float(), atol=1e-4
    ) and not torch.allclose(guided, plain, atol=0.05)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_samples_of_a_class_have_its_distribution(kind):
    n, teacher = 900, MixtureTeacher(schedule=SCHEDULES[kind])
    noise, labels = torch.randn(n, 2, 1, 1, generator=torch.Generator().manual_seed(0)), torch.arange(n) % 3
    x = teacher.sample(noise, labels, "heun", 40).flatten(1).double()
    for k in range(3):
        std = float(PLANE.log_stds[k].exp())
        assert torch.allclose(x[labels == k].mean(0), PLANE.means[k], rtol=0, atol=4 * std / 300**0.5 + 0.02)
        assert torch.allclose(x[labels == k].std(0), torch.full((2,), std).double(), rtol=0.15)
    blind = MixtureTeacher(schedule=SCHEDULES[kind], labelled=False)
    assert torch.allclose(
        blind.sample(noise[:5], None, "heun", 8), teacher.sample(noise[:5], torch.full((5,), -1), "heun", 8)
    )


def test_a_teacher_samples_as_usual_unless_told_otherwise():
    teacher = MixtureTeacher()
    noise, labels = torch.randn(2, 2, 1, 1), torch.tensor([0, 1])

    def calls(*arguments, **more):
        teacher.calls.clear()
        teacher.sample(noise, labels, *arguments, **more)
        return len(teacher.calls)

    assert calls() == 35 and calls("euler") == 18 and calls(steps=4) == 7 and calls("ddim", 5) == 5  # heun, 18 steps
    assert calls(Solver("euler", 9)) == 9 and calls(Solver("euler", 9), 3) == 3
    assert teacher.solver() == Solver("heun", 18) and teacher.solver("dpmpp", 20) == Solver("dpmpp", 20)
    with pytest.raises(UserError, match="steps must be at least 1, not 0"):
        calls(steps=0)
    with pytest.raises(UserError, match="unknown solver 'eler': did you mean 'euler'"):
        calls("eler")


def test_conditions_that_do_not_fit_are_refused():
    blind, x = MixtureTeacher(labelled=False), torch.randn(2, 2, 1, 1)
    with pytest.raises(UserError, match="'mixture' is unconditional; it takes no labels"):
        blind.sample(x, torch.tensor([0, 1]))
    with pytest.raises(UserError, match="guidance .cfg 2. needs a condition"):
        blind.sample(x, None, cfg=2.0)
    with pytest.raises(UserError, match="takes no prompts .condition: none."):
        blind.embed(Condition.of_prompts(["a red square"]))
    with pytest.raises(UserError, match="takes class indices, not prompts"):
        MixtureTeacher().sample(x, Condition.of_prompts(["a red square", "a blue circle"]))
    with pytest.raises(UserError, match="label -2 is out of range; 'mixture' has classes 0 to 2"):
        MixtureTeacher().sample(x, torch.tensor([0, -2]))


def test_a_teachers_network_is_frozen_and_a_copy_of_it_learns():
    teacher, labels = MixtureTeacher(), torch.tensor([0, 1, 2])
    assert not any(p.requires_grad for p in teacher.network.parameters()) and not teacher.network.training
    x = torch.randn(3, 2, 1, 1, requires_grad=True)
    teacher.guided(x, 1.0, labels, 2.0).sum().backward()  # what methods need that differentiate through the teacher
    assert x.grad.abs().min() > 0
    copied = copy.deepcopy(teacher.network).requires_grad_(True)
    copied(x.detach(), torch.ones(3), labels).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in copied.parameters())
    assert not teacher.sample(x.detach(), labels, steps=2).requires_grad
    assert teacher.fingerprint == MixtureTeacher().fingerprint


def test_a_spec_of_another_version_is_read_or_refused_in_words():
    older = {name: value for name, value in SPEC.to_dict().items() if name not in ("solver", "steps", "guidable")}
    assert Spec.from_dict(older) == SPEC
    with pytest.raises(UserError, match="by colour, which this d2o does not know"):
        Spec.from_dict({**SPEC.to_dict(), "colour": "red"})
