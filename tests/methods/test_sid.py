"""SiD and SiDA: an iteration against Algorithm 1, phases, data or none, what makes no difference, what is refused, and
through the loop."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from d2o.cli.app import main
from d2o.condition import Condition
from d2o.errors import UserError
from d2o.interop.safetensors_io import read_meta
from d2o.losses import score as losses
from d2o.methods.base import Batch, Draws, Setup, get_method
from d2o.methods.sid import SiD, SiDOptions
from d2o.networks.build import build_network
from d2o.recipes.load import load_recipe
from d2o.recipes.plan import make_plan
from d2o.students.base import Student, load_student
from d2o.students.multistep import MultistepStudent
from d2o.teachers.base import Spec, Teacher
from tests.helpers import SPEC, check_same_bytes, tiny_network, tiny_student, tiny_teacher
from tests.methods.recording import Loop
from tests.methods.test_latent import train
from tests.methods.test_methods import CPU, Images
from tests.networks.test_ncsnpp_z import SMALL

STUDENT = SimpleNamespace(sigma=2.5, init="teacher", dropout=None)
ADVERSARIAL = {"adversarial": True, "start_g_nimg": 0, "start_adv_nimg": 0, "batch_pool": 4}
ADV = 1  # the iteration from which ADVERSARIAL's student has both losses


def sid(teacher=None, start=None, student=STUDENT, images=None, batch=8, **options) -> SiD:
    torch.manual_seed(0)
    options = SiDOptions(**options)
    images = images or (Images() if SiD.needs(options) == "images" else None)
    setup = Setup(
        options, teacher=teacher or tiny_teacher(), student=student, start=start, images=images, device=CPU, batch=batch
    )
    method = get_method("sid")(setup)
    with torch.no_grad():  # some iterations later: the score network is no longer the teacher
        for p in method.score.parameters():
            p.mul_(1.05)
    return method


def real(n: int = 8) -> Batch:
    return Batch(
        images=torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(5)) * 2 - 1,
        condition=Condition.of_labels(torch.arange(n) % 10),
    )


def run(
    method: SiD, batch: Batch | None = None, iteration: int = 0, size: int | None = None, **more
) -> tuple[dict, Loop]:
    loop = Loop(method, size, **more)
    scalars = method.step(loop, batch or Batch(), iteration)
    method.settle()
    return scalars, loop


def test_an_iteration_is_algorithm_1_and_needs_no_data():
    teacher = tiny_teacher()
    method = sid(teacher)
    scalars, loop = run(method)
    assert SiD.needs(method.options) == "none" and loop.updated == ["score", "student"]  # from the first iteration on
    assert loop.modes == [
        (False, True),
        (True, False),
    ]  # dropout: the score network's in its step, the student's in its own
    G, f, g = method.student.eval(), teacher.network, method.score

    draw = Draws(3, 0, 8, 8, CPU)
    labels, z = draw.randint(0, 10), draw.randn(1, 8, 8)
    y = teacher.network(2.5 * z, torch.tensor([2.5]), labels)  # the student begins as the teacher called at sigma_init
    sigma = torch.exp(-1.2 + 1.2 * draw.randn(1, 1, 1))
    loss = (sigma**-2 + 4) * (g(y + sigma * draw.randn(1, 8, 8), sigma.flatten(), labels) - y) ** 2
    assert loop.losses[0] == pytest.approx(loss.sum((1, 2, 3)).mean().item(), rel=1e-4)
    assert scalars["loss_score"].item() == pytest.approx(loss.mean().item(), rel=1e-4)

    draw = Draws(1003, 0, 8, 8, CPU)
    labels = draw.randint(0, 10)
    x = G(draw.randn(1, 8, 8), labels)
    t = 0.8 * draw.rand(1, 1, 1)
    sigma = (80 ** (1 / 7) + (1 - t) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    x_t = x + sigma * draw.randn(1, 8, 8)
    delta = f(x_t, sigma.flatten(), labels) - g(x_t, sigma.flatten(), labels)
    fake = g(x_t, sigma.flatten(), labels)
    weight = 64 / (x - f(x_t, sigma.flatten(), labels)).abs().sum((1, 2, 3), keepdim=True).detach()
    loss = weight * ((1 - 1.2) * delta**2 + delta * (fake - x))  # Algorithm 1
    assert loop.losses[1] == pytest.approx(100 * loss.sum((1, 2, 3)).mean().item(), rel=1e-3)
    wanted = torch.autograd.grad(100 * loss.sum((1, 2, 3)).mean(), list(G.parameters()), allow_unused=True)
    wanted = torch.cat(
        [
            torch.zeros_like(p).flatten() if w is None else w.flatten()
            for p, w in zip(G.parameters(), wanted, strict=True)
        ]
    )
    torch.testing.assert_close(loop.gradients["student"], wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
    assert scalars["delta"].item() == pytest.approx(delta.abs().mean().item(), rel=1e-4)
    assert set(scalars) == {"loss_score", "loss_g", "delta"} and all(torch.isfinite(v) for v in scalars.values())
    assert all(p.grad is None and not p.requires_grad for p in teacher.network.parameters())


def test_long_and_short_guidance_guides_the_score_network_in_both_steps_and_the_true_score():
    teacher = tiny_teacher()
    method = sid(teacher, cfg=3.0, score_cfg=1.5)
    _, loop = run(method)
    student, nobody = method.student.eval(), torch.full((8,), -1)

    def guided(network, x_t, sigma, labels, cfg):
        d_c, d_u = (network(x_t, sigma.flatten(), of) for of in (labels, nobody))
        return d_u + cfg * (d_c - d_u)

    draw = Draws(3, 0, 8, 8, CPU)
    labels = draw.randint(0, 10)
    y = student(draw.randn(1, 8, 8), labels)
    sigma = torch.exp(-1.2 + 1.2 * draw.randn(1, 1, 1))
    g = guided(method.score.eval(), y + sigma * draw.randn(1, 8, 8), sigma, labels, 1.5)
    assert loop.losses[0] == pytest.approx(((sigma**-2 + 4) * (g - y) ** 2).sum((1, 2, 3)).mean().item(), rel=1e-4)

    draw = Draws(1003, 0, 8, 8, CPU)
    labels = draw.randint(0, 10)
    x = student(draw.randn(1, 8, 8), labels)
    sigma = (80 ** (1 / 7) + (1 - 0.8 * draw.rand(1, 1, 1)) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    x_t = x + sigma * draw.randn(1, 8, 8)
    f = guided(teacher.network, x_t, sigma, labels, 3.0)
    g = guided(method.score, x_t, sigma, labels, 1.5)
    loss = (f - g) * ((f - x) - 1.2 * (f - g)) / (x - f).abs().mean((1, 2, 3), keepdim=True)
    assert loop.losses[1] == pytest.approx(100 * loss.sum((1, 2, 3)).mean().item(), rel=1e-3)


def test_an_adversarial_iteration_adds_both_terms_and_takes_the_images_classes():
    method, batch = sid(**ADVERSARIAL), real()
    scalars, loop = run(method, batch, ADV)
    assert set(scalars) == {"loss_score", "loss_g", "loss_adv", "loss_d", "logit_real", "logit_fake", "delta"}
    g = method.score.eval()
    draw = Draws(3, 0, 8, 8, CPU)
    y = method.student.eval()(draw.randn(1, 8, 8), batch.condition.labels)
    sigma = torch.exp(-1.2 + 1.2 * draw.randn(1, 1, 1))
    noise, weight = sigma * draw.randn(1, 8, 8), sigma**-2 + 4
    denoised, fake = g(y + noise, sigma.flatten(), batch.condition.labels, part="encoder_decoder")
    shown = g(
        batch.images + noise, sigma.flatten(), batch.condition.labels, part="encoder"
    )  # the same level, noise and classes
    loss = (weight * (denoised - y) ** 2).sum((1, 2, 3)).mean() + losses.critic_adversarial(
        shown, fake, 4, weight, weight
    ).mean()
    assert loop.losses[0] == pytest.approx(loss.item(), rel=1e-4)
    assert scalars["logit_real"].item() == pytest.approx(shown.mean().item(), rel=1e-4)

    once, twice = (
        run(sid(**ADVERSARIAL, lambda_sid=0.0, adv_half=half), batch, ADV)[1].losses[1] for half in ("single", "double")
    )
    assert 0 < once == pytest.approx(2 * twice, rel=1e-5)
    alone = run(sid(**{**ADVERSARIAL, "start_adv_nimg": 10**6}), batch, ADV)[1].losses[
        1
    ]  # SiD's loss alone, not halved
    assert loop.losses[1] == pytest.approx(0.5 * alone + once, rel=1e-4)


def test_phases_begin_after_their_numbers_of_images():
    method, batch = sid(adversarial=True, start_g_nimg=16, start_adv_nimg=32, batch_pool=2), real()
    done = [run(method, batch, iteration) for iteration in range(6)]  # 0, 8, ... images seen before
    assert [loop.updated for _, loop in done] == [["score"]] * 3 + [["score", "student"]] * 3  # strictly more than 16
    assert ["loss_adv" in scalars for scalars, _ in done] == [False] * 5 + [True]
    assert all("loss_d" in scalars for scalars, _ in done)  # the critic learns from the first image on
    papers = sid(adversarial=True, batch=1000, batch_pool=2)
    for iteration, updated in ((100, ["score"]), (101, ["score", "student"])):
        assert run(papers, real(), iteration, total=8)[1].updated == updated
    assert papers.options.start_adv_nimg == 200_000
    assert run(sid(start_g_nimg=8), None, 1)[1].updated == ["score"]  # SiD waits if it is asked to


@pytest.mark.parametrize("options", [{}, {**ADVERSARIAL, "real_noise": "independent"}])
def test_micro_batches_change_nothing(options):
    wanted, found = (run(sid(**options), real(), ADV, size)[1].gradients for size in (8, 4))
    for name in ("score", "student"):
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=1e-5 * float(wanted[name].abs().max()))


def test_pooling_groups_have_to_fit_into_micro_batches():
    whole = {**ADVERSARIAL, "batch_pool": None}  # the pool is the batch
    for options, together in ((ADVERSARIAL, 4), (whole, 16), ({"batch_pool": 4}, 1)):
        assert SiD.micro_multiple(SiDOptions(**options), 16) == together
    whole = {**ADVERSARIAL, "batch_pool": None}
    run(sid(**whole), real(), ADV)
    with pytest.raises(
        UserError,
        match=r"groups of 8, the whole batch \(sid.batch_pool: null\), and a forward pass of one process has 4",
    ):
        run(sid(**whole), real(), ADV, size=4)
    with pytest.raises(UserError, match=r"groups of 4 \(sid.batch_pool\) and a forward pass of one process has 2"):
        run(sid(**ADVERSARIAL), real(), ADV, size=2)
    groups = [
        run(sid(**{**ADVERSARIAL, "batch_pool": pool}, lambda_sid=0.0), real(), ADV)[1].losses[1]
        for pool in (1, 4, None)
    ]
    assert len(set(groups)) == 3


AUGMENTED = {"augment_dim": 9}


@pytest.mark.parametrize(
    "options",
    [
        {"real_noise": "shared_sigma"},
        {"real_noise": "independent"},
        {"gen_adv": "linear_fakeness"},
        {"gen_adv": "saturating"},
        {"adv_half": "double"},
        {"disc_map": "mid_mean"},
        {"logit_clamp": None},
        {"lambda_d": 100.0},
        {"lambda_adv": 1.0},
        {"augment": 0.5},
    ],
)
def test_every_adversarial_switch_trains_both_networks_and_matters(options):
    teacher = Teacher(tiny_network(**AUGMENTED), SPEC)
    plain, other = (run(sid(teacher, **{**ADVERSARIAL, **more}), real(), ADV) for more in ({}, options))
    assert all(torch.isfinite(value) for value in other[0].values())
    changes = [
        not torch.allclose(plain[1].gradients[name], other[1].gradients[name], rtol=1e-5)
        for name in ("score", "student")
    ]
    assert any(changes) or options == {"logit_clamp": None}  # no map is beyond it here
    assert all((gradient != 0).float().mean() > 0.7 for gradient in other[1].gradients.values())


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 0.5},
        {"tmax": 500},
        {"rho": 3.0},
        {"sigma_max": 20.0},
        {"sigma_min": 0.1},
        {"lambda_sid": 1.0},
        {"teacher_precision": "bf16"},
    ],
)
def test_switches_of_the_student_s_loss_matter_to_it_alone(options):
    plain, other = (run(sid(**more))[1].gradients for more in ({}, options))
    assert not torch.equal(plain["student"], other["student"]) and torch.equal(plain["score"], other["score"])


@pytest.mark.parametrize("options", [{"p_mean": -0.4}, {"p_std": 1.0}, {"lambda_score": 2.0}, {"score_dropout": 0.5}])
def test_switches_of_the_score_network_s_loss_matter_to_it_alone(options):
    torch.manual_seed(0)
    plain, other = (run(sid(**more))[1].gradients for more in ({}, options))
    assert not torch.equal(plain["score"], other["score"]) and torch.equal(plain["student"], other["student"])


def test_dropout_of_the_student_is_its_own_matter():
    dropping = SimpleNamespace(sigma=2.5, init="teacher", dropout=0.5)
    plain, still, other = (
        run(sid(student=student, train_dropout=on))[1].gradients["student"]
        for student, on in ((STUDENT, True), (dropping, False), (dropping, True))
    )
    assert torch.equal(plain, still) and not torch.allclose(plain, other)


def test_the_true_score_in_bf16_is_near_and_stays_fp32_where_asked():
    full, half = (run(sid(teacher_precision=p))[1].gradients["student"] for p in (None, "bf16"))
    assert torch.nn.functional.cosine_similarity(full, half, dim=0) > 0.9
    method, seen = sid(teacher_precision="fp32"), []
    method.teacher.network.model.dec["8x8_in0"].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        run(method)
    assert seen == [torch.float32]


def test_classes_come_uniform_or_from_the_data():
    images = Images()
    images.labels = torch.full((40,), 7)
    for options, classes in (({}, None), ({"labels": "data"}, {7}), ({**ADVERSARIAL}, {7})):
        method, seen = sid(images=images, **options), []
        method.student.register_forward_pre_hook(lambda module, args, seen=seen: seen.extend(args[1].tolist()))
        batch = Batch(images=real().images, condition=Condition.of_labels(images.labels[:8]))
        run(method, batch if SiD.needs(method.options) == "images" else None, ADV)
        assert set(seen) == classes if classes else len(set(seen)) > 3
    unconditional = Teacher(
        build_network({**tiny_network().config, "label_dim": 0}), replace(SPEC, condition="none", classes=0)
    )
    run(sid(unconditional))
    run(sid(unconditional, **ADVERSARIAL), real(), ADV)  # the images' classes are of no interest


class Poisoned(nn.Module):
    """A teacher that says NaN of classes 3."""

    def __init__(self, network):
        super().__init__()
        self.network, self.told = network, 0

    def forward(self, x, sigma, labels):
        y = self.network(x, sigma, labels)
        self.told += int((labels == 3).sum())
        return torch.where((labels == 3)[:, None, None, None], torch.nan, y)


@pytest.mark.parametrize("options", [{}, ADVERSARIAL])
def test_samples_that_are_not_finite_are_dropped_and_counted_or_refused(options):
    images = Images()
    images.labels = torch.arange(40) % 4
    options = {**options, "labels": "data"}
    batch = real(16)
    method = sid(images=images, nan="drop", batch=16, **options)
    poisoned = method.teacher.network = Poisoned(method.teacher.network)
    scalars, loop = run(method, batch, ADV)
    assert scalars["nan_samples"].item() == poisoned.told > 0
    assert all(torch.isfinite(value) for value in scalars.values()) and all(
        g.isfinite().all() for g in loop.gradients.values()
    )
    whole = sid(images=images, nan="drop", batch=16, **options)
    clean_scalars, clean = run(whole, batch, ADV)
    assert clean_scalars["nan_samples"] == 0
    torch.testing.assert_close(clean.gradients["score"], loop.gradients["score"])  # its step asks the teacher nothing
    assert not torch.allclose(clean.gradients["student"], loop.gradients["student"])
    method = sid(images=images, batch=16, **options)
    method.teacher.network = Poisoned(method.teacher.network)
    with pytest.raises(UserError, match=f"{poisoned.told} samples were not finite up to iteration 1") as caught:
        run(method, batch, ADV)
    assert "nan: drop" in caught.value.hint


def test_a_student_s_bad_image_teaches_the_score_network_nothing():
    method = sid(nan="drop")
    forward = method.student.forward
    method.student.forward = lambda z, labels: torch.where(
        (torch.arange(len(z)) == 2)[:, None, None, None], torch.inf, forward(z, labels)
    )
    scalars, loop = run(method)
    assert scalars["nan_samples"] == 2 and all(g.isfinite().all() for g in loop.gradients.values())


EDM2 = {
    "arch": "edm2",
    "img_resolution": 8,
    "img_channels": 1,
    "label_dim": 10,
    "model_channels": 16,
    "channel_mult": [1],
    "num_blocks": 1,
    "attn_resolutions": [],
    "channels_per_head": 16,
    "logvar_channels": 8,
}


def edm2_teacher(**more) -> Teacher:
    torch.manual_seed(0)
    network = build_network({**EDM2, **more})
    for name, p in network.named_parameters():
        if name.endswith("_gain"):
            nn.init.constant_(p, 0.5)
    return Teacher(network, SPEC)


def test_edm2_s_uncertainty_weighs_every_loss_and_the_student_has_none():
    method, batch = sid(edm2_teacher(), **ADVERSARIAL), real()
    assert not any("logvar" in name for name, _ in method.student.named_parameters())
    assert method.describe()["network"]["logvar_channels"] == 0 and any(
        "logvar" in name for name, _ in method.score.named_parameters()
    )
    build_network(method.describe()["network"]).load_state_dict(method.student.network.state_dict())
    method.score.logvar_linear.weight.data.fill_(0.0)
    _, loop = run(method, batch, ADV)  # u = 0
    zero = sid(edm2_teacher(), uncertainty=False, **ADVERSARIAL)
    assert not any("logvar" in name for name, _ in zero.score.named_parameters())
    assert run(zero, batch, ADV)[1].losses == pytest.approx(loop.losses, rel=1e-4)
    method = sid(edm2_teacher(), **ADVERSARIAL, lambda_score=0.0)
    with torch.no_grad():
        method.score.logvar = method.score._logvar = lambda c_noise: torch.full((len(c_noise), 1, 1, 1), 2.0).log()
    half = run(method, batch, ADV)[1].losses
    whole = run(sid(edm2_teacher(), uncertainty=False, **ADVERSARIAL, lambda_score=0.0), batch, ADV)[1].losses
    assert [2 * loss for loss in half] == pytest.approx(whole, rel=1e-4)


def norms(network: nn.Module) -> torch.Tensor:
    return torch.cat(
        [p.flatten(1).square().mean(1).sqrt() for name, p in network.named_parameters() if name.endswith("weight")]
    )


@pytest.mark.parametrize(
    ("student", "score"),
    [
        (None, None),
        ("post_step", "post_step"),
        ("pre_forward", "pre_forward"),
        ("off", "off"),
        ("post_step", "off"),
        ("off", "pre_forward"),
    ],
)
def test_forced_weight_normalisation_is_a_switch_of_each_network(student, score):
    teacher = edm2_teacher(force_wn="off" if student == "post_step" else "post_step")
    with torch.no_grad():
        for p in teacher.network.parameters():
            p.mul_(2.0 if p.ndim > 1 else 1.0)
    before = copy.deepcopy(teacher.network.state_dict())
    method = sid(teacher, student_force_wn=student, score_force_wn=score)
    z, labels = torch.randn(4, 1, 8, 8), torch.arange(4)
    torch.testing.assert_close(
        method.student.eval()(z, labels), teacher.network(2.5 * z, torch.tensor([2.5]), labels), rtol=1e-3, atol=1e-3
    )
    run(method, lr=1e-4)
    for network, force_wn in ((method.student.network, student), (method.score, score)):
        far = (norms(network) - 1).abs().max()
        assert far > 0.5 if force_wn == "off" else far < (0.3 if force_wn == "pre_forward" else 1e-3)
        assert network.config["force_wn"] == network.force_wn == (force_wn or "post_step")
    assert all(torch.equal(before[name], value) for name, value in teacher.network.state_dict().items())


def test_the_one_switch_of_older_recipes_is_both():
    recipe = load_recipe("sid_digits", ["sid.force_wn=off"])
    assert (recipe.options.student_force_wn, recipe.options.score_force_wn) == ("off", "off")
    mixed = SiDOptions.model_validate({"force_wn": "off", "score_force_wn": "post_step"})
    assert (mixed.student_force_wn, mixed.score_force_wn) == ("off", "post_step")
    assert "force_wn" not in recipe.resolved()["sid"]


def test_latent_teachers_encode_the_real_images(monkeypatch):
    latent = replace(SPEC, space="edm2")
    images = Images()
    images.shape = (3, 64, 64)
    with pytest.raises(UserError, match="does not say how they become images"):
        sid(Teacher(tiny_network(), replace(SPEC, space="unnamed")), images=images, **ADVERSARIAL)
    asked = []
    teacher = Teacher(tiny_network(), latent)
    monkeypatch.setattr(teacher.space, "encode", lambda images, noise: (asked.append(images.shape), noise)[1])
    with pytest.raises(UserError, match="makes images of 3 x 64 x 64, images has 1 x 8 x 8"):
        sid(teacher, **ADVERSARIAL)
    run(
        sid(teacher, images=images, **ADVERSARIAL),
        Batch(Condition.of_labels(range(8)), images=torch.zeros(8, 3, 64, 64)),
        ADV,
    )
    assert asked == [(8, 3, 64, 64)]


def other_images(**attributes):
    images = Images()
    for name, value in attributes.items():
        setattr(images, name, value)
    return images


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: get_method("sid")(Setup(SiDOptions(), student=STUDENT)), "needs a `teacher:`"),
        (
            lambda: sid(student=SimpleNamespace(sigma=80.0, init="teacher", dropout=None)),
            "student.sigma is 80, the teacher's highest noise level",
        ),
        (lambda: sid(start=tiny_student()), "student.sigma is 2.5, but the student to start from is called at 80"),
        (
            lambda: sid(
                start=MultistepStudent(
                    build_network({"arch": "ddgan", "img_resolution": 8, "img_channels": 1, **SMALL}), SPEC, 2
                )
            ),
            "goes on with students of kind denoiser; the one to start from is of kind multistep",
        ),
        (
            lambda: sid(start=Student(tiny_network(), replace(SPEC, classes=3), 2.5)),
            "with 3 classes, teacher 'tiny' makes other images",
        ),
        (lambda: sid(sigma_min=3.0, sigma_max=3.0), "no range of noise levels"),
        (lambda: sid(adversarial=True, labels="uniform"), "uniform does not go with adversarial"),
        (lambda: sid(**{**ADVERSARIAL, "batch_pool": 3}), "3 does not divide the batch of 8"),
        (lambda: sid(student_force_wn="off"), "sid.student_force_wn: only networks of EDM2"),
        (lambda: sid(score_force_wn="off"), "sid.score_force_wn: only networks of EDM2"),
        (lambda: sid(augment=0.12), "takes no augmentation labels"),
        (
            lambda: sid(images=other_images(labels=None, classes=0), **ADVERSARIAL),
            "images has no classes, teacher 'tiny' has 10",
        ),
        (lambda: sid(images=other_images(classes=7), labels="data"), "images has 7 classes, teacher 'tiny' has 10"),
        (
            lambda: sid(images=other_images(shape=(3, 8, 8)), **ADVERSARIAL),
            "makes images of 1 x 8 x 8, images has 3 x 8 x 8",
        ),
    ],
)
def test_mistakes(made, words):
    with pytest.raises(UserError, match=words):
        made()


def test_a_student_can_start_from_scratch():
    method = sid(student=SimpleNamespace(sigma=2.5, init="scratch", dropout=0.1))
    assert method.student.network.config["dropout"] == 0.1 and method.score.config["dropout"] == 0.0
    assert not torch.equal(next(method.student.parameters()), next(method.score.parameters()))


# Through the loop -----------------------------------------------------------------------------------------------------

SMALL_RUN = ["batch=8", "images=48", "log_every=1", "eval=null", "preview=null", "ema.half_life=50"]
EARLY = ["sid.start_g_nimg=8", "sid.start_adv_nimg=24", "sid.batch_pool=4"]


def log(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def teacher(tmp_path) -> str:
    tiny_teacher(tmp_path / "teacher.safetensors")
    return f"teacher={tmp_path / 'teacher.safetensors'}"


@pytest.mark.long
@pytest.mark.parametrize("name", ["sid_digits", "sida_digits"])
def test_a_stopped_and_resumed_run_ends_with_the_same_bytes(name, teacher, tmp_path):
    recipe = load_recipe(name, [*SMALL_RUN, teacher, *(EARLY if name == "sida_digits" else [])])
    train(recipe, tmp_path / "whole")
    train(recipe, tmp_path / "parts", 4)
    train(recipe, tmp_path / "parts")
    check_same_bytes(tmp_path / "whole", tmp_path / "parts")
    student = load_student(tmp_path / "whole")
    assert type(student) is Student and student.sigma == 2.5 and student.nfe == 1
    lines = log(tmp_path / "whole")
    if name == "sid_digits":
        assert (
            recipe.data is None
            and read_meta(tmp_path / "whole" / "checkpoints" / "last.safetensors")["provenance"][-1]["data"] is None
        )
        assert all("loss_g" in line for line in lines)
    else:
        assert ["loss_g" in line for line in lines] == [False] * 2 + [True] * 4 and [
            "loss_adv" in line for line in lines
        ] == [False] * 4 + [True] * 2


@pytest.mark.long
def test_accumulation_and_activation_checkpointing_end_with_the_same_student(teacher, tmp_path):
    ends = []
    for i, more in enumerate(([], ["micro_batch=4", "checkpointing=true"])):
        plain = [
            "optim={name: sgd, lr: 1.0e-4}",
            "optim_critic={name: sgd, lr: 1.0e-4}",
            "ema.half_life=null",
        ]  # Adam would enlarge rounding errors
        train(load_recipe("sida_digits", [*SMALL_RUN, teacher, *EARLY, *plain, *more]), tmp_path / str(i))
        ends.append(torch.cat([p.flatten() for p in load_student(tmp_path / str(i)).parameters()]))
    start = torch.cat([p.flatten() for p in tiny_network().parameters()])
    change = (ends[0] - start).abs().max()
    assert change > 1e-4 and (ends[1] - ends[0]).abs().max() < 1e-3 * change


@pytest.mark.long
def test_sid2a_goes_on_from_a_student_of_sid(teacher, tmp_path):
    train(load_recipe("sid_digits", [*SMALL_RUN, teacher]), tmp_path / "sid")
    changes = [*SMALL_RUN, teacher, *EARLY, "images=8"]  # the student waits: it is still the one it was
    with pytest.raises(SystemExit) as done:
        main(
            [
                "finetune",
                "sid2a_digits",
                "--from",
                str(tmp_path / "sid"),
                "--out",
                str(tmp_path / "sid2a"),
                *(word for change in changes for word in ("--set", change)),
            ]
        )
    assert done.value.code == 0
    before, after = load_student(tmp_path / "sid"), load_student(tmp_path / "sid2a")
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    state = log(tmp_path / "sid2a")
    assert len(state) == 1 and "loss_d" in state[0] and "loss_g" not in state[0]
    history = read_meta(tmp_path / "sid2a" / "checkpoints" / "last.safetensors")["provenance"]
    assert [entry["method"] for entry in history if "method" in entry] == ["sid", "sid"]


def test_plans_name_both_networks():
    plan = make_plan(load_recipe("sida_digits"))
    assert list(plan.networks) == ["teacher (frozen)", "student", "score"] and not plan.missing
    assert make_plan(load_recipe("sid_digits")).calls["training (forward passes of trained networks)"] == 4 * 200_000


def test_specs_and_samples():
    method = sid()
    assert isinstance(method.spec(), Spec) and method.nfe() == 1
    images = method.generate(method.student, 10 * torch.randn(2, 1, 8, 8), torch.tensor([0, 1]))
    assert images.shape == (2, 1, 8, 8) and images.abs().max() <= 1
