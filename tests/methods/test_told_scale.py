"""One student for every guidance scale: `pairs.cfg: [1, 8]` (Meng et al. 2023), by Diffusion2GAN in both stages."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from d2o.condition import Condition, Guided
from d2o.data.pair_settings import PairSettings
from d2o.errors import UserError
from d2o.methods.base import Batch, Setup, get_method
from d2o.methods.diffusion2gan import Diffusion2GANOptions
from d2o.recipes.plan import make_plan
from d2o.recipes.schema import Recipe
from d2o.runtime import StopFlag, Stopped
from d2o.students.base import load_student
from d2o.students.samplers import student_sampler
from d2o.teachers.compute import Compute
from d2o.teachers.generate import make_pairs
from d2o.training.loop import Trainer
from d2o.training.preview import scales_between
from d2o.training.setup import guidance_of
from tests.helpers import tiny_student, tiny_teacher
from tests.methods import recording
from tests.teachers.families import tiny

CPU = torch.device("cpu")
STUDENT = SimpleNamespace(sigma=80.0, begins="noise", init="teacher", dropout=None)
SD = SimpleNamespace(sigma=14.6146, begins="x_T", init="teacher", dropout=None)
RANGE = (1.0, 8.0)
GAN = {"lambda_gan": 0.25, "r1": {"interval": 2}}


def made(teacher=None, student=STUDENT, start=None, guidance=RANGE, **options):
    torch.manual_seed(0)
    given = Diffusion2GANOptions.model_validate({"distance": {"kind": "mse"}, **options})
    setup = Setup(given, teacher or tiny_teacher(), student=student, start=start, device=CPU, guidance=guidance)
    return get_method("diffusion2gan")(setup)


def rows(n=4, channels=1) -> Batch:
    generator = torch.Generator().manual_seed(5)
    noise, target = (torch.randn(n, channels, 8, 8, generator=generator) for _ in range(2))
    labels = Condition.of_labels(torch.arange(n) % 10)
    return Batch(noise=noise, target=target, condition=labels.guided(torch.linspace(1, 8, n)))


@torch.no_grad()
def test_it_begins_as_the_teacher_s_network(tmp_path):
    """Exactly, whatever scale it is told; the critic's features likewise."""
    z, asked = rows().noise, rows().condition
    method, plain = made(**GAN), made(guidance=None, **GAN)
    assert torch.equal(method.student(z, asked), plain.student(z, asked.guided(None)))
    found = method.critic.features(z, z, Guided(asked.labels, asked.guidance))
    expected = plain.critic.features(z, z, asked.labels)
    assert torch.equal(found.last, expected.last)
    sdxl = tiny("sdxl", tmp_path)
    asked = Condition.of_prompts(["a", "b c", "a", ""]).guided(3.0)
    latents = rows(4, 4).noise
    told, fixed = (made(sdxl, SD, guidance=g).student for g in (RANGE, None))
    embedded = sdxl.embed(asked)
    assert torch.equal(told(latents, Guided(embedded, asked.guidance)), fixed(latents, embedded))


@pytest.mark.parametrize("options", [{}, GAN, {**GAN, "critic": {"told": False}}])
def test_micro_batches_change_nothing(options):
    found = []
    for size in (4, 2):
        method = made(**options)
        with torch.no_grad():
            for network in method.players().values():
                for p in network.parameters():
                    p += 0.05 * torch.randn(p.shape)
        loop = recording.Loop(method, size, total=4)
        method.step(loop, rows(), 0)
        found.append(loop.gradients)
    for name, gradient in found[0].items():
        assert torch.allclose(found[1][name], gradient, rtol=1e-3, atol=1e-5 * gradient.abs().max().item()), name


def test_who_is_told_it():
    """Student and critic learn from it, the critic unless it is switched off."""
    for told in (True, False):
        method = made(**GAN, critic={"told": told})
        loop = recording.Loop(method, total=4)
        method.step(loop, rows(), 0)
        names = [name for name, p in method.critic.named_parameters() if "map_augment" in name]
        assert bool(names) == told
    method.student(rows().noise, rows().condition).square().sum().backward()
    assert method.student.network.model.map_augment.weight.grad.abs().sum() > 0


def test_what_does_not_fit_is_refused():
    student, z, asked = made().student, rows().noise, rows().condition
    for wrong, words in (
        (asked.guided(None), "none is given"),
        (asked.guided(9.0), "trained for guidance scales from 1 to 8"),
        (asked.labels, "none is given"),
    ):
        with pytest.raises(UserError, match=words):
            student(z, wrong)
    with pytest.raises(UserError, match="is not told a guidance scale"):
        tiny_student()(z, asked)
    with pytest.raises(UserError, match="is told the guidance scale, 1 to 8, and here samples have none"):
        made(start=student, guidance=None)
    assert made(start=student, guidance=(2.0, 5.0)).student.guidance == (2.0, 5.0)
    assert made(start=tiny_student()).student.guidance == RANGE  # a first stage of one guidance
    for cfg, words in ((None, "none is given"), (9.0, "from 1 to 8")):
        with pytest.raises(UserError, match=words):
            student_sampler(student, cfg=cfg)
    with pytest.raises(UserError, match="is not told"):
        student_sampler(tiny_student(), cfg=3.0)


def test_a_recipe_says_it_by_its_pairs():
    base = {"name": "told", "teacher": "digits", "optim": {"lr": 1e-3}, "batch": 4, "images": 8}
    pairs = {"n": 8, "cfg": [1, 8]}
    told = Recipe.from_dict({**base, "method": "diffusion2gan", "pairs": pairs})
    assert guidance_of(told) == RANGE
    other = Recipe.from_dict(
        {**base, "method": "dmd", "pairs": pairs, "dmd": {"lambda_reg": 0.25, "regression": "mse"}}
    )
    with pytest.raises(UserError, match="which students of method dmd are not told"):
        guidance_of(other)
    assert any("are not told" in line for line in make_plan(other).refused)
    for wrong, words in (([8, 1], r"a range like \[1, 8\]"), ([1], "pairs.cfg"), ("1:8", "pairs.cfg")):
        with pytest.raises(UserError, match=words):
            Recipe.from_dict({**base, "method": "diffusion2gan", "pairs": {"n": 8, "cfg": wrong}})


def test_previews_go_from_one_end_to_the_other():
    assert scales_between(RANGE, [0, 0, 1, 1]).tolist() == [1, 8, 1, 8]
    assert scales_between((1.0, 3.0), [5, 2, 7]).tolist() == [1, 2, 3]


# Through the loop -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    settings = PairSettings("tiny", n=8, shard_size=8, solver="euler", steps=2, cfg=RANGE)
    return make_pairs(settings, tmp_path_factory.mktemp("told") / "pairs", compute=Compute(8), teacher=tiny_teacher())


def train(folder, store, start=None, stop_after=0, **more):
    folder.mkdir(exist_ok=True)
    recipe = Recipe.from_dict(
        {
            "name": "told",
            "method": "diffusion2gan",
            "teacher": "tiny",
            "optim": {"lr": 1e-3},
            "batch": 4,
            "images": 12,
            "diffusion2gan": {"distance": {"kind": "mse"}, **(GAN if start else {})},
            "preview": {"every": 12, "n": 10},
            **more,
        }
    )
    setup = Setup(
        recipe.options,
        tiny_teacher(),
        student=recipe.student,
        batch=4,
        pairs=store,
        guidance=RANGE,
        start=None if start is None else load_student(start),
    )
    trainer, stop = Trainer(recipe, setup, folder), StopFlag()
    trainer.resume()

    def progress(images, text):
        if stop_after and trainer.iteration >= stop_after:
            stop.received = 2

    try:
        trainer.run(progress, stop)
    except Stopped:
        assert stop_after


@pytest.mark.long
def test_both_stages_train_resume_and_are_told(store, tmp_path):
    train(tmp_path / "one", store)
    train(tmp_path / "two", store, tmp_path / "one")
    train(tmp_path / "parts", store, tmp_path / "one", stop_after=2)
    train(tmp_path / "parts", store, tmp_path / "one")
    whole, parts = (tmp_path / name / "checkpoints" / "last.safetensors" for name in ("two", "parts"))
    assert whole.read_bytes() == parts.read_bytes()
    student = load_student(tmp_path / "two")
    assert student.guidance == RANGE and student.meta["student"]["guidance"] == [1.0, 8.0]
    z, asked = rows().noise, rows().condition
    at = [student(z, asked.guided(w)) for w in (1.0, 8.0)]
    assert not torch.equal(*at)
    each = student(z, asked.guided(torch.tensor([1.0, 8.0, 1.0, 8.0])))
    assert torch.allclose(each[:2], torch.stack([at[0][0], at[1][1]]), atol=1e-5)
