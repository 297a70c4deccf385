from __future__ import annotations

import json
import math
import sys
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from d2o.errors import UserError
from d2o.recipes.differences import diff_recipes
from d2o.recipes.find import find_recipe, recipe_names
from d2o.recipes.load import load_recipe
from d2o.recipes.schema import LOADER_KEYS, Recipe, describe
from d2o.settings import recipe_names as recipe_names_of
from d2o.settings.yaml_text import compose, dump
from d2o.shipped import recipe_folders

SMALL = """\
name: small
method: fake
teacher: digits
optim: {lr: 1e-3}
batch: 8
images: 1000
"""


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    weight: float = Field(1.0, ge=0, description="weight")


class FakeOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    loss: Literal["mse", "l1"] = Field("mse", description="distance")
    scales: tuple[float, float] = Field((1.0, 2.0), description="two scales")
    most: float = Field(math.inf, description="no limit")
    layers: int | Literal["all"] = Field("all", description="how many")
    inner: Inner | None = Field(None, description="more")
    by_name: dict[str, int] = Field({}, description="numbers by name")


class OtherOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    rate: float = Field(..., gt=0, description="a rate")


@pytest.fixture(autouse=True)
def methods(monkeypatch, tmp_path):
    """Two methods that need no training code, and an empty current folder."""
    base = ModuleType("d2o.methods.base")
    known = {"fake": FakeOptions, "two-player": OtherOptions}
    base.method_names = lambda: sorted(known)  # type: ignore[attr-defined]
    base.get_method = lambda name: type("Method", (), {"Options": known[name]})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "d2o.methods.base", base)
    monkeypatch.chdir(tmp_path)


def write(text: str, name: str = "r.yaml") -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text)
    return name


def lines(text: str, *overrides: str, mini: bool = False) -> list[str]:
    """The problems of SMALL with more lines (they begin in line 7)."""
    with pytest.raises(UserError) as caught:
        load_recipe(write(SMALL + text), overrides, mini)
    return caught.value.message.splitlines()


def recipe(text: str = "", *overrides: str, mini: bool = False) -> Recipe:
    return load_recipe(write(SMALL + text), overrides, mini)


def failure(name: str) -> UserError:
    with pytest.raises(UserError) as caught:
        load_recipe(name)
    return caught.value


# ---- what a recipe holds ---------------------------------------------------------------------------------------------


def test_defaults():
    r = recipe()
    assert (r.name, r.title, r.method, r.teacher, r.seed, r.batch, r.images) == (
        "small",
        "",
        "fake",
        "digits",
        0,
        8,
        1000,
    )
    assert (
        r.data is None
        and r.pairs is None
        and r.network is None
        and r.eval is None
        and r.preview is None
        and r.reproduces is None
    )
    assert (r.student.sigma, r.student.init) == (80.0, "teacher")
    assert (
        r.optim.betas == (0.9, 0.999) and r.optim.lr == 0.001 and r.optim.clip_norm is None and r.optim_critic is None
    )
    assert (r.ema.half_life, r.ema.decay, r.ema.ramp) == (None, None, 0.05)
    assert (r.precision, r.channels_last, r.compile, r.bad_gradients, r.log_every) == (
        "fp32",
        "auto",
        False,
        "raise",
        20,
    )
    assert (r.checkpoint.every, r.checkpoint.keep) == (50_000, 3)
    assert r.options == FakeOptions()


def test_every_section_is_read():
    r = recipe(
        "data: {path: real:digits, resolution: 8, channels: 1, on_bad: skip, xflip: true}\n"
        "network: {arch: ddpmpp, channel_mult: [1, 2], dropout: 1e-1}\n"
        "pairs: {n: 64, cfg: 2}\n"
        "optim_critic: {lr: 1}\n"
        "ema: {half_life: 5_000}\n"
        "eval: {every: 10, extractor: digits, n: 100, reference: real:digits}\n"
        "preview: {every: 10}\n"
        "reproduces: {paper: 2022, table: [1], value: null}\n"
        "fake: {loss: l1, scales: [3, 4.5], layers: 3, inner: {weight: 2}, by_name: {a: 1}}\n"
    )
    assert r.data is not None and r.data.channels == 1 and r.data.xflip is True
    assert r.network == {"arch": "ddpmpp", "channel_mult": [1, 2], "dropout": 0.1}
    assert r.pairs is not None and r.pairs.cfg == 2.0 and isinstance(r.pairs.cfg, float)
    assert r.optim_critic is not None and r.optim_critic.lr == 1.0
    assert r.ema.half_life == 5000.0
    assert r.eval is not None and r.eval.seed == 2_000_000 and r.preview is not None and r.preview.n == 64
    assert r.reproduces == {"paper": 2022, "table": [1], "value": None}
    assert r.options == FakeOptions(loss="l1", scales=(3.0, 4.5), layers=3, inner=Inner(weight=2.0), by_name={"a": 1})


def test_a_metric_of_the_method_needs_no_extractor():
    r = recipe("eval: {every: 10, metric: accuracy}\ncheckpoint: {keep: 0}\n")
    assert r.eval is not None and r.eval.extractor is None and r.eval.n == 1000
    assert load_recipe(write(r.to_yaml())) == r


def test_section_key_of_a_method_with_a_hyphen():
    r = load_recipe(write(SMALL.replace("fake", "two-player") + "two_player: {rate: 3}\n"))
    assert r.options.rate == 3.0
    assert list(r.resolved())[-1] == "two_player"


def test_frozen():
    r = recipe()
    with pytest.raises(ValidationError):
        r.batch = 3
    with pytest.raises(ValidationError):
        r.optim.lr = 3.0


def test_an_empty_section_is_its_defaults():
    r = recipe("student:\nfake:\nema:\nmini:\n")
    assert r == recipe()


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-4", 1e-4),
        ("1E4", 1e4),
        ("1.e-4", 1e-4),
        (".5e-3", 5e-4),
        ("+2.5", 2.5),
        ("1_000", 1000),
        ("010", 10),
        ("0x10", 16),
        ("-3", -3),
        (".inf", math.inf),
        ("-.inf", -math.inf),
        ("null", None),
        ("~", None),
        ("true", True),
        ("yes", "yes"),
        ("off", "off"),
        ("2024-01-02", "2024-01-02"),
        ("1:30", "1:30"),
        ("'1e-4'", "1e-4"),
        ("!!str 3", "3"),
        ("1e", "1e"),
        ("e5", "e5"),
        ("1__0", "1__0"),
    ],
)
def test_scalars(written, value):
    network = recipe(f"network: {{x: {written}, y: [{written}]}}\n").network
    assert network is not None
    for got in (network["x"], network["y"][0]):
        assert got == value and type(got) is type(value)


# ---- resolved --------------------------------------------------------------------------------------------------------


def test_resolved_reads_back_to_an_equal_recipe():
    r = recipe(
        "title: 'yes: 1e-4 # no'\nnetwork: {text: '1e-4', no: 'no', date: '2024-01-01', n: '010', e: '',\n"
        "  x: 1e-8, y: [1e22, .inf], none: ~, s: '8'}\n"
        "pairs: {n: 3, path: 'C:\\x'}\nfake: {scales: [1e-7, 3]}\nmini: {batch: 2}\n"
    )
    again = load_recipe(write(r.to_yaml(), "again.yaml"))
    assert again == r and again.to_yaml() == r.to_yaml()
    assert again.network == r.network and again.title == "yes: 1e-4 # no"
    assert Recipe.from_dict(json.loads(json.dumps(r.resolved()))) == r
    assert r != recipe("network: {text: 1e-4}\n")


def test_resolved_is_flat_complete_and_in_order():
    data = recipe("mini: {batch: 2}\n").resolved()
    assert list(data) == [*Recipe.model_fields, "fake"]
    assert not LOADER_KEYS.keys() & data.keys()
    assert data["optim"]["betas"] == [0.9, 0.999] and data["fake"]["most"] == math.inf and data["pairs"] is None


def test_other_yaml_readers_see_the_same_texts():
    r = recipe("network: {a: 'no', b: '1:30', c: '2024-01-01', d: '1e-4', e: '010'}\n")
    assert yaml.safe_load(r.to_yaml())["network"] == r.network


def test_options_take_part_in_equality():
    assert recipe("fake: {loss: l1}\n") != recipe("fake: {loss: mse}\n")


def test_from_dict_reports_like_a_file():
    with pytest.raises(UserError) as caught:
        Recipe.from_dict(
            {"name": "x", "method": "fake", "optim": {"lr": -1}, "batch": 1, "images": 1, "fake": {"los": 3}},
            "checkpoint x",
        )
    assert caught.value.message.splitlines() == [
        "checkpoint x: optim.lr: expected a number > 0, got -1",
        "checkpoint x: fake.los: unknown key; did you mean 'loss'?",
    ]


def test_dump_escapes_what_yaml_cannot_hold():
    data = {"a": "x\ny\t\x00\u2028é", "b": {"c": [1, {"d": None}]}, "e": "", "f": {}, "g": []}
    assert yaml.safe_load(dump(data)) == data


# ---- wrong values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("optim_critic: {lr: 1, lrr: 2}", "optim_critic.lrr: unknown key; did you mean 'lr'?"),
        ("sed: 3", "sed: unknown key; did you mean 'seed'?"),
        ("lr: 3", "lr: unknown key; did you mean 'optim.lr'?"),
        ("optim.eps: 3", "optim.eps: unknown key; write it as optim: {eps: ...}"),
        ("checkpoint: {qqq: 3}", "checkpoint.qqq: unknown key; known here: every, keep"),
        ("mini_: {}", "mini_: unknown key; did you mean 'mini'?"),
        ("options: {loss: l1}", "options: unknown key; did you mean 'optim'?"),
        ("qqq: 1", "qqq: unknown key"),
        ("fake: {los: l1}", "fake.los: unknown key; did you mean 'loss'?"),
        ("fake: {inner: {wait: 1}}", "fake.inner.wait: unknown key; did you mean 'weight'?"),
        ("fake: {loss: mze}", "fake.loss: expected 'mse' or 'l1', got 'mze'; did you mean 'mse'?"),
        ("fake: {scales: [1]}", "fake.scales: expected a list of 2, each a number, got 1 value"),
        ("fake: {scales: [1, 2, 3]}", "fake.scales: expected a list of 2, each a number, got 3 values"),
        ("fake: {scales: [1, x]}", "fake.scales[1]: expected a number, got 'x'"),
        ("fake: {layers: some}", "fake.layers: expected an integer or 'all', got 'some'"),
        ("fake: {by_name: {a: 1.5}}", "fake.by_name.a: expected an integer, got 1.5"),
        ("fake: {inner: {weight: -1}}", "fake.inner.weight: expected a number >= 0, got -1"),
        ("fake: [1]", "fake: expected a section (lines of `key: value`), got a list"),
        (
            "two_player: {rate: 1}",
            "two_player: unknown key: it belongs to method 'two-player', but this recipe's method is 'fake'",
        ),
        ("seed: abc", "seed: expected an integer >= 0 and <= 4294967295, got 'abc'"),
        ("seed: -1", "seed: expected an integer >= 0 and <= 4294967295, got -1"),
        ("seed: 4294967296", "seed: expected an integer >= 0 and <= 4294967295, got 4294967296"),
        ("seed: '3'", "seed: expected an integer >= 0 and <= 4294967295, got '3' (leave out the quotes)"),
        ("seed: 3.0", "seed: expected an integer >= 0 and <= 4294967295, got 3.0 (write 3)"),
        ("seed: 3.5", "seed: expected an integer >= 0 and <= 4294967295, got 3.5"),
        ("seed: true", "seed: expected an integer >= 0 and <= 4294967295, got true"),
        ("seed:", "seed: expected an integer >= 0 and <= 4294967295, got nothing"),
        ("seed: [1]", "seed: expected an integer >= 0 and <= 4294967295, got a list"),
        ("micro_batch: 9", "micro_batch: expected at most batch = 8, got 9"),
        ("student: {sigma: .inf}", "student.sigma: expected a number > 0, got Infinity"),
        ("student: {sigma: 0}", "student.sigma: expected a number > 0, got 0"),
        (
            "student: {init: teachr}",
            "student.init: expected 'teacher' or 'scratch', got 'teachr'; did you mean 'teacher'?",
        ),
        ("student: x", "student: expected a section (lines of `key: value`), got 'x'"),
        ("title: 3", "title: expected a text, got 3 (put it in quotes)"),
        ("compile: yes", "compile: expected true or false, got 'yes' (write true)"),
        ("compile: 1", "compile: expected true or false, got 1"),
        ("data: {path: x, channels: 2}", "data.channels: expected 1 or 3, got 2"),
        ("data: {path: x, channels: true}", "data.channels: expected 1 or 3, got true"),
        ("data: {path: x, channels: 3.0}", "data.channels: expected 1 or 3, got 3.0"),
        ("data: {path: ''}", "data.path: expected a text, not empty, got ''"),
        ("data: {}", "data.path: missing; expected a text, not empty"),
        ("network: [1]", "network: expected a section (lines of `key: value`), got a list"),
        ("ema: {decay: 1}", "ema.decay: expected a number > 0 and < 1, got 1"),
        (
            "ema: {half_life: 5, decay: 0.9}",
            "ema.decay: half_life is given too (5.0); give one of the two (null takes the other back)",
        ),
        ("optim_critic: {lr: 1e-3, final_lr: 1e-2}", "optim_critic.final_lr: expected at most lr = 0.001, got 0.01"),
        ("optim_critic: {lr: 1, betas: [0.9, 1]}", "optim_critic.betas[1]: expected a number >= 0 and < 1, got 1"),
        ("eval: {every: 5, reference: x}", "eval.extractor: missing; metric fd needs it"),
        ("eval: {every: 5, extractor: x, reference: null}", "eval.reference: missing; metric fd needs it"),
        ("eval: {extractor: x, reference: x}", "eval.every: missing; expected an integer >= 1"),
        ("checkpoint: {keep: -1}", "checkpoint.keep: expected an integer >= 0, got -1"),
        ("mini: [1]", "mini: expected a section of recipe keys, got a list"),
        ("mini: {mini: {}}", "mini.mini: cannot stand in `mini:`"),
        ("mini: {extends: x}", "mini.extends: cannot stand in `mini:`"),
        ("mini: {optim: {lrr: 3}}", "mini.optim.lrr: unknown key; did you mean 'lr'?"),
        ("mini: {pairs: {seed: 3}}", "mini.pairs.n: missing; expected an integer >= 1"),
        ("mini: {batch: 0}", "mini.batch: expected an integer >= 1, got 0"),
        ("mini: {batch: null}", "mini.batch: expected an integer >= 1, got nothing"),
        ("mini: {fake: {loss: x}}", "mini.fake.loss: expected 'mse' or 'l1', got 'x'"),
        ("mini: {method: fke}", "mini.method: unknown method 'fke': did you mean 'fake'? (known: fake, two-player)"),
    ],
)
def test_one_problem(text, problem):
    (line,) = lines(text + "\n")
    assert line == f"r.yaml:7: {problem}" or (
        line.startswith(f"r.yaml:7: {problem};") and "known here: name, title" in line
    )


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (
            "name: small\n",
            "",
            "1: name: missing; expected a name of letters, digits and . _ + - that begins with a letter or digit",
        ),
        (
            "name: small",
            "name: ../x",
            "1: name: expected a name of letters, digits and . _ + - that begins with a letter or digit, got '../x'",
        ),
        (
            "method: fake",
            "method: fke",
            "2: method: unknown method 'fke': did you mean 'fake'? (known: fake, two-player)",
        ),
        ("method: fake", "method: [fake]", "2: method: expected a text, not empty, got a list"),
        ("method: fake\n", "", "1: method: missing; expected a text, not empty"),
        ("method: fake", "method: two-player", "1: two_player.rate: missing; expected a number > 0"),
        ("lr: 1e-3", "eps: 1e-3", "4: optim.lr: missing; expected a number > 0"),
        ("batch: 8", "batch: abc", "5: batch: expected an integer >= 1, got 'abc'"),
        ("images: 1000", "images: 1e3", "6: images: expected an integer >= 1, got 1000.0 (write 1000)"),
    ],
)
def test_one_problem_in_the_required_keys(old, new, problem):
    assert old in SMALL
    assert failure(write(SMALL.replace(old, new))).message == f"r.yaml:{problem}"


def test_a_wrong_method_does_not_blame_its_section():
    assert failure(write(SMALL.replace("fake", "fke") + "fke: {loss: l1}\nfake: {loss: l1}\n")).message.startswith(
        "r.yaml:2: method: unknown"
    )


def test_a_pydantic_message_we_have_no_words_for(monkeypatch):
    class Odd(BaseModel):
        when: date = Field(None, description="a day")

    monkeypatch.setattr(
        sys.modules["d2o.methods.base"], "get_method", lambda name: type("Method", (), {"Options": Odd})
    )
    (line,) = lines("fake: {when: soon}\n")
    assert line.startswith("r.yaml:7: fake.when: ") and "date" in line and line.endswith("got 'soon'")


def test_all_problems_are_listed_in_the_order_of_the_file():
    assert lines(
        "log_every: 0\npairs:\n  m: 3\n  solver: 4\nprecision: fp8\nmini:\n  batc: 3\n", "images=x", "optim.lrr=3"
    ) == [
        "r.yaml:7: log_every: expected an integer >= 1, got 0",
        "r.yaml:8: pairs.n: missing; expected an integer >= 1",
        (
            "r.yaml:9: pairs.m: unknown key; known here: path, n, solver, steps, spacing, final, eta, s_churn,"
            " s_min, s_max, s_noise, seed, batch, shard_size, labels, cfg, sdxl_uncond, prompts, per_prompt, rewire,"
            " dtype, precision, channels_last, store_noise"
        ),
        "r.yaml:10: pairs.solver: expected a text, not empty, got 4 (put it in quotes)",
        "r.yaml:11: precision: expected 'fp32', 'bf16', 'fp16' or 'auto', got 'fp8'; did you mean 'fp32'?",
        "r.yaml:13: mini.batc: unknown key; did you mean 'batch'?",
        "--set optim.lrr: unknown key; did you mean 'lr'?",
        "--set images: expected an integer >= 1, got 'x'",
    ]


# ---- merging ---------------------------------------------------------------------------------------------------------


def test_precedence_base_file_mini_set():
    write(SMALL + "seed: 1\nlog_every: 1\nthreads: 1\nmini: {log_every: 5}\n", "base.yaml")
    child = write("extends: base.yaml\nname: child\nseed: 2\nlog_every: 2\nmini: {seed: 3, threads: 3}\n", "child.yaml")

    def values(*overrides: str, mini: bool = False) -> tuple:
        r = load_recipe(child, overrides, mini)
        return r.name, r.seed, r.log_every, r.threads, r.batch

    assert values() == ("child", 2, 2, 1, 8)
    assert values(mini=True) == ("child", 3, 5, 3, 8)
    assert values("seed=4", "batch=5", mini=True) == ("child", 4, 5, 3, 5)
    assert values("seed=4", "seed=6") == ("child", 6, 2, 1, 8)


def test_sections_merge_and_lists_are_replaced():
    write(SMALL + "network: {arch: a, mult: [1, 2], deep: {x: 1, y: 2}}\nfake: {loss: l1}\n", "base.yaml")
    r = load_recipe(
        write("extends: base\nnetwork: {mult: [3], deep: {y: 3}}\nfake: {layers: 2}\noptim: {eps: 1}\n", "child.yaml")
    )
    assert r.network == {"arch": "a", "mult": [3], "deep": {"x": 1, "y": 3}}
    assert r.options == FakeOptions(loss="l1", layers=2)
    assert (r.optim.lr, r.optim.eps) == (0.001, 1.0)


def test_null_takes_back():
    write(
        SMALL
        + "seed: 3\npairs: {n: 3}\noptim_critic: {lr: 1}\nnetwork: {a: 1, b: ~}\nema: {half_life: 5}\nfake: {loss:"
        " l1}\n",
        "base.yaml",
    )
    child = (
        "extends: base.yaml\nseed: null\npairs: ~\nnetwork: {a: null}\nema: {half_life: ~, decay: 0.9, ramp:"
        " null}\nfake: null\n"
    )
    r = load_recipe(write(child, "child.yaml"), ["optim_critic=null"])
    assert r.seed == 0 and r.pairs is None and r.optim_critic is None
    assert r.network == {"b": None}
    assert (r.ema.half_life, r.ema.decay, r.ema.ramp) == (None, 0.9, None)
    assert r.options == FakeOptions()


def test_null_in_mini_and_set():
    text = "seed: 3\nema: {half_life: 5}\nmini: {seed: null, ema: {half_life: null, decay: 0.5}}\n"
    assert recipe(text).seed == 3
    small = recipe(text, mini=True)
    assert small.seed == 0 and small.ema.half_life is None and small.ema.decay == 0.5
    assert recipe(text, "seed=", "teacher=null").seed == 0
    assert recipe(text, "seed=", "teacher=null").teacher is None


def test_a_changed_method_leaves_its_section_with_null():
    write(SMALL + "fake: {loss: l1}\n", "base.yaml")
    child = "extends: base.yaml\nmethod: two-player\ntwo_player: {rate: 1}\n"
    assert "base.yaml:7: fake: unknown key: it belongs to method 'fake'" in failure(write(child, "child.yaml")).message
    assert load_recipe(write(child + "fake: null\n", "child.yaml")).options.rate == 1.0


def test_extends_by_name_and_in_another_folder(monkeypatch):
    shipped = Path("shipped")
    write(SMALL, "shipped/basic.yaml")
    monkeypatch.setattr(recipe_names_of, "recipe_folders", lambda: [shipped])
    assert load_recipe(write("extends: basic\nseed: 3\n", "mine/child.yaml")).seed == 3
    write(SMALL + "seed: 5\n", "mine/near.yaml")
    assert load_recipe(write("extends: near.yaml\n", "mine/child.yaml")).seed == 5


def test_problems_name_the_file_they_are_in():
    write(SMALL + "sed: 3\n", "base.yaml")
    error = failure(write("extends: ../base.yaml\n\nbatch: 0\n", "sub/child.yaml"))
    assert sorted(error.message.splitlines()) == [
        "sub/../base.yaml:7: sed: unknown key; did you mean 'seed'?",
        "sub/child.yaml:3: batch: expected an integer >= 1, got 0",
    ]


def test_what_both_files_lack_is_missing_in_the_one_that_was_asked_for():
    write(SMALL.replace("batch: 8\n", ""), "base.yaml")
    assert failure(write("extends: base.yaml\n")).message == "r.yaml:1: batch: missing; expected an integer >= 1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: child.yaml", "r.yaml:1: extends: child.yaml itself extends 'base.yaml'; only one level is allowed"),
        ("extends: r.yaml", "r.yaml:1: extends: r.yaml is this file itself"),
        ("extends: [base.yaml]", "r.yaml:1: extends: expected the path or name of one recipe, got a list"),
        ("name: x\nextends: nothing.yaml", "r.yaml:2: extends: no such recipe file: 'nothing.yaml'"),
        ("extends: bse", "r.yaml:1: extends: unknown recipe 'bse'"),
    ],
)
def test_bad_extends(text, message):
    write(SMALL, "base.yaml")
    write("extends: base.yaml\n", "child.yaml")
    assert failure(write(text + "\n")).message.startswith(message)


# ---- mini ------------------------------------------------------------------------------------------------------------


def test_mini_is_merged_only_when_asked_for():
    text = "fake: {loss: l1}\nmini: {batch: 2, optim: {eps: 1}, fake: {layers: 1}, pairs: {n: 3}}\n"
    full, small = recipe(text), recipe(text, mini=True)
    assert (full.batch, full.pairs, full.options.layers) == (8, None, "all")
    assert (small.batch, small.optim.lr, small.optim.eps, small.options) == (
        2,
        0.001,
        1.0,
        FakeOptions(loss="l1", layers=1),
    )
    assert small.pairs is not None and small.pairs.n == 3


def test_mini_without_a_section():
    for text in ("", "mini:\n"):
        with pytest.raises(UserError, match=r"r\.yaml has no `mini:` section"):
            recipe(text, mini=True)


def test_a_typo_is_reported_with_mini_too():
    assert lines("mini: {optim: {lrr: 3}}\n", mini=True) == [
        "r.yaml:7: mini.optim.lrr: unknown key; did you mean 'lr'?"
    ]
    assert lines("sed: 3\nmini: {sed: 3}\n") == [
        "r.yaml:7: sed: unknown key; did you mean 'seed'?",
        "r.yaml:8: mini.sed: unknown key; did you mean 'seed'?",
    ]


def test_a_conflict_that_mini_makes():
    assert lines("ema: {half_life: 5}\nmini: {ema: {decay: 0.9}}\n")[0].startswith(
        "r.yaml:8: mini.ema.decay: half_life is given too"
    )
    assert lines("micro_batch: 4\nmini: {batch: 2}\n") == [
        "r.yaml:7: micro_batch: expected at most batch = 2, got 4 (with --mini)"
    ]


def test_set_may_mend_a_file_but_not_break_its_mini():
    text = SMALL.replace("teacher: digits", "teacher: ''") + "mini: {fake: {loss: l1}}\n"
    assert load_recipe(write(text), ["teacher=x"]).teacher == "x"
    assert load_recipe(write(text), ["teacher=x", "method=two-player", "two_player.rate=1"]).options.rate == 1.0


# ---- --set -----------------------------------------------------------------------------------------------------------


def test_set_values_are_yaml():
    r = recipe(
        "",
        "optim.lr=1e-4",
        "optim.betas=[0, 0.5]",
        "pairs.n=3",
        "network={arch: x, y: 1}",
        "network.y=2",
        "title=a=b",
        "fake.loss=l1",
        "data.path=#1",
        "compile=true",
        "name='010'",
    )
    assert r.optim.lr == 1e-4 and r.optim.betas == (0.0, 0.5)
    assert r.pairs is not None and r.pairs.n == 3
    assert (
        r.network == {"arch": "x", "y": 2}
        and r.title == "a=b"
        and r.options.loss == "l1"
        and r.compile is True
        and r.name == "010"
    )
    assert r.data is not None and r.data.path == "#1"


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("optim.lr", "--set optim.lr: expected key=value, for example optim.lr=1e-4"),
        ("=3", "--set =3: expected key=value, for example optim.lr=1e-4"),
        ("optim..lr=3", "--set optim..lr: expected key=value, for example optim.lr=1e-4"),
        ("optim.lrr=3", "--set optim.lrr: unknown key; did you mean 'lr'?"),
        ("optim={lrr: 3}", "--set optim: optim.lrr: unknown key; did you mean 'lr'?"),
        ("optim={lr: 3, lr: 4}", "--set optim: optim.lr: given twice"),
        ("batch=abc", "--set batch: expected an integer >= 1, got 'abc'"),
        ("batch=", "--set batch: expected an integer >= 1, got nothing"),
        ("batch.x=1", "--set batch.x: batch: expected an integer >= 1, got a section"),
        ("pairs.seed=1", "--set pairs.seed: pairs.n: missing; expected an integer >= 1"),
        ("fake.inner.weight=-1", "--set fake.inner.weight: expected a number >= 0, got -1"),
        ("two-player.rate=1", "--set two-player.rate: two-player: unknown key; known here: "),
        (
            "mini.batch=2",
            "--set mini.batch: cannot be set; it belongs in the file (set the key itself: --set comes after mini)",
        ),
        ("extends=x", "--set extends: cannot be set; it belongs in the file"),
        ("name=[1,", "--set name: cannot read '[1,': a bracket is opened here"),
        ("name=*x", "--set name: cannot read '*x': aliases are not used in recipes"),
    ],
)
def test_bad_set(override, line):
    (found,) = lines("", override)
    assert found == line or (found.startswith(line) and line.endswith((" ", "here", "recipes")))


# ---- not a recipe ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"name: a\n\tmethod: x\n", "r.yaml:2: a tab; YAML is indented with spaces"),
        (b"optim:\n\tlr: 3\n", "r.yaml:2: a tab; YAML is indented with spaces"),
        (b"seed: 1\nname: 'a\nmethod: x\n", "r.yaml:2: a quote is opened here and never closed"),
        (b"name: a: b\n", "r.yaml:1: a second `:` in one line, or wrong indentation; put texts with `: ` in quotes"),
        (b"seed: 1\nname: [a,\nmethod: x\n", "r.yaml:2: a bracket is opened here and not closed as it should be"),
        (b"name: a\n---\nname: b\n", "r.yaml:2: a second document begins here (`---`); a recipe is one document"),
        (b"name: a\nx: @y\n", "r.yaml:2: not YAML: found character '@' that cannot start any token"),
        (b"name: &a x\ntitle: *a\n", "r.yaml:2: aliases are not used in recipes; write the value out"),
        (b"# head\n- a\n- b\n", "r.yaml:2: not a recipe: expected lines of `key: value`, got a list"),
        (b"just words\n", "r.yaml:1: not a recipe: expected lines of `key: value`, got a text"),
        (b"", "r.yaml is empty; a recipe has at least name, method, optim, batch and images"),
        (b"# nothing\n---\n", "r.yaml is empty; a recipe has at least name, method, optim, batch and images"),
        (b"\x89PNG\r\n\x1a\n\x00", "r.yaml is not a recipe: it is not a text in UTF-8 (byte 0)"),
        (b"name: a\nseed: \x00\n", "r.yaml:2: not a YAML text: it has the control character 0"),
        (b"a: " + b"[" * 5000, "r.yaml: not a recipe: nested too deeply"),
        (b" " * 1_000_001, "r.yaml is not a recipe: it is larger than 1000 kB"),
    ],
)
def test_not_a_recipe(content, message):
    Path("r.yaml").write_bytes(content)
    error = failure("r.yaml")
    assert error.message.startswith(message) and "\n" not in error.message


def test_keys_and_values_that_cannot_be():
    assert lines(
        "title: a\ntitle: b\nema: {ramp: 1, ramp: 1}\n1: x\n[a]: x\nseed: !!int abc\nthreads: !foo 3\nnetwork: !bar {a:"
        " 1}\n"
    ) == [
        "r.yaml:8: title: given twice (first in line 7)",
        "r.yaml:9: ema.ramp: given twice (first in line 9)",
        "r.yaml:10: a key must be a text, not 1",
        "r.yaml:11: a key must be a text, not a list or section",
        "r.yaml:12: seed: cannot read 'abc' as int",
        "r.yaml:13: threads: cannot read '3' as !foo",
        "r.yaml:14: network: tags like !bar are not used in recipes",
    ]
    (line,) = lines(f"seed: {'9' * 5000}\n")  # more digits than int() takes
    assert line.startswith("r.yaml:7: seed: cannot read '999") and len(line) < 120
    assert lines('title: "\\ud800"\n') == ["r.yaml:7: title: cannot read '\\ud800' as str"]


def test_a_key_on_a_line_of_its_own_is_found():
    assert lines("network:\n  a:\n    - 1\n\noptim_critic:\n  lr:\n    - 3\n") == [
        "r.yaml:12: optim_critic.lr: expected a number > 0, got a list"
    ]


def test_windows_text_and_byte_order_mark():
    Path("r.yaml").write_bytes(b"\xef\xbb\xbf" + (SMALL + "sed: 3\n").replace("\n", "\r\n").encode())
    assert failure("r.yaml").message == "r.yaml:7: sed: unknown key; did you mean 'seed'?"


def test_folder_missing_and_unreadable(monkeypatch):
    Path("run").mkdir()
    assert failure("run").message == "run is a folder; expected a recipe (.yaml)"
    write(SMALL, "run/recipe.yaml")
    assert failure("run").hint == "did you mean run/recipe.yaml?"
    assert failure("no/where.yaml").message == "no such recipe file: 'no/where.yaml'"
    assert failure("x" * 5000).message.startswith("unknown recipe")
    write(SMALL)

    def refuse(*args, **more):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    assert failure("r.yaml").message == "cannot read r.yaml: Permission denied"


def test_compose_alone():
    assert compose("", "x") is None and compose("a: 1", "x") is not None


# ---- finding ---------------------------------------------------------------------------------------------------------


def test_find_by_path_and_name(monkeypatch):
    write(SMALL, "one/quick.yaml")
    write(SMALL, "one/slow.yaml")
    write(SMALL, "two/quick.yaml")
    write("x", "one/tables/t.yaml")
    monkeypatch.setattr(recipe_names_of, "recipe_folders", lambda: [Path("one"), Path("two")])
    assert recipe_names() == ["quick", "slow"]
    for name in ("quick", "quick.yaml", "recipes/quick", "recipes/quick.yaml"):
        assert find_recipe(name) == (Path("one/quick.yaml"), None)
    assert find_recipe("two/quick.yaml").path == Path("two/quick.yaml") == find_recipe(Path("two/quick.yaml")).path
    write(SMALL, "recipes/quick.yaml")
    assert find_recipe("recipes/quick.yaml").path == Path("recipes/quick.yaml")  # a file as it is given comes first
    Path("slow").mkdir()
    assert find_recipe("slow").path == Path("one/slow.yaml")  # a folder of that name is not in the way


@pytest.mark.parametrize("name", ["quik", "recipes/quik.yaml", "recipes/quik"])
def test_unknown_name(name, monkeypatch):
    write(SMALL, "one/quick.yaml")
    monkeypatch.setattr(recipe_names_of, "recipe_folders", lambda: [Path("one")])
    with pytest.raises(UserError) as caught:
        find_recipe(name)
    assert (
        caught.value.message == "unknown recipe 'quik': did you mean 'quick'?" and caught.value.hint == "known: quick"
    )


@pytest.mark.parametrize("name", ["", "quik.yaml", "a/quik", "../quick"])
def test_no_such_file(name, monkeypatch):
    write(SMALL, "one/quick.yaml")
    monkeypatch.setattr(recipe_names_of, "recipe_folders", lambda: [Path("one")])
    with pytest.raises(UserError, match="no such recipe file") as caught:
        find_recipe(name)
    assert caught.value.hint == "known recipes: quick"
    assert "did you mean recipe 'quick'?" in caught.value.message or not name


def test_folders_of_a_checkout_and_of_an_installed_package(monkeypatch):
    import d2o.shipped

    for folder in ("site/d2o/recipes/builtin", "site/recipes", "checkout/d2o", "checkout/recipes"):
        Path(folder).mkdir(parents=True)
    write("", "checkout/pyproject.toml")
    monkeypatch.setattr(d2o.shipped, "__file__", str(Path("site/d2o/shipped.py").absolute()))
    assert recipe_folders() == [Path("site/d2o/recipes/builtin").resolve()]  # not a `recipes` package of somebody else
    monkeypatch.setattr(d2o.shipped, "__file__", str(Path("checkout/d2o/shipped.py").absolute()))
    assert recipe_folders() == [Path("checkout/recipes").resolve()]


# ---- comparing and describing ----------------------------------------------------------------------------------------


def test_diff():
    a = recipe("optim_critic: {lr: 1}\n").resolved()
    assert diff_recipes(a, a) == []
    b = recipe(
        "",
        "optim.lr=0.002",
        "teacher=other",
        "optim.betas=[0, 0.5]",
        "network.arch=x",
        "compile=true",
        "fake.loss=l1",
        "title=",
    ).resolved()
    assert diff_recipes(a, b) == [
        "teacher: digits -> other",
        'network: null -> {"arch": "x"}',
        "optim.lr: 0.001 -> 0.002",
        "optim.betas: [0.9, 0.999] -> [0.0, 0.5]",
        (
            'optim_critic: {"name": "adam", "state": "fp32", "lr": 1.0, "betas": [0.9, 0.999], "eps": 1e-08,'
            ' "weight_decay": 0.0,'
            ' "no_decay": [], "decays": {}, "schedule": "constant", "warmup": 0, "final_lr": 0.0,'
            ' "clip_norm": null, "clip_value": null} -> null'
        ),
        "compile: false -> true",
        "fake.loss: mse -> l1",
    ]


def test_diff_of_odd_values():
    assert diff_recipes({"a": 1, "n": math.nan, "t": (1, 2)}, {"a": 1.0, "n": math.nan, "t": [1, 2]}) == []
    assert diff_recipes({"a": 1, "b": "", "c": [True]}, {"a": True, "b": " ", "c": [1], "d": 0}) == [
        "a: 1 -> true",
        'b: "" -> " "',
        "c: [true] -> [1]",
        "d: absent -> 0",
    ]


def test_every_key_is_described_with_its_default():
    rows = {row.key: row for row in describe("fake")}
    assert (
        list(rows)[:3] == ["name", "title", "method"]
        and {"optim.lr", "fake.loss", "fake.inner.weight", "extends", "mini"} <= rows.keys()
    )
    assert all(row.description for row in rows.values())
    sections = {"student", "optim", "checkpoint", "extends", "variants", "mini"}
    required = {
        "name",
        "method",
        "batch",
        "images",
        "data.path",
        "pairs.n",
        "optim.lr",
        "optim_critic.lr",
        "eval.every",
        "preview.every",
        "tracker.name",
        "student.lora.rank",
    }
    for key, row in rows.items():
        if not key.startswith("fake") and key not in sections | required:
            assert "(default" in row.description, key
    assert rows["optim.lr"].expected == "a number > 0" and rows["log_every"].description.endswith("(default 20)")
    assert "fake.loss" not in {row.key for row in describe()}


# ---- anything at all -------------------------------------------------------------------------------------------------

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(1 - 2**63, 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


@pytest.mark.long
@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), PLAIN, max_size=3))
@settings(max_examples=50)
def test_any_free_section_survives_the_file(network):
    r = Recipe.from_dict(
        {"name": "x", "method": "fake", "optim": {"lr": 1}, "batch": 1, "images": 1, "network": network}
    )
    again = load_recipe(write(r.to_yaml()))
    assert again == r and diff_recipes(again.resolved(), r.resolved()) == []


@given(st.data())
@settings(max_examples=50)
def test_a_damaged_file_is_a_user_error_or_a_recipe(data):
    text = bytearray((SMALL + "fake: {scales: [1, 2]}\nmini:\n  batch: 2\n").encode())
    for _ in range(data.draw(st.integers(1, 3))):
        at, end = data.draw(st.integers(0, len(text))), data.draw(st.integers(0, 3))
        text[at : at + end] = data.draw(
            st.binary(max_size=3)
            | st.sampled_from([b"\t", b"'", b"{", b"]", b": ", b"- ", b"\n", b"!!", b"&a", b"|", b"null"])
        )
    Path("r.yaml").write_bytes(text)
    try:
        assert isinstance(load_recipe("r.yaml"), Recipe)
    except UserError as error:
        assert error.message.strip() and "Traceback" not in error.message
