"""The score on the way: by a protocol, announced, refused before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from d2o.cli.app import main
from d2o.evaluation import paper_protocols
from d2o.evaluation.presets import Preset
from d2o.evaluation.quick import Evaluator
from d2o.interop.safetensors_io import read_meta
from d2o.recipes.load import load_recipe
from d2o.teachers.base import Spec
from tests.helpers import tiny_recipe

RECIPE = """
name: test
method: ode
teacher: {teacher}
pairs: {{path: {pairs}, n: 32, solver: euler, steps: 2, batch: 32, shard_size: 32}}
optim: {{lr: 1.0e-3}}
batch: 16
images: 96
log_every: 1
threads: 1
eval: {{every: 40, protocol: tiny, seed: 7, batch: 20}}
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    settings = {"n": 40, "resize": "none", "quantize": "dmd_trunc", "labels": "balanced", "repeats": 3, "seed": 0}
    for name, count in (("tiny", 1797), ("other", 50_000)):
        preset = Preset(name, "a paper", "digits", ("is", "fd"), settings, "real:digits", count, "digits", "d2o")
        monkeypatch.setitem(paper_protocols.PRESETS, name, preset)
    return tiny_recipe(tmp_path, RECIPE)


def d2o(*arguments: object) -> int:
    with pytest.raises(SystemExit) as done:
        main([str(a) for a in arguments])
    return done.value.code  # type: ignore[return-value]


@pytest.mark.long
def test_a_protocol_gives_network_number_reference_and_the_making_of_images(recipe, tmp_path, capsys):
    run = tmp_path / "run"
    assert d2o("train", recipe, "--out", run) == 0
    said = capsys.readouterr().err
    told = (
        "Fréchet distance (protocol tiny, digits) of 40 images to real:digits, every 40 images: 120 images of 1 network"
        " call each, beside"
    )
    assert f"{told} training on 96" in said and said.index("evaluation:") < said.index(
        "train "
    )  # before it costs anything
    resolved = load_recipe(run / "recipe.yaml")
    chosen = {"channels_last": resolved.channels_last}  # what `auto` came to
    assert resolved == load_recipe(recipe).model_copy(update=chosen)
    assert (resolved.eval.extractor, resolved.eval.n, resolved.eval.reference) == ("digits", 40, "real:digits")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scores = [line["eval"]["fd"] for line in lines if "eval" in line]
    assert [line["images"] for line in lines if "eval" in line] == [48, 80, 96]
    best = read_meta(run / "checkpoints" / "best.safetensors")
    assert best["metrics"]["fd"] == min(scores)
    # `d2o eval` of the last checkpoint under the same settings finds the same number, and another one under its own
    again = [
        "eval",
        run / "checkpoints" / "last.safetensors",
        "--against",
        "real:digits",
        "--extractor",
        "digits",
        "--metrics",
        "fd",
        "--n",
        40,
        "--seed",
        7,
        "--batch",
        20,
        "--no-teacher-distance",
    ]
    found = []
    for more in (["--quantize", "dmd_trunc", "--labels", "balanced"], []):
        assert d2o(*again, *more, "--json", tmp_path / "eval.json") == 0
        found.append(json.loads((tmp_path / "eval.json").read_text())["metrics"]["fd"]["value"])
    assert found[0] == pytest.approx(scores[-1], rel=1e-6) and abs(found[1] - found[0]) > 1e-3


def test_further_metrics_are_those_of_d2o_eval(recipe, tmp_path, capsys):
    run = tmp_path / "run"
    also = ["--set", "eval.also=[is@digits, prdc]", "--set", "eval.every=96"]
    assert d2o("train", recipe, "--out", run, *also) == 0
    assert "(protocol tiny, digits), is@digits, prdc of 40 images" in capsys.readouterr().err
    (scores,) = [
        line["eval"] for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "eval" in line
    ]
    last, made = run / "checkpoints" / "last.safetensors", ["--quantize", "dmd_trunc", "--labels", "balanced"]
    same = ["--against", "real:digits", "--extractor", "digits", "--n", 40, "--seed", 7, "--batch", 20, *made]
    asked = ["--metrics", "fd,is@digits,prdc", "--no-teacher-distance", "--json", tmp_path / "eval.json"]
    assert d2o("eval", last, *same, *asked) == 0
    metrics = json.loads((tmp_path / "eval.json").read_text())["metrics"]
    keys = {"fd", "accuracy", "is@digits", "precision", "recall", "density", "coverage"}
    assert scores == pytest.approx({key: metrics[key]["value"] for key in keys}, rel=1e-6)
    assert d2o("eval", "--curves", tmp_path / "is.svg", "--run", run, "--metrics", "is@digits") == 0
    assert "is@digits" in (tmp_path / "is.svg").read_text() and "highest value" in (tmp_path / "is.svg").read_text()


@pytest.mark.parametrize(
    ("also", "words"),
    [
        ("[ist]", "unknown metric 'ist'"),
        ("[prompt-accuracy]", "metric prompt-accuracy needs prompts; the student has none"),
        ("[rel-fd]", "needs more than the student's images"),
        ("[is@digits, kid@digits]", "a subset has 1000 images, the smaller set 40"),
    ],
)
def test_further_metrics_that_cannot_be_had_are_refused_at_once(recipe, tmp_path, capsys, also, words):
    assert d2o("train", recipe, "--out", tmp_path / "run", "--set", f"eval.also={also}") == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_what_is_missing_or_wrong_is_told_before_anything_is_made(recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("D2O_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("D2O_OFFLINE", "1")
    for protocol, words in (
        ("sida_cifar10", ("weights 'inception'", "put it at", "--set eval=null")),
        ("other", ("not the protocol other", "images of the reference: 1,797")),
    ):
        assert d2o("train", recipe, "--out", tmp_path / "run", "--set", f"eval.protocol={protocol}") == 2
        err = capsys.readouterr().err
        assert all(word in err for word in words) and "--weights" not in err
    assert not (tmp_path / "run").exists() and not (tmp_path / "pairs").exists()
    assert d2o("train", recipe, "--plan", "--set", "eval.protocol=sida_cifar10") == 1
    out = capsys.readouterr().out
    assert "evaluation (3 x 50,000 images)" in out and "reference edm-cifar10 is not on this machine" in out


def test_images_that_the_extractor_does_not_take_are_refused_at_once(tmp_path, capsys):
    large = tmp_path / "large.yaml"
    large.write_text("""
name: large
method: edm
network: {arch: ddpmpp, model_channels: 16, channel_mult: [1], num_blocks: 1, attn_resolutions: [], dropout: 0.0}
data: {path: real:digits, resolution: 12, limit: 16}
optim: {lr: 1.0e-3}
batch: 8
images: 32
eval: {every: 8, extractor: digits, n: 8, reference: real:digits}
""")
    assert d2o("train", large, "--out", tmp_path / "large") == 2
    assert "12x12 pixels" in capsys.readouterr().err
    assert not (tmp_path / "large" / "checkpoints").exists()


def test_the_reference_can_be_the_images_that_are_trained_on():
    """As training reads them: all digits are what `real:digits` stands for; of a part of them the distance is
    another."""
    spec, score = Spec("s", (1, 8, 8)), {"n": 60, "seed": 0}
    data = [load_recipe("spi_gan_digits", changes).data for changes in ([], ["data.limit=300"])]
    whole, part = (
        Evaluator("digits", "data", data=section).score(lambda z, _: z.clamp(-1, 1), spec, **score)["fd"]
        for section in data
    )
    named = Evaluator("digits", "real:digits").score(lambda z, _: z.clamp(-1, 1), spec, **score)["fd"]
    assert whole == pytest.approx(named, rel=1e-3) and part != pytest.approx(named, rel=1e-3)


def test_a_recipe_is_scored_against_its_own_images(tmp_path, capsys, monkeypatch):
    settings = {"n": 60, "resize": "none", "quantize": "edm_round", "labels": "random", "repeats": 1}
    for count in (1797, 50_000):  # as the protocols of SPI-GAN, whose reference the user brings
        preset = Preset(
            f"own{count}",
            "a paper",
            "digits",
            ("fd",),
            settings,
            None,
            count,
            "digits",
            "d2o",
            (),
            {"against": "the digits"},
        )
        monkeypatch.setitem(paper_protocols.PRESETS, preset.name, preset)
        changes = [
            f"eval={{every: 16, protocol: own{count}, reference: data, n: 60}}",
            "images=16",
            "batch=8",
            "preview=null",
            "network.synthesis.base=64",
            "spi_gan.critic.base=64",
        ]
        arguments = [word for change in changes for word in ("--set", change)]
        assert d2o("train", "spi_gan_digits", "--out", tmp_path / f"own{count}", *arguments) == (
            0 if count == 1797 else 2
        )
    said = capsys.readouterr().err
    assert "of 60 images to the training images, every 16" in said
    assert "images of the reference: 1,797, the protocol has 50,000" in said
    assert read_meta(tmp_path / "own1797" / "checkpoints" / "best.safetensors")["metrics"]["fd"] > 0
    assert d2o("train", "sid_digits", "--mini", "--out", tmp_path / "sid", "--set", "eval.reference=data") == 2
    assert "eval: reference: data means the recipe's own images" in capsys.readouterr().err
