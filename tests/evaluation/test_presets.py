"""Protocols: what they settle, what contradicts them, what a result must be to stand beside a paper's number."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path

import pytest

from d2o.errors import UserError
from d2o.evaluation.known_metrics import parse_metrics
from d2o.evaluation.named_extractors import EXTRACTORS
from d2o.evaluation.named_references import REFERENCES
from d2o.evaluation.paper_protocols import PRESETS, find_preset, protocol_table
from d2o.evaluation.preset_check import check_result
from d2o.evaluation.presets import apply_preset
from d2o.evaluation.protocol import Settings
from d2o.interop.weights import WEIGHTS

SIDA = find_preset("sida_cifar10")
DOCS = Path(__file__).parents[2] / "docs" / "evaluation.md"


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_names_what_exists_and_settles_valid_options(name):
    preset = PRESETS[name]
    assert preset.name == name
    settings = Settings(**preset.settings)  # known options, values in range
    judged = preset.metrics in (("top1",), ("2afc",))  # of networks, which are given images as they are
    assert {"repeats", "resize", *(() if judged else ("n", "quantize"))} <= set(preset.settings)
    assert preset.extractors <= set(EXTRACTORS) and preset.extractor in (*EXTRACTORS, *([""] * judged))
    keys = {want.metric.name for want in parse_metrics(preset.metrics)}
    assert not keys & {"pr", "prdc"} or {"pr_k", "pr_dtype"} <= set(preset.settings)
    assert "is" not in keys or "is_mode" in preset.settings
    assert settings.seed == 0 or "seed" not in preset.settings
    if preset.reference is None:
        assert "against" in preset.needs
    else:
        published = REFERENCES[preset.reference]
        assert preset.extractors <= set(published.extractors)
        assert preset.n_ref in (None, published.n)
        assert published.images or not keys & {"pr", "dc", "prdc", "kid"}  # these need the reference's single images


def test_the_protocols_of_the_evaluation_sheet():
    """Section 13's numbers."""
    coco = find_preset("d2g_coco2014")
    assert (coco.settings["n"], coco.n_ref, coco.settings["resize"], coco.metrics) == (
        30_000,
        40_504,
        "256:lanczos",
        ("fid-clean", "clip-score"),
    )
    assert find_preset("d2g_coco2014_pr").settings["n"] == 10_000
    five = find_preset("d2g_coco2017")
    assert (five.settings["n"], five.settings["per_prompt"], five.settings["distance_n"]) == (5_000, 8, 5_000)
    assert not {"pr", "prdc", "dc"} & set(five.metrics)
    assert (SIDA.settings["n"], SIDA.settings["repeats"], SIDA.settings["report_as"], SIDA.reference) == (
        50_000,
        10,
        "mean",
        "edm-cifar10",
    )
    edm = find_preset("edm_imagenet64")
    assert (edm.settings["seed"], edm.settings["repeats"], edm.settings["report_as"], edm.n_ref) == (
        0,
        3,
        "min",
        1_281_167,
    )
    assert (find_preset("gdd_cifar10").settings["seed"], find_preset("gdd_cifar10").settings["is_mode"]) == (0, "adm")
    assert find_preset("gdd_relfid").metrics == ("fid", "rel-fid")
    assert (
        find_preset("spi_gan_church").settings["dc_k"] == 5
        and find_preset("spi_gan_church").extractor == "inception-legacy_pytorch"
    )


def test_the_table_in_the_documentation_is_that_of_the_presets():
    text = DOCS.read_text()
    body = text[text.index("<!-- protocols") : text.index("<!-- end of protocols -->")].splitlines()
    printed = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in body if line.startswith("|")]
    assert printed[:1] + printed[2:] == protocol_table()


def test_unknown_protocol():
    with pytest.raises(UserError) as caught:
        find_preset("sida_cifar")
    assert (
        caught.value.message == "unknown protocol 'sida_cifar': did you mean 'sida_cifar10'?"
        and "gdd_relfid" in caught.value.hint
    )


def test_applying_fills_in_what_the_protocol_settles_and_leaves_the_rest():
    options = apply_preset(
        SIDA,
        {"n": 50_000, "batch": 64, "device": "cuda", "solver": "euler", "against": "edm-cifar10", "metrics": ("fid",)},
    )
    assert options["repeats"] == 10 and options["against"] == "edm-cifar10" and options["extractor"] == "inception"
    assert (options["batch"], options["solver"], options["metrics"]) == (64, "euler", ("fid",))
    assert apply_preset(SIDA, {})["metrics"] == ("fid", "is")


def test_everything_that_contradicts_the_protocol_is_named():
    with pytest.raises(UserError) as caught:
        apply_preset(SIDA, {"n": 10_000})
    assert caught.value.message == "--n 10000 is not the protocol sida_cifar10 (n 50000)"
    assert caught.value.hint.startswith("leave the option away; or leave --protocol away")
    wrong = {
        "n": 10_000,
        "quantize": "dmd_trunc",
        "metrics": ("fid", "kid"),
        "against": "cifar10-test.zip",
        "report_as": "min",
        "batch": 7,
    }
    with pytest.raises(UserError) as caught:
        apply_preset(SIDA, wrong)
    assert (
        caught.value.message
        == "--n 10000, --quantize dmd_trunc, --metrics fid,kid, --against cifar10-test.zip, --report-as min are not the"
        " protocol sida_cifar10 (n 50000, quantize edm_round, metrics fid,is, against edm-cifar10, report_as mean)"
    )


def test_what_only_the_user_can_give_is_asked_for():
    with pytest.raises(
        UserError,
        match=r"needs --against \(the 40,504 .* of COCO 2014\) and --prompts \(30,000 of their captions, one a line\)",
    ):
        apply_preset(find_preset("d2g_coco2014"), {})
    assert (
        apply_preset(find_preset("d2g_coco2014"), {"against": "val2014/", "prompts": "c.txt"})["against"] == "val2014/"
    )


def record(**changes):
    """The protocol of a result that is SiDA's."""
    made = {
        "n_gen": 50_000,
        "seeds": [1_000_000, 1_499_999],
        "repeats": 10,
        "labels": None,
        "features": "inception/2048",
        "weights_sha256": WEIGHTS["inception"].sha256,
        "resize": "tf_bilinear299",
        "quantize": "edm_round",
        "ref": "edm-cifar10",
        "ref_kind": "statistics",
        "n_ref": 50_000,
        "ref_seeds": None,
        "ref_resize": None,
    }
    return made | changes


def test_a_result_of_the_protocol_passes_as_does_what_is_known_of_it_beforehand():
    assert check_result(SIDA, record()) == []
    assert (
        check_result(SIDA, record(weights_sha256=WEIGHTS["inception-nvidia"].sha256, labels="random")) == []
    )  # the same network
    assert check_result(SIDA, {"ref": "edm-cifar10", "n_ref": None, "features": "inception/2048"}) == []
    assert check_result(SIDA, {}) == []
    elsewhere = record(
        seeds=None, labels="own", quantize="as stored"
    )  # a folder of images: how they were made is not known
    assert check_result(SIDA, elsewhere) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_gen": 10_000}, "generated images: 10,000, the protocol has 50,000"),
        ({"repeats": 1}, "repeats: 1, the protocol has 10"),
        ({"n_ref": 10_000}, "images of the reference: 10,000, the protocol has 50,000"),
        ({"ref": "cifar10-test.zip"}, "reference: cifar10-test.zip, the protocol has edm-cifar10"),
        ({"quantize": "dmd_trunc"}, "quantize: dmd_trunc, the protocol has edm_round"),
        ({"labels": "balanced"}, "labels: balanced, the protocol has random"),
        (
            {"resize": "center_crop+lanczos256+tf_bilinear299"},
            "resize: center_crop+lanczos256+tf_bilinear299, the protocol has none",
        ),
        ({"features": "inception-clean/2048"}, "features: inception-clean, the protocol has inception"),
        ({"features": "lite0/1280", "weights_sha256": None}, "features: lite0, the protocol has inception"),
        (
            {"weights_sha256": "0" * 64},
            "weights of inception: sha256 000000000000... is no published file of this network",
        ),
        ({"is_mode": "adm"}, "is mode: adm, the protocol has edm_order"),
    ],
)
def test_each_ingredient_that_differs_is_named(changes, words):
    (piece,) = check_result(SIDA, record(**changes))
    assert piece.startswith(words)


def test_all_of_them_at_once_and_first_seeds_and_several_networks():
    assert len(check_result(SIDA, record(n_gen=5_000, n_ref=5_000, features="inception-clean/2048"))) == 3
    gdd = find_preset("gdd_cifar10")
    assert check_result(gdd, record(repeats=1, seeds=[0, 49_999])) == []
    assert check_result(gdd, record(repeats=1)) == ["first seed: 1,000,000, the protocol has 0"]
    coco = find_preset("d2g_coco2014")
    scored = record(
        n_gen=30_000, repeats=1, quantize="dmd_trunc", ref="val2014/", n_ref=40_504, features="inception-clean/2048"
    )
    assert check_result(coco, scored | {"resize": "center_crop+lanczos256+clean_pil299"}) == []
    assert check_result(coco, scored | {"resize": "center_crop+bicubic256+clean_pil299"})[0].startswith(
        "resize: center_crop+bicubic256"
    )
    two = find_preset("sida_edm2_512")
    both = record(features="inception/2048, dinov2_vitl14/1024", ref="edm2-img512", n_ref=1_281_167)
    assert (
        check_result(two, both | {"weights": {"inception": WEIGHTS["inception"].sha256, "dinov2_vitl14": "1" * 64}})
        == []
    )
    assert (
        check_result(two, both | {"features": "dinov2_vitl14/1024", "weights_sha256": "1" * 64}) == []
    )  # --metrics fd-dinov2 alone
    assert check_result(two, both | {"weights": {"inception": "1" * 64}})[0].startswith("weights of inception")


def test_settings_are_named_as_the_options_are():
    """What a preset settles reaches the measurement: every key is a setting, or one of the request's."""
    known = {field.name for field in fields(Settings)} | {"metrics", "extractor", "against"}
    assert {key for preset in PRESETS.values() for key in preset.fixed} <= known
    assert asdict(Settings(**SIDA.settings))["is_mode"] == "edm_order"
