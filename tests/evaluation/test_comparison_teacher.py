"""A student or a run as the teacher: rel-FD between students of one and of several calls (GDD, Fig. 2)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from d2o.errors import UserError
from d2o.evaluation.protocol import Settings
from d2o.evaluation.request import Request
from d2o.evaluation.result_model import mistake
from d2o.evaluation.run import evaluate_all
from d2o.evaluation.statistics_files import save_statistics
from d2o.networks.edm_unet import EDMPrecond
from d2o.reports.comparison import results_table
from d2o.students.base import Student, save_student
from d2o.students.consistency import ConsistencyStudent
from d2o.students.few_step import FewStepStudent
from tests.evaluation.test_evaluate import evaluate
from tests.helpers import SPEC, tiny_network, tiny_teacher

SMALL = Settings(n=24, seed=7, batch=12, distance_n=6)
TOLD = {"recipe": {}, "teacher": {"name": "tiny", "sha256": "0" * 64, "licence": "CC0-1.0"}}


def stored(path: Path, student: Student) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_student(path, student, metrics={}, provenance=[], **TOLD)
    return path


@pytest.fixture
def one(tmp_path: Path) -> Path:
    """The one-step student whose network is that of `tiny_teacher(seed=0)`."""
    return stored(tmp_path / "one.safetensors", Student(tiny_network(0), SPEC))


def measured(x: Path, teacher: Path, **more) -> dict:
    request = {"metrics": ["rel-fd"], **more}
    return evaluate(x, teacher=str(teacher), settings=request.pop("settings", SMALL), **request)[0]


def test_a_model_against_itself_is_0(digits: Path, one: Path) -> None:
    record = measured(one, one)
    assert record["metrics"]["rel-fd"]["value"] == pytest.approx(0, abs=1e-6)
    assert record["metrics"]["distance"]["rmse"] == 0


def test_the_teachers_images_of_other_seeds(digits: Path, one: Path, tmp_path: Path) -> None:
    settings = replace(SMALL, repeats=2, teacher_n=36, teacher_seed=1000)
    record = measured(one, one, settings=settings)
    rel = record["metrics"]["rel-fd"]
    assert rel["value"] > 1e-3 and rel["to_seeds"] == "1000..1035" and len(rel["runs"]) == 2 and mistake(record) is None
    footer = "\n".join(results_table([record, measured(one, one)]).footer)
    assert f"to the images of {one} from seeds 1000..1035" in footer and f"{one} from the same seeds" in footer
    assert "--teacher-n 36 --teacher-seed 1000" in record["command"]
    stats = tmp_path / "stats.npz"
    other = replace(SMALL, n=36, seed=1000)
    made = next(iter(evaluate_all(Request([str(one)], metrics=["rel-fd"], teacher=str(one)), other))).statistics
    assert made is not None
    save_statistics(stats, made)
    fd = evaluate(one, against=str(stats), metrics=["fd"], extractor="digits", settings=replace(SMALL, repeats=2))[0]
    assert rel["runs"] == pytest.approx(fd["metrics"]["fd"]["runs"], rel=1e-5)
    with pytest.raises(UserError, match="--teacher-n must be at least 2, not 1"):
        replace(SMALL, teacher_n=1)
    with pytest.raises(UserError, match="seed"):
        replace(SMALL, teacher_seed=2**63)


def test_sets_of_images_may_be_of_other_conditions(digits: Path, one: Path, tmp_path: Path) -> None:
    plain = Student(
        EDMPrecond("ddpmpp", 8, 1, 0, model_channels=16, channel_mult=(1,)), replace(SPEC, condition="none", classes=0)
    )
    free = stored(tmp_path / "free.safetensors", plain)
    refusal = "with --teacher-seed, images of other conditions"
    for x, teacher, more in ((free, one, {}), (one, free, {}), (free, one, {"metrics": ["rel-fd", "lpips"]})):
        with pytest.raises(UserError, match=refusal):
            measured(x, teacher, settings=SMALL if not more else replace(SMALL, teacher_seed=1000), **more)
    for x, teacher in ((free, one), (one, free)):
        record = measured(x, teacher, settings=replace(SMALL, teacher_seed=1000))
        assert record["metrics"]["rel-fd"]["to_seeds"] == "1000..1023" and record["metrics"].get("distance") is None
        assert any("no images of the same noise and condition" in note for note in record["notes"])
        assert "teacher_png" not in record["grid"] and mistake(record) is None


def test_the_teacher_called_once_is_the_student(digits: Path, one: Path, tmp_path: Path) -> None:
    tiny_teacher(tmp_path / "teacher.safetensors", seed=0)
    called_once = replace(SMALL, solver="euler", steps=1)
    record = measured(tmp_path / "teacher.safetensors", one, settings=called_once)
    assert record["metrics"]["distance"]["rmse"] < 1e-5
    assert record["metrics"]["rel-fd"]["value"] == pytest.approx(0, abs=1e-4)


def test_students_of_several_calls_as_a_run_and_as_a_file(digits: Path, one: Path, tmp_path: Path) -> None:
    two = FewStepStudent(tiny_network(0), SPEC, 80.0, [0.8])
    stored(tmp_path / "run" / "checkpoints" / "last.safetensors", two)
    ours = measured(tmp_path / "run", one)
    theirs = measured(one, tmp_path / "run", teacher_distance=False)
    value = ours["metrics"]["rel-fd"]["value"]
    assert value > 1e-3 and theirs["metrics"]["rel-fd"]["value"] == pytest.approx(value, rel=1e-6)
    assert ours["metrics"]["rel-fd"]["to"] == str(one) and ours["metrics"]["distance"]["teacher"]["nfe"] == 1
    assert ours["metrics"]["distance"]["teacher"]["kind"] == "student" and mistake(ours) is None
    footer = "\n".join(results_table([ours, theirs]).footer)
    assert f"(digits): to the images of {one}, {tmp_path / 'run'} from the same seeds" in footer
    assert f"distance to {one} (a student of 1 call) from equal noise" in footer
    assert f"--teacher {one}" in ours["command"]
    consistency = stored(tmp_path / "cd.safetensors", ConsistencyStudent(tiny_network(0), SPEC))
    twice = measured(consistency, consistency, settings=replace(SMALL, steps=2))  # the teacher: as it was trained
    assert twice["x"]["nfe"] == 2 and twice["metrics"]["distance"]["teacher"]["steps"] == 1
    assert twice["metrics"]["distance"]["rmse"] > 0
    both = measured(consistency, consistency, settings=replace(SMALL, steps=2, teacher_steps=2))
    assert both["metrics"]["distance"]["teacher"]["steps"] == 2 and both["metrics"]["distance"]["rmse"] == 0


def test_every_run_of_repeats_has_the_teacher_s_images_of_its_own_seeds(digits: Path, one: Path) -> None:
    runs = measured(one, one, settings=replace(SMALL, repeats=2))["metrics"]["rel-fd"]["runs"]
    assert runs == pytest.approx([0, 0], abs=1e-6)


def test_what_the_teacher_made_is_found_again(digits: Path, one: Path, tmp_path: Path) -> None:
    """By its checkpoint's bytes, whatever it is called."""
    others = [stored(tmp_path / f"{seed}.safetensors", Student(tiny_network(seed), SPEC)) for seed in (1, 2)]
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(one.read_bytes())
    made: list[tuple[str, int]] = []
    for x, teacher in zip(others, (one, copy), strict=True):
        request = Request([str(x)], None, ["rel-fd"], teacher=str(teacher), teacher_distance=False, grid=False)
        list(evaluate_all(replace(request, work=tmp_path / "work"), SMALL))
        made.append((teacher.name, len([p for p in (tmp_path / "work").iterdir() if p.is_dir()])))
    assert made == [("one.safetensors", 2), ("copy.safetensors", 3)]


def test_what_cannot_be_a_teacher_is_said(digits: Path, one: Path, tmp_path: Path) -> None:
    config = {"model_channels": 16, "channel_mult": (1,), "num_blocks": 1, "attn_resolutions": (), "dropout": 0.0}
    plain = Student(EDMPrecond("ddpmpp", 8, 1, 0, **config), replace(SPEC, condition="none", classes=0))
    unconditional = stored(tmp_path / "plain.safetensors", plain)
    with pytest.raises(UserError, match=r"makes \[1, 8, 8\] images without a condition; .* images of 10 classes"):
        measured(one, unconditional)
    large = Student(EDMPrecond("ddpmpp", 16, 1, 10, **config), replace(SPEC, shape=(1, 16, 16)))
    with pytest.raises(UserError, match=r"makes \[1, 16, 16\] images of 10 classes; .* makes \[1, 8, 8\] images"):
        measured(one, stored(tmp_path / "large.safetensors", large))
    run = tmp_path / "begun"
    run.mkdir()
    (run / "recipe.yaml").write_text("name: begun\n")
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="begun is a run without a checkpoint"):
        measured(one, run)
    (run / "checkpoints").mkdir()
    with pytest.raises(UserError, match="without a checkpoint"):
        measured(one, run)
    with pytest.raises(UserError, match="--teacher-steps: .* is a student of 1 call"):
        measured(one, one, settings=replace(SMALL, teacher_steps=2))
    with pytest.raises(UserError, match="--teacher-solver: .* is a student, which no solver samples"):
        measured(one, one, settings=replace(SMALL, teacher_solver="euler"))
    with pytest.raises(UserError, match="real:digits is not a teacher") as caught:
        measured(one, Path("real:digits"))
    assert caught.value.hint and "--against" in caught.value.hint
