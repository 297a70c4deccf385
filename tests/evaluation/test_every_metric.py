"""Every metric through `evaluate_all`, with small stand-ins where the real networks weigh gigabytes: values against the
functions behind them, options that change them, and what is refused before any image is made."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from d2o.condition import Condition
from d2o.data.draws import draw
from d2o.data.images import open_images
from d2o.errors import UserError
from d2o.evaluation import named_extractors, paper_protocols, preset_check, subjects, tools
from d2o.evaluation.extractor import Extractor
from d2o.evaluation.known_metrics import METRICS, parse_metrics
from d2o.evaluation.leaks import leak_notes
from d2o.evaluation.named_extractors import load_extractor
from d2o.evaluation.prepare import parse_preparation, quantize
from d2o.evaluation.presets import Preset
from d2o.evaluation.probes import digit_in
from d2o.evaluation.protocol import Settings
from d2o.evaluation.request import Request
from d2o.evaluation.run import evaluate_all
from d2o.evaluation.statistics import Statistics
from d2o.evaluation.statistics_files import save_statistics
from d2o.evaluation.tools import Tools
from d2o.metrics.diversity import dream_diversity
from d2o.metrics.frechet import Moments, frechet_distance
from d2o.metrics.inception_score import inception_score
from d2o.metrics.kid import kid
from d2o.metrics.prdc import manifold
from d2o.students.base import load_student, save_student
from tests.helpers import SPEC, TinyText, tiny_student, tiny_teacher

SMALL = Settings(n=60, seed=7, batch=32, distance_n=12, kid_size=50, kid_subsets=5)


def evaluate(*xs: str | Path, settings: Settings = SMALL, **request) -> list[dict]:
    request = {"teacher_distance": False, "grid": False, **request}
    return [e.record for e in evaluate_all(Request([str(x) for x in xs], **request), settings)]


class Mean(Extractor):
    """Takes any image; its features are means over a 2x2 grid of each channel, brighter for no reason but to be told
    apart by its name."""

    def __init__(self, name: str, weights: Path | None, device, classes: int = 0):
        outputs = ("features", "spatial", "logits") if classes else ("features", "spatial")
        super().__init__(name, 12, f"{len(name):064d}", device, resize="mean2", classes=classes, outputs=outputs)

    def run(self, images, wanted):
        grid = torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)
        return {name: grid if name == "features" else grid[:, :7] for name in wanted}


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Extractors and models whose weights cannot be here."""
    for name in ("inception", "inception-clean", "inception-legacy_pytorch", "dinov2_vitl14", "clip", "lite0"):
        monkeypatch.setitem(
            named_extractors.EXTRACTORS, name, lambda name, weights, device: Mean(name, weights, device, classes=7)
        )
    monkeypatch.setitem(named_extractors.EXTRACTORS, "dreamsim", Mean)
    monkeypatch.setattr(tools, "ClipScore", StandInClip)
    monkeypatch.setattr(tools, "load_pair_distance", lambda name, weights, device: StandInDistance(name))


class StandInClip:
    sha256 = "c" * 64

    def __init__(self, name: str, weights: Path | None, device):
        self.name = name

    def score(self, images, prompts):
        return torch.tensor([len(prompt) / 100 for prompt in prompts])


class StandInDistance:
    sha256 = "d" * 64

    def __init__(self, name: str):
        self.name, self.space = name, "latent" if name.startswith("latent") else "pixel"

    def __call__(self, a, b):
        return (a.float() - b.float()).abs().flatten(1).mean(1)


@pytest.fixture
def text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The teacher "tiny-sd" is one that takes text and works in latents; returns a file of prompts."""
    monkeypatch.setattr(subjects, "load_teacher", lambda name, device: TinyText())
    (tmp_path / "prompts.txt").write_text("one\nthe two\nand three\n")
    return tmp_path / "prompts.txt"


def both_sides(student: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of the student's images and of the real ones, by hand."""
    extractor = load_extractor("digits")
    images = quantize(load_student(student)(*draw(7, 0, 60, SPEC.shape, 10, "random")))
    return extractor.features(images), extractor.features(open_images("real:digits").images(slice(None)))


def test_kid_prdc_and_is_are_those_of_their_functions(digits: Path, student: Path) -> None:
    (record,) = evaluate(student, against="real:digits", metrics=["kid", "prdc", "is@digits"])
    fake, real = both_sides(student)
    got = record["metrics"]
    assert (
        got["kid"]["value"] == pytest.approx(kid(fake, real, 5, 50).mean, rel=1e-4) and got["kid"]["error"] == "subsets"
    )
    found = manifold(real, fake, 3, 5)
    for key in ("precision", "recall", "density", "coverage"):
        assert got[key]["value"] == pytest.approx(getattr(found, key), abs=0.02) and got[key]["better"] == "higher"
    logits = load_extractor("digits").logits(quantize(load_student(student)(*draw(7, 0, 60, SPEC.shape, 10, "random"))))
    assert (
        got["is@digits"]["value"] == pytest.approx(inception_score(logits).mean, rel=1e-4)
        and got["is@digits"]["label"] == "IS(digits)"
    )
    assert (got["precision"]["k"], got["precision"]["inside"], got["density"]["k"], got["density"]["inside"]) == (
        3,
        "<=",
        5,
        "<",
    )
    assert got["precision"]["n_ref"] == 1797 and got["kid"]["label"] == "KID(digits)"


def test_pr_and_dc_alone_equal_prdc(digits: Path, student: Path) -> None:
    options = replace(SMALL, pr_k=4, dc_k=2, pr_dtype="float64")
    (apart,) = evaluate(student, against="real:digits", metrics=["pr", "dc"], settings=options)
    (together,) = evaluate(student, against="real:digits", metrics=["prdc"], settings=options)
    assert {k: e["value"] for k, e in apart["metrics"].items() if "k" in e} == {
        k: e["value"] for k, e in together["metrics"].items() if "k" in e
    }
    assert apart["metrics"]["recall"]["k"] == 4 and apart["metrics"]["coverage"]["dtype"] == "float64"


@pytest.mark.long
def test_frechet_by_class(digits: Path, student: Path) -> None:
    (record,) = evaluate(student, against="real:digits", metrics=["fd-class"], settings=replace(SMALL, n=300))
    entry = record["metrics"]["fd-class"]
    assert len(entry["per_class"]) == 10 and entry["value"] == pytest.approx(np.mean(list(entry["per_class"].values())))
    images, labels = load_student(student), draw(7, 0, 300, SPEC.shape, 10, "random")
    real, extractor = open_images("real:digits"), load_extractor("digits")
    sides = []
    for pictures, classes in ((quantize(images(*labels)), labels[1]), (real.images(slice(None)), real.labels)):
        stream = Moments(16)
        stream.update(extractor.features(pictures[classes == 3]))
        sides.append(stream)
    by_hand = frechet_distance(sides[0].mean, sides[0].cov, sides[1].mean, sides[1].cov)
    assert entry["per_class"]["3"] == pytest.approx(by_hand, rel=1e-3)
    with pytest.raises(UserError, match="no class has more than 16 images"):
        evaluate(student, against="real:digits", metrics=["fd-class"], settings=replace(SMALL, n=20))


def test_names_and_n_are_those_of_the_literature(stand_ins: None, digits: Path, student: Path) -> None:
    wanted = ["fid", "fid-clean", "fid-pytorch", "fd-dinov2", "clip-fid", "sfid", "is", "fd@lite0", "kid@lite0"]
    (record,) = evaluate(student, against="real:digits", metrics=wanted)
    labels = {key: entry["label"] for key, entry in record["metrics"].items() if "label" in entry}
    assert labels == {
        "fid": "FID (n = 60)",
        "fid-clean": "clean-FID (n = 60)",
        "fid-pytorch": "pytorch-FID (n = 60)",
        "fd-dinov2": "FD-DINOv2 (n = 60)",
        "clip-fid": "CLIP-FID (n = 60)",
        "sfid": "sFID (n = 60)",
        "is": "IS (n = 60)",
        "fd@lite0": "FD(lite0)",
        "kid@lite0": "KID(lite0)",
    }
    assert set(record["protocol"]["weights"]) == {
        "inception",
        "inception-clean",
        "inception-legacy_pytorch",
        "dinov2_vitl14",
        "clip",
        "lite0",
    }
    assert record["protocol"]["resizes"]["clip"] == "mean2" and "digits" not in record["protocol"]["features"]
    (thousands,) = evaluate(student, against="real:digits", metrics=["fid"], settings=replace(SMALL, n=2000, batch=500))
    assert thousands["metrics"]["fid"]["label"] == "FID-2k"


def test_statistics_of_the_published_files(stand_ins: None, digits: Path, student: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 40, 12))
    mu, sigma = a.mean(0) + 100, np.cov(a.T)
    np.savez(tmp_path / "edm.npz", mu=mu, sigma=sigma)
    (record,) = evaluate(student, against=str(tmp_path / "edm.npz"), metrics=["fid"])
    assert record["metrics"]["fid"]["value"] > 0 and any(
        "doesn't say which weights" in note for note in record["notes"]
    )
    with pytest.raises(UserError, match=r"metric kid: .*holds statistics, not the features of single images"):
        evaluate(student, against=str(tmp_path / "edm.npz"), metrics=["kid@inception"])
    with pytest.raises(UserError, match="no spatial statistics"):
        evaluate(student, against=str(tmp_path / "edm.npz"), metrics=["sfid"])
    # One of ADM's batches: FID and sFID compare with its statistics, precision and recall with its images.
    images = open_images("real:digits").images(range(50)).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    spatial = b[:, :7]
    np.savez(tmp_path / "adm.npz", arr_0=images, mu=mu, sigma=sigma, mu_s=spatial.mean(0), sigma_s=np.cov(spatial.T))
    (adm,) = evaluate(student, against=str(tmp_path / "adm.npz"), metrics=["fid", "sfid", "pr@inception"])
    assert adm["metrics"]["fid"]["value"] == pytest.approx(record["metrics"]["fid"]["value"], rel=1e-9)
    assert adm["metrics"]["sfid"]["value"] > 0 and adm["metrics"]["precision@inception"]["n_ref"] == 50
    (clean,) = evaluate(
        student, against=str(tmp_path / "adm.npz"), metrics=["fid-clean"]
    )  # another resize: then its images count
    assert clean["metrics"]["fid-clean"]["value"] != pytest.approx(record["metrics"]["fid"]["value"], rel=1e-3)


@pytest.mark.long
def test_rel_fd_compares_with_the_teachers_images_of_the_same_seeds(digits: Path, student: Path, teacher: Path) -> None:
    (record,) = evaluate(student, teacher=str(teacher), metrics=["rel-fd"])
    (by_hand,) = evaluate(student, against=str(teacher), metrics=["fd"])
    assert record["metrics"]["rel-fd"]["value"] == pytest.approx(by_hand["metrics"]["fd"]["value"], rel=1e-9)
    assert record["metrics"]["rel-fd"]["label"] == "rel-FD(digits)" and record["protocol"]["ref"] is None


def test_bootstrap_gives_error_bars_of_one_run(digits: Path, student: Path) -> None:
    (record,) = evaluate(student, against="real:digits", settings=replace(SMALL, bootstrap=20))
    fd = record["metrics"]["fd"]
    assert fd["error"] == "bootstrap" and 0 < fd["std"] < fd["value"] and fd["interval"][0] < fd["interval"][1]
    (again,) = evaluate(student, against="real:digits", settings=replace(SMALL, bootstrap=20))
    assert again["metrics"]["fd"]["std"] == fd["std"]
    with pytest.raises(UserError, match="--bootstrap 1 gives no error bar"):
        replace(SMALL, bootstrap=1)


def test_the_least_of_several_runs_is_called_so(digits: Path, student: Path) -> None:
    (record,) = evaluate(
        student, against="real:digits", metrics=["fd", "is@digits"], settings=replace(SMALL, repeats=3, report_as="min")
    )
    fd, score = record["metrics"]["fd"], record["metrics"]["is@digits"]
    assert (
        fd["value"] == min(fd["runs"])
        and fd["label"] == "FD(digits), min of 3"
        and fd["mean"] == pytest.approx(np.mean(fd["runs"]))
    )
    assert score["value"] == max(score["runs"]) and score["label"] == "IS(digits), max of 3"


def test_quantisation_and_size_are_part_of_the_number(stand_ins: None, digits: Path, student: Path) -> None:
    (plain,), (darker,) = (
        evaluate(student, against="real:digits", metrics=["fd@lite0"], settings=replace(SMALL, quantize=q))
        for q in ("edm_round", "dmd_trunc")
    )
    assert plain["metrics"]["fd@lite0"]["value"] != darker["metrics"]["fd@lite0"]["value"]
    assert darker["protocol"]["quantize"] == "dmd_trunc"
    (larger,) = evaluate(student, against="real:digits", metrics=["fd@lite0"], settings=replace(SMALL, resize="16"))
    assert larger["protocol"]["resize"] == "center_crop+lanczos16+mean2" == larger["protocol"]["ref_resize"]
    images = quantize(load_student(student)(*draw(7, 0, 60, SPEC.shape, 10, "random")))
    scored = load_extractor("lite0").features(parse_preparation("16").apply(images))
    stream = Moments(12)
    stream.update(scored)
    save = Statistics.of(stream, load_extractor("lite0"))
    (made,) = list(
        evaluate_all(
            Request([str(student)], metrics=["fd@lite0"], reference_needed=False, teacher_distance=False),
            replace(SMALL, resize="16"),
        )
    )
    torch.testing.assert_close(made.statistics.mu, save.mu)
    with pytest.raises(UserError, match="--quantize must be one of"):
        replace(SMALL, quantize="round")


def test_distances_to_the_teacher(stand_ins: None, digits: Path, student: Path, teacher: Path) -> None:
    (record,) = evaluate(student, teacher=str(teacher), metrics=["lpips", "dreamsim"])
    noise, labels = draw(7, 0, 12, SPEC.shape, 10, "random")
    s, t = load_student(student), tiny_teacher()
    ours, theirs = quantize(s.decode(s(noise, labels))), quantize(t.decode(t.sample(noise, labels)))
    assert record["metrics"]["lpips"]["value"] == pytest.approx(
        float((ours.float() - theirs.float()).abs().mean()), rel=0.05
    )
    assert (
        record["metrics"]["dreamsim"]["label"] == "DreamSim (n = 12)"
        and 0 <= record["metrics"]["dreamsim"]["value"] <= 2
    )
    with pytest.raises(UserError, match="compares latents"):
        evaluate(student, teacher=str(teacher), metrics=["latent-lpips-sd15"])
    with pytest.raises(UserError, match=r"metric lpips compares .* has no teacher here"):
        evaluate(student, metrics=["lpips"])


def test_text_generators(stand_ins: None, text: Path, digits: Path) -> None:
    options = replace(SMALL, prompts=str(text), steps=2, per_prompt=4)
    (record,) = evaluate(
        "tiny-sd", against="real:digits", metrics=["fd@digits", "clip-score", "dreamdiv"], settings=options
    )
    got = record["metrics"]
    assert got["clip-score"]["value"] == pytest.approx((3 + 7 + 9) / 300) and "ViT" not in got["clip-score"]["label"]
    assert (
        got["clip-score"]["model"] == "clip-vit-g-14"
        and got["dreamdiv"]["images"] == 12
        and got["dreamdiv"]["per_prompt"] == 4
    )
    assert (
        record["protocol"]["prompts"] == 3
        and len(record["protocol"]["prompts_sha256"]) == 64
        and record["protocol"]["labels"] is None
    )
    with pytest.raises(UserError, match="conditioned on text"):
        evaluate("tiny-sd", against="real:digits", metrics=["fd@digits"])
    with pytest.raises(UserError, match="clip-score needs prompts; real:digits has none"):
        evaluate("real:digits", metrics=["clip-score"], settings=options)


def test_latency_and_its_parts(digits: Path, text: Path) -> None:
    (record,) = evaluate(
        "tiny-sd",
        against="real:digits",
        metrics=["fd@digits"],
        latency=True,
        settings=replace(SMALL, n=4, prompts=str(text), steps=1),
    )
    speed = record["metrics"]["speed"]
    assert 0 < speed["network_ms"] <= speed["latency_ms"] <= speed["latency_p90_ms"] and speed["text_ms"] >= 0
    assert speed["timed"] == 50 and speed["dtype"] == "float32" and (speed["peak_memory_bytes"] or 10**8) > 10**6


def test_nearest_images_of_the_reference(digits: Path, tmp_path: Path) -> None:
    (record,) = evaluate("real:digits/a", against="real:digits", neighbours=2)
    assert record["neighbours"]["k"] == 2 and record["neighbours"]["n_ref"] == 1797
    assert max(row[0] for row in record["neighbours"]["closest"]["distances"]) == pytest.approx(
        0, abs=1e-3
    )  # they are in the reference
    stats = next(evaluate_all(Request(["real:digits"], reference_needed=False), SMALL)).statistics
    save_statistics(tmp_path / "s.npz", stats)
    with pytest.raises(UserError, match="holds statistics|holds none"):
        evaluate("real:digits/a", against=str(tmp_path / "s.npz"), neighbours=2)


def test_what_cannot_be_is_refused_before_any_image_is_made(
    stand_ins: None, digits: Path, student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("d2o.evaluation.passes.generate", lambda *a, **k: pytest.fail("an image was made"))
    with pytest.raises(UserError, match="metric kid: a subset has 1000 images, the smaller set 60"):
        evaluate(student, against="real:digits", metrics=["kid"], settings=replace(SMALL, kid_size=1000))
    with pytest.raises(UserError, match="metric pr: 60 neighbours need more than 60 images"):
        evaluate(student, against="real:digits", metrics=["pr"], settings=replace(SMALL, pr_k=60))
    with pytest.raises(UserError, match="clip-score needs prompts"):
        evaluate(student, against="real:digits", metrics=["clip-score"])
    with pytest.raises(UserError, match="dreamdiv compares images of one prompt"):
        evaluate(student, metrics=["dreamdiv"])


def test_metric_names(digits: Path) -> None:
    assert [w.key("kid") for w in parse_metrics(["kid@lite0", "kid"])] == ["kid@lite0", "kid"]
    with pytest.raises(UserError, match="did you mean 'fid'"):
        parse_metrics(["fidd"])
    with pytest.raises(UserError, match="has no choice of extractor"):
        parse_metrics(["clip-score@lite0"])
    with pytest.raises(UserError, match="has no choice of extractor"):
        parse_metrics(["fid@lite0"])
    assert all(metric.about and metric.keys for metric in METRICS.values())


def test_weights_are_told_apart_by_name(tmp_path: Path) -> None:
    lone = Tools([str(tmp_path / "x.pth")])
    assert (
        lone._file("inception") == tmp_path / "x.pth" == lone._file("inception-clean")
    )  # one file, prepared for in two ways
    with pytest.raises(UserError, match="was taken for inception; lite0 needs its own"):
        lone._file("lite0")
    named = Tools([f"inception={tmp_path / 'i'}", f"lpips={tmp_path / 'l'}"])
    assert (
        named._file("inception-clean") == tmp_path / "i"
        and named._file("lpips-vgg") == tmp_path / "l"
        and named._file("lite0") is None
    )
    with pytest.raises(UserError, match="unknown network"):
        Tools(["incepton=x"])
    with pytest.raises(UserError, match="for which network"):
        Tools(["a.pth", "b.pth"])


@pytest.fixture
def preset(monkeypatch: pytest.MonkeyPatch, stand_ins: None) -> Preset:
    made = Preset(
        "mini",
        "A paper, Table 9",
        "digits",
        ("fid",),
        {"n": 60, "quantize": "edm_round"},
        None,
        1797,
        "inception",
        "a tool",
        ("labels are not stated",),
    )
    monkeypatch.setitem(paper_protocols.PRESETS, "mini", made)
    monkeypatch.setattr(preset_check, "_published", lambda extractor: [f"{9:064d}"])
    return made


def test_a_protocol_is_kept_or_refused(
    digits: Path, student: Path, preset: Preset, monkeypatch: pytest.MonkeyPatch
) -> None:
    (record,) = evaluate(student, against="real:digits", metrics=preset.metrics, extractor="inception", preset=preset)
    assert record["preset"]["paper"] == "A paper, Table 9" and "labels are not stated" in record["notes"]
    assert "--protocol mini" in record["command"]
    monkeypatch.setattr("d2o.evaluation.passes.generate", lambda *a, **k: pytest.fail("an image was made"))
    with pytest.raises(UserError, match=r"not the protocol mini(.|\n)*899"):
        evaluate(student, against="real:digits/a", metrics=preset.metrics, extractor="inception", preset=preset)
    monkeypatch.setattr(preset_check, "_published", lambda extractor: ["f" * 64])
    with pytest.raises(UserError, match="is no published file"):
        evaluate(student, against="real:digits", metrics=preset.metrics, extractor="inception", preset=preset)


def test_leaks() -> None:
    def notes(options: dict, *extractors: str) -> list[str]:
        return leak_notes("x", {"method": "m", "m": options}, list(extractors))

    assert "the same backbone" in notes({"critic": {"backbone": "efficientnet_lite0"}}, "lite0")[0]
    assert "the same ImageNet labels" in notes({"critic": {"backbone": "efficientnet_lite0"}}, "inception")[0]
    assert "the same backbone" in notes({"backbones": ["vgg16", "dinov2_vits14"]}, "dinov2_vitl14")[0]
    assert not notes({"critic": {"backbone": "efficientnet_lite0"}}, "digits") and not notes(
        {"loss": "mse", "extractor": "digits"}, "digits"
    )
    assert len(notes({"loss": "perceptual", "extractor": "digits"}, "digits")) == 1 and not leak_notes(
        "x", {}, ["lite0"]
    )


def test_copies_in_a_set_are_counted(digits: Path, tmp_path: Path) -> None:
    images = open_images("real:digits").images(range(40)).permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "x.npz", arr_0=np.concatenate([images, images[:5]]))
    (record,) = evaluate(tmp_path / "x.npz", against="real:digits")
    assert any("5 of 45 images are pixel for pixel copies" in note for note in record["notes"])


def test_a_student_trained_on_the_metrics_backbone_is_flagged(stand_ins: None, digits: Path, tmp_path: Path) -> None:
    recipe = {"method": "gdd", "gdd": {"critic": {"backbone": "efficientnet_lite0"}}}
    save_student(tmp_path / "s.safetensors", tiny_student(), recipe=recipe, teacher={"name": "tiny"})
    (record,) = evaluate(tmp_path / "s.safetensors", against="real:digits", metrics=["fd@lite0"])
    assert any("the same backbone" in note for note in record["notes"])


def test_prompt_accuracy_and_diversity_of_a_teacher_of_text(digits: Path, text: Path) -> None:
    few = replace(SMALL, n=12, steps=3, prompts=str(text), per_prompt=4)
    (record,) = evaluate("tiny-sd", metrics=["prompt-accuracy", "diversity"], settings=few)
    got, extractor = record["metrics"], load_extractor("digits")

    def images(prompts: list[str]) -> torch.Tensor:
        noise, _ = draw(7, 0, 12, SPEC.shape, 0, "none")
        made = TinyText().sample(noise, Condition.of_prompts(prompts), "heun", 3)
        return quantize(made.clamp(-1, 1))

    prompts = ["one", "the two", "and three"]
    seen = extractor.logits(images(prompts * 4)).argmax(1)
    assert got["prompt-accuracy"]["value"] == (seen == torch.tensor([1, 2, 3] * 4)).float().mean().item()
    assert got["prompt-accuracy"]["percent"] and got["prompt-accuracy"]["label"] == "prompt accuracy(digits)"
    features = extractor.features(images([prompt for prompt in prompts for _ in range(4)]))
    assert got["diversity"]["value"] == pytest.approx(dream_diversity(features, 4)[0], rel=1e-4)
    (text.parent / "prompts.txt").write_text("a dog\n")
    with pytest.raises(UserError, match="no prompt names a digit"):
        evaluate("tiny-sd", metrics=["prompt-accuracy"], settings=few)
    assert [digit_in(p) for p in ("Seven!", "a 7", "two or three", "digit 12")] == [7, 7, -1, -1]


def test_the_classifier_of_digits_looks_at_images_of_any_size() -> None:
    extractor, pixels = load_extractor("digits-area"), open_images("real:digits").images(range(20))
    large = pixels.repeat_interleave(4, 2).repeat_interleave(4, 3).expand(-1, 3, -1, -1)
    torch.testing.assert_close(extractor.features(large), load_extractor("digits").features(pixels))
    assert (extractor.name, extractor.shape, extractor.resize) == ("digits-area", None, "grey+area8")
