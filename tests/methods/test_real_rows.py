"""Real images among the critic's real samples."""

from types import SimpleNamespace

import pytest
import torch

from d2o.condition import Condition, Guided
from d2o.data.images import open_images
from d2o.data.pair_settings import PairSettings
from d2o.errors import UserError
from d2o.methods.base import Batch, Draws, Reals, Setup, get_method
from d2o.methods.diffusion2gan import Diffusion2GANOptions
from d2o.recipes.schema import Recipe
from d2o.runtime import StopFlag
from d2o.teachers.compute import Compute
from d2o.teachers.generate import make_pairs
from d2o.teachers.registry import load_teacher
from d2o.training.batches import open_batches
from d2o.training.loop import Trainer
from tests.helpers import tiny_teacher
from tests.methods import recording

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits():
    return open_images("real:digits", channels=1, resolution=8)


def made(images, share=0.5, teacher=None, sigma=80.0, guidance=None, captioned=False, **options):
    torch.manual_seed(0)
    given = {"distance": {"kind": "mse"}, "lambda_gan": 0.25, "real_data": {"share": share}, **options}
    options = Diffusion2GANOptions.model_validate(given)
    student = SimpleNamespace(sigma=sigma, begins="noise", init="teacher", dropout=None)
    setup = Setup(
        options, teacher or tiny_teacher(), student=student, images=images, guidance=guidance, captioned=captioned
    )
    return get_method("diffusion2gan")(setup)


def rows(images, n=4) -> Batch:
    generator = torch.Generator().manual_seed(5)
    noise, target = (torch.randn(n, 1, 8, 8, generator=generator) for _ in range(2))
    reals = Reals([1, 2], images.images([7, 9]).float() / 127.5 - 1, Condition.of_labels(images.labels[[7, 9]]))
    return Batch(noise=noise, target=target, condition=Condition.of_labels(torch.arange(n)), reals=reals)


def test_rows_become_real_with_a_noise_and_class_of_their_own(digits):
    batch = rows(digits)
    method, draw = made(digits), Draws(3, 0, 4, 4, CPU)
    z, x, c = method.real_rows.put(batch, batch.noise, batch.target, batch.condition.labels, draw)
    assert torch.equal(x[[1, 2]], batch.reals.images) and torch.equal(x[[0, 3]], batch.target[[0, 3]])
    assert torch.equal(z[[0, 3]], batch.noise[[0, 3]]) and not (z == batch.noise)[[1, 2]].any()
    assert c.tolist() == [0, *digits.labels[[7, 9]].tolist(), 3]
    scales = torch.linspace(1, 8, 4)
    told = method.real_rows.put(batch, z, x, Guided(batch.condition.labels, scales), Draws(3, 0, 4, 4, CPU))[2]
    assert torch.equal(told.embedded, c) and torch.equal(told.scale, scales)
    untouched = Batch(noise=batch.noise, target=batch.target, condition=batch.condition, reals=batch.reals.part(3, 4))
    assert untouched.reals.rows == [] and untouched.reals.images is None
    assert method.real_rows.put(untouched, z, x, c, Draws(3, 0, 4, 4, CPU))[1] is x


def test_the_critic_sees_them_and_the_student_s_loss_does_not(digits):
    method = made(digits, mix={"latent": 0.0, "text": 0.0, "noise": 0.0}, r1={"gamma": 0.0})
    seen, batch = [], rows(digits)
    method.critic.register_forward_pre_hook(lambda module, args: seen.append(args))
    scalars = method.step(recording.Loop(method, total=4), batch, 1)
    fake, real, own = seen
    real, fake = (real, fake) if torch.equal(real[0][[1, 2]], batch.reals.images) else (fake, real)
    assert torch.equal(real[0][[1, 2]], batch.reals.images) and torch.equal(real[0][[0, 3]], batch.target[[0, 3]])
    assert torch.equal(real[1], fake[1]) and torch.equal(real[2], fake[2])
    with torch.no_grad():
        assert torch.allclose(fake[0], method.student(real[1], real[2]), atol=1e-5)
        x = method.student(batch.noise, batch.condition.labels)
    assert torch.equal(own[1], batch.noise)
    assert scalars["loss"].item() == pytest.approx((x - batch.target).square().mean().item(), rel=1e-4)


def test_micro_batches_change_nothing(digits):
    found = []
    for size in (4, 2):
        loop = recording.Loop(made(digits), size, total=4)
        method = made(digits)
        loop = recording.Loop(method, size, total=4)
        method.step(loop, rows(digits), 0)
        found.append(loop.gradients)
    for name, gradient in found[0].items():
        assert torch.allclose(found[1][name], gradient, rtol=1e-3, atol=1e-5 * gradient.abs().max().item()), name


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    settings = PairSettings("tiny", n=16, shard_size=16, solver="euler", steps=1)
    return make_pairs(settings, tmp_path_factory.mktemp("real") / "pairs", compute=Compute(16), teacher=tiny_teacher())


def test_which_rows_is_a_function_of_seed_and_iteration(digits, store):
    """On one process or two, in any order, with mirrored images; about the share of them."""

    def read(shares, iterations, xflip=False):
        found = {}
        for start, stop in shares:
            batches = open_batches(store, 8, 3, (start, stop), CPU, xflip=xflip, beside=(digits, 0.4))
            for i in iterations:
                reals = batches.get(i).reals
                for k, row in enumerate(reals.rows):
                    found[i, start + row] = (reals.images[k], int(reals.condition.labels[k]))
            batches.close()
        return found

    for xflip in (False, True):
        one, two = read([(0, 8)], range(6), xflip), read([(0, 4), (4, 8)], [4, 1, 0, 2, 3, 5], xflip)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key][0], two[key][0]) and one[key][1] == two[key][1] for key in one)
    assert 10 <= len(one) <= 30 and len({i for i, _ in one}) == 6
    none = open_batches(store, 8, 3, (0, 8), CPU, beside=(digits, 1e-6))
    assert none.get(0).reals.rows == [] and none.get(1).part(0, 4).reals.images is None
    none.close()


@pytest.mark.long
def test_it_trains_with_them_on_any_micro_batch(digits, store, tmp_path):
    files = []
    for name, micro in (("whole", 8), ("parts", 2)):
        recipe = Recipe.from_dict(
            {
                "name": "real",
                "method": "diffusion2gan",
                "teacher": "tiny",
                "optim": {"lr": 1e-3, "name": "sgd"},
                "batch": 8,
                "micro_batch": micro,
                "images": 16,
                "data": {"path": "real:digits"},
                "diffusion2gan": {"distance": {"kind": "mse"}, "lambda_gan": 0.25, "real_data": {"share": 0.5}},
            }
        )
        setup = Setup(recipe.options, tiny_teacher(), student=recipe.student, batch=8, pairs=store, images=digits)
        (tmp_path / name).mkdir()
        trainer = Trainer(recipe, setup, tmp_path / name)
        trainer.run(lambda images, text: None, StopFlag())
        files.append({key: p.detach().clone() for key, p in trainer.networks["critic"].named_parameters()})
    for key, p in files[0].items():
        assert torch.allclose(p, files[1][key], atol=1e-5), key


def test_images_of_a_text_teacher_have_captions():
    teacher = load_teacher("tiny-sd")
    images = open_images("real:digits", channels=3, resolution=32)
    method = made(
        images, teacher=teacher, sigma=14.6, real_data={"share": 0.5, "templates": ["a handwritten {name}", "{name}"]}
    )
    asked = method.real_rows.asked(Condition.of_labels([7, 3]), [0, 2])
    assert asked.prompts == ("a handwritten seven", "three")
    x = torch.zeros(2, 4, 8, 8)
    batch = Batch(noise=x, target=x, reals=Reals([1], images.images([5]).float() / 127.5 - 1, Condition.of_labels([5])))
    text = teacher.embed(Condition.of_prompts(["one", "two"]))
    _, latents, c = method.real_rows.put(batch, x, x, text, Draws(3, 0, 2, 2, CPU))
    assert torch.equal(c.states[0], text.states[0]) and not torch.equal(c.states[1], text.states[1])
    assert 0.5 < latents[1].std() < 2 and not latents[0].any()


def test_what_does_not_go_together_is_refused(digits):
    for images, more, words in (
        (None, {}, "has no `data:` section"),
        (digits, {"lambda_gan": 0.0}, "trains without one"),
        (open_images("real:digits", channels=3, resolution=32), {}, "makes images of 1 x 8 x 8"),
    ):
        with pytest.raises(UserError, match=words):
            made(images, **more)
