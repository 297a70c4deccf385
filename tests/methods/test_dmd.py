"""Distribution matching: an iteration against the papers' algorithms, and through the loop."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from d2o.condition import Condition
from d2o.critics.bottleneck import BottleneckCritic
from d2o.data.images import open_images
from d2o.errors import UserError
from d2o.losses import distribution
from d2o.methods import dmd as module
from d2o.methods.base import Batch, Draws, Setup, get_method
from d2o.methods.dmd import DMD, DMDOptions
from d2o.networks.build import build_network
from d2o.recipes.load import load_recipe
from d2o.recipes.plan import make_plan
from d2o.students.base import Student, load_student
from d2o.students.multistep import MultistepStudent
from d2o.teachers.base import Spec, Teacher
from tests.helpers import SPEC, TinyText, tiny_network, tiny_student, tiny_teacher
from tests.methods.recording import Loop
from tests.methods.test_latent import train
from tests.networks.test_edm_unet import PUBLISHED
from tests.networks.test_ncsnpp_z import SMALL

CPU = torch.device("cpu")
STUDENT = SimpleNamespace(sigma=80.0, init="teacher", dropout=None)


def dmd(teacher=None, start=None, student=STUDENT, **options) -> DMD:
    torch.manual_seed(0)
    setup = Setup(DMDOptions(**options), teacher=teacher or tiny_teacher(), student=student, start=start, device=CPU)
    setup.images = open_images("real:digits") if options.get("adversarial") else None
    return get_method("dmd")(setup)


def pairs(n: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(5)
    noise, target = torch.randn(n, 1, 8, 8, generator=generator), torch.rand(n, 1, 8, 8, generator=generator) * 2 - 1
    return Batch(noise=noise, target=target, condition=Condition.of_labels(torch.arange(n) % 10))


def moved(network: nn.Module, seed: int = 9) -> None:
    """Away from the teacher: the gradient between a score network and its own original is 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p += 0.02 * torch.randn(p.shape, generator=generator)


def test_an_iteration_of_dmd_is_its_algorithm():
    """Yin et al. 2024, algorithms 1 to 3: the student's step with both losses, then the score network's on the same
    samples."""
    method = dmd(lambda_reg=0.25, regression="l1")
    moved(method.score)
    loop, data = Loop(method, total=6), pairs()
    scalars = method.step(loop, data, 0)
    assert loop.updated == ["student", "score"]

    teacher, draw = tiny_teacher(), Draws(3, 0, 6, 6, CPU)
    z, labels = draw.randn(1, 8, 8), draw.randint(0, 10)
    sigma = distribution.index_sigma(draw.randint(20, 981, 1, 1, 1))
    with torch.no_grad():
        x = teacher.denoise(80 * z, 80.0, labels)
        x_t = x + sigma * draw.randn(1, 8, 8)
        real, fake = teacher.denoise(x_t, sigma.flatten(), labels), method.score(x_t, sigma.flatten(), labels)
        grad = (fake - real) / (x - real).abs().mean((1, 2, 3), keepdim=True)
        regression = (teacher.denoise(80 * data.noise, 80.0, data.condition.labels) - data.target).abs().mean()
        draw = Draws(1003, 0, 6, 6, CPU)
        sigma = distribution.index_sigma(draw.randint(0, 1000, 1, 1, 1))
        denoised = method.score(x + sigma * draw.randn(1, 8, 8), sigma.flatten(), labels)
        denoising = ((sigma**-2 + 4) * (denoised - x) ** 2).mean()
    assert scalars["loss"].item() == pytest.approx(0.5 * grad.square().mean().item(), rel=1e-4)
    assert scalars["loss_reg"].item() == pytest.approx(regression.item(), rel=1e-5)
    assert loop.losses[0] == pytest.approx((scalars["loss"] + 0.25 * regression).item(), rel=1e-5)
    assert scalars["loss_score"].item() == pytest.approx(denoising.item(), rel=1e-3)

    student = (
        tiny_network()
    )  # the student's gradient is that of the papers: the matching gradient times dx/dtheta, and the regression's
    x = student(80 * z, torch.tensor([80.0]), labels)
    reference = student(80 * data.noise, torch.tensor([80.0]), data.condition.labels)
    ((x * grad).sum() / x.numel() + 0.25 * (reference - data.target).abs().mean()).backward()
    expected = torch.cat([p.grad.flatten() for p in student.parameters()])
    assert torch.allclose(loop.gradients["student"], expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())


def test_without_kl_the_pairs_alone_are_learned():
    """Yin et al. 2024's ablation without distribution matching: no score network; and the weight of what is matched."""
    method, data = dmd(lambda_kl=0.0, lambda_reg=0.5, regression="l1"), pairs()
    assert list(method.players()) == ["student"] and method.needs(method.options) == "pairs"
    loop = Loop(method, total=6)
    scalars = method.step(loop, data, 0)
    expected = tiny_teacher().denoise(80 * data.noise, 80.0, data.condition.labels)
    expected = 0.5 * (expected - data.target).abs().mean().item()
    assert loop.updated == ["student"] and list(scalars) == ["loss"]
    assert scalars["loss"].item() == pytest.approx(expected, rel=1e-5) == pytest.approx(loop.losses[0])
    found = []
    for weight in (1.0, 0.25):
        method = dmd(lambda_kl=weight)
        moved(method.score)
        loop = Loop(method, total=6)
        assert method.step(loop, Batch(), 0)["loss"].item() > 0
        found.append(loop.losses[0])
    assert found[1] == pytest.approx(0.25 * found[0], rel=1e-5)
    with pytest.raises(UserError, match="would learn nothing"):
        dmd(lambda_kl=0.0)


def test_an_iteration_of_diff_instruct_is_its_algorithm():
    """Luo et al. 2023, algorithm 1: the score network learns first, from samples of its own; then the student's step,
    sums over the pixels."""
    method = dmd(kind="diff_instruct", student=SimpleNamespace(sigma=1.0, init="teacher", dropout=0.3))
    moved(method.score)
    loop = Loop(method, total=6)
    scalars = method.step(loop, Batch(), 0)
    assert loop.updated == ["score", "student"] and loop.turns == [1, 0]
    teacher, draw = tiny_teacher(), Draws(1003, 0, 6, 6, CPU)
    z, labels = draw.randn(1, 8, 8), draw.randint(0, 10)
    with torch.no_grad():
        x = teacher.denoise(z, 1.0, labels)  # without the student's dropout
        sigma = (-1.2 + 1.2 * draw.randn(1, 1, 1)).exp()
        denoised = method.score(x + sigma * draw.randn(1, 8, 8), sigma.flatten(), labels)
        expected = ((sigma**-2 + 4) * (denoised - x) ** 2).sum() / 6
    assert scalars["loss_score"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert method.student.training and {
        part.dropout for part in method.student.modules() if hasattr(part, "dropout")
    } == {0.3}

    method = dmd(kind="diff_instruct", student=SimpleNamespace(sigma=1.0, init="teacher", dropout=None))
    moved(method.score)
    loop = Loop(method, total=6)
    method.step(loop, Batch(), 0)
    draw, student = Draws(3, 0, 6, 6, CPU), tiny_network()
    z, labels = draw.randn(1, 8, 8), draw.randint(0, 10)
    x = student(z, torch.tensor([1.0]), labels)
    sigma = (-1.2 + 1.2 * draw.randn(1, 1, 1)).exp()
    x_t = (x + sigma * draw.randn(1, 8, 8)).detach()
    with torch.no_grad():
        g = method.score(x_t, sigma.flatten(), labels) - teacher.denoise(x_t, sigma.flatten(), labels)
    ((g * x).sum() / 6).backward()
    expected = torch.cat([p.grad.flatten() for p in student.parameters()])
    assert torch.allclose(loop.gradients["student"], expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())


def test_the_score_network_may_take_several_steps_on_new_samples():
    """DMD2's two time scales (Yin et al. 2024b, section 4.2)."""
    method = dmd(score_steps=3)
    loop = Loop(method, lr=1e-3, total=6)
    seen = []
    handle = method.score.register_forward_pre_hook(
        lambda m, args: seen.append(args[0]) if torch.is_grad_enabled() else None
    )
    method.step(loop, Batch(), 0)
    handle.remove()
    assert loop.updated == ["student", "score", "score", "score"] and loop.turns == [0, 1, 2, 3]
    assert len(seen) == 3 and not torch.allclose(seen[0], seen[1]) and not torch.allclose(seen[1], seen[2])


def real_images(n: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(6)
    return Batch(
        images=torch.rand(n, 1, 8, 8, generator=generator) * 2 - 1, condition=Condition.of_labels(torch.arange(n) % 10)
    )


def test_the_student_waits_while_the_score_network_learns():
    """DMD2's two time scales, with real images of its own in each iteration (Yin et al. 2024b, section 4.2)."""
    method = dmd(student_every=3)
    loop = Loop(method, total=6)
    logs = [set(method.step(loop, Batch(), k)) for k in range(4)]
    assert loop.updated == ["student", "score", "score", "score", "student", "score"]
    assert logs == [{"loss", "loss_score"}, {"loss_score"}, {"loss_score"}, {"loss", "loss_score"}]


def test_an_iteration_of_dmd2_is_its_algorithm():
    """Yin et al. 2024b, section 4.3: beside DMD's losses the student's softplus(-logit) of its samples, diffused anew,
    on the score network's bottleneck, and the head's softplus of real and made ones."""
    method = dmd(adversarial=True, lambda_adv=0.5, lambda_d=0.25)
    moved(method.score)
    loop, data = Loop(method, total=6), real_images()
    log = method.step(loop, data, 0)
    assert loop.updated == ["student", "score"] and method.needs(method.options) == "images"

    teacher, draw = tiny_teacher(), Draws(3, 0, 6, 6, CPU)
    z, labels = draw.randn(1, 8, 8), draw.randint(0, 10)
    draw.randint(20, 981, 1, 1, 1), draw.randn(1, 8, 8)

    def logits(x, classes, draw):
        sigma = distribution.index_sigma(draw.randint(0, 1000, 1, 1, 1))
        x_t = x + sigma * draw.randn(1, 8, 8)
        features = method.score.eval()(x_t, sigma.flatten(), classes, part="encoder")
        assert features.shape == (6, 16, 8, 8)  # all channels
        return method.critic.head(features).flatten()

    student = tiny_network()
    x = student(80 * z, torch.tensor([80.0]), labels)
    paid = torch.nn.functional.softplus(-logits(x, labels, draw)).mean()
    assert log["loss_adv"].item() == pytest.approx(paid.item(), rel=1e-4)
    assert loop.losses[0] == pytest.approx((log["loss"] + 0.5 * paid).item(), rel=1e-4)
    gradient = torch.autograd.grad(paid, list(student.parameters()), allow_unused=True)
    assert sum(float(g.abs().sum()) for g in gradient if g is not None) > 0
    with torch.no_grad():
        x = teacher.denoise(80 * z, 80.0, labels)
        draw = Draws(1003, 0, 6, 6, CPU)
        draw.randint(0, 1000, 1, 1, 1), draw.randn(1, 8, 8)
        fake, real = logits(x, labels, draw), logits(data.images, data.condition.labels, draw)
        told = (torch.nn.functional.softplus(fake) + torch.nn.functional.softplus(-real)).mean()
    assert log["loss_d"].item() == pytest.approx(told.item(), rel=1e-4)
    assert loop.losses[1] == pytest.approx((log["loss_score"] + 0.25 * told).item(), rel=1e-4)
    head = loop.gradients["score"][-sum(p.numel() for p in method.critic.head.parameters()) :]
    assert float(head.abs().sum()) > 0


def test_the_head_of_dmd2_has_the_papers_size_and_refuses_what_it_cannot_take():
    with torch.device("meta"):
        critic = BottleneckCritic(build_network(PUBLISHED["imagenet64-adm"][0]), (768, 8, 8))
        assert critic.head(torch.zeros(2, 768, 8, 8)).shape == (2, 1, 1, 1)
    assert [tuple(m.weight.shape) for m in critic.head if isinstance(m, nn.Conv2d)] == [
        (768, 768, 4, 4),
        (768, 768, 4, 4),
        (1, 768, 1, 1),
    ]
    with pytest.raises(UserError, match="bottleneck is of 1 x 1"):
        BottleneckCritic(tiny_network(), (16, 1, 1))
    with pytest.raises(UserError, match="real images or pairs, not both"):
        dmd(adversarial=True, lambda_reg=0.25, regression="l1")


def test_a_plan_counts_the_steps_that_are_made():
    """Of five iterations each has the score network's pass, the head's two and the student's one, and one more of the
    student and the head's one in the student's own step."""
    plan = make_plan(load_recipe("dmd_digits:dmd2", ["images=6400"], mini=True))
    calls = plan.calls["training (forward passes of trained networks)"]
    loop = make_plan(load_recipe("dmd_digits:dmd2", ["images=6400", "dmd.student_every=1"], mini=True))
    assert calls == 6400 * 4 + 1280 * 2 and loop.calls["training (forward passes of trained networks)"] == 6400 * 6


@pytest.mark.parametrize(
    "options",
    [
        {"lambda_reg": 0.25, "regression": "mse"},
        {"adversarial": True, "student_every": 2},
        {"kind": "diff_instruct"},
        {"t_dist": "karras_uniform", "score_t_dist": "karras_uniform", "weight": "none", "samples": "fresh"},
    ],
)
def test_micro_batches_change_nothing(options):
    found = []
    for size in (6, 2):
        method = dmd(**options)
        moved(method.score)
        loop = Loop(method, size, 1e-3, 6)
        scalars = method.step(loop, real_images() if options.get("adversarial") else pairs(), 0)
        found.append((loop.gradients, scalars))
    (whole, log), (parts, log2) = found
    for name in ("student", "score"):
        assert torch.allclose(whole[name], parts[name], rtol=1e-4, atol=1e-5 * whole[name].abs().max().item())
    assert all(log[key].item() == pytest.approx(log2[key].item(), rel=1e-5) for key in log)


def sigmas(method, draws: int = 4000, which: str = "student") -> torch.Tensor:
    o, draw = method.options, Draws(0, 0, draws, draws, CPU)
    return method.sigma(
        draw, *((o.t_dist, o.t_index, o.t_range) if which == "student" else (o.score_t_dist, (0, 999), (0.0, 1.0)))
    ).flatten()


def test_noise_levels_are_drawn_as_the_papers_do():
    index = distribution.index_sigma(torch.arange(1000))
    drawn = sigmas(dmd(), 40_000)
    assert torch.isclose(drawn.min(), index[20]) and torch.isclose(drawn.max(), index[980])
    assert drawn.log().mean().item() == pytest.approx(index[20:981].log().mean().item(), abs=0.05)
    assert sigmas(dmd(), 40_000, "score").min() < index[2] and sigmas(dmd(), 40_000, "score").max() > index[997]
    assert set(sigmas(dmd(t_index=(5, 6))).tolist()) == set(index[5:7].tolist())
    drawn = sigmas(dmd(t_dist="karras_uniform", t_range=(0.0, 0.8)))
    assert 0.002 <= drawn.min() < 0.003 and 23 < drawn.max() < 24.41 and len(drawn.unique()) > 3900
    log = sigmas(dmd(kind="diff_instruct", p_mean=-0.4, p_std=1.0)).log()
    assert log.mean().item() == pytest.approx(-0.4, abs=0.06) and log.std().item() == pytest.approx(1.0, abs=0.05)


def test_dropout_of_teacher_and_score_network_in_the_student_s_step():
    network = tiny_network(dropout=0.5)
    teacher = Teacher(network, SPEC)
    x, sigma, labels = torch.randn(4, 1, 8, 8), torch.ones(4), torch.arange(4)
    method = dmd(teacher, dropout="shared")  # Diff-Instruct's code: the same masks in both
    real, fake = method.both(method.score, x, sigma, labels)
    assert torch.equal(real, fake) and not torch.allclose(real, teacher.denoise(x, sigma, labels), atol=1e-4)
    assert method.score.training and not teacher.network.training
    method = dmd(teacher)
    real, fake = method.both(method.score, x, sigma, labels)
    assert torch.equal(real, fake) and torch.equal(real, teacher.denoise(x, sigma, labels)) and method.score.training
    method = dmd(teacher, score_dropout=0.25)
    assert {part.dropout for part in method.score.modules() if hasattr(part, "dropout")} == {0.25} and network.config[
        "dropout"
    ] == 0.5


def test_the_student_starts_from_the_teacher_from_a_student_or_from_scratch():
    teacher, z, labels = tiny_teacher(), torch.randn(3, 1, 8, 8), torch.arange(3)
    method = dmd(teacher, student=SimpleNamespace(sigma=2.5, init="teacher", dropout=None))
    assert torch.allclose(method.student(z, labels), teacher.denoise(2.5 * z, 2.5, labels), atol=1e-6)
    assert method.describe()["student"] == {"kind": "denoiser", "sigma": 2.5}
    assert not any(p.requires_grad for p in teacher.network.parameters()) and all(
        p.requires_grad for p in method.score.parameters()
    )
    start = tiny_student(seed=4)
    assert start.sigma == STUDENT.sigma
    method = dmd(teacher, start=start)
    assert torch.equal(method.student(z, labels), start(z, labels)) and all(
        p.requires_grad for p in method.student.parameters()
    )
    assert torch.equal(method.score(z, torch.ones(1), labels), teacher.denoise(z, 1.0, labels))  # always the teacher's
    scratch = dmd(teacher, student=SimpleNamespace(sigma=80.0, init="scratch", dropout=0.1))
    assert not torch.allclose(scratch.student.eval()(z, labels), teacher.denoise(80 * z, 80.0, labels), atol=1e-3)


def test_an_unconditional_teacher():
    torch.manual_seed(0)
    config = {**tiny_network().config, "label_dim": 0}
    method = dmd(Teacher(build_network(config), Spec("free", (1, 8, 8))), lambda_reg=0.1, regression="mse")
    data = pairs()
    data.condition = Condition.none(len(data.noise))
    method.step(loop := Loop(method, total=6), data, 0)
    assert loop.updated == ["student", "score"]
    assert method.generate(method.student, torch.randn(2, 1, 8, 8), Condition.none(2)).abs().max() <= 1


def test_the_score_network_is_told_of_augmentations():
    network = tiny_network(augment_dim=9)
    method, told = dmd(Teacher(network, SPEC), kind="diff_instruct", augment=1.0), []
    method.score.register_forward_pre_hook(
        lambda m, args, kwargs: told.append(kwargs.get("augment_labels")), with_kwargs=True
    )
    method.step(Loop(method, total=6), Batch(), 0)
    assert len(told) == 2 and told[0].shape == (6, 9) and (told[0][:, 2] != 0).all() and told[1] is None


def test_edm2_learns_with_its_uncertainty_and_the_student_goes_without():
    torch.manual_seed(0)
    config = {
        "arch": "edm2",
        "model_channels": 8,
        "channel_mult": [1],
        "num_blocks": 1,
        "attn_resolutions": [],
        "channels_per_head": 8,
        "img_resolution": 8,
        "img_channels": 1,
        "label_dim": 10,
    }
    network = build_network(config)
    torch.nn.init.ones_(network.unet.out_gain)
    method = dmd(Teacher(network, SPEC), kind="diff_instruct")
    method.step(Loop(method, lr=1e-3, total=6), Batch(), 0)
    method.settle()
    assert method.score.logvar_linear.weight.square().mean().item() == pytest.approx(
        1, abs=1e-2
    )  # it learnt, and was normalised
    assert not torch.equal(method.score.logvar_linear.weight, network.logvar_linear.weight)
    assert method.student.network.unet.out_conv.weight.square().mean().item() == pytest.approx(1, abs=1e-2)
    again = build_network(method.describe()["network"])  # as a checkpoint is read
    again.load_state_dict(method.student.network.state_dict())


def test_the_regression_s_distances(monkeypatch):
    x, y = torch.rand(2, 1, 8, 8), torch.rand(2, 1, 8, 8)
    method = dmd(lambda_reg=0.1, regression="perceptual", extractor="digits")
    assert method.distance(x, y).shape == (2,) and (method.distance(x, x) == 0).all()
    seen = []

    def lpips(a, b):
        seen.append(a.shape)
        return (a - b).abs().mean((1, 2, 3))

    monkeypatch.setattr(module, "load_lpips", lambda device: lpips)
    method = dmd(lambda_reg=0.1)
    assert method.distance(x, y).shape == (2,) and seen == [(2, 3, 224, 224)]


def test_mistakes_are_named():
    with pytest.raises(UserError, match="needs a `teacher:`"):
        get_method("dmd")(Setup(DMDOptions()))
    with pytest.raises(UserError, match="method dmd draws prompts for its student, and the recipe names none"):
        dmd(TinyText()).draw_condition(Draws(0, 0, 2, 2, CPU))
    with pytest.raises(UserError, match=r"dmd.t_index: \[9, 1000\] is no range of the levels 0 to 999"):
        dmd(t_index=(9, 1000))
    with pytest.raises(UserError, match=r"dmd.t_range: \[0.9, 0.1\] is no part"):
        dmd(t_range=(0.9, 0.1))
    with pytest.raises(UserError, match="there are no samples yet"):
        dmd(kind="diff_instruct", samples="same")
    with pytest.raises(UserError, match="dmd.extractor"):
        dmd(lambda_reg=1.0, regression="perceptual")
    with pytest.raises(UserError, match="dmd.augment: the teacher's network takes no augmentation labels"):
        dmd(augment=0.12)
    other = Student(tiny_network(), Spec("other", (1, 8, 8), condition="label", classes=3))
    with pytest.raises(UserError, match="with 3 classes, teacher 'tiny' makes other images"):
        dmd(start=other)
    with pytest.raises(UserError, match="of kind multistep"):
        dmd(
            start=MultistepStudent(
                build_network({"arch": "ddgan", "img_resolution": 8, "img_channels": 1, **SMALL}), SPEC, 2
            )
        )


def test_only_the_regression_needs_pairs(tmp_path):
    assert DMD.needs(DMDOptions()) == "none" and DMD.needs(DMDOptions(lambda_reg=0.25)) == "pairs"
    assert any(
        "pair store" in why
        for why in make_plan(load_recipe("dmd_digits", ["batch=2", f"pairs.path={tmp_path / 'p'}"])).first
    )
    assert make_plan(load_recipe("diff_instruct_digits", ["batch=2"])).missing == []
    with pytest.raises(UserError, match="needs `teacher:` and `pairs:`"):
        train(load_recipe("diff_instruct_digits", ["dmd.lambda_reg=0.1"], mini=True), tmp_path / "run")


@pytest.mark.long
@pytest.mark.parametrize("name", ["dmd_digits", "dmd_digits:dmd2", "diff_instruct_digits"])
def test_a_stopped_and_resumed_run_ends_with_the_same_bytes_and_gives_a_student(name, tmp_path):
    tiny_teacher(tmp_path / "teacher.safetensors")
    changes = [
        f"teacher={tmp_path / 'teacher.safetensors'}",
        "batch=8",
        "images=40",
        "log_every=1",
        "eval=null",
        "preview={every: 40, n: 4}",
    ]
    changes += ["micro_batch=4", "student.dropout=0.1", "dmd.score_dropout=0.1", "dmd.dropout=shared"]
    changes += [f"pairs={{path: {tmp_path / 'pairs'}, n: 32, steps: 2}}"] if name == "dmd_digits" else []
    recipe = load_recipe(name, changes, mini=True)
    train(recipe, tmp_path / "whole")
    train(recipe, tmp_path / "parts", stop_after=2)
    train(recipe, tmp_path / "parts")
    for file in ("last", "state"):
        whole, parts = (tmp_path / folder / "checkpoints" / f"{file}.safetensors" for folder in ("whole", "parts"))
        assert whole.read_bytes() == parts.read_bytes()
    student = load_student(tmp_path / "whole")
    assert student.nfe == 1 and student.sigma == recipe.student.sigma and student.spec.classes == 10
    assert student.meta["teacher"]["licence"] == "CC0-1.0"


def test_the_recipes_are_the_papers():
    """Yin et al. 2024, appendix B.1 and C.2; Luo et al. 2023, the command of their readme."""
    dmd, noreg, instruct = (load_recipe(name) for name in ("dmd_cifar10", "dmd_cifar10_noreg", "diff_instruct_cifar10"))
    o = dmd.options.filled()
    assert (o.t_dist, o.t_index, o.score_t_dist, o.weight, o.order, o.samples) == (
        "karras_index",
        (20, 980),
        "karras_index",
        "l1_teacher",
        "generator_first",
        "same",
    )
    assert (o.lambda_reg, o.regression, dmd.pairs.n, dmd.pairs.steps) == (0.25, "lpips", 100_000, 18)
    assert (dmd.student.sigma, dmd.student.dropout, o.score_dropout) == (80.0, 0.0, 0.0)
    assert (dmd.optim.name, dmd.optim.lr, dmd.optim.weight_decay, dmd.optim.warmup, dmd.optim.clip_norm) == (
        "adamw",
        5e-5,
        0.01,
        500,
        10,
    )
    assert dmd.batch == 392 and dmd.images / dmd.batch == 300_000 and dmd.optim_critic is None
    assert noreg.options.lambda_reg == 0 and noreg.pairs is None and noreg.optim.lr == 1e-5 and noreg.batch == 392
    o = instruct.options.filled()
    assert (o.t_dist, o.p_mean, o.p_std, o.weight, o.reduce, o.order, o.dropout) == (
        "lognormal",
        -1.2,
        1.2,
        "none",
        "sum",
        "score_first",
        "shared",
    )
    assert (instruct.student.sigma, instruct.batch, instruct.optim.lr, instruct.optim.betas) == (
        1.0,
        128,
        1e-5,
        (0.0, 0.999),
    )
    assert (instruct.ema.half_life, instruct.ema.ramp, instruct.bad_gradients) == (500_000, 0.05, "zero")
