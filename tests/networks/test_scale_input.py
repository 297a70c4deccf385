"""Networks that are told the guidance scale: nothing changes at first, and their configuration says it."""

import pytest
import torch

from d2o.condition import Condition
from d2o.errors import UserError
from d2o.interop import torchvision_compat
from d2o.networks.build import build_network
from d2o.networks.scale_input import add_scale_input, scale_embedding
from d2o.teachers.in_edm import in_edm
from tests.helpers import tiny_network
from tests.teachers.families import tiny


def test_the_embedding_is_that_of_diffusers_pipelines():
    torchvision_compat.ensure()
    from diffusers import StableDiffusionPipeline

    embed = StableDiffusionPipeline.get_guidance_scale_embedding
    w = torch.tensor([1.0, 1.3, 7.5])
    assert torch.allclose(scale_embedding(w), embed(None, w - 1, embedding_dim=256), atol=2e-3)
    assert torch.equal(scale_embedding(w)[0], torch.cat([torch.zeros(128), torch.ones(128)]))


def networks(tmp_path):
    yield tiny_network(augment_dim=9), torch.tensor([1, 2]), 1, 80.0
    adm = {"arch": "adm", "img_resolution": 8, "img_channels": 1, "label_dim": 10, "model_channels": 16}
    yield (
        build_network({**adm, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}),
        torch.tensor([1, 2]),
        1,
        80.0,
    )
    for family in ("sd", "sdxl"):
        teacher = in_edm(tiny(family, tmp_path / family))
        yield teacher.network, teacher.embed(Condition.of_prompts(["a", "b"])), 4, 14.0


@torch.no_grad()
def test_nothing_changes_at_first_and_the_file_says_it(tmp_path):
    for network, asked, channels, sigma in networks(tmp_path):
        network.eval()
        for p in network.parameters():  # some begin at 0
            p += 0.05 * torch.randn(p.shape)
        x, at, w = torch.randn(2, channels, 8, 8), torch.tensor([sigma]), torch.tensor([2.0, 7.0])
        before = network(sigma * x, at, asked)
        add_scale_input(network)
        assert torch.equal(network(sigma * x, at, asked, scale_embedding(w)), before)
        again = build_network(network.config)
        again.load_state_dict(network.state_dict())
        name = next(n for n, _ in again.named_parameters() if "cond_proj" in n or "map_augment" in n)
        again.get_parameter(name).normal_(0, 0.3)
        again.eval()
        one, other = (again(sigma * x, at, asked, scale_embedding(torch.full((2,), v))) for v in (2.0, 7.0))
        both = again(sigma * x, at, asked, scale_embedding(w))
        assert not torch.allclose(one, other, atol=1e-4)
        assert torch.allclose(both[0], one[0], atol=1e-4) and torch.allclose(both[1], other[1], atol=1e-4)


@pytest.mark.parametrize("name", ["edm2", "sd3", "ddpm-labels"])
def test_networks_without_a_place_for_it_are_refused(name, tmp_path):
    with pytest.raises(UserError, match="has no place for a guidance scale"):
        add_scale_input(in_edm(tiny(name, tmp_path)).network)
