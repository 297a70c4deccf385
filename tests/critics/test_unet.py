"""Diffusion2GAN's critic: it begins as the teacher, its options, published sizes, and derivatives of derivatives."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from d2o.condition import Condition, Text
from d2o.critics.build import build_critic
from d2o.critics.unet import PER_RESNET_3X3, UNetCritic
from d2o.errors import UserError
from d2o.losses.logit_maps import over_maps
from d2o.networks.build import build_network, count_parameters, network_config, set_dropout
from d2o.networks.edm_view import EDMView
from d2o.networks.latent import build_diffusers
from d2o.teachers.published_configs import SD15_UNET, SDXL_UNET
from d2o.teachers.registry import load_teacher
from d2o.training.strategy import blocks
from tests.critics.unets import BETAS, KINDS, SIZES, asked, moved, teacher


def decoder(kind: str, x, condition, t) -> list:
    """What the decoder's residual blocks of the teacher give, and what its output convolution takes, by other means."""
    network, seen, handles = teacher(kind), [], []
    if kind in ("sd", "sdxl"):
        wanted = [(b.attentions if hasattr(b, "attentions") else b.resnets) for b in network.net.up_blocks]
        parts = [part for scale in wanted for part in scale] + [network.net.conv_out]
    else:
        parts = [part for name, part in network.model.dec.items() if "_block" in name]
        parts.append(network.model.out_conv if kind == "adm" else network.model.dec["8x8_aux_conv"])
    for part in parts:
        hook = lambda module, args, out: seen.append(  # noqa: E731
            args[0] if isinstance(module, nn.Conv2d) or module is parts[-1] else out[0] if type(out) is tuple else out
        )
        handles.append(part.register_forward_hook(hook))
    if kind in ("sd", "sdxl"):
        network.call(x, torch.full((len(x),), float(t)), condition)
    else:
        network(x, torch.full((len(x),), float(t)), condition)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("z", ["after_conv_in", "before_conv_in", "none"])
def test_it_begins_with_the_teachers_features_exactly(kind, z):
    x, noise, condition = asked(kind)
    critic = UNetCritic.of(teacher(kind), z=z, inputs_with_z=z != "none")
    found = critic.features(x, noise, condition)
    t = 0 if kind in ("sd", "sdxl") else 0.002
    expected = decoder(kind, x, condition, t)
    rows = [row for scale in found.scales for row in scale]
    assert len(rows) == len(expected) - 1 == 4
    assert all(torch.equal(row.out, value) for row, value in zip(rows, expected))
    assert torch.equal(found.last, expected[-1])
    assert [row.up.shape[2] for row in rows] == [row.skip.shape[2] for row in rows] == [4, 4, 8, 8]
    assert torch.equal(rows[1].up, rows[0].out) and torch.equal(rows[3].up, rows[2].out)
    elsewhere = critic.features(x, noise, condition, 981 if kind in ("sd", "sdxl") else 3.0)
    assert not torch.allclose(elsewhere.last, found.last, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_of_every_place_of_three_tensors_of_each_scale(kind):
    x, z, condition = asked(kind)
    critic = moved(UNetCritic.of(teacher(kind)))
    maps = critic(x, z, condition)
    assert [tuple(m.shape) for m in maps] == [(3, 4, 4)] * 3 + [(3, 8, 8)] * 3
    assert all(m.dtype == torch.float32 for m in maps)
    # By hand: the heads are 1x1 convolutions of the readings, first skip, from below, last output.
    scale = critic.features(x, z, condition).scales[1]
    for head, value, found in zip(critic.heads[1], (scale[0].skip, scale[0].up, scale[1].out), maps[3:]):
        by_hand = torch.einsum("c,nchw->nhw", head.weight[0, :, 0, 0], value) + head.bias
        torch.testing.assert_close(found, by_hand, rtol=1e-4, atol=1e-5)
    # What it is told reaches it, and samples do not look at each other.
    other = condition[torch.tensor([1, 2, 0])]
    for changed in (critic(x + 0.1, z, condition), critic(x, z + 0.1, condition), critic(x, z, other)):
        assert all(not torch.allclose(a, b, atol=1e-6) for a, b in zip(changed[3:], maps[3:]))
    alone = critic(x[1:2], z[1:2], condition[1:2])
    for one, all_of_them in zip(alone, maps):
        torch.testing.assert_close(one[0], all_of_them[1], rtol=1e-4, atol=1e-5)


OPTIONS = [
    ({"z": "none"}, 6),
    ({"z": "before_conv_in"}, 6),
    ({"inputs": "none"}, 6),
    ({"inputs": "1x1", "resize": "bicubic", "inputs_zero": False}, 6),
    ({"inputs_with_z": True}, 6),
    ({"heads": "final"}, 1),
    ({"heads": "final_mean"}, 1),
    ({"per": "resnet"}, 12),
    ({"combined": "concat"}, 6),
    ({"head": "3x3", "head_norm": True, "keep_output": False}, 6),
    ({"t": 999.0}, 6),
    (PER_RESNET_3X3, 12),
]


@pytest.mark.parametrize(("options", "maps"), OPTIONS, ids=[str(o) for o, _ in OPTIONS])
@pytest.mark.parametrize("kind", ["sd", "adm"])
def test_every_option_is_rebuilt_learns_and_differs(kind, options, maps):
    x, z, condition = asked(kind)
    torch.manual_seed(3)
    critic = moved(UNetCritic.of(teacher(kind), **options))
    logits = critic(x, z, condition)
    assert len(logits) == maps and all(m.shape[0] == 3 and m.ndim == 3 for m in logits)
    torch.manual_seed(3)
    usual = moved(UNetCritic.of(teacher(kind)))(x, z, condition)
    assert len(usual) != maps or not all(torch.allclose(a, b, atol=1e-7) for a, b in zip(logits, usual))

    again = build_critic(critic.config)
    assert not all(torch.equal(a, b) for a, b in zip(again(x, z, condition), logits))
    again.load_state_dict(critic.state_dict())
    copied = copy.deepcopy(critic)
    for other in (again, copied):
        assert all(torch.equal(a, b) for a, b in zip(other(x, z, condition), logits))
    with torch.no_grad():  # a copy has its own weights, through and through
        for p in copied.parameters():
            p.zero_()
    assert all(torch.equal(a, b) for a, b in zip(critic(x, z, condition), logits))

    over_maps(logits).sum().backward()
    unused = {name for name, p in critic.named_parameters() if p.grad is None}
    if options.get("combined") != "concat":  # which looks at nothing that the finest scale gives
        assert all(name.split(".")[-2] in ("conv_out", "conv_norm_out", "out_conv", "out_norm") for name in unused)
    assert (critic.conv_z is None) == (options.get("z") == "none")
    assert len(critic.inputs) == (0 if options.get("inputs") == "none" else 1)


def test_the_sample_itself_is_resized_for_each_level():
    x, z, condition = asked("sd")
    critic = moved(UNetCritic.of(teacher("sd"), z="none"))
    found = []
    handle = critic.inputs[0].register_forward_hook(lambda module, args, out: found.append(args[0]))
    critic(x, z, condition)
    handle.remove()
    assert torch.allclose(found[0], x.unflatten(3, (4, 2)).unflatten(2, (4, 2)).mean((3, 5)), atol=1e-6)
    # What enters the level changes, the skip that left for the decoder before does not.
    before, after = UNetCritic.of(teacher("sd"), z="none").features(x, z, condition), critic.features(x, z, condition)
    assert torch.equal(after.scales[1][0].skip, before.scales[1][0].skip)
    assert not torch.allclose(after.scales[0][0].skip, before.scales[0][0].skip, atol=1e-4)


def test_the_z_path_after_the_input_convolution_is_that_of_a_widened_one():
    x, z, condition = asked("sd")
    critic = moved(UNetCritic.of(teacher("sd"), inputs="none"))
    expected = critic(x, z, condition)
    first = critic.network.net.conv_in
    wide = nn.Conv2d(8, first.out_channels, 3, padding=1)
    with torch.no_grad():
        wide.weight.copy_(torch.cat([first.weight, critic.conv_z.weight], 1))
        wide.bias.copy_(first.bias + critic.conv_z.bias)
    critic.conv_z = None
    first.forward = lambda seen: wide(torch.cat([seen, z], 1))
    for found, value in zip(critic(x, z, condition), expected):
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def published():
    """Stable Diffusion's U-Nets on the meta device."""
    with torch.device("meta"):
        nets = [build_diffusers("UNet2DConditionModel", config, "network") for config in (SD15_UNET, SDXL_UNET)]
    return [EDMView.of(net, BETAS, "epsilon", time_ids=ids) for net, ids in zip(nets, (None, SIZES))]


def added(view: EDMView, **options) -> int:
    with torch.device("meta"):
        critic = UNetCritic(view.config, module=view, **options)
    return count_parameters(critic) - count_parameters(view)


def test_published_sizes(published):
    """Table A1: 859.6M and 2567.7M; the designs that give them."""
    sd15, sdxl = published
    assert (count_parameters(sd15), count_parameters(sdxl)) == (859_520_964, 2_567_463_684)
    assert added(sd15) == 11_840 + 82_880 + 11_532 == 106_252
    assert f"{(count_parameters(sd15) + added(sd15)) / 1e6:.1f}" == "859.6"
    assert added(sdxl) == 11_840 + 35_520 + 7_689 == 55_049  # 2567.5M: not what is printed
    assert 186_316 <= added(sdxl, **PER_RESNET_3X3) < 286_316
    assert f"{(count_parameters(sdxl) + added(sdxl, **PER_RESNET_3X3)) / 1e6:.1f}" == "2567.7"
    assert added(sd15, z="before_conv_in") == 106_252 - 11_840 + 148
    assert added(sd15, z="none", inputs="none", heads="final") == 9 * 320 + 1
    assert added(sd15, head_norm=True) == 106_252 + 23_040
    kept = count_parameters(sd15)
    with torch.device("meta"):
        slim = UNetCritic(sd15.config, module=sd15, keep_output=False)  # the last: it takes the network's away
    assert count_parameters(slim) == kept + 106_252 - 11_524


def test_channels_of_stable_diffusions_decoder(published):
    with torch.device("meta"):
        sd15, sdxl = (UNetCritic(view.config, module=view, combined="concat") for view in published)
    assert [[head.in_channels for head in scale] for scale in sd15.heads] == [
        [1280, 1280, 2560],
        [1280, 1280, 2560],
        [640, 1280, 1920],
        [320, 640, 960],
    ]
    assert [layer.out_channels for layer in sd15.inputs] == [320, 640, 1280]
    assert [layer.out_channels for layer in sdxl.inputs] == [320, 640]
    assert len(sdxl.heads) == 3


def test_tiny_sd_becomes_a_critic():
    toy = load_teacher("tiny-sd")
    critic = UNetCritic.of(toy.edm_view())
    text = toy.embed(Condition.of_prompts(["a seven", "a two"]))
    x, z = torch.randn(2, 2, *toy.spec.shape, generator=torch.Generator().manual_seed(0))
    found = critic.features(x, z, text, 500).output
    expected = toy.network(x, torch.tensor([500, 500]), text.states).sample
    assert torch.equal(found, expected)
    assert [m.shape[1] for m in critic(x, z, text)] == [4, 4, 4, 8, 8, 8]
    assert all(not p.requires_grad for p in toy.network.parameters())


def test_it_is_told_a_time_for_each_sample():
    x, z, condition = asked("sd")
    critic = moved(UNetCritic.of(teacher("sd")))
    each = critic(x, z, condition, torch.tensor([0, 500, 999]))
    for i, t in enumerate((0, 500, 999)):
        for m, one in zip(each, critic(x, z, condition, float(t))):
            torch.testing.assert_close(m[i], one[i], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(each[0][0], critic(x, z, condition)[0][0], rtol=1e-4, atol=1e-5)  # clean: step 0


def test_what_is_left_in_a_network_after_a_pass():
    """Hooks are gone, whatever happens within."""
    x, z, condition = asked("sd")
    critic = UNetCritic.of(teacher("sd"))
    critic(x, z, condition)
    with pytest.raises(RuntimeError):  # in the first attention to text
        critic(x, z, Text(condition.states[:, :, 1:]))
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in critic.modules())


def test_its_blocks_can_be_shared_among_processes():
    critic = UNetCritic.of(teacher("sd"))
    units = list(blocks(critic))
    assert critic.network.net.up_blocks[0] in units and critic.inputs[0] in units and critic.heads[0][0] in units
    inside = {p for unit in units for p in unit.parameters()}
    outside = {name.split(".")[0] for name, p in critic.named_parameters() if p not in inside}
    assert outside == {"network", "conv_z"}  # of the network: its input, output and time embedding


def test_dropout_is_left_behind():
    with_dropout = copy.deepcopy(teacher("ddpmpp"))
    set_dropout(with_dropout, 0.3)
    critic = UNetCritic.of(with_dropout)
    assert network_config(critic.network)["dropout"] == 0 and network_config(with_dropout)["dropout"] == 0.3
    x, z, condition = asked("ddpmpp")
    assert critic.training and torch.equal(critic(x, z, condition)[0], critic(x, z, condition)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"z": "later"}, "critic.z"),
        ({"inputs": "5x5"}, "critic.inputs"),
        ({"resize": "nearest"}, "critic.resize"),
        ({"heads": "mulit"}, "did you mean 'multi'"),
        ({"per": "block"}, "critic.per"),
        ({"combined": "sum"}, "critic.combined"),
        ({"head": "2x2"}, "critic.head"),
        ({"heads": "final_mean", "keep_output": False}, "final_mean reads the output convolution"),
        ({"z": "none", "inputs_with_z": True}, "does not look at z"),
    ],
)
def test_options_that_it_does_not_have(options, message):
    with pytest.raises(UserError, match=message):
        UNetCritic.of(teacher("sd"), **options)


def test_networks_that_it_does_not_take():
    small = {"arch": "edm2", "img_resolution": 8, "img_channels": 3, "model_channels": 16, "channel_mult": [1, 2]}
    with pytest.raises(UserError, match="UNet2DConditionModel or one of EDM's U-Nets, not a EDM2Precond"):
        UNetCritic.of(build_network(small))
