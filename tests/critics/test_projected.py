"""GDD's critic against the official one's numbers, and what it promises: nothing frozen moves, pools are stated, what
moves once an iteration does so whatever the division."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_sample_images
from torch import nn

from d2o.critics.mixing import Mixing
from d2o.critics.projected import ProjectedCritic
from d2o.data.images import open_images, to_float
from d2o.errors import UserError
from d2o.features import Backbone, deit, load_backbone, vgg16
from d2o.features.common import IMAGENET_MEAN, IMAGENET_STD, package
from d2o.losses.adversarial import critic_loss, generator_loss, r1_penalty, squared_gradient
from tests.critics.official import FOLDER, official
from tests.features.test_backbone import drawn, stand_in


def near(found, golden, share):
    return (found.detach() - golden).abs().max() < share * golden.abs().max()


def of_stand_in(**options):
    stages, channels = stand_in()
    return ProjectedCritic([("resnet18", Backbone(stages, channels, IMAGENET_MEAN, IMAGENET_STD))], **options)


def small(size=32, classes=0, heads_seed=0, **options):
    """A critic of little cost: two backbones of a few channels, maps of a quarter of `size` and less."""
    torch.manual_seed(heads_seed)
    backbones = []
    for name in ("a", "b"):
        stages = [nn.Sequential(nn.Conv2d(c, 4, k, k), nn.SiLU()) for c, k in ((3, 2), (4, 2), (4, 1), (4, 2))]
        backbones.append((name, Backbone(stages, [4] * 4, (0.5,) * 3, (0.5,) * 3, size=size)))
    return ProjectedCritic(backbones, classes, width=4, **options).train()


def images(n=8, size=16, seed=1):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# The official critic -------------------------------------------------------------------------------------------------


def check_all(critic, name, first, heavy=True):
    golden = load_file(FOLDER / f"{name}.safetensors")
    critic.load_official(official(name, first))
    x, labels = golden["x"].requires_grad_(True), golden.get("label")
    parts = critic.train().logits(x, labels)
    logits = torch.cat(parts, 1)
    assert near(logits, golden["logits"], 1e-4)
    weights = torch.cos(torch.arange(logits.numel())).view_as(logits)
    (gradient,) = torch.autograd.grad((logits * weights).sum(), x, retain_graph=True)
    assert near(gradient, golden["grad"], 1e-2)
    if not heavy:
        return
    assert near(squared_gradient(parts, x), golden["r1_penalty"], 1e-2)  # of which `r1_penalty` is made
    with torch.no_grad():
        assert near(torch.cat(critic.eval().logits(x, labels), 1), golden["logits_eval"], 1e-4)


@pytest.mark.long
def test_stand_in_as_the_official_critic():
    check_all(of_stand_in(), "standin", 4000)


@pytest.mark.long
def test_deit_as_the_official_critic(tmp_path):
    name = "deit_tiny_distilled_patch16_224"
    shapes = {k: v.shape for k, v in deit.untrained_deit(name).state_dict().items() if not k.startswith("head")}
    torch.save(drawn(shapes, 8000), tmp_path / "deit.pth")
    check_all(ProjectedCritic([name], weights={name: tmp_path / "deit.pth"}), "deit_tiny", 9000, heavy=False)


def test_r1_can_be_trained_through_transformers():
    """Whose fused attention cannot be differentiated twice."""
    network = package("timm").models.VisionTransformer(embed_dim=16, num_heads=2, num_classes=0)
    critic = ProjectedCritic([("vit", deit.deit_backbone(network))], width=4)
    r1_penalty(critic, images(2)).mean().backward()
    assert all(p.grad is not None for p in critic.parameters())


@pytest.mark.long
def test_vgg16_and_lite0_with_classes_as_the_official_critic(tmp_path):
    """As CIFAR-10's: two backbones under conditional heads, in training and in eval mode, gradient and R1."""
    shapes = {k: v.shape for k, v in vgg16.batch_normed().state_dict().items()}
    torch.save({f"features.{k}": v for k, v in drawn(shapes, 6000, "features.").items()}, tmp_path / "vgg.pth")
    weights = {"vgg16_bn": tmp_path / "vgg.pth"}
    critic = ProjectedCritic(["vgg16_bn", "tf_efficientnet_lite0"], classes=10, bn_probe=True, weights=weights)
    check_all(critic, "vgg_lite0_cond", 7000)
    golden = load_file(FOLDER / "vgg_lite0_cond.safetensors")
    with torch.no_grad():
        for i, maps in enumerate(critic.features(golden["x"])):
            for level, y in enumerate(maps):
                assert near(y.mean((2, 3)), golden[f"means_{i}_{level}"], 1e-4)
    with pytest.raises(UserError, match="conditioned on 10 classes and needs labels"):
        critic.logits(golden["x"])


def test_what_has_no_batch_norm_is_not_probed():
    """A transformer takes images of its own size alone, the classifier of digits grey ones."""
    network = package("timm").models.VisionTransformer(embed_dim=16, num_heads=2, num_classes=0)
    vit = deit.deit_backbone(network)
    for backbone in (("vit", vit), "digits"):
        assert len(ProjectedCritic([backbone], width=4, bn_probe=True).heads[0]) == 4


def test_another_critics_tensors_are_refused():
    state = official("standin", 4000)
    with pytest.raises(UserError, match="_ccm.weight' is not there"):
        small().load_official(state)
    state["feature_networks.resnet18.scratch.layer0_ccm.weight"] = torch.zeros(64, 13, 1, 1)
    with pytest.raises(UserError, match=r"layer0_ccm.weight' has the shape \(64, 13, 1, 1\), not \(64, 12, 1, 1\)"):
        of_stand_in().load_official(state)


@pytest.mark.long
def test_published_sizes():
    """Sheet D3: 484 + 64 logits of an image with VGG-16, 64 + 64 with DeiT; the widths of the heads."""
    with torch.device("meta"):
        cifar = ProjectedCritic(["vgg16_bn", "tf_efficientnet_lite0"], device="meta")
        imagenet = ProjectedCritic(["deit_base_distilled_patch16_224", "lite0"], classes=1000, device="meta")
        x, labels = torch.empty(2, 3, 32, 32), torch.empty(2, dtype=torch.int64)
        assert [tuple(part.shape) for part in cifar(x)] == [(2, 484), (2, 64)]
        assert [tuple(part.shape) for part in imagenet(x, labels)] == [(2, 64), (2, 64)]
    conv = lambda a, b: 16 * a * b + b + 2 * b  # noqa: E731 (with its batch norm)
    steps = [(64, 64), (64, 128), (128, 256), (256, 512)]
    heads = 2 * sum(sum(conv(*step) for step in steps[level:]) + 16 * 512 for level in range(4))
    assert sum(p.numel() for p in cifar.parameters()) == heads == 20_662_656
    classes = 8 * (1000 * 320 + 64 * 320 + 64 + 63 * 16 * 512)
    assert sum(p.numel() for p in imagenet.parameters()) == heads + classes


# What is frozen, and what is not -------------------------------------------------------------------------------------


def test_frozen_parts_get_no_gradient_and_the_image_does():
    critic = of_stand_in(width=8)
    x = images(2, 32).requires_grad_(True)
    generator_loss(critic(x)).mean().backward()
    assert x.grad.abs().sum() > 0
    trained = dict(critic.named_parameters())
    assert all(name.startswith("heads.") and p.grad is not None for name, p in trained.items())
    stored = critic.state_dict()
    assert any(name.startswith("mixing.") for name in stored)  # of which the weights are stored
    assert not any(name.startswith("backbones.") for name in stored)  # these have files of their own
    with torch.no_grad():
        assert not any(part.requires_grad for part in critic(x))
    assert not any(part.requires_grad for maps in critic.features(images()) for part in maps)  # real images: no graph


def test_projections_are_those_of_their_seed():
    """Whatever the state of torch's generator, which is left as it was; another seed draws others."""
    torch.manual_seed(5)
    expected = torch.randn(1)
    torch.manual_seed(5)
    Mixing((4, 4, 4, 4), False, 3)
    assert torch.equal(torch.randn(1), expected)
    first, again, other = (small(heads_seed=i, seed=seed).mixing.state_dict() for i, seed in ((0, 0), (1, 0), (0, 7)))
    torch.testing.assert_close(first, again)
    assert not any(torch.equal(other[key], value) for key, value in first.items())
    one, two = (value for key, value in first.items() if key.endswith("across_channels.0.weight"))
    assert not torch.equal(one, two)  # each backbone has its own


@pytest.fixture(params=["scikit-learn", "cifar10"])
def photographs(request):
    """Eight real images of 32 pixels, in [-1, 1]: cut out of the two photographs that scikit-learn brings; of CIFAR-10
    where $D2O_CIFAR10 is an archive of it, or ../shared/data holds one."""
    if request.param == "cifar10":
        beside = Path(__file__).parents[3] / "shared" / "data" / "cifar10-train.zip"
        archive = os.environ.get("D2O_CIFAR10") or str(beside)
        if not os.path.exists(archive):
            pytest.skip("$D2O_CIFAR10 names no archive of CIFAR-10")
        return to_float(open_images(archive).images(torch.arange(8)))
    whole = torch.tensor(np.stack(load_sample_images().images)).permute(0, 3, 1, 2)
    return to_float(whole[:, :, 32:64, :128].unfold(3, 32, 32).permute(0, 3, 1, 2, 4).flatten(0, 1))


def test_lite0_on_real_photographs(photographs):
    """The published weights on images of CIFAR-10, as a run would: an iteration moves the heads and nothing else."""
    critic = ProjectedCritic(["lite0"], size=64, width=16, pool=4).train()
    before = {name: value.clone() for name, value in critic.state_dict().items()}
    frozen = {name: value.clone() for name, value in critic.named_buffers() if name.startswith("backbones.")}
    fake = photographs.flip(0).roll(3, 2).requires_grad_(True)
    optimiser = torch.optim.Adam(critic.parameters(), 1e-3, (0.0, 0.99))
    real, made = critic(photographs), critic(fake)
    assert [tuple(part.shape) for part in real] == [(8, 4)]  # one logit of each level
    critic_loss(real, made).mean().backward()
    assert fake.grad.flatten(1).norm(dim=1).min() > 0
    optimiser.step()
    critic.settle()
    after = critic.state_dict()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert {name for name, _ in critic.named_parameters()} < moved
    assert moved < {name for name in after if name.startswith("heads.")}
    assert len(frozen) > 100
    assert all(torch.equal(value, frozen[name]) for name, value in critic.named_buffers() if name in frozen)


# Small sizes ---------------------------------------------------------------------------------------------------------


def test_small_maps_are_halved_less_often():
    """At 64 pixels the maps that heads get are 32, 16, 8 and 4 pixels wide: three, two, one and no halvings."""
    critic = ProjectedCritic(["lite0"], size=64, width=8, device="cpu")
    assert [len(head.blocks) for head in critic.heads[0]] == [3, 2, 1, 0]
    assert [tuple(part.shape) for part in critic(images(2, 64))] == [(2, 4)]
    with pytest.raises(UserError, match="at 32 pixels ends in 2x2, and the heads need 4x4") as error:
        ProjectedCritic(["lite0"], size=32)
    assert "EfficientNets need 64" in error.value.hint


def test_large_images_are_halved_more_often():
    """Sheet D3: a nominal 8 pixels are left of images of 256, 512 and 1024 alike; further halvings keep the channels of
    their map."""
    with torch.device("meta"):
        for size, more in ((224, 0), (256, 0), (448, 0), (512, 1), (1024, 2)):
            critic = ProjectedCritic(["lite0"], size=size, width=16, device="meta")
            widths = [[block[0].weight.shape[0] for block in head.blocks] for head in critic.heads[0]]
            assert [len(head.blocks) for head in critic.heads[0]] == [more + n for n in (4, 3, 2, 1)]
            assert [row[:more] for row in widths] == [[n] * more for n in (16, 16, 32, 64)]
            assert [row[more:] for row in widths] == [[16, 32, 64, 128], [32, 64, 128], [64, 128], [128]]
            assert critic(torch.empty(2, 3, 64, 64))[0].shape[0] == 2


def test_digits_as_a_backbone():
    """Of the classifier that ships, at a size that is not its own: no published weights are needed."""
    for size in (32, 64):
        critic = ProjectedCritic(["digits"], classes=10, embedding="learned", size=size, width=4)
        x = torch.rand(3, 1, 8, 8, requires_grad=True)
        (logits,) = critic(x, torch.tensor([0, 1, 9]))
        logits.square().sum().backward()
        assert logits.ndim == 2 and x.grad.abs().sum() > 0
        (others,) = critic(x, torch.tensor([0, 1, 8]))
        assert not torch.allclose(others[2], logits[2])  # told of another class


# Pools, and what moves once an iteration -----------------------------------------------------------------------------


def settled(critic, passes):
    for x in passes:
        critic(x)
    critic.settle()
    return critic.state_dict()


def test_a_pool_is_as_stated_whatever_the_micro_batches():
    """Logits, R1, gradients and running statistics of a batch of 8 in pools of 4, at once and as two micro-batches."""
    x = images()
    whole, parts = small(pool=4), small(pool=4)
    at_once, halves = whole(x), [parts(half) for half in x.split(4)]
    for i, logits in enumerate(at_once):
        torch.testing.assert_close(logits, torch.cat([half[i] for half in halves]))
    torch.testing.assert_close(r1_penalty(whole, x), torch.cat([r1_penalty(parts, half) for half in x.split(4)]))
    generator_loss(whole(x)).mean().backward()
    for half in x.split(4):
        (generator_loss(parts(half)).mean() / 2).backward()
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)
    fresh = [settled(small(pool=4), passes) for passes in ([x, x.flip(0)], [*x.split(4), *x.flip(0).split(4)])]
    torch.testing.assert_close(fresh[0], fresh[1])
    other = small(pool=None)(x)
    assert not torch.allclose(other[0], at_once[0], rtol=1e-2)  # the pool matters


def test_running_statistics_move_once_an_iteration_by_a_tenth():
    critic = small(pool=4)
    norm = critic.heads[0][0].blocks[0][1]
    before = norm.running_mean.clone(), norm.running_var.clone()
    seen = []
    handle = norm.register_forward_pre_hook(lambda module, given: seen.extend(given[0].detach().split(4)))
    critic(images(seed=1)), critic(images(seed=2))
    handle.remove()
    torch.testing.assert_close((norm.running_mean, norm.running_var), before)
    critic.settle()
    means = torch.stack([y.mean((0, 2, 3)) for y in seen]).mean(0)
    variances = torch.stack([y.var((0, 2, 3)) for y in seen]).mean(0)
    torch.testing.assert_close(norm.running_mean, 0.9 * before[0] + 0.1 * means)
    torch.testing.assert_close(norm.running_var, 0.9 * before[1] + 0.1 * variances)
    now = norm.running_mean.clone()
    critic.settle()  # nothing was seen since
    assert torch.equal(norm.running_mean, now)
    with torch.no_grad():
        critic.eval()(images())
    critic.train().settle()
    assert torch.equal(norm.running_mean, now)  # nor in eval mode


def test_spectral_norms_move_once_an_iteration():
    critic = small()
    layer = critic.heads[0][0].output
    with torch.no_grad():
        layer.weight.copy_(torch.randn_like(layer.weight))
    critic(images())
    u, v = layer.u.clone(), layer.v.clone()
    critic(images(seed=2)), critic(images(seed=3))
    assert torch.equal(layer.u, u) and torch.equal(layer.v, v)
    critic.settle()
    assert torch.equal(layer.v, v)
    with torch.no_grad():
        layer.weight.copy_(torch.randn_like(layer.weight))
    critic(images())
    assert not torch.allclose(layer.v, v)
    layer.iterate(100)
    sigma = torch.linalg.matrix_norm(layer.weight.flatten(1), 2)
    torch.testing.assert_close(layer.u @ layer.weight.flatten(1) @ layer.v, sigma, rtol=1e-3, atol=0)


def test_each_backbone_is_augmented_by_itself():
    class Same:
        def rand(self, *shape):
            return torch.full((8, *shape), 0.5)

        def randint(self, low, high, *shape):
            return torch.zeros(8, *shape, dtype=torch.int64)

    class Counted(Same):
        calls = 0

        def rand(self, *shape):
            self.calls += 1
            return torch.full((8, *shape), 0.5 if self.calls == 1 else 0.9)

    x = images()
    plain, augmenting = small(), small(diffaug=True)
    for a, b in zip(plain(x), augmenting(x), strict=True):  # R1 brings no draws
        torch.testing.assert_close(a, b)
    same, other = augmenting(x, None, Same()), augmenting(x, None, Counted())
    assert not torch.allclose(same[0], augmenting(x)[0])  # cut out
    torch.testing.assert_close(same[0], other[0])
    assert not torch.allclose(same[1], other[1])


@pytest.mark.parametrize("kind", ["nonsaturating", "hinge"])
def test_losses_add_backbones_and_average_logits(kind):
    real, fake = ([torch.randn(5, m) for m in (484, 64)] for _ in range(2))
    each = [(generator_loss(f, kind), critic_loss(r, f, kind)) for r, f in zip(real, fake, strict=True)]
    torch.testing.assert_close(generator_loss(fake, kind), each[0][0] + each[1][0])
    torch.testing.assert_close(critic_loss(real, fake, kind), each[0][1] + each[1][1])
    assert generator_loss(fake, kind).shape == (5,)
    a, b = torch.randn(2, 6, 3)
    x = torch.randn(4, 6)
    found = r1_penalty(lambda x, _: [x @ a, (x @ b).square()], x)
    gradient = a.sum(1) + (2 * (x @ b)) @ b.T
    torch.testing.assert_close(found, gradient.square().sum(1))


def test_unknown_names_and_settings():
    with pytest.raises(UserError, match="unknown backbone 'resnet18'"):
        ProjectedCritic(["resnet18"])
    with pytest.raises(UserError, match="critic.backbones: none given"):
        ProjectedCritic([])
    with pytest.raises(UserError, match="has 1000 classes, and the images 1001"):
        small(classes=1001)
    with pytest.raises(UserError, match="unknown critic.embedding 'imagenet'"):
        small(classes=3, embedding="imagenet")
    critic = small(classes=10)
    table = torch.randn(1000, 320)
    critic.begin_classes(table)
    heads = [head for four in critic.heads for head in four]
    assert len(heads) == 8 and all(torch.equal(head.embed.weight, table) for head in heads)
    assert len({head.embed.weight.data_ptr() for head in heads}) == 8  # each trains its own
    with pytest.raises(UserError, match="1000 x 320, not"):
        critic.begin_classes(table[:10])


@pytest.mark.parametrize("name", ["vit_base_patch16_224", "tf_efficientnet_b0", "deit_small_distilled_patch16_224"])
def test_the_other_backbones_of_the_official_code(name):
    with torch.device("meta"):
        critic = ProjectedCritic([name], device="meta")
        assert [tuple(part.shape) for part in critic(torch.empty(2, 3, 32, 32))] == [(2, 64)]
    with nullcontext() if "efficientnet" in name else pytest.raises(UserError, match="takes 224 pixels, not 64"):
        load_backbone(name, "meta", size=64)
