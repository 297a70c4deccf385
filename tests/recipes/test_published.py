"""Recipes of papers have the papers' settings, sizes and numbers: SPI-GAN's Tables 4 and 8, SiDA's Tables 1 to 8."""

from __future__ import annotations

import re

import pytest

from d2o.methods.sid import SiD
from d2o.methods.spi_gan import SPIGAN
from d2o.recipes.find import find_recipe, recipe_names
from d2o.recipes.load import load_recipe
from d2o.recipes.plan import make_plan
from d2o.reports.paper_tables import load_table, table_names

FIRST = {32: 3 * 32 * 32 * 512 + 512, 256: 3 * 256 * 256 * 512 + 512}  # Table 6
R = 512 * 512 + 512  # Table 7, one layer


# What the synthesis network and the critic without time have is counted by hand in tests/networks/test_style.py; the
# critic's time is two layers and one for each of its blocks, at 256 px of 64, 128, 256 and three times 512 channels.
TIMED = 2 * R + 513 * (64 + 128 + 256 + 3 * 512)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "generator", "critic"),
    [
        ("spi_gan_cifar10", FIRST[32] + R + 19_422_227, 20_720_641 + 5 * R),
        ("spi_gan_256:celeba", FIRST[256] + 7 * R + 22_666_210, 24_001_089 + TIMED),
    ],
)
def test_published_sizes(name, generator, critic):
    plan = make_plan(load_recipe(name))
    assert plan.networks == {"generator": generator, "critic": critic}
    images, weights = plan.missing  # planned without its images, and without what scores them
    assert "training says how to get them" in images and "'inception' are not on this machine" in weights


def test_table_8():
    cifar, celeba, church = (load_recipe(f"spi_gan_{name}") for name in ("cifar10", "256:celeba", "256:church"))
    keys = ("K", "ada_target", "ada_interval", "mixing_prob", "r1_gamma", "pl_weight", "r1_every", "pl_every")
    assert [getattr(cifar.options, key) for key in keys] == [2, 0.6, 4, 0.0, 0.01, 0.0, 16, 4]
    assert (
        [getattr(celeba.options, key) for key in keys]
        == [getattr(church.options, key) for key in keys]
        == [2, 0.6, 4, 0.9, 10.0, 2.0, 16, 4]
    )
    assert (cifar.network["mapping"], celeba.network["mapping"]) == ({"r_layers": 1}, {"r_layers": 7})
    assert (cifar.options.critic["blocks"], celeba.options.critic["blocks"]) == ("orig", "resnet")
    assert (cifar.ema.decay, celeba.ema.decay, church.ema.decay) == (0.9999, 0.999, 0.999)
    for recipe in (cifar, celeba):
        for optim, every in ((recipe.optim, 4), (recipe.optim_critic, 16)):
            assert (optim.lr, optim.betas) == (0.0025, (0, 0.99)) and not recipe.options.lazy_correction  # as printed
            c = every / (every + 1)  # StyleGAN2's reading of them
            method = SPIGAN.__new__(SPIGAN)
            method.options = recipe.options.model_copy(update={"lazy_correction": True})
            corrected = method.optim("generator" if every == 4 else "critic", optim)
            assert (corrected.lr, corrected.betas) == (pytest.approx(0.0025 * c), (0, pytest.approx(0.99**c)))
            assert corrected.eps == optim.eps
    assert (cifar.images // cifar.batch, celeba.images // celeba.batch) == (1_000_000, 390_625)
    assert not cifar.data.xflip and celeba.data.xflip and church.data.xflip


def test_table_4():
    rows = {"cifar10:k1": 1, "cifar10": 2, "cifar10:k3": 3, "cifar10:k4": 4, "cifar10:k5": 5, "cifar10:fixed_j": 2}
    rows |= {"digits:k1": 1, "digits:fixed_j": 2}
    same = {name: load_recipe(f"spi_gan_{name.split(':')[0]}").resolved() for name in rows}
    for name, k in rows.items():
        recipe = load_recipe(f"spi_gan_{name}")
        assert k == recipe.options.K and recipe.options.j_sampling.startswith("fixed") == name.endswith("fixed_j")
        different = {key for key, value in recipe.resolved().items() if value != same[name][key]}
        assert different <= {"name", "title", "spi_gan", "reproduces"}


@pytest.mark.parametrize("name", [name for name in recipe_names() if name.startswith(("spi_gan_", "dd_gan_"))])
def test_gans_are_scored_on_the_way_so_that_best_and_figure_8_exist(name):
    recipe = load_recipe(name)
    assert recipe.eval is not None and recipe.images >= 5 * recipe.eval.every  # a curve, and a best of several
    if "digits" in name:
        assert (recipe.eval.extractor, recipe.eval.reference, recipe.eval.protocol) == ("digits", "real:digits", None)
        return
    own = name.replace("256:", "") if "256" in name else "spi_gan_cifar10"
    assert recipe.eval.protocol == (own if name.startswith("spi") else "ddgan")
    assert (recipe.eval.metric, recipe.eval.n, recipe.eval.reference) == ("fd", 50_000, "data")
    assert recipe.eval.extractor == (
        "inception" if own == "spi_gan_cifar10" and name.startswith("spi") else "inception-legacy_pytorch"
    )
    mini = load_recipe(name, mini=True).eval
    assert (mini.protocol, mini.extractor, mini.reference) == (None, "digits", "real:digits")


@pytest.mark.parametrize(
    "name",
    [
        "cd_cifar10",
        "cd_cifar10:cond",
        "cd_cifar10:cd_i",
        "cd_cifar10:cd_i_unfrozen",
        "cd_imagenet64",
        "dmd_cifar10",
        "dmd_cifar10:noreg",
        "diff_instruct_cifar10",
    ],
)
def test_baselines_are_scored_on_the_way_as_their_headers_score_them(name):
    recipe, text = load_recipe(name), find_recipe(name).path.read_text()
    assert f"runs/{recipe.name}" in text and f"--protocol {recipe.eval.protocol}" in text
    assert recipe.images >= 20 * recipe.eval.every
    assert load_recipe(name, mini=True).eval.extractor == "digits"


def test_cd_i_and_its_twin_differ_in_freeze_alone():
    """Zheng & Yang 2024, Fig. 4A."""
    for frozen, twin in (("cd_cifar10:cd_i", "cd_cifar10:cd_i_unfrozen"), ("cd_digits:cd_i", "cd_digits")):
        for mini in (False, True):
            a, b = (load_recipe(name, mini=mini).resolved() for name in (frozen, twin))
            assert {key for key in a if a[key] != b[key]} <= {"name", "title", "student"}
            assert (a["student"].pop("freeze"), b["student"].pop("freeze")) == ("conv", "none") and a["student"] == b[
                "student"
            ]
    recipe = load_recipe("cd_cifar10:cd_i")
    assert (recipe.precision, recipe.data.xflip, recipe.options.i_min, recipe.options.form) == ("bf16", False, 2, "F")
    assert load_recipe("ctm_digits").options.i_min == load_recipe("ctm_digits", ["ctm.i_min=null"]).options.i_min == 2


# ---- SiDA (arXiv 2410.14919) -----------------------------------------------------------------------------------------

SETS = ("cifar10:uncond", "cifar10:cond", "imagenet64", "ffhq64", "afhqv2")
# batch, of one GPU, learning rate, eps, half-life of the average, precision (fp16 there), dropout, augmentation
SIDA_TABLE_8 = {
    "cifar10": (256, 32, 1e-5, 1e-8, 500_000, "fp32", 0.13, 0.12),
    "imagenet64": (8192, 32, 4e-6, 1e-6, 2_000_000, "bf16", 0.10, 0.0),
    "ffhq64": (512, 64, 1e-5, 1e-6, 500_000, "bf16", 0.05, 0.15),
    "afhqv2": (512, 64, 5e-6, 1e-6, 500_000, "bf16", 0.05, 0.15),
}
EDM2_POOL = {"xs": 64, "s": 64, "m": 32, "l": 32, "xl": 16, "xxl": 2}
SIZES = {  # of EDM and EDM2, as released
    "edm-cifar10-cond-vp": 55_735_299,
    "edm-imagenet64-adm": 295_899_267,
    "edm-afhqv2-vp": 61_805_571,
    "edm2-img512-s": 280_212_837,
}


def rows_of(*tables):
    """(row, table) of all rows that have a recipe."""
    return [(row, name) for name in tables for row in load_table(name).rows if row.recipe is not None]


@pytest.mark.parametrize("dataset", SETS)
@pytest.mark.parametrize("method", ["sid_{}_a1.0", "sid_{}_a1.2", "sida_{}", "sid2a_{}_a1.0", "sid2a_{}_a1.2"])
def test_sida_table_8(method, dataset):
    name = method.format(dataset)
    if ":" not in dataset:  # a variant for each alpha alone
        name = name.replace("_a1", ":a1")
    recipe, o = load_recipe(name), load_recipe(name).options
    batch, gpu, lr, eps, half_life, precision, dropout, augment = SIDA_TABLE_8[dataset.split(":")[0]]
    assert (recipe.batch, recipe.micro_batch, recipe.precision) == (batch, gpu, precision)
    assert (recipe.ema.half_life, recipe.ema.ramp, recipe.bad_gradients, o.nan) == (half_life, 0.05, "zero", "drop")
    assert (recipe.student.sigma, o.tmax, o.lambda_sid, o.p_mean, o.p_std) == (2.5, 800, 100, -1.2, 1.2)
    assert (o.sigma_min, o.sigma_max, o.rho, o.lambda_score) == (0.002, 80, 7, 1)
    assert (recipe.student.dropout, o.score_dropout, o.augment) == (dropout, dropout, augment)
    assert o.alpha == (1.0 if method == "sida_{}" else float(name[-3:]))
    score = recipe.optim_critic or recipe.optim
    for optim in (recipe.optim, score):
        assert (optim.name, optim.lr, optim.eps, optim.weight_decay, optim.warmup, optim.clip_norm) == (
            "adam",
            lr,
            eps,
            0,
            0,
            None,
        )
        beta1 = (
            0.9 if optim is recipe.optim and name.startswith("sid_ffhq64") else 0.0
        )  # their scripts, against the table
        assert optim.betas == (beta1, 0.999)
    assert (
        o.adversarial == (recipe.data is not None) == (not name.startswith("sid_")) and recipe.optim.clip_value is None
    )
    if o.adversarial:
        assert (o.batch_pool, o.lambda_adv, o.lambda_d, o.start_g_nimg, o.start_adv_nimg, score.clip_value) == (
            gpu,
            0.01,
            1,
            100_000,
            200_000,
            1.0,
        )
        assert (o.gen_adv, o.logit_clamp, o.adv_half, o.real_noise, o.disc_map) == (
            "nonsat_bce",
            10,
            "single",
            "shared",
            "enc_last_mean",
        )
    else:
        assert SiD.needs(o) == "none" and score.clip_value is None


@pytest.mark.parametrize("size", EDM2_POOL)
@pytest.mark.parametrize("method", ["sid", "sida", "sid2a"])
def test_edm2_512(method, size):
    recipe = load_recipe(f"{method}_edm2_512:{size}")
    o, plain = recipe.options, method == "sid" or size != "s"
    assert (recipe.teacher, recipe.batch, recipe.micro_batch) == (f"edm2-img512-{size}", 2048, EDM2_POOL[size])
    assert (recipe.optim.lr, recipe.optim.betas, recipe.optim.eps, recipe.optim_critic) == (
        5e-5,
        (0, 0.999),
        1e-6,
        None,
    )
    assert (recipe.ema.half_life, o.alpha, o.p_mean, o.p_std, o.augment, recipe.student.sigma) == (
        2_000_000,
        1.0,
        -0.4,
        1.0,
        0,
        2.5,
    )
    assert recipe.student.dropout == o.score_dropout == (0.0 if size in ("xs", "s") else 0.1)
    assert (o.uncertainty, o.student_force_wn) == ((True, "post_step") if plain else (False, "off"))
    assert o.score_force_wn == ("post_step" if method == "sid" else "off")  # what their copied hooks come to
    assert o.lambda_sid == (50 if (method, size) == ("sid2a", "m") else 100) and o.lambda_score == 1
    if method != "sid":
        assert (o.adversarial, o.batch_pool, o.lambda_d, o.lambda_adv, recipe.data.resolution) == (
            True,
            EDM2_POOL[size],
            100,
            0.01,
            512,
        )


@pytest.mark.long
def test_their_tables_have_their_recipes_and_their_recipes_the_tables_numbers():
    rows = rows_of(*(f"sida_table{i}" for i in ("1", "2", "3", "3_pr", "4", "5", "6", "7")))
    ours = [(row, name) for row, name in rows if row.recipe.startswith("sid")]
    assert len(ours) == 5 * 6 + 14 * 2
    for row, name in ours:
        recipe = load_recipe(row.recipe)
        value = recipe.reproduces["value"]
        for key, printed in row.paper.items():
            assert key == "nfe" or value[key] == printed, (row.recipe, key)
        assert name.removeprefix("sida_table").removesuffix("_pr") in str(recipe.reproduces["table"])
        assert recipe.eval.protocol == load_table(name).protocol.removesuffix("_pr") and row.x == f"runs/{recipe.name}"
        path, variant = find_recipe(row.recipe)
        head = path.read_text().split("\nmethod:")[0]
        assert f"d2o {'finetune' if row.start else 'train'} " in head and (variant is None or f" {variant} " in head)
        assert row.start is None or re.search(rf"--from {row.start[:-4]}|starts from", head)
    for row, _ in rows_of(*table_names()):  # of other papers' tables too
        if row.recipe.startswith("d2g_") and ":" in row.recipe:
            assert (row.x == f"runs/{load_recipe(row.recipe).name}") == (not row.set)  # changed, it is another run


@pytest.mark.parametrize(("name", "memory"), [("sida_cifar10:cond", 13.0), ("sid2a_edm2_512:s", None)])
def test_plans_count_what_was_published(name, memory):
    recipe = load_recipe(name)
    n = SIZES[recipe.teacher]
    plan = make_plan(recipe)
    head = 128 if name.endswith(":s") else 0  # EDM2's uncertainty: a student has none, nor has this score network
    assert plan.networks == {"teacher (frozen)": n, "student": n - head, "score": n - head} and not plan.refused
    if memory:  # Table 8, in GB of each GPU
        assert sum(plan.memory.values()) / 1e9 == pytest.approx(memory, rel=0.15)
