"""The kinds of critics that a recipe's section can name, behind one interface (Zheng & Yang 2024, table 1a)."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from d2o.critics.build import class_table, make_critic
from d2o.critics.critic_section import CriticSection
from d2o.critics.projected import ProjectedCritic
from d2o.critics.style import StyleCritic
from d2o.critics.style_judge import StyleJudge
from d2o.critics.trunks import LpipsCritic, VGG16Critic
from d2o.errors import UserError
from d2o.features import load_backbone, load_features
from d2o.interop.safetensors_io import load_file, save_file
from d2o.losses.adversarial import critic_loss, generator_loss, r1_penalty
from d2o.methods.base import Draws
from tests.training.processes import main

SHAPE = (1, 8, 8)
DIGITS = {"backbones": ("digits",), "size": 16, "width": 4, "embedding": "learned"}
KINDS = {
    "projected": {**DIGITS, "diffaug": True},
    "style": {"style": {"base": 64, "max_channels": 8, "mbstd_group": 4}, "diffaug": True},
    "vgg16": {"trunk": "digits", "size": 8, "diffaug": True},
    "lpips": {"trunk": "digits", "size": 8, "diffaug": True},
}


def section(kind="projected", **keys):
    return CriticSection.model_validate({"kind": kind, **keys})


def images(n=8):
    return torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [0, 10])
def test_every_kind_is_called_and_trained_alike(kind, classes):
    critic = make_critic(section(kind, **KINDS[kind]), SHAPE, classes).train()
    x, labels = images().requires_grad_(True), torch.arange(8) if classes else None
    logits = critic(x, labels)
    assert isinstance(logits, list) and all(part.ndim == 2 and len(part) == 8 for part in logits)
    draws = Draws(0, 0, 8, 8, torch.device("cpu"))
    assert not torch.allclose(critic(x, labels, draws)[0], logits[0])  # DiffAugment
    generator_loss(logits).mean().backward(retain_graph=True)
    assert x.grad.flatten(1).abs().sum(1).min() > 0
    (critic_loss(logits, critic(-x, labels)).mean() + r1_penalty(critic, x, labels).mean()).backward()
    assert [name for name, p in critic.named_parameters() if p.grad is None] == []
    critic.settle()
    again = make_critic(section(kind, **KINDS[kind]), SHAPE, classes).train()
    again.load_state_dict(critic.state_dict())  # whatever is random or trained is in the state
    with torch.no_grad():
        expected, found = critic(x, labels), again(x, labels)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind, made", [("vgg16", VGG16Critic), ("lpips", LpipsCritic)])
def test_a_trunk_is_trained_from_its_weights_on(kind, made):
    """All of what the logits depend on: four stages of the classifier, and none of its layers behind them."""
    trunk = load_backbone("digits", size=8)
    critic = made(load_backbone("digits", size=8), SHAPE)
    of_trunk = [name for name, _ in critic.named_parameters() if name.startswith("trunk.")]
    assert len(of_trunk) == 4 * 4  # weights and biases of convolutions and normalisations
    torch.testing.assert_close(critic.trunk.maps(images()), trunk.maps(images()))
    frozen = made(load_backbone("digits", size=8), SHAPE, frozen=True)
    assert not any(name.startswith("trunk.") for name, _ in frozen.named_parameters())
    whole = made(load_features("digits"), SHAPE)  # the classifier itself, whose last layers nothing reads
    assert len([name for name, _ in whole.named_parameters() if name.startswith("trunk.")]) == 4 * 4
    torch.cat(critic(images()), 1).sum().backward()
    assert all(p.grad.abs().sum() > 0 for name, p in critic.named_parameters() if "trunk" in name or kind == "vgg16")


def test_what_vgg16_ends_in():
    """Maximum over 2 x 2, mean over places, linear, SiLU, linear without bias: one logit. By hand."""
    critic = VGG16Critic(load_backbone("digits", size=8), SHAPE)
    last = F.max_pool2d(critic.trunk.maps(images())[-1], 2).mean((2, 3))
    by_hand = F.silu(last @ critic.hidden.weight.T + critic.hidden.bias) @ critic.output.weight.T
    torch.testing.assert_close(critic(images()), [by_hand])
    assert critic.output.bias is None and critic.hidden.weight.shape == (64, 64)


def test_lpips_critic_sees_directions_at_each_place():
    critic = LpipsCritic(load_backbone("digits", size=8), SHAPE)
    assert [part.shape for part in critic(images())] == [(8, 64), (8, 64), (8, 16), (8, 16)]
    y = critic.trunk.maps(images())[1]
    unit = y / y.norm(dim=1, keepdim=True)
    by_hand = (unit * critic.heads[1].weight[0][None]).sum(1).flatten(1) + critic.heads[1].bias
    torch.testing.assert_close(critic(images())[1], by_hand, rtol=1e-3, atol=1e-4)


def test_published_trunks_have_vgg16s_size():
    vgg = make_critic(section("vgg16"), (3, 32, 32), device="meta")
    lpips = make_critic(section("lpips"), (3, 32, 32), device="meta")
    convolutions = 14_714_688  # of VGG-16, as torchvision counts them
    assert sum(p.numel() for p in vgg.parameters()) == convolutions + 512 * 512 + 512 + 512
    assert sum(p.numel() for p in lpips.parameters()) == convolutions + sum((64, 128, 256, 512, 512)) + 5
    x = torch.empty(2, 3, 32, 32, device="meta")
    assert [part.shape[1] for part in lpips(x)] == [1024, 256, 64, 16, 4] and vgg(x)[0].shape == (2, 1)


# StyleGAN2's, pretrained ---------------------------------------------------------------------------------------------

SPIGAN = """
name: spi
method: spi-gan
data: {path: real:digits, limit: 8}
network: {arch: style_generator, h_dim: 16, synthesis: {base: 64, max_channels: 8}}
spi_gan: {critic: {base: 64, max_channels: 8, mbstd_group: 4, time_dim: 16}, ada: null}
optim: {lr: 1.0e-3, betas: [0.0, 0.99]}
ema: {half_life: 30}
batch: 4
images: 4
threads: 1
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    (folder / "spi.yaml").write_text(SPIGAN)
    main(folder, [{"recipe": str(folder / "spi.yaml"), "changes": [], "run": "spi", "stop": 0}])
    return folder / "spi"


def test_a_critic_begins_with_that_of_a_run(run):
    """That of SPI-GAN knows times: clean images are at 1."""
    critic = make_critic(section("style", pretrained=str(run)), SHAPE)
    assert isinstance(critic, StyleJudge)
    held, _ = load_file(run / "checkpoints" / "state.safetensors")
    theirs = StyleCritic(8, 1, base=64, max_channels=8, mbstd_group=4, time_dim=16)
    theirs.load_state_dict({k.removeprefix("network/critic/"): v for k, v in held.items() if "/critic/" in k[:16]})
    with torch.no_grad():
        torch.testing.assert_close(critic(images())[0][:, 0], theirs(images(), 1.0))
    assert make_critic(section("style", pretrained=str(run)), SHAPE, device="meta")(images().to("meta"))[0].is_meta


def test_runs_that_have_no_such_critic_are_refused(run, tmp_path):
    for path, shape, words in (
        (tmp_path, SHAPE, "has no checkpoints/state.safetensors"),
        (run, (3, 8, 8), "is not one of 3 x 8 x 8 images"),
        (run, (1, 16, 16), "is not one of 1 x 16 x 16 images"),
    ):
        with pytest.raises(UserError, match=words):
            make_critic(section("style", pretrained=str(path)), shape)
    (tmp_path / "checkpoints").mkdir()
    tensors, record = load_file(run / "checkpoints" / "state.safetensors")
    for changed, words in (
        ({"recipe": {"method": "sid"}}, "is a run of sid, not spi-gan"),
        ({"parts": {"folder": "state-a", "files": {}}}, "divided among the files of its processes"),
    ):
        save_file(tmp_path / "checkpoints" / "state.safetensors", tensors, {**record, **changed})
        with pytest.raises(UserError, match=words):
            make_critic(section("style", pretrained=str(tmp_path)), SHAPE)


# The section ---------------------------------------------------------------------------------------------------------


def test_pools_are_those_of_the_section():
    assert [section(pool=pool).together(48) for pool in (32, 16, "batch", 5)] == [24, 16, 48, 4]
    assert section("style").together(64) == 32 and section("style", style={"mbstd_group": 4}).together(64) == 4
    assert section("vgg16").together(64) == 1
    critic = make_critic(section(**DIGITS, pool="batch"), SHAPE)
    assert critic.heads[0][0].blocks[0][1].pool is None


def test_settings_reach_the_critic():
    one = make_critic(section(**DIGITS), SHAPE)
    assert isinstance(one, ProjectedCritic) and one.backbones[0].size == 16
    other = make_critic(section(**DIGITS, seed=1), SHAPE)
    weights = [c.mixing[0].across_scales[0].weight for c in (one, other)]
    assert weights[0].shape == (4, 4, 1, 1) and not torch.equal(*weights)
    probed = make_critic(section(backbones=("lite0",), size=64, width=4, bn_probe=True), (3, 16, 16))
    plain = make_critic(section(backbones=("lite0",), size=64, width=4), (3, 16, 16))
    x = torch.rand(2, 3, 16, 16)
    assert not torch.allclose(probed.backbones[0].maps(x)[3], plain.backbones[0].maps(x)[3], rtol=0.1)
    frozen = make_critic(section("vgg16", trunk="digits", size=8, freeze_trunk=True), SHAPE)
    assert len(list(frozen.parameters())) == 3


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"kind": "style", "size": 64}, "critic.size: kind style does not read it"),
        ({"kind": "vgg16", "backbones": ("digits",)}, "critic.backbones: kind vgg16 does not read it"),
        ({"kind": "style", "pretrained": "x", "style": {"base": 64}}, "options of a pretrained critic are those of"),
        ({"kind": "vgg16", "size": 64}, "critic.size: lpips-vgg looks at images as they are, at no size of its own"),
        ({"weights": {"lite0": "x"}}, "critic.weights: 'lite0' is nothing that this critic looks through"),
        ({"kind": "vgg16", "weights": {"vgg16_bn": "x"}}, "'vgg16_bn' is nothing that this critic looks through"),
        ({"backbones": ("vgg19",)}, "unknown backbone 'vgg19'"),
        ({"kind": "vgg16", "trunk": "vgg19"}, "unknown extractor 'vgg19'"),
        ({"kind": "style", "style": {"bass": 64}}, "network.bass: unknown key for style_critic"),
    ],
)
def test_bad_sections(keys, words):
    with pytest.raises(UserError, match=words):
        make_critic(CriticSection.model_validate(keys), SHAPE)
    with pytest.raises(ValidationError):
        section(pool=0)


def test_a_resolved_section_is_one_again():
    """A run's recipe lists every key, also those of other kinds."""
    for kind, keys in KINDS.items():
        again = CriticSection.model_validate(section(kind, **keys).model_dump())
        assert again == section(kind, **keys)
        again.check()


def test_the_table_of_classes(tmp_path, monkeypatch):
    """By name, from whatever file holds it; that it is missing is said before anything costs time."""
    table = torch.randn(1000, 320)
    torch.save({"embed": table}, tmp_path / "table.pt")
    keys = {**DIGITS, "embedding": "imagenet_lite0"}
    critic = make_critic(section(**keys, weights={"imagenet-lite0-classes": str(tmp_path / "table.pt")}), SHAPE, 10)
    assert all(torch.equal(head.embed.weight, table) for head in critic.heads[0])
    torch.save({"embed": table[:10]}, tmp_path / "short.pt")
    with pytest.raises(UserError, match=r"short.pt holds no table of ImageNet's classes, 1000 x 320"):
        class_table(tmp_path / "short.pt", "cpu")
    monkeypatch.setenv("D2O_HOME", str(tmp_path))
    monkeypatch.setenv("D2O_OFFLINE", "1")
    with pytest.raises(UserError, match="'imagenet-lite0-classes' are not on this machine"):
        make_critic(section(**keys), SHAPE, 10)
    make_critic(section(**keys), SHAPE)  # without classes nobody asks for it
    assert make_critic(section(**keys), SHAPE, 10, "meta").heads[0][0].embed.weight.is_meta  # nor does a plan
