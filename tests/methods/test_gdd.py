"""GDD's iteration, its switches and its names, through a loop that notes what happens and through the trainer."""

from __future__ import annotations

import json

import pytest
import torch

from d2o.condition import Condition
from d2o.errors import UserError
from d2o.evaluation.known_metrics import parse_metrics
from d2o.losses.consistency import karras_time
from d2o.methods.base import Batch, Setup, get_method
from d2o.methods.gdd import GDD, GDDOptions
from d2o.networks.edm_blocks import Conv2d
from d2o.networks.spectral_conv import SpectralConv2d
from d2o.recipes.find import recipe_names
from d2o.recipes.load import load_recipe
from d2o.recipes.schema import Recipe
from d2o.reports.paper_tables import load_table
from d2o.runtime import StopFlag
from d2o.settings.yaml_text import dump
from d2o.shipped import recipe_folders
from d2o.students.base import load_student
from d2o.students.few_step import FewStepStudent
from d2o.students.student_section import StudentSection
from d2o.training.loop import Trainer
from d2o.training.setup import prepare
from tests.helpers import check_same_bytes, tiny_network, tiny_student, tiny_teacher
from tests.methods.recording import Loop
from tests.methods.test_latent import train
from tests.methods.test_methods import CPU, Images

CRITIC = {"backbones": ["digits"], "size": 8, "width": 4, "pool": 4, "embedding": "learned"}


def gdd(start=None, student=None, teacher=None, **options) -> GDD:
    torch.manual_seed(0)
    given = GDDOptions.model_validate_json(json.dumps({"critic": CRITIC, **options}))
    section = StudentSection.model_validate(student or {})
    return GDD(Setup(given, teacher=teacher or tiny_teacher(), student=section, images=Images(), start=start, batch=8))


def batch(n: int = 8) -> Batch:
    images = torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(5)) * 2 - 1
    return Batch(Condition.of_labels(torch.arange(n) % 10), images=images)


def test_the_student_is_the_teacher_in_the_form_of_consistency_models():
    """Appendix B.4: c_skip(80) = 3.906e-5, c_out(80) = .49998, and the identity at sigma .002."""
    student = gdd(teacher=with_augment()).student
    assert student.sigma == 80.0 and student.network.config["precond"] == "consistency"
    c_skip, c_out, _, c_noise = student.network.coefficients(torch.full((1, 1, 1, 1), 80.0))
    assert float(c_skip) == pytest.approx(3.906e-5, rel=1e-3) and float(c_out) == pytest.approx(0.49998, abs=1e-5)
    assert float(c_noise) == pytest.approx(1.0955, abs=1e-4)
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(student.network(x, torch.tensor(0.002), torch.tensor([0, 1])), x)
    assert not any("augment" in name for name, _ in student.named_parameters())  # it is never told any
    assert "augment_dim" not in student.network.config


def with_augment():
    teacher = tiny_teacher()
    teacher.network = tiny_network(augment_dim=9)
    return teacher


def test_an_iteration_is_the_codes():
    """The student, the critic against other images, and from the 16th iteration on, every 16, R1 on its own."""
    method, data = gdd(), batch()
    for iteration, updates in ((0, 2), (1, 2), (15, 2), (16, 3), (17, 2), (32, 3)):
        loop = Loop(method)
        scalars = method.step(loop, data, iteration)
        assert loop.updated == ["student", "critic", "critic"][:updates] and loop.turns == [0, 1, 2][:updates]
        assert ("r1" in scalars) == (updates == 3)
    assert set(scalars) == {"loss_g", "loss_d", "logit_real", "logit_fake", "diversity", "r1"}


def test_main_scale_scales_the_gan_and_not_r1():
    found = []
    for scale in (2.0, 4.0):
        method = gdd(main_scale=scale)
        loop = Loop(method)
        method.step(loop, batch(), 16)
        found.append(loop.losses)
    (g, d, r1), twice = found
    assert twice == pytest.approx([2 * g, 2 * d, r1], rel=1e-5)
    assert gdd().scale == 1.0  # an eighth of the batch of 8


def test_the_lazy_correction_of_the_critics_optimiser():
    optim = load_recipe("gdd_digits").optim
    critic = gdd().optim("critic", optim)
    assert critic.lr == pytest.approx(optim.lr * 16 / 17) and critic.betas == (0.0, pytest.approx(0.99 ** (16 / 17)))
    assert gdd().optim("student", optim) is optim
    assert gdd(r1={"lazy_correction": False}).optim("critic", optim) is optim


@pytest.mark.long
def test_micro_batches_have_the_gradients_of_the_batch():
    term = {"cd": {"weight": 1.0, "distance": {"kind": "mse"}}, "ada": {"pipe": "b"}}
    for options in (term, {"critic": {**CRITIC, "diffaug": True}}):
        found = []
        for size in (8, 4):
            method = gdd(**options)
            loop = Loop(method, size)
            method.step(loop, batch(), 16)
            found.append(loop.gradients)
        for name in ("student", "critic"):
            largest = float(found[0][name].abs().max())
            torch.testing.assert_close(found[1][name], found[0][name], rtol=1e-3, atol=1e-3 * largest)


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "hinge"},
        {"r1": {"gamma": 0.0}},
        {"r1": {"gamma": 0.1, "interval": 1}},
        {"critic": {**CRITIC, "diffaug": True}},
        {"critic": {"kind": "style", "style": {"base": 64, "max_channels": 8}}, "ada": {"pipe": "bgc", "kimg": 0.1}},
        {"critic": {"kind": "vgg16", "trunk": "digits", "size": 8}, "ada": {"pipe": "b", "target": 0.0, "interval": 1}},
        {"critic": {"kind": "lpips", "trunk": "digits", "size": 8}},
        {
            "cd": {
                "weight": 2.0,
                "N": 4,
                "i_min": 1,
                "distance": {"kind": "perceptual", "extractor": "digits", "size": None},
            }
        },
    ],
)
def test_every_switch_trains_both_networks(options):
    method = gdd(**options)
    loop = Loop(method)
    scalars = method.step(loop, batch(), 16)
    assert all(bool(value.isfinite()) for value in scalars.values())
    assert all(float((loop.gradients[name] != 0).float().mean()) > 0.6 for name in ("student", "critic"))
    assert ("r1" in scalars) == (method.options.r1.gamma > 0) and ("loss_cd" in scalars) == (
        method.options.cd.weight > 0
    )
    assert ("ada_p" in scalars) == (method.options.ada.pipe is not None)


def test_in_half_precision_is_the_student_alone():
    method = gdd(cd={"weight": 1.0, "N": 4, "distance": {"kind": "perceptual", "extractor": "digits", "size": None}})
    critic, distance = method.critic.heads[0][0].output, method.distance
    seen: dict[str, set[torch.dtype]] = {}
    parts = {"student": method.student.network, "teacher": method.teacher.network, "critic": critic}
    for name, module in parts.items():
        layers = [layer for layer in module.modules() if isinstance(layer, Conv2d | SpectralConv2d)]
        for layer in layers:
            layer.register_forward_hook(lambda _, given, out, name=name: seen.setdefault(name, set()).add(out.dtype))
    judge = lambda x, y: seen.setdefault("distance", set()).update({x.dtype, y.dtype}) or distance(x, y)  # noqa: E731
    method.distance = judge
    with torch.autocast("cpu", torch.bfloat16):
        method.step(Loop(method), batch(), 16)
    full = {torch.float32}
    assert seen == {"student": {torch.bfloat16}, "teacher": full, "critic": full, "distance": full}


@pytest.mark.parametrize("steps", [2, 4])
def test_students_of_several_calls(steps, tmp_path):
    """The levels of eq. 5, gradients through all calls, and an end at sigma_min or at the last call's x_0."""
    method = gdd(student={"steps": steps})
    student = method.student
    assert isinstance(student, FewStepStudent) and student.nfe == steps and student.last == 0.002
    wanted = karras_time(torch.arange(steps, 0, -1), steps).tolist()
    assert list(student.levels) == pytest.approx(wanted)
    assert gdd(student={"steps": 2, "levels": [0.8]}).student.levels == (80.0, 0.8)
    ends = gdd(student={"steps": steps}, last="x0").student
    assert ends.last == 0.0 and "last" not in ends.record and student.record["last"] == 0.002
    calls = []
    student.network.register_forward_hook(lambda module, args, x: calls.append(x.requires_grad))
    method.student_step(Loop(method), batch(), {})
    assert calls == [True] * steps
    z, labels = torch.randn(2, 1, 8, 8), torch.tensor([0, 1])
    again = FewStepStudent.from_record(student.network, student.spec, student.record)
    assert torch.equal(again(z, labels), student(z, labels)) and not torch.equal(ends(z, labels), student(z, labels))


@pytest.mark.parametrize(("n", "i", "sigma"), [(256, 225, 39.95), (256, 243, 60.29), (2, 1, 2.515), (4, 3, 17.53)])
def test_the_schedule(n, i, sigma):
    assert float(karras_time(torch.tensor(i), n)) == pytest.approx(sigma, abs=6e-3)


def test_what_does_not_go_together_is_refused():
    with pytest.raises(UserError, match="two augmentations"):
        gdd(ada={"pipe": "bgc"}, critic={**CRITIC, "diffaug": True})
    with pytest.raises(UserError, match="gdd.ada.pipe 'bgx'"):
        gdd(ada={"pipe": "bgx"})
    with pytest.raises(UserError, match="kind style does not read it"):
        gdd(critic={"kind": "style", "pool": 8})
    with pytest.raises(UserError, match="goes on with students of kind denoiser and few_step"):
        start = tiny_student()
        start.__class__ = type("Other", (type(start),), {"record": property(lambda self: {"kind": "style"})})
        gdd(start=start)


def test_it_goes_on_with_a_student():
    start = tiny_student()
    method = gdd(start=start)
    z, labels = torch.randn(2, 1, 8, 8), torch.tensor([0, 1])
    torch.testing.assert_close(method.student(z, labels), start(z, labels), rtol=1e-3, atol=1e-3)


def tiny(*changes: str, name: str = "gdd_digits") -> Recipe:
    critic = "gdd.critic={kind: projected, backbones: [digits], size: 8, width: 4, pool: 8, embedding: learned}"
    small = ["images=64", "batch=8", "gdd.r1.interval=3", "log_every=1", "eval=null", "preview=null", "threads=1"]
    return load_recipe(name, overrides=[critic, *small, *changes])


def test_gdd_i_moves_all_that_is_not_frozen(tmp_path):
    """After a step frozen tensors are bit-identical, and every other one has changed."""
    recipe = tiny("images=8", "student.freeze=conv")
    setup = prepare(recipe, CPU, None, lambda text: None, lambda *_: None, StopFlag())
    trainer = Trainer(recipe, setup, tmp_path)
    student = trainer.networks["student"]
    with torch.no_grad():
        for name, p in student.named_parameters():  # what begins near 0 hides what comes before it
            if "conv1" in name or "proj" in name:
                p.normal_(0, 0.05)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    trainer.run(lambda images, text: None, StopFlag())
    for name, p in student.named_parameters():
        frozen = name.split(".")[-2] in ("conv0", "conv1", "proj")
        assert torch.equal(p, before[name]) == frozen == (not p.requires_grad), name


@pytest.mark.long
def test_a_killed_and_resumed_run_ends_with_the_same_bytes(tmp_path):
    recipe = tiny("student.steps=2", "gdd.ada.pipe=b", "bad_gradients=zero")
    train(recipe, tmp_path / "whole")
    for stop in (2, 5):
        train(recipe, tmp_path / "parts", stop)
    train(recipe, tmp_path / "parts")
    check_same_bytes(tmp_path / "whole", tmp_path / "parts")
    student = load_student(tmp_path / "whole")
    assert student.nfe == 2 and student.last == 0.002 and student.network.config["precond"] == "consistency"


@pytest.mark.parametrize(("name", "freeze"), [("d2o", "none"), ("d2o-f", "conv"), ("gdd-i", "conv"), ("gdd", "none")])
def test_other_names_of_the_method(name, freeze, tmp_path):
    section = name.replace("-", "_")
    text = f"extends: gdd_digits\nname: x\nmethod: {name}\n{section}: {{r1: {{gamma: 0.5}}}}\n"
    (tmp_path / "x.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "x.yaml")
    assert recipe.method == "gdd" and recipe.student.freeze == freeze
    assert recipe.options.r1.gamma == 0.5 and recipe.options.r1.interval == 16 and recipe.options.critic.size == 64
    assert recipe == Recipe.from_dict(recipe.resolved()) and dump(recipe.resolved())
    (tmp_path / "x.yaml").write_text(text.replace("gamma", "gama"))
    with pytest.raises(UserError, match=rf"x.yaml:4: {section}.r1.gama: unknown key; did you mean 'gamma'"):
        load_recipe(tmp_path / "x.yaml")


def test_get_method():
    assert get_method("gdd") is GDD and GDD.takes == "edm"


TABLES = sorted(path.stem for path in (recipe_folders()[0] / "tables").glob("*gdd*.yaml"))


@pytest.mark.parametrize("name", TABLES)
def test_recipes_that_the_tables_name_are_there(name):
    known = set(recipe_names())
    rows = load_table(name).rows
    assert rows and not [row.recipe for row in rows if row.recipe and row.recipe not in known]


@pytest.mark.parametrize("name", ["mini_gdd", "mini_gdd_fig2"])
def test_what_measures_a_student_has_not_trained_it(name):
    table = load_table(name)
    for row in table.rows:
        if row.recipe is None or load_recipe(row.recipe).method != "gdd" or "flattered" in row.name:
            continue
        critic = load_recipe(row.recipe).options.critic
        seen = {"projected": set(critic.backbones), "style": set()}.get(critic.kind, {critic.trunk})
        judges = {want.extractor for want in parse_metrics(table.options_of(row)["metrics"])}
        assert judges and not judges & {each.removeprefix("tf_efficientnet_") for each in seen}, row.name


def test_twins_differ_in_freeze_alone():
    def of(name):
        return {**load_recipe(name).resolved(), "name": "", "title": "", "reproduces": None}

    for one, other in (
        ("gdd_digits", "gdd_digits:gdd_i"),
        ("gdd_digits:cd", "gdd_digits:cd_gdd_i"),
        ("gdd_cifar10", "gdd_cifar10:gdd_i"),
        ("cd_cifar10:cd_i", "cd_cifar10:cd_i_unfrozen"),
        ("cd_digits", "cd_digits:cd_i"),
    ):
        a, b = of(one), of(other)
        assert a["student"].pop("freeze") != b["student"].pop("freeze") and a == b
