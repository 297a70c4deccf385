"""Freezing by kind of layer: the shares of the published networks, and nothing by accident of a name."""

from __future__ import annotations

import pytest
import torch

from d2o.errors import UserError
from d2o.networks.build import build_network, count_parameters
from d2o.networks.freeze import FREEZE, freeze
from d2o.students.student_section import StudentSection
from tests.helpers import tiny_network

CIFAR10 = {"img_resolution": 32, "img_channels": 3, "channel_mult": [2, 2, 2]}
NETWORKS = {
    "ncsnpp-cifar10": {"arch": "ncsnpp", **CIFAR10},
    "ddpmpp-cifar10": {"arch": "ddpmpp", **CIFAR10},
    "ncsnpp-ffhq": {"arch": "ncsnpp", "img_resolution": 64, "img_channels": 3},
    "adm-imagenet": {"arch": "adm", "img_resolution": 64, "img_channels": 3, "label_dim": 1000},
}


def on_meta(name):
    with torch.device("meta"):
        return build_network(NETWORKS[name])


@pytest.mark.parametrize(
    ("name", "total", "shares"),
    [
        ("ncsnpp-cifar10", 56_395_523, (84.40, 86.50, 90.46)),
        ("ncsnpp-ffhq", 62_758_787, (83.84, 85.72, 89.70)),
        ("adm-imagenet", 295_899_267, (78.77, 86.96, 90.17)),
    ],
)
def test_the_frozen_shares_of_gdd(name, total, shares):
    network = on_meta(name)
    for level, share in zip(FREEZE[1:], shares, strict=True):  # each freezes what the one before it does, and more
        frozen = freeze(network, level)
        assert count_parameters(network) == total and 100 * frozen / total == pytest.approx(share, abs=0.006)
        assert sum(p.numel() for p in network.parameters() if not p.requires_grad) == frozen


@pytest.mark.parametrize(
    ("name", "share"), [("ncsnpp-cifar10", 83.7), ("ddpmpp-cifar10", 84.7), ("adm-imagenet", 76.0)]
)
def test_the_two_convolutions_of_the_blocks(name, share):
    network = on_meta(name)
    freeze(network, "conv")
    both = sum(p.numel() for key, p in network.named_parameters() if not p.requires_grad and ".conv" in key)
    assert 100 * both / count_parameters(network) == pytest.approx(share, abs=0.06)


def test_what_stays_trainable():
    network = on_meta("ncsnpp-cifar10")
    freeze(network, "conv")
    trained = {name.split(".")[-2] for name, p in network.named_parameters() if p.requires_grad}
    assert trained == {
        "map_layer0",
        "map_layer1",
        "32x32_conv",
        "16x16_aux_residual",
        "8x8_aux_residual",
        "32x32_aux_norm",
        "32x32_aux_conv",
        "norm0",
        "norm1",
        "norm2",
        "affine",
        "qkv",
        "skip",
    }
    frozen = [name.split(".")[-2] for name, p in network.named_parameters() if not p.requires_grad]
    assert (
        set(frozen) == {"conv0", "conv1", "proj"} and frozen.count("conv0") == 2 * frozen.count("conv1") / 2
    )  # biases with their weights


def test_edm2_and_networks_without_blocks():
    edm2 = build_network(
        {
            "arch": "edm2",
            "img_resolution": 8,
            "img_channels": 1,
            "model_channels": 8,
            "channel_mult": [1, 2],
            "num_blocks": 1,
            "attn_resolutions": [4],
            "channels_per_head": 8,
        }
    )
    for level, layers in (
        ("conv", {"conv_res0", "conv_res1", "attn_proj"}),
        ("conv_qkv_skip", {"conv_res0", "conv_res1", "attn_proj", "attn_qkv", "conv_skip"}),
    ):
        freeze(edm2, level)
        assert {name.split(".")[-2] for name, p in edm2.named_parameters() if not p.requires_grad} == layers
    assert freeze(torch.nn.Linear(2, 2), "none") == 0
    with pytest.raises(UserError, match="has none"):
        freeze(torch.nn.Linear(2, 2), "conv")
    with pytest.raises(UserError, match="did you mean 'conv'"):
        freeze(tiny_network(), "convs")


def test_a_recipe_knows_the_same_levels():
    assert StudentSection.model_json_schema()["properties"]["freeze"]["enum"] == list(FREEZE)
