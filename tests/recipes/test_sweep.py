"""What `--sweep` understands: keys, values, names, and everything that is wrong with them."""

from __future__ import annotations

import pytest

from d2o.errors import UserError
from d2o.recipes.sweep import plan_sweep, split_values, written


def test_values_are_split_at_commas_outside_brackets_and_quotes():
    assert split_values("-0.25,0, 1.5") == ["-0.25", "0", "1.5"]
    assert split_values("[0,0.9],[0.5,0.999]") == ["[0,0.9]", "[0.5,0.999]"]
    assert split_values('"a,b",c') == ['"a,b"', "c"] and split_values("it's,x") == ["it's", "x"]
    assert split_values("a,,b") == ["a", "", "b"] and split_values("") == [""]


def test_a_value_has_one_name_however_it_is_written():
    assert [written(v) for v in (1.2, -0.25, 1.0, 1e-4, 1e-10, 0.1 + 0.2, True, None, 7, (0.0, 0.9), "a b/c")] == [
        "1.2",
        "-0.25",
        "1",
        "0.0001",
        "1e-10",
        "0.30000000000000004",
        "true",
        "none",
        "7",
        "0_0.9",
        "a_b_c",
    ]


def test_keys_of_the_recipe_and_of_the_methods_own_section():
    sweep = plan_sweep(
        "quickstart", ["batch=64"], ["loss=l1,mse", "optim.lr=1e-4,2.0e-4", "student.dropout=null"], mini=True
    )
    assert [axis.key for axis in sweep.axes] == ["ode.loss", "optim.lr", "student.dropout"]
    assert [m.name for m in sweep.members] == [
        "loss=l1,optim.lr=0.0001,student.dropout=none",
        "loss=l1,optim.lr=0.0002,student.dropout=none",
        "loss=mse,optim.lr=0.0001,student.dropout=none",
        "loss=mse,optim.lr=0.0002,student.dropout=none",
    ]
    last = sweep.members[-1]
    assert last.settings == {"ode.loss": "mse", "optim.lr": 2e-4, "student.dropout": None}
    assert (last.recipe.options.loss, last.recipe.optim.lr, last.recipe.batch, last.recipe.images) == (
        "mse",
        2e-4,
        64,
        12800,
    )
    assert (
        sweep.base.options.loss == "pseudo_huber" and sweep.folder == "quickstart-sweep-loss-optim.lr-student.dropout"
    )
    assert plan_sweep("quickstart", [], ["ode.loss=l1"]).members[0].name == "loss=l1"
    assert plan_sweep("spi_gan_digits", [], ["K=1,2"]).axes[0].key == "spi_gan.K"
    assert [m.name for m in plan_sweep("quickstart", [], ["optim.betas=[0,0.9],[0.5,0.9]"]).members] == [
        "optim.betas=0_0.9",
        "optim.betas=0.5_0.9",
    ]
    assert (
        plan_sweep("spi_gan_digits", [], ["network.h_dim=32,64"]).members[0].recipe.network["h_dim"] == 32
    )  # a free section


def test_variants_in_place_of_a_key():
    sweep = plan_sweep("d2g_tiny_sd", ["batch=8"], ["variant=mse,gan", "seed=0,1"], mini=True)
    assert [m.name for m in sweep.members][:3] == ["variant=mse,seed=0", "variant=mse,seed=1", "variant=gan,seed=0"]
    assert [(m.source, m.recipe.name, m.recipe.seed) for m in sweep.members][-1] == (
        "d2g_tiny_sd:gan",
        "d2g_tiny_sd_gan",
        1,
    )
    assert sweep.members[2].settings == {"variant": "gan", "seed": 0}
    assert sweep.folder == "d2g_tiny_sd-sweep-variant-seed" and sweep.title == "Diffusion2GAN of tiny-sd, stage 1"
    assert plan_sweep("latent_reconstruction", [], ["variant=b"]).folder == "latent_reconstruction-sweep-variant"
    for name, text, words in (
        ("d2g_tiny_sd:gan", "variant=mse", "is the variant gan already"),
        ("d2g_tiny_sd", "variant=mse,", "expected variant=NAME"),
        ("d2g_tiny_sd", "variant=mse,mze", "no variant 'mze'; did you mean 'mse'"),
    ):
        with pytest.raises(UserError, match=words):
            plan_sweep(name, [], [text])


@pytest.mark.parametrize(
    "sweeps, words",
    [
        (["optim.lrr=1"], ["--sweep optim.lrr: unknown key; did you mean 'optim.lr'?"]),
        (["losss=l1"], ["--sweep losss: unknown key; did you mean 'loss'?"]),
        (["optim=1"], ["--sweep optim: a section; sweep one of its keys (name, state, lr"]),
        (["optim.lr"], ["--sweep optim.lr: expected key=value,value"]),
        (["optim.lr=1e-4,,1e-3"], ["--sweep optim.lr: a value is missing"]),
        (["optim.lr=1e-4", "optim.lr=1e-3"], ["--sweep optim.lr: given twice"]),
        (["loss=l1,mse", "ode.loss=l1"], ["--sweep ode.loss: given twice"]),
        (["optim.lr=1e-3,0.001"], ["--sweep: optim.lr=0.001 is there twice"]),
        (
            ["optim.lr=1e-4,x,-1", "loss=l1,mss"],
            [
                "--sweep optim.lr: expected a number > 0, got 'x'",
                "got -1",
                "--sweep ode.loss: expected",
                "did you mean 'mse'?",
            ],
        ),
        (["mini=1,2"], ["--sweep mini: unknown key"]),
    ],
)
def test_everything_wrong_is_told_at_once_with_the_key(sweeps, words):
    with pytest.raises(UserError) as caught:
        plan_sweep("quickstart", [], sweeps)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert len(caught.value.message.splitlines()) == len(set(caught.value.message.splitlines())) <= 3
