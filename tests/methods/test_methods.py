"""Each method's step against its equation, through a stand-in for the loop."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from d2o.augment.edm import augment
from d2o.condition import Condition
from d2o.errors import UserError
from d2o.methods.base import METHODS, Batch, Draws, Setup, get_method
from d2o.methods.classifier import ClassifierOptions, translate
from d2o.methods.edm import EDMOptions
from d2o.methods.ode import ODEOptions
from d2o.training.frozen import hold_frozen
from tests.helpers import SPEC, tiny_network, tiny_student, tiny_teacher

CPU = torch.device("cpu")
NETWORK = {
    "arch": "ddpmpp",
    "model_channels": 16,
    "channel_mult": [1],
    "num_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.0,
}


class Images:
    name, classes, shape, bad, notes, fingerprint = "images", 10, (1, 8, 8), [], [], "f"

    def __init__(self, n=40):
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.arange(n) % 10
        self.pixels = torch.randint(0, 256, (n, 1, 8, 8), generator=generator, dtype=torch.uint8)

    def __len__(self):
        return len(self.pixels)

    def images(self, index):
        return self.pixels[index]


class OneStep:
    """A loop that only records."""

    def __init__(self, method, batch):
        self.networks, self.batch, self.losses, self.updated = method.players(), batch, [], []

    def micro_batches(self, batch, turn=0):
        n = len(batch.condition.labels)
        yield batch, Draws(3 + 1000 * turn, 0, n, n, CPU)

    def everywhere(self, value):
        return value

    def backward(self, loss):
        self.losses.append(loss)
        loss.backward()

    def update(self, name):
        self.updated.append(name)

    def net(self, name):
        return self.networks[name]

    @contextmanager
    def frozen(self, name):
        yield self.networks[name]

    def mean(self, values):
        return torch.stack(values).mean().detach()


def run(method, batch):
    loop = OneStep(method, batch)
    return method.step(loop, batch, 0), loop


def test_edm_loss_is_table_1():
    method = get_method("edm")(Setup(EDMOptions(), network=NETWORK, images=Images(), name="x"))
    y, labels = torch.rand(6, 1, 8, 8) * 2 - 1, torch.arange(6)
    scalars, loop = run(method, Batch(images=y, condition=Condition.of_labels(labels)))
    draw = Draws(3, 0, 6, 6, CPU)
    sigma = torch.exp(-1.2 + 1.2 * draw.randn(1, 1, 1))
    n = sigma * draw.randn(1, 8, 8)
    weight = sigma**-2 + 0.5**-2
    expected = (weight * (method.denoiser(y + n, sigma.flatten(), labels) - y).square()).mean()
    assert scalars["loss"].item() == pytest.approx(expected.item(), rel=1e-6)
    assert loop.updated == ["denoiser"]


def test_edm_label_dropout_trains_the_unconditional_denoiser():
    method = get_method("edm")(Setup(EDMOptions(label_dropout=1.0), network=NETWORK, images=Images(), name="x"))
    seen = []
    method.denoiser.register_forward_pre_hook(lambda m, args: seen.append(args[2]))
    run(method, Batch(images=torch.zeros(4, 1, 8, 8), condition=Condition.of_labels(torch.arange(4))))
    assert torch.equal(seen[0], torch.full((4,), -1))
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(method.denoiser(x, torch.ones(4), seen[0]), method.denoiser(x, torch.ones(4), None))


EDM2 = {
    "arch": "edm2",
    "model_channels": 8,
    "channel_mult": [1],
    "num_blocks": 1,
    "attn_resolutions": [],
    "channels_per_head": 8,
}


@pytest.mark.parametrize("options", [{}, {"force_wn": "off"}, {"logvar_channels": 0}])
def test_edm_trains_edm2_with_its_uncertainty_and_normalised_weights(options):
    torch.manual_seed(0)
    method = get_method("edm")(Setup(EDMOptions(), network={**EDM2, **options}, images=Images()))
    network, images = method.denoiser, Images().images(torch.arange(6)).float() / 127.5 - 1
    for p in network.parameters():  # away from unit magnitude, and from gains of 0
        torch.nn.init.normal_(p, 1.0, 3.0)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    batch = Batch(images=images, condition=Condition.of_labels(torch.arange(6)))
    loop = OneStep(method, batch)
    with torch.no_grad():
        draw = Draws(3, 0, 6, 6, CPU)
        sigma = (-1.2 + 1.2 * draw.randn(1, 1, 1)).exp()
        noisy = images + sigma * draw.randn(1, 8, 8)
        error = (
            (sigma**2 + 0.25)
            / (sigma * 0.5) ** 2
            * (network(noisy, sigma.flatten(), batch.condition.labels) - images) ** 2
        )
        expected = error.mean()
        if options.get("logvar_channels", 128):
            u = network.logvar(sigma.flatten())
            expected = (error / u.exp() + u).mean()  # Karras et al. 2024, eq. 21
    method.step(loop, batch, 0)
    method.settle()
    assert torch.allclose(loop.losses[0].detach(), expected, rtol=1e-4)
    kept = all(
        torch.equal(p, before[name]) for name, p in network.named_parameters()
    )  # this loop takes no optimiser steps
    weight = network.unet.out_conv.weight.detach()
    assert kept == (options.get("force_wn") == "off")
    assert kept or torch.allclose(weight.square().mean(dim=(1, 2, 3)), torch.ones(len(weight)), atol=1e-3)


def test_edm_trains_with_its_augmentation_and_tells_the_network():
    """As EDM's teachers were trained (Karras et al. 2022, appendix F.2)."""
    network = {**NETWORK, "augment_dim": 9}
    method = get_method("edm")(
        Setup(EDMOptions(augment=0.5, label_dropout=0.5), network=network, images=Images(), name="x")
    )
    seen = []
    method.denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((*args, kwargs["augment_labels"])), with_kwargs=True
    )
    y, labels = torch.rand(6, 1, 8, 8) * 2 - 1, torch.arange(6)
    scalars, _ = run(method, Batch(images=y, condition=Condition.of_labels(labels)))
    draw = Draws(3, 0, 6, 6, CPU)
    moved, told = augment(y, 0.5, draw.randn, draw.rand)
    sigma = torch.exp(-1.2 + 1.2 * draw.randn(1, 1, 1))
    noisy = moved + sigma * draw.randn(1, 8, 8)
    ((x, _, kept, asked),) = seen
    assert torch.equal(asked, told) and (told != 0).any() and not torch.equal(moved, y)
    torch.testing.assert_close(x, noisy)
    denoised = method.denoiser(noisy, sigma.flatten(), kept, augment_labels=told)
    expected = ((sigma**-2 + 4) * (denoised - moved).square()).mean()  # of the image as it was augmented
    assert scalars["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    with pytest.raises(UserError, match="edm.augment: the network takes no augmentation labels"):
        get_method("edm")(Setup(EDMOptions(augment=0.12), network=NETWORK, images=Images()))


def test_edm_refuses_networks_that_are_no_denoiser_or_do_not_fit():
    with pytest.raises(UserError, match="not a denoiser"):
        get_method("edm")(Setup(EDMOptions(), network={"arch": "classifier", "classes": 10}, images=Images(), name="x"))
    with pytest.raises(UserError, match="other images than the data has"):
        get_method("edm")(Setup(EDMOptions(), network={**NETWORK, "img_channels": 3}, images=Images(), name="x"))
    with pytest.raises(UserError, match="network"):
        get_method("edm")(Setup(EDMOptions(), images=Images(), name="x"))


def ode(**options):
    return get_method("ode")(
        Setup(
            ODEOptions(**options),
            teacher=tiny_teacher(),
            student=SimpleNamespace(sigma=80.0, init="teacher", dropout=None),
        )
    )


@pytest.mark.parametrize(("loss", "norm"), [("mse", lambda d: d.square().mean()), ("l1", lambda d: d.abs().mean())])
def test_ode_regresses_to_the_target_from_the_same_noise(loss, norm):
    method = ode(loss=loss)
    noise, target, labels = torch.randn(5, 1, 8, 8), torch.randn(5, 1, 8, 8), torch.arange(5)
    scalars, loop = run(method, Batch(noise=noise, target=target, condition=Condition.of_labels(labels)))
    teacher = tiny_teacher()
    assert scalars["loss"].item() == pytest.approx(
        norm(teacher.denoise(80 * noise, 80.0, labels) - target).item(), rel=1e-5
    )
    assert loop.updated == ["student"]
    assert all(p.grad is not None for p in method.student.parameters())


def test_student_starts_as_one_teacher_call_or_from_a_student_or_from_scratch():
    teacher, noise, labels = tiny_teacher(), torch.randn(3, 1, 8, 8), torch.arange(3)
    setup = Setup(ODEOptions(), teacher=teacher, student=SimpleNamespace(sigma=80.0, init="teacher", dropout=None))
    method = get_method("ode")(setup)
    once = teacher.sample(noise, labels, "euler", 1)
    assert torch.allclose(method.student(noise, labels), once, atol=1e-5)
    assert not any(p.requires_grad for p in teacher.network.parameters())
    start = tiny_student(seed=4)
    method = get_method("ode")(Setup(ODEOptions(), teacher=teacher, student=setup.student, start=start))
    assert torch.equal(method.student(noise, labels), start(noise, labels))
    assert method.student is not start and all(p.requires_grad for p in method.student.parameters())
    scratch = get_method("ode")(
        Setup(ODEOptions(), teacher=teacher, student=SimpleNamespace(sigma=80.0, init="scratch", dropout=0.25))
    )
    assert not torch.allclose(scratch.student.eval()(noise, labels), once, atol=1e-3)
    assert scratch.student.config["network"]["dropout"] == 0.25
    assert {part.dropout for part in scratch.student.modules() if hasattr(part, "dropout")} == {0.25}


def test_ode_errors():
    with pytest.raises(UserError, match="needs a `teacher:`"):
        get_method("ode")(Setup(ODEOptions()))
    with pytest.raises(UserError, match=r"ode\.extractor"):
        ode(loss="perceptual")
    with pytest.raises(UserError, match="did you mean 'ode'"):
        get_method("od")
    assert set(METHODS) >= {"edm", "ode", "classifier"}


def test_classifier_learns_and_never_sees_what_it_is_tested_on():
    images = Images(200)
    images.pixels = (255 * torch.eye(64, dtype=torch.uint8)[images.labels * 6]).reshape(
        -1, 1, 8, 8
    )  # a class is the place of a dot
    method = get_method("classifier")(
        Setup(ClassifierOptions(holdout=0.25, shift=0), network={"width": 8}, images=images)
    )
    train, held = set(method.train_indices.tolist()), set(method.held_indices.tolist())
    assert len(held) == 50 and not train & held and train | held == set(range(200))
    before = method.validate(method.classifier)["accuracy"]
    optimizer = torch.optim.Adam(method.classifier.parameters(), 3e-3)
    x = images.pixels[method.train_indices].float() / 127.5 - 1
    for _ in range(40):
        run(method, Batch(images=x, condition=Condition.of_labels(images.labels[method.train_indices])))
        optimizer.step()
        optimizer.zero_grad()
    assert method.validate(method.classifier)["accuracy"] > max(before, 0.6)
    assert method.classifier.training


def test_classifier_needs_labels():
    images = Images()
    images.classes, images.labels = 0, None
    with pytest.raises(UserError, match="no labels"):
        get_method("classifier")(Setup(ClassifierOptions(), images=images))


def test_a_classifier_has_the_classes_of_its_images():
    with pytest.raises(UserError, match="network.classes: 9, and .* has 10 classes"):
        get_method("classifier")(Setup(ClassifierOptions(), network={"classes": 9}, images=Images(), name="x"))


def test_translate_moves_by_whole_pixels():
    x = torch.arange(2 * 16.0).reshape(2, 1, 4, 4)
    moved = translate(x, torch.tensor([[1, 0], [0, -1]]))
    assert torch.equal(moved[0, 0, 1:], x[0, 0, :-1]) and torch.equal(moved[0, 0, 0], x[0, 0, 0])
    assert torch.equal(moved[1, 0, :, :-1], x[1, 0, :, 1:])


def test_spec_of_a_trained_teacher():
    method = get_method("edm")(Setup(EDMOptions(), network=NETWORK, images=Images(), name="mine", licence="CC0"))
    spec = method.spec()
    assert (spec.name, spec.shape, spec.condition, spec.classes, spec.licence) == (
        "mine",
        (1, 8, 8),
        "label",
        10,
        "CC0",
    )
    out = method.generate(method.denoiser, torch.randn(2, 1, 8, 8), torch.tensor([0, 1]))
    assert out.shape == (2, 1, 8, 8) and out.abs().max() <= 1
    assert SPEC.shape == (1, 8, 8) and tiny_network().label_dim == 10


@pytest.mark.parametrize(
    ("recipe", "changes", "trained", "called"),
    [
        ("quickstart", ["ode.loss=mse"], {"student"}, set()),
        ("quickstart", ["ode={loss: perceptual, extractor: digits}"], {"student"}, {"extractor"}),
        ("sid_digits", [], {"student", "score"}, {"teacher"}),
        ("dmd_digits", ["dmd.regression=l1"], {"student", "score"}, {"teacher"}),
        (
            "dmd_digits",
            ["dmd={regression: perceptual, extractor: digits}"],
            {"student", "score"},
            {"teacher", "regression"},
        ),
        ("cd_digits", ["cd.target=ema"], {"student"}, {"teacher"}),
        ("spi_gan_digits", [], {"generator", "critic"}, set()),
    ],
)
def test_what_is_trained_and_what_is_only_called(recipe, changes, trained, called):
    from d2o.recipes.load import load_recipe

    recipe = load_recipe(recipe, changes)
    method = get_method(recipe.method)(
        Setup(recipe.options, network=recipe.network, student=recipe.student, teacher=tiny_teacher(), images=Images())
    )
    players, frozen = method.players(), method.frozen()
    assert players.keys() == trained and frozen.keys() == called and method.product in players
    hold_frozen(method, torch.device("cpu"))
    assert not any(part.training for net in frozen.values() for part in net.modules())
    assert all(p.requires_grad for net in players.values() for p in net.parameters())
    assert not any(p.requires_grad for net in (*frozen.values(), *method.states().values()) for p in net.parameters())


def test_what_is_trained_is_not_frozen_as_well():
    from d2o.recipes.load import load_recipe

    recipe = load_recipe("sid_digits")
    method = get_method(recipe.method)(Setup(recipe.options, student=recipe.student, teacher=tiny_teacher()))
    method.frozen = lambda: {"score": method.players()["score"]}
    with pytest.raises(ValueError, match="'score' of SiD"):
        hold_frozen(method, torch.device("cpu"))


def test_a_plan_counts_what_is_only_called():
    from d2o.recipes.load import load_recipe
    from d2o.recipes.plan import make_plan

    plain, perceptual = (
        make_plan(load_recipe("quickstart", changes))
        for changes in ([], ["ode.loss=perceptual", "ode.extractor=digits"])
    )
    assert perceptual.networks.keys() - plain.networks.keys() == {"extractor (frozen)"}
    count = perceptual.networks["extractor (frozen)"]
    assert count > 1000 and perceptual.memory["extractor weights"] == 4 * count
