"""Measuring generators, images and statistics: values, protocols, determinism and what is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from d2o.data.draws import draw
from d2o.data.images import open_images, to_uint8
from d2o.data.pair_settings import PairSettings
from d2o.errors import UserError
from d2o.evaluation import reference, subjects
from d2o.evaluation.named_extractors import load_extractor
from d2o.evaluation.protocol import Settings, protocol_line
from d2o.evaluation.quick import Evaluator
from d2o.evaluation.request import Request
from d2o.evaluation.run import evaluate_all
from d2o.evaluation.statistics import Statistics
from d2o.evaluation.statistics_files import load_statistics, save_statistics
from d2o.metrics.frechet import Moments, frechet_distance
from d2o.networks.edm_unet import EDMPrecond
from d2o.students.base import Student, load_student, save_student
from d2o.teachers.generate import make_pairs
from tests.helpers import SPEC, tiny_student, tiny_teacher

SMALL = Settings(n=40, seed=7, batch=16, distance_n=10)


def evaluate(*xs: str | Path, settings: Settings = SMALL, **request) -> list[dict]:
    return [e.record for e in evaluate_all(Request([str(x) for x in xs], **request), settings)]


def folder_of(images: torch.Tensor, path: Path, labels: list[int] | None = None) -> Path:
    for i, image in enumerate(images):
        name = path / (str(labels[i]) if labels else "") / f"{i:05d}.png"
        name.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(name)
    return path


def features_by_hand(images: torch.Tensor) -> Moments:
    extractor = load_extractor("digits")
    stream = Moments(extractor.dim)
    stream.update(extractor.features(images))
    return stream


def test_student_against_real_digits(digits: Path, student: Path) -> None:
    """The number is the one computed by hand, from the images that the seeds name, whatever the batch."""
    (record,) = evaluate(student, against="real:digits")
    model = load_student(student)
    noise, labels = draw(7, 0, 40, SPEC.shape, 10, "random")
    images = to_uint8(model(noise, labels))
    fake, real = features_by_hand(images), features_by_hand(open_images("real:digits").images(slice(None)))
    assert record["metrics"]["fd"]["value"] == pytest.approx(
        frechet_distance(fake.mean, fake.cov, real.mean, real.cov), rel=1e-4
    )
    guess = load_extractor("digits").logits(images).argmax(1)
    accuracy = record["metrics"]["accuracy"]
    assert accuracy["value"] == pytest.approx(float((guess == labels).float().mean()))
    assert set(accuracy["per_class"]) == {str(c) for c in labels.tolist()} and accuracy["n"] == 40
    assert accuracy["per_class"]["3"] == pytest.approx(float((guess == 3)[labels == 3].float().mean()))


def test_protocol_says_everything(digits: Path, student: Path) -> None:
    (record,) = evaluate(student, against="real:digits")
    protocol, extractor = record["protocol"], load_extractor("digits")
    assert protocol["n_gen"] == 40 and protocol["seeds"] == [7, 46] and protocol["labels"] == "random"
    assert protocol["features"] == "digits/16" and protocol["weights_sha256"] == extractor.sha256
    assert (protocol["resize"], protocol["quantize"], protocol["ref"], protocol["n_ref"]) == (
        "none",
        "edm_round",
        "real:digits",
        1797,
    )
    assert record["metrics"]["fd"]["label"] == "FD(digits)" and record["metrics"]["fd"]["trace"] == "eigvalsh"
    assert record["x"]["nfe"] == record["x"]["forwards"] == 1 and record["x"]["parameters"] > 1000
    assert record["env"]["cpu"] and record["env"]["torch"] == torch.__version__ and record["d2o"]
    assert record["command"] == f"d2o eval {student} --against real:digits --n 40 --seed 7 --batch 16 --distance-n 10"
    line = protocol_line(protocol)
    for part in (
        "n = 40",
        "seeds 7..46",
        "digits/16",
        extractor.sha256[:12],
        "resize none",
        "quantise edm_round",
        "real:digits, n = 1,797",
    ):
        assert part in line


@pytest.mark.long
def test_equal_seeds_give_equal_numbers(digits: Path, student: Path) -> None:
    first, second = (evaluate(student, against="real:digits")[0]["metrics"]["fd"]["value"] for _ in range(2))
    assert first == second
    (other,) = evaluate(student, against="real:digits", settings=Settings(n=40, seed=8, batch=16, distance_n=10))
    assert other["metrics"]["fd"]["value"] != first


@pytest.mark.long
def test_teacher_as_x_and_its_calls(digits: Path, teacher: Path) -> None:
    (once,) = evaluate(
        teacher,
        against="real:digits",
        settings=Settings(n=20, batch=10, solver="euler", steps=1, distance_n=5),
        teacher=str(teacher),
    )
    assert (once["x"]["kind"], once["x"]["nfe"], once["x"]["forwards"]) == ("teacher", 1, 1)
    assert once["metrics"]["distance"]["rmse"] > 0 and once["metrics"]["distance"]["teacher"]["steps"] == 18
    settings = Settings(n=20, batch=10, solver="heun", steps=3, cfg=2.0, distance_n=5)
    (guided,) = evaluate(teacher, against="real:digits", settings=settings, teacher_distance=False)
    assert (guided["x"]["nfe"], guided["x"]["forwards"], guided["name"]) == (5, 10, "teacher, heun 3, cfg 2")
    (full,) = evaluate(teacher, against="real:digits", settings=Settings(n=4, batch=4), teacher=str(teacher))
    assert full["x"]["nfe"] == 35 and "distance" not in full["metrics"]  # it would be 0


@pytest.mark.long
def test_distance_to_the_teacher_from_equal_noise(digits: Path, student: Path, teacher: Path) -> None:
    (record,) = evaluate(student, against="real:digits", teacher=str(teacher))
    noise, labels = draw(7, 0, 10, SPEC.shape, 10, "random")
    s, t = load_student(student), tiny_teacher()
    ours, theirs = s.decode(s(noise, labels)), t.decode(t.sample(noise, labels))
    distance, extractor = record["metrics"]["distance"], load_extractor("digits")
    assert distance["rmse"] == pytest.approx(float((ours - theirs).double().square().mean().sqrt()), rel=1e-4)
    gap = extractor.features(to_uint8(ours)) - extractor.features(to_uint8(theirs))
    assert distance["feature"] == pytest.approx(float(gap.norm(dim=1).mean()), rel=1e-3)
    assert distance["seeds"] == [7, 16] and distance["teacher"]["solver"] == "heun"
    assert any(
        "another" in note and "weights 000000000000" in note for note in record["notes"]
    )  # tiny_student names a teacher of zeros


def test_a_teacher_that_is_not_here_is_a_note_not_an_error(digits: Path, student: Path) -> None:
    (record,) = evaluate(student, against="real:digits")
    assert "distance" not in record["metrics"] and any(
        "no distance to the teacher (tiny)" in note for note in record["notes"]
    )
    with pytest.raises(UserError, match="no such file or teacher"):
        evaluate(student, against="real:digits", teacher="absent")
    with pytest.raises(UserError, match="is not a teacher"):
        evaluate(student, against="real:digits", teacher="real:digits")


@pytest.mark.long
def test_repeats_use_disjoint_seeds(digits: Path, student: Path) -> None:
    (record,) = evaluate(
        student, against="real:digits", settings=Settings(n=40, seed=7, batch=16, repeats=3, distance_n=4)
    )
    fd = record["metrics"]["fd"]
    assert (
        len(set(fd["runs"])) == 3
        and fd["value"] == pytest.approx(np.mean(fd["runs"]))
        and fd["std"] == pytest.approx(np.std(fd["runs"], ddof=1))
    )
    assert record["protocol"]["seeds"] == [7, 126] and record["protocol"]["repeats"] == 3
    (second,) = evaluate(student, against="real:digits", settings=Settings(n=40, seed=47, batch=16, distance_n=4))
    assert second["metrics"]["fd"]["value"] == fd["runs"][1]


@pytest.mark.parametrize(("labels", "classes"), [("balanced", set("0123456789")), ("2,5", {"2", "5"})])
def test_labels(digits: Path, student: Path, labels: str, classes: set[str]) -> None:
    (record,) = evaluate(student, against="real:digits", settings=Settings(n=40, batch=16, labels=labels, distance_n=4))
    assert set(record["metrics"]["accuracy"]["per_class"]) == classes and record["protocol"]["labels"] == labels
    with pytest.raises(UserError, match="class 10 is out of range"):
        evaluate(student, against="real:digits", settings=Settings(n=40, labels="10"))


def test_images_whole_with_labels_from_folders(digits: Path, tmp_path: Path) -> None:
    real = open_images("real:digits")
    picks = [i for i in range(len(real)) if int(real.labels[i]) in (1, 4)][:60]
    folder = folder_of(real.images(picks), tmp_path / "some", [int(real.labels[i]) for i in picks])
    (record,) = evaluate(folder, against="real:digits")
    assert record["protocol"]["n_gen"] == 60 and record["protocol"]["seeds"] is None and record["x"].get("nfe") is None
    assert set(record["metrics"]["accuracy"]["per_class"]) == {
        "1",
        "4",
    }  # not the 0 and 1 that two folders would count as
    assert "speed" not in record["metrics"] and "distance" not in record["metrics"]


@pytest.mark.long
def test_images_score_as_the_generator_that_made_them(digits: Path, student: Path, tmp_path: Path) -> None:
    noise, labels = draw(7, 0, 40, SPEC.shape, 10, "random")
    folder = folder_of(to_uint8(load_student(student)(noise, labels)), tmp_path / "samples")
    (files,), (generated,) = evaluate(folder, against="real:digits"), evaluate(student, against="real:digits")
    assert files["metrics"]["fd"]["value"] == pytest.approx(generated["metrics"]["fd"]["value"], rel=1e-3)


@pytest.mark.long
def test_a_part_of_the_reference_is_noted(digits: Path) -> None:
    (half,) = evaluate("real:digits/a", against="real:digits/b")
    assert half["protocol"]["n_gen"] == 899 and half["protocol"]["n_ref"] == 898 and not half["notes"]
    (part,) = evaluate("real:digits/a")
    assert any("part of its own reference" in note for note in part["notes"])


@pytest.mark.long
def test_pair_store(digits: Path, teacher: Path, tmp_path: Path) -> None:
    make_pairs(PairSettings(str(teacher), n=24, seed=7, steps=2, shard_size=12), tmp_path / "pairs")
    (record,) = evaluate(tmp_path / "pairs", against="real:digits")
    assert record["x"]["kind"] == "pairs" and record["protocol"]["n_gen"] == 24
    (same,) = evaluate(teacher, against="real:digits", settings=Settings(n=24, seed=7, steps=2), teacher_distance=False)
    assert record["metrics"]["fd"]["value"] == pytest.approx(same["metrics"]["fd"]["value"], rel=1e-3)
    assert record["metrics"]["accuracy"]["value"] == same["metrics"]["accuracy"]["value"]


@pytest.mark.long
def test_run_folder_takes_best_then_last(digits: Path, student: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=r"folder without a checkpoint \(checkpoints/best\.safetensors"):
        evaluate(run, against="real:digits")
    shutil.copy(student, run / "checkpoints" / "last.safetensors")
    (last,) = evaluate(run, against="real:digits")
    assert last["name"] == "run"
    tiny_student(run / "checkpoints" / "best.safetensors", seed=5)
    (best,) = evaluate(run, against="real:digits")
    assert best["x"]["sha256"] != last["x"]["sha256"]


@pytest.mark.long
def test_statistics_as_x_and_as_reference(digits: Path, student: Path, tmp_path: Path) -> None:
    (made,) = list(evaluate_all(Request([str(student)], reference_needed=False, teacher_distance=False), SMALL))
    assert "fd" not in made.record["metrics"]
    save_statistics(tmp_path / "s.npz", made.statistics)
    assert load_statistics(tmp_path / "s.npz").n == 40
    (zero,) = evaluate(student, against=str(tmp_path / "s.npz"))
    assert zero["metrics"]["fd"]["value"] < 1e-6 and zero["protocol"]["n_ref"] == 40
    (numbers,) = evaluate(tmp_path / "s.npz", against="real:digits")
    (direct,) = evaluate(student, against="real:digits")
    assert numbers["metrics"]["fd"]["value"] == pytest.approx(direct["metrics"]["fd"]["value"], rel=1e-9)
    assert "grid" not in numbers and numbers["x"]["kind"] == "statistics"


def test_statistics_of_another_extractor_are_refused(digits: Path, student: Path, tmp_path: Path) -> None:
    eye = torch.eye(16, dtype=torch.float64)
    save_statistics(tmp_path / "other.npz", Statistics(torch.zeros(16), eye, 99, "digits", "none", "f" * 64))
    with pytest.raises(UserError, match="another extractor"):
        evaluate(student, against=str(tmp_path / "other.npz"))
    save_statistics(tmp_path / "wide.npz", Statistics(torch.zeros(17), torch.eye(17), 99, "x"))
    with pytest.raises(UserError, match=r"17 features.*16 features"):
        evaluate(student, against=str(tmp_path / "wide.npz"))


def test_shipped_statistics_serve_when_the_weights_agree(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are told apart from computed ones here by being wrong."""
    extractor = load_extractor("digits")
    monkeypatch.setattr(reference, "asset", lambda name: tmp_path / name)
    for sha, shipped in ((extractor.sha256, True), ("0" * 64, False)):
        save_statistics(
            tmp_path / "reference_digits.npz", Statistics(torch.zeros(16), torch.eye(16), 1797, "digits", "none", sha)
        )
        outputs = {"digits": (extractor, {"features"})}
        found = reference.load_reference("real:digits", outputs, False, Settings()).side.statistics(extractor)
        assert torch.equal(found.mu, torch.zeros(16, dtype=torch.float64)) is shipped and found.n == 1797


@pytest.mark.long
def test_generator_as_reference_has_equal_noise(digits: Path, student: Path, teacher: Path) -> None:
    (record,) = evaluate(
        student, against=str(teacher), settings=Settings(n=20, seed=3, batch=10, solver="euler", steps=1)
    )
    assert record["protocol"]["ref"] == "teacher, heun 18"  # X's solver options don't spoil the reference
    assert record["protocol"]["ref_seeds"] == [3, 22] and record["protocol"]["n_ref"] == 20
    (self_,) = evaluate(student, against=str(student))
    assert self_["metrics"]["fd"]["value"] < 1e-6


def test_collapsed_student_is_counted(digits: Path, tmp_path: Path) -> None:
    model = tiny_student()
    for p in model.network.parameters():
        p.data.fill_(float("nan"))
    save_student(tmp_path / "bad.safetensors", model)
    with pytest.raises(UserError, match=r"16 of 16 images \(seeds 7 to 22\) hold NaN") as caught:
        evaluate(tmp_path / "bad.safetensors", against="real:digits")
    assert "earlier checkpoint" in caught.value.hint


def test_too_few_images(digits: Path, student: Path, tmp_path: Path) -> None:
    (few,) = evaluate(student, against="real:digits", settings=Settings(n=10, batch=10))
    assert few["metrics"]["fd"]["small_n"] and any("10 images for 16 features" in note for note in few["notes"])
    with pytest.raises(UserError, match="needs at least 2"):
        evaluate(folder_of(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), tmp_path / "one"), against="real:digits")
    with pytest.raises(UserError, match="--n must be at least 2"):
        Settings(n=1)


def test_images_of_another_size(digits: Path, tmp_path: Path) -> None:
    folder = folder_of(torch.randint(256, (20, 1, 12, 16), dtype=torch.uint8), tmp_path / "wide")
    with pytest.raises(UserError, match="16x12 pixels of 1 channel, but the extractor 'digits' takes 8x8"):
        evaluate(folder, against="real:digits", extractor="digits")
    with pytest.raises(UserError, match="--resize crop needs --extractor"):
        evaluate(folder, against="real:digits", settings=Settings(resize="crop"))
    (record,) = evaluate(folder, against="real:digits", extractor="digits", settings=Settings(resize="crop"))
    assert record["protocol"]["resize"] == "lanczos+centre_crop"
    assert any("shrunk" in note for note in record["notes"]) and any("cropped" in note for note in record["notes"])


def test_reference_is_required_where_there_is_no_default(digits: Path, student: Path) -> None:
    with pytest.raises(UserError, match="Give --against"):
        evaluate(student)
    with pytest.raises(UserError, match="did you mean 'digits'"):
        evaluate("digit")
    with pytest.raises(UserError, match="1 --name for 2 X"):
        evaluate("digits", "digits", names=["one"])
    with pytest.raises(UserError, match="Give --against"):
        reference.default_reference(subjects.open_subject(str(student), SMALL))


def test_a_student_trained_on_the_metric_is_flagged(digits: Path, tmp_path: Path) -> None:
    recipe = {"method": "ode", "ode": {"loss": "perceptual", "extractor": "digits"}}
    save_student(tmp_path / "s.safetensors", tiny_student(), recipe=recipe, teacher={"name": "tiny"})
    (record,) = evaluate(tmp_path / "s.safetensors", against="real:digits")
    assert any("trained on features of digits" in note for note in record["notes"])


def test_quick_score_in_training(digits: Path, student: Path) -> None:
    model = load_student(student)
    before = torch.get_rng_state()
    first, again = (Evaluator("digits", "real:digits").score(model, SPEC, n=40, seed=7, batch=16) for _ in range(2))
    assert first == again
    assert torch.equal(before, torch.get_rng_state())
    (record,) = evaluate(student, against="real:digits")
    assert first["fd"] == pytest.approx(record["metrics"]["fd"]["value"], rel=1e-6)
    assert first["accuracy"] == record["metrics"]["accuracy"]["value"]
    one, two = Evaluator("digits", "real:digits"), Evaluator("digits", "real:digits")
    assert one.reference is two.reference  # loaded once


def test_unconditional_student(digits: Path, tmp_path: Path) -> None:
    spec = replace(SPEC, condition="none", classes=0)
    network = EDMPrecond(
        "ddpmpp", 8, 1, 0, model_channels=16, channel_mult=(1,), num_blocks=1, attn_resolutions=(), dropout=0.0
    )
    save_student(tmp_path / "u.safetensors", Student(network, spec))
    (record,) = evaluate(tmp_path / "u.safetensors", against="real:digits")
    assert (
        "accuracy" not in record["metrics"]
        and record["protocol"]["labels"] is None
        and record["grid"]["labels"] is None
    )
