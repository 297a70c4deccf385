"""The map of a denoiser's encoder, and the recomputation of activations: same numbers as without."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from d2o.errors import UserError
from d2o.networks.build import build_network, set_checkpointing, set_dropout
from d2o.networks.precond import set_disc_map
from d2o.teachers.registry import load_teacher

GOLDEN = Path(__file__).parents[1] / "golden" / "edm"
TINY = {
    "model_channels": 16,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
    "img_resolution": 8,
    "img_channels": 2,
    "label_dim": 3,
}
MORE = {
    "ddpmpp": {},
    "ncsnpp": {},
    "adm": {"model_channels": 64},
    "edm2": {"channels_per_head": 16, "logvar_channels": 8},
}


def tiny(arch: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    network = build_network({"arch": arch, **TINY, **MORE[arch]})
    with torch.no_grad():  # untrained networks have zeros where something is to be said
        for p in network.parameters():
            if p.abs().max() < 1e-3:
                p.normal_(0.0, 0.1)
    return network


def inputs():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 2, 8, 8, generator=generator), torch.tensor([0.1, 1.0, 20.0]), torch.tensor([0, 2, -1])


@pytest.mark.parametrize("kind", ["enc_last_mean", "mid_mean"])
@pytest.mark.parametrize("arch", MORE)
def test_one_pass_gives_the_image_and_the_map_of_separate_passes(arch, kind):
    network = tiny(arch).eval()
    set_disc_map(network, kind)
    seen = {}
    unet = network.unet if arch == "edm2" else network.model
    last, middle = unet.enc["4x4_block0"], unet.dec["4x4_in1"]
    for name, block in (("enc_last_mean", last), ("mid_mean", middle)):
        block.register_forward_hook(lambda module, args, out, name=name: seen.update({name: out}))
    with torch.inference_mode():
        denoised, disc_map = network(*inputs(), part="encoder_decoder")
        assert torch.equal(denoised, network(*inputs())) and torch.equal(denoised, network(*inputs(), part="decoder"))
        seen.clear()
        assert torch.equal(disc_map, network(*inputs(), part="encoder"))
        assert list(seen) == (
            ["enc_last_mean"] if kind == "enc_last_mean" else ["enc_last_mean", "mid_mean"]
        )  # and no block after it
    assert disc_map.shape == (3, 1, 4, 4) and disc_map.dtype == torch.float32
    torch.testing.assert_close(disc_map, seen[kind].mean(1, keepdim=True))


def test_uncertainty_comes_last():
    network = tiny("edm2").eval()
    denoised, disc_map, u = network(*inputs(), part="encoder_decoder", return_logvar=True)
    assert torch.equal(u, network.logvar(inputs()[1])) and torch.equal(
        disc_map, network(*inputs(), part="encoder", return_logvar=True)[0]
    )
    assert torch.equal(denoised, network(*inputs(), return_logvar=True)[0])


def test_other_parts_and_maps_are_refused():
    for arch in ("ddpmpp", "edm2"):
        with pytest.raises(UserError, match="unknown part of a denoiser 'encode': did you mean 'encoder'"):
            tiny(arch)(*inputs(), part="encode")
    with pytest.raises(UserError, match="unknown disc_map 'mid'"):
        set_disc_map(tiny("ddpmpp"), "mid")


def test_half_precision_maps_are_float32():
    with torch.autocast("cpu", torch.bfloat16):
        denoised, disc_map = tiny("ddpmpp").eval()(*inputs(), part="encoder_decoder")
    assert denoised.dtype == disc_map.dtype == torch.float32


def test_augmentation_labels_reach_the_network():
    network = load_teacher(GOLDEN / "edm-ddpmpp.pkl").network
    x, sigma, label = torch.randn(2, 3, 16, 16), torch.ones(2), torch.tensor([0, 1])
    told = torch.zeros(2, 9)
    assert torch.equal(network(x, sigma, label, told), network(x, sigma, label))
    told[0, 0] = 1
    assert not torch.allclose(network(x, sigma, label, told)[0], network(x, sigma, label)[0])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("arch", MORE)
def test_recomputing_activations_changes_no_gradient(arch, dropout):
    plain = tiny(arch).train()
    set_dropout(plain, dropout)
    other = copy.deepcopy(plain)
    assert set_checkpointing(other, True)
    kept, found = [], []
    for network in (plain, other):
        x, sigma, label = inputs()
        x.requires_grad_()
        torch.manual_seed(7)
        stored: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, stored=stored: (stored.append(t.numel()), t)[1], lambda t: t
        ):
            denoised, disc_map = network(x, sigma, label, part="encoder_decoder")
            loss = denoised.square().mean() + disc_map.square().mean()
        loss.backward()
        kept.append(sum(stored))
        found.append([loss.detach(), x.grad, *(p.grad for p in network.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) and all(torch.equal(a, b) for a, b in zip(*found))
    assert kept[1] < 0.5 * kept[0]
    with torch.no_grad():
        assert torch.equal(other.eval()(*inputs()), plain.eval()(*inputs()))
