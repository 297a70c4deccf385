"""A recipe that names a pair store need not say how it was made."""

import hashlib
import json
import math

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from d2o.cli.app import main
from d2o.data.pair_settings import PairSettings
from d2o.data.pairs import PairStore
from d2o.errors import UserError
from d2o.recipes.load import load_recipe
from d2o.recipes.plan import make_plan
from d2o.teachers.compute import Compute
from d2o.teachers.generate import make_pairs
from d2o.training.setup import pair_settings
from d2o.work.base import dump_manifest
from tests.helpers import tiny_recipe

RECIPE = """
name: test
method: ode
pairs: {{path: {pairs}}}
ode: {{loss: mse}}
optim: {{lr: 1.0e-3}}
batch: 8
images: 32
threads: 1
"""


@pytest.fixture
def recipe(tmp_path):
    return tiny_recipe(tmp_path, RECIPE)


@pytest.fixture
def make(tmp_path):
    def run(n=24, **settings):
        settings = {
            "solver": "euler",
            "steps": 2,
            "seed": 5,
            "cfg": 1.5,
            "labels": "balanced",
            "shard_size": 8,
            "dtype": "bf16",
            **settings,
        }
        return make_pairs(
            PairSettings(str(tmp_path / "teacher.safetensors"), n, **settings),
            tmp_path / "pairs",
            compute=Compute(4, 1),
        )

    return run


def d2o(*arguments):
    with pytest.raises(SystemExit) as done:
        main([str(a) for a in arguments])
    return done.value.code


def test_what_is_left_open_is_as_the_store_says(recipe, make, tmp_path):
    with pytest.raises(UserError, match="pairs.n: missing"):
        load_recipe(recipe)  # there is no store yet
    make()
    found = load_recipe(recipe)
    p = found.pairs
    assert (p.n, p.solver, p.steps, p.seed, p.cfg, p.labels, p.shard_size, p.dtype) == (
        24,
        "euler",
        2,
        5,
        1.5,
        "balanced",
        8,
        "bf16",
    )
    assert found.teacher == str(tmp_path / "teacher.safetensors")
    assert load_recipe(recipe, ["pairs.n=9"]).pairs.n == 9
    assert make_plan(found).refused == [] and not make_plan(found).missing


def test_training_takes_the_store_as_it_is_and_records_how_it_was_made(recipe, make, tmp_path, capsys):
    make()
    assert d2o("train", recipe, "--out", tmp_path / "run", "--device", "cpu") == 0
    written = load_recipe(tmp_path / "run" / "recipe.yaml")
    assert (written.pairs.n, written.pairs.solver, written.pairs.steps) == (24, "euler", 2)
    make(32)  # the store grows, and the run goes on with what it began with
    assert d2o("train", recipe, "--out", tmp_path / "run", "--device", "cpu", "--resume") == 0
    assert "is finished" in capsys.readouterr().err


@pytest.mark.long
def test_fewer_pairs_are_the_first_and_more_are_made(recipe, make, tmp_path):
    make()
    assert d2o("train", recipe, "--set", "pairs.n=9", "--out", tmp_path / "few", "--device", "cpu") == 0
    assert len(PairStore(tmp_path / "pairs")) == 24
    assert "8 more pairs" in make_plan(load_recipe(recipe, ["pairs.n=32"])).first[0]
    assert d2o("train", recipe, "--set", "pairs.n=32", "--out", tmp_path / "more", "--device", "cpu") == 0
    assert len(PairStore(tmp_path / "pairs")) == 32


def test_recipes_say_how_stochastic_pairs_are_drawn(recipe, make, tmp_path):
    """By the keys that `d2o pairs` has as options; left open they are the store's."""
    churn = {"s_churn": 10.0, "s_min": 0.1, "s_max": 20.0, "s_noise": 1.0}
    make(solver="sde", steps=2, **churn)
    found = load_recipe(recipe)
    assert {key: getattr(found.pairs, key) for key in churn} == churn and make_plan(found).refused == []
    assert "s_churn: 10.0 -> 40.0" in make_plan(load_recipe(recipe, ["pairs.s_churn=40.0"])).refused[0]
    settings = pair_settings(found.teacher, found.pairs)
    assert (settings.s_churn, settings.s_min, settings.s_max, settings.s_noise) == tuple(churn.values())
    plain = load_recipe("d2g_cifar10:50k").pairs
    assert (plain.s_churn, plain.s_min, plain.s_max, plain.s_noise) == (40.0, 0.05, 50.0, 1.003)
    with pytest.raises(UserError, match="pairs.s_noise"):
        load_recipe(recipe, ["pairs.s_noise=-1.0"])


def test_recipes_say_what_xl_s_guidance_takes_for_no_prompt():
    recipe = load_recipe("d2g_sdxl_cfg7:ode", ["pairs.sdxl_uncond=encode_empty"])
    settings = pair_settings(recipe.teacher, recipe.pairs)
    assert settings.sdxl_uncond == "encode_empty" and "encode_empty" in settings.folder().name
    assert load_recipe("d2g_sdxl_cfg7:ode").pairs.sdxl_uncond is None
    with pytest.raises(UserError, match="pairs.sdxl_uncond"):
        load_recipe("d2g_sdxl_cfg7:ode", ["pairs.sdxl_uncond=nothing"])


def test_what_contradicts_the_store_is_refused_with_both_values(recipe, make, tmp_path, capsys):
    make()
    assert d2o("train", recipe, "--set", "pairs.steps=3", "--out", tmp_path / "run", "--device", "cpu") == 2
    assert "steps: 2 -> 3" in capsys.readouterr().err
    assert "steps: 2 -> 3" in make_plan(load_recipe(recipe, ["pairs.steps=3"])).refused[0]


def test_a_damaged_shard_is_not_trained_on(recipe, make, tmp_path, capsys):
    store = make()
    path = store.path / "shard-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 64
    path.write_bytes(bytes(data))
    assert d2o("train", recipe, "--out", tmp_path / "run", "--device", "cpu") == 2
    err = capsys.readouterr().err.replace("\n", " ")
    assert "shard-00001.safetensors is damaged" in err and "delete it, and run: d2o pairs" in err


def test_values_that_are_not_finite_are_named_before_training(recipe, make, tmp_path, capsys):
    store = make()
    path = store.path / "shard-00002.safetensors"
    with safe_open(path, "pt") as file:  # by hand: d2o would not write it
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    tensors["target"][3, 0, 2, 2] = math.nan
    record = {key: value for key, value in json.loads(metadata["d2o"]).items() if not key.startswith("file_")}
    save_file(tensors, path, {"d2o": json.dumps(record)})
    manifest = dict(store.manifest)
    manifest["shards"][2] |= {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    (store.path / "manifest.json").write_text(dump_manifest(manifest))
    assert PairStore(store.path).verify() == [
        "shard-00002.safetensors: pair 19 holds values that are not finite (NaN or infinite)"
    ]
    assert d2o("train", recipe, "--out", tmp_path / "run", "--device", "cpu") == 2
    assert "pair 19 holds values that are not finite" in capsys.readouterr().err.replace("\n", " ")
