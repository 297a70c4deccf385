"""SPI-GAN's recipes are its Table 8 and Table 4, at the published sizes."""

from __future__ import annotations

import pytest

from d2o.recipes.load import load_recipe
from d2o.recipes.plan import make_plan

FIRST = {32: 3 * 32 * 32 * 512 + 512, 256: 3 * 256 * 256 * 512 + 512}  # Table 6
R = 512 * 512 + 512  # Table 7, one layer


# What the synthesis network and the critic without time have is counted by hand in tests/networks/test_style.py; the critic's time is two layers
# and one for each of its blocks, at 256 px of 64, 128, 256 and three times 512 channels.
TIMED = 2 * R + 513 * (64 + 128 + 256 + 3 * 512)


@pytest.mark.parametrize(
    ("name", "generator", "critic"),
    [("spi_gan_cifar10", FIRST[32] + R + 19_422_227, 20_720_641 + 5 * R), ("spi_gan_celeba", FIRST[256] + 7 * R + 22_666_210, 24_001_089 + TIMED)],
)
def test_published_sizes(name, generator, critic):
    plan = make_plan(load_recipe(name))
    assert plan.networks == {"generator": generator, "critic": critic}
    assert len(plan.missing) == 1 and "training says how to get them" in plan.missing[0]  # planned without its images


def test_table_8():
    cifar, celeba, church = (load_recipe(f"spi_gan_{name}") for name in ("cifar10", "celeba", "church"))
    keys = ("K", "ada_target", "ada_interval", "mixing_prob", "r1_gamma", "pl_weight", "r1_every", "pl_every")
    assert [getattr(cifar.options, key) for key in keys] == [2, 0.6, 4, 0.0, 0.01, 0.0, 16, 4]
    assert [getattr(celeba.options, key) for key in keys] == [getattr(church.options, key) for key in keys] == [2, 0.6, 4, 0.9, 10.0, 2.0, 16, 4]
    assert (cifar.network["mapping"], celeba.network["mapping"]) == ({"r_layers": 1}, {"r_layers": 7})
    assert (cifar.options.critic["blocks"], celeba.options.critic["blocks"]) == ("orig", "resnet")
    assert (cifar.ema.decay, celeba.ema.decay, church.ema.decay) == (0.9999, 0.999, 0.999)
    for recipe in (cifar, celeba):
        for optim, every in ((recipe.optim, 4), (recipe.optim_critic, 16)):
            share = every / (every + 1)
            assert optim.lr == pytest.approx(0.0025 * share, abs=1e-6) and optim.betas == (0, pytest.approx(0.99**share, abs=1e-5))
    assert (cifar.images // cifar.batch, celeba.images // celeba.batch) == (1_000_000, 390_625)
    assert not cifar.data.xflip and celeba.data.xflip and church.data.xflip


def test_table_4():
    rows = {"cifar10_k1": 1, "cifar10": 2, "cifar10_k3": 3, "cifar10_k4": 4, "cifar10_k5": 5, "cifar10_fixed_j": 2}
    rows |= {"digits_k1": 1, "digits_fixed_j": 2}
    same = {name: load_recipe(f"spi_gan_{name.split('_')[0]}").resolved() for name in rows}
    for name, k in rows.items():
        recipe = load_recipe(f"spi_gan_{name}")
        assert k == recipe.options.K and (recipe.options.j_sampling == "fixed") == name.endswith("fixed_j")
        different = {key for key, value in recipe.resolved().items() if value != same[name][key]}
        assert different <= {"name", "title", "spi_gan", "reproduces"}
