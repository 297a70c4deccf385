"""Students of a few deterministic calls."""

from types import SimpleNamespace

import pytest
import torch

from d2o.condition import Condition
from d2o.diffusion.schedules import karras_sigma
from d2o.errors import UserError
from d2o.export.exporter import export_checkpoint
from d2o.methods.base import Batch, Setup, get_method
from d2o.methods.diffusion2gan import Diffusion2GANOptions
from d2o.metrics.nfe import Phase
from d2o.networks.edm_view import lowest_level
from d2o.recipes.load import load_recipe
from d2o.recipes.plan import make_plan
from d2o.recipes.schema import Recipe
from d2o.students.base import load_student, save_student
from d2o.students.few_step import FewStepStudent, spaced_levels
from d2o.students.samplers import student_sampler
from d2o.teachers.in_edm import in_edm
from d2o.teachers.registry import load_teacher
from tests.helpers import SPEC, tiny_network, tiny_student, tiny_teacher
from tests.methods import recording
from tests.teachers.families import tiny

LABELS = torch.tensor([3, 7])
META = {"recipe": {}, "teacher": {"name": "t", "sha256": "0" * 64, "licence": "MIT"}, "metrics": {}, "provenance": []}


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(teacher=None, start=None, steps=2, levels=None, **options):
    student = SimpleNamespace(sigma=80.0, begins="noise", init="teacher", dropout=None, steps=steps, levels=levels)
    given = Diffusion2GANOptions.model_validate({"distance": {"kind": "mse"}, **options})
    return get_method("diffusion2gan")(Setup(given, teacher or tiny_teacher(), student=student, start=start))


@torch.no_grad()
def test_it_is_the_euler_solver_s_steps(tmp_path):
    teacher, method = tiny_teacher(), made(steps=3)
    levels = [float(karras_sigma(i / 3, 0.002, 80.0)) for i in range(3)]
    assert method.student.levels == pytest.approx(levels) and method.nfe() == 3
    x = levels[0] * noise(2, 1, 8, 8)
    for t, u in zip(levels, [*levels[1:], 0.0], strict=True):
        d = teacher.denoise(x, t, LABELS)
        x = x + (u - t) * (x - d) / t
    assert torch.allclose(method.student(noise(2, 1, 8, 8), LABELS), x, atol=1e-4)
    sd = in_edm(tiny("sd", tmp_path)).network
    sigmas = sd.levels.sigmas
    assert spaced_levels(sd, 14.6146, 4) == pytest.approx([float(sigmas[t]) for t in (749, 499, 249)])


def test_the_losses_see_the_last_call_and_all_calls_learn():
    method = made(lambda_gan=0.25)
    seen = []

    def look(module, args, out):
        if out.requires_grad:
            out.retain_grad()
            seen.append(out)

    method.student.network.register_forward_hook(look)
    loop = recording.Loop(method, total=2)
    batch = Batch(noise=noise(2, 1, 8, 8), target=noise(2, 1, 8, 8, seed=1), condition=Condition.of_labels(LABELS))
    scalars = method.step(loop, batch, 1)
    assert scalars["loss"].item() == pytest.approx((seen[-1] - batch.target).square().mean().item(), rel=1e-5)
    assert len(seen) == 2 and all(out.grad.abs().sum() > 0 for out in seen)


def test_the_file_says_the_calls(tmp_path):
    student = FewStepStudent(tiny_network(1), SPEC, 80.0, [5.0, 0.5]).eval()
    save_student(tmp_path / "s.safetensors", student, **META)
    again = load_student(tmp_path / "s.safetensors")
    assert again.nfe == 3 and again.meta["student"] == {"kind": "few_step", "sigma": 80.0, "then": [5.0, 0.5]}
    with torch.no_grad():
        expected = student(noise(2, 1, 8, 8), LABELS)
        assert torch.equal(again(noise(2, 1, 8, 8), LABELS), expected)
        assert torch.allclose(again(noise(2, 1, 8, 8)[1:], LABELS[1:]), expected[1:], atol=1e-5)
    assert student_sampler(again).record["nfe"] == 3 and again.with_steps(3) is again
    with pytest.raises(UserError, match="3 network calls"):
        again.with_steps(1)
    assert made(start=again, steps=1).student.nfe == 3
    assert made(start=tiny_student(), steps=2).student.nfe == 2


def test_what_does_not_go_together_is_refused(tmp_path):
    for levels, words in (((90.0,), "levels below 80 that fall"), ((1.0, 2.0), "levels for 2 steps")):
        with pytest.raises(UserError, match=words):
            made(levels=list(levels))
    with pytest.raises(UserError, match="makes an image in 2 calls"):
        made(start=made(steps=2).student.eval(), steps=4)
    base = {"name": "few", "teacher": "digits", "optim": {"lr": 1e-3}, "batch": 4, "images": 8}
    plan = make_plan(Recipe.from_dict({**base, "method": "dmd", "student": {"steps": 2}}))
    assert any("method dmd has no students of 2 steps" in line for line in plan.refused)


def test_plans_count_all_calls():
    two, one = (make_plan(load_recipe(name)).calls for name in ("d2g_digits:2steps", "d2g_digits"))
    for key in ("training, as papers count (NFE)", "training (forward passes of trained networks)"):
        assert two[key] == 2 * one[key] > 0
    assert Phase("adversarial", 4, 10, 2).nfe == (5 + 2) * 40


@pytest.mark.long
@pytest.mark.parametrize("begins", ["x_T", "noise"])
def test_diffusers_makes_the_same_steps(begins, tmp_path):
    teacher = in_edm(load_teacher("tiny-sd"))
    then = spaced_levels(teacher.network, 14.6146, 2)
    student = FewStepStudent(teacher.network, teacher.spec, 14.6146, then, begins).eval()
    save_student(tmp_path / "s.safetensors", student, **META)
    done = export_checkpoint(tmp_path / "s.safetensors", "diffusers", tmp_path / "out", dtype="fp32", check_n=2)
    assert done.parity.difference < 1e-4 and "num_inference_steps=2" in done.card.read_text()
    low = lowest_level(teacher.network)
    to_the_lowest = FewStepStudent(teacher.network, teacher.spec, 14.6146, then, begins, last=low).eval()
    elsewhere = FewStepStudent(teacher.network, teacher.spec, 14.6146, then, begins, last=2 * low).eval()
    others = FewStepStudent(teacher.network, teacher.spec, 14.6146, [1.0], begins).eval()
    for name, refused in (("low", to_the_lowest if begins == "x_T" else None), ("high", elsewhere), ("o", others)):
        save_student(tmp_path / f"{name}.safetensors", refused or to_the_lowest, **META)
        if refused is None:  # as GDD's
            done = export_checkpoint(tmp_path / "low.safetensors", "diffusers", tmp_path / "l", dtype="fp32", check_n=2)
            assert done.parity.difference < 1e-4
        else:
            with pytest.raises(UserError, match="2 network calls"):
                export_checkpoint(tmp_path / f"{name}.safetensors", "diffusers", tmp_path / "no")
