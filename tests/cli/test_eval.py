"""`d2o eval` as a user types it."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from d2o.cli.app import main
from d2o.cli.eval import evaluate
from d2o.data.triplets import open_triplets
from d2o.errors import UserError
from d2o.evaluation import collect, judging, named_extractors, results
from d2o.evaluation.statistics_files import load_statistics
from d2o.interop.safetensors_io import write_error
from d2o.runtime import Stopped
from d2o.students.base import save_student
from tests.helpers import tiny_student, tiny_teacher
from tests.samples import make_extractor

SMALL = ["--n", "20", "--batch", "10", "--distance-n", "8", "--device", "cpu"]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a student and a teacher; `digits` is a tiny untrained extractor."""
    path = make_extractor(tmp_path / "net.safetensors")
    monkeypatch.setitem(
        named_extractors.EXTRACTORS,
        "digits",
        lambda name, weights, device: named_extractors.read_extractor("digits", path, device),
    )
    monkeypatch.chdir(tmp_path)
    tiny_student(Path("student.safetensors"))
    tiny_teacher(Path("teacher.safetensors"))
    return tmp_path


def run(*arguments: str) -> str:
    app = typer.Typer()
    app.command()(evaluate)
    result = CliRunner().invoke(app, list(arguments))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.long
def test_table_json_and_report(work: Path) -> None:
    out = run(
        "student.safetensors",
        "teacher.safetensors",
        "--against",
        "real:digits",
        *SMALL,
        "--steps",
        "2",
        "--teacher",
        "teacher.safetensors",
        "--name",
        "mine",
        "--name",
        "theirs",
        "--json",
        "e.json",
        "--report",
        "r.html",
    )
    assert (
        "mine" in out
        and "theirs" in out
        and "FD(digits)" in out
        and "edm_round" in out
        and "real:digits, n = 1,797" in out
    )
    records = json.loads(Path("e.json").read_text())
    assert [r["name"] for r in records] == ["mine", "theirs"] and [r["x"]["nfe"] for r in records] == [1, 3]
    assert (
        "--steps is not for student.safetensors" in records[0]["notes"]
        and "--steps is not for teacher.safetensors" not in records[1]["notes"]
    )
    assert records[0]["grid"]["teacher_png"] and records[0]["protocol"]["n_gen"] == 20
    assert "Samples from equal noise" in Path("r.html").read_text()
    assert not [p for p in work.iterdir() if p.name.endswith(".tmp")]


def test_the_teacher_as_a_measure_has_a_solver_of_its_own(work: Path) -> None:
    of_it = ("--teacher", "teacher.safetensors", "--teacher-solver", "euler", "--teacher-steps", "3")
    run("student.safetensors", "--metrics", "rel-fd", *of_it, *SMALL, "--json", "e.json")
    record = json.loads(Path("e.json").read_text())
    made = record["metrics"]["distance"]["teacher"]
    assert (made["solver"], made["steps"], made["nfe"]) == ("euler", 3, 3)
    assert "--teacher-solver euler --teacher-steps 3" in record["command"]


@pytest.mark.long
def test_json_to_standard_output_is_all_that_is_there(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["eval", "student.safetensors", "real:digits/a", "--against", "real:digits", *SMALL, "--json", "-"])
    said = capfd.readouterr()
    assert done.value.code == 0 and [r["name"] for r in json.loads(said.out)] == ["student", "real:digits/a"]
    assert "FD(digits)" in said.err and not Path("-").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["real:digits/a", "student.safetensors"], "student.safetensors be compared with\\? Give --against"),
        (
            ["student.safetensors", "damaged.safetensors", "--against", "real:digits"],
            "damaged.safetensors is truncated",
        ),
        (
            ["student.safetensors", "real:digits", "--against", "real:digits", "--metrics", "fd,lpips"],
            "no teacher here",
        ),
        (["real:digits/a", "student.safetensors", "--against", "real:digits", "--labels", "3,10"], "10"),
        (["real:digits/a", "real:digits/b", "--against", "teacher.safetensors", "--neighbours", "2"], "holds none"),
        (["real:digits/a", "real:digits/b", "--against", "absent.npz"], "no such file or teacher: 'absent.npz'"),
    ],
)
def test_every_x_is_checked_before_the_first_is_measured(
    work: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*arguments: object) -> None:
        raise AssertionError("an image was measured")

    Path("damaged.safetensors").write_bytes(b"damaged")
    monkeypatch.setattr(collect, "_measure", measured)
    with pytest.raises(UserError, match=message):
        run(*arguments, *SMALL)


def test_a_full_disk_costs_no_work(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D2O_HOME", str(work / "home"))
    command = ["student.safetensors", "--against", "real:digits/a", *SMALL, "--no-teacher-distance", "--json", "e.json"]
    with monkeypatch.context() as full:
        full.setattr(
            results,
            "atomic_write",
            lambda path, data: (_ for _ in ()).throw(write_error(path, OSError(errno.ENOSPC, "full"))),
        )
        with pytest.raises(UserError, match="the disk is full"):
            run(*command)
    monkeypatch.setattr(collect, "_measure", lambda *arguments: pytest.fail("measured again"))
    run(*command)
    assert json.loads(Path("e.json").read_text())["name"] == "student" and not list((work / "home" / "eval").iterdir())


@pytest.mark.long
def test_stopped_between_two_x_it_says_how_far_it_was(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = collect._measure

    def stop_at_a_generator(work: collect.Pass, numbers: range) -> object:
        if work.title == "student":
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(work, numbers)

    monkeypatch.setattr(collect, "_measure", stop_at_a_generator)
    with pytest.raises(
        Stopped, match="1 of 2 X measured; stopped with 0 of 20 images of student; run the same command again"
    ) as caught:
        run("real:digits/a", "student.safetensors", "--against", "real:digits", *SMALL)
    assert caught.value.exit_code == 143


def test_compare_puts_results_together(work: Path) -> None:
    run("student.safetensors", "--against", "real:digits", *SMALL, "--json", "a.json")
    Path("run").mkdir()
    run("real:digits/a", "--against", "real:digits/b", "--json", "run/eval.json")
    Path("run/metrics.jsonl").write_text(
        '{"iteration": 1, "images": 8, "loss": 1.0}\n{"iteration": 2, "images": 16, "loss": 0.5}\n'
    )
    out = run("--compare", "a.json", "run", "--report", "r.html", "--run", "run", "--json", "both.json")
    assert "student" in out and "real:digits/a" in out and "a: n = 20" in out and "b: n = 899" in out
    assert len(json.loads(Path("both.json").read_text())) == 2 and "Training loss" in Path("r.html").read_text()


def test_statistics_need_no_reference_and_serve_as_one(work: Path) -> None:
    run("real:digits", "--save-stats", "ref.npz")
    stats = load_statistics("ref.npz")
    assert stats.n == 1797 and stats.feature == "digits" and stats.resize == "none" and len(stats.weights_sha256) == 64
    out = run("real:digits", "--against", "ref.npz", "--json", "e.json")
    assert json.loads(Path("e.json").read_text())["metrics"]["fd"]["value"] < 1e-6 and "FD(digits)" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["student.safetensors"], "Give --against"),
        (["digitz"], "did you mean 'digits'"),
        (["student.safetensors", "--extractor", "inceptn", "--against", "real:digits"], "unknown extractor"),
        (["teacher.safetensors", "--solver", "hoin", "--against", "real:digits"], "unknown solver"),
        (
            ["student.safetensors", "--steps", "2", "--against", "real:digits"],
            "neither a teacher nor a student that takes several steps",
        ),
        (["student.safetensors", "--run", "x", "--against", "real:digits"], "add --report|training curves in a report"),
        (["student.safetensors", "digits", "--save-stats", "x.npz"], "one X"),
        (["student.safetensors", "--save-stats", "x.txt"], "an .npz file"),
        (["student.safetensors", "--json", "student.safetensors"], "not overwritten"),
        (["student.safetensors", "--report", "student.safetensors"], "not overwritten"),
        (["student.safetensors", "--report", "r.html", "--run", "."], "not a run folder"),
        (["net.safetensors", "--against", "real:digits"], "holds extractor, not a student"),
        (["--compare", "student.safetensors"], "not a result"),
        (["student.safetensors", "--against", "real:digits", "--n", "0"], "--n must be at least 2"),
        ([], "Give X, or --table"),
        (["digits", "--table", "digits"], "is too much"),
        (["--compare", "--table", "digits"], "give one of them"),
        (["--table", "digitz"], "did you mean 'digits'"),
        (["digits", "--metrics", "fidd"], "did you mean 'fid'"),
        (["digits", "--protocol", "gdd_cifar"], "did you mean 'gdd_cifar10'"),
        (
            ["digits", "--protocol", "gdd_cifar10", "--n", "100", "--resize", "256"],
            r"--n 100, --resize 256 are not the protocol gdd_cifar10",
        ),
        (["digits", "--protocol", "gdd_cifar10", "--metrics", "fd"], "not the protocol"),
        (["digits", "--weights", "incepton=x"], "did you mean 'inception'"),
        (["student.safetensors", "digitz"], "no such file or teacher: 'digitz'"),
        (["digits", "--csv", "x.txt"], "ends in .csv"),
        (["digits", "--markdown", "student.safetensors"], "ends in .md or .tex"),
        (["digits", "--neighbours", "-1"], "at least 0"),
        (["digits", "--resize", "large"], "not a way to prepare images"),
        (["digits", "--report-as", "best"], "--report-as must be one of mean, min"),
        (["digits", "--is-mode", "tf"], "--is-mode must be one of"),
        (["digits", "--per-prompt", "1"], "--per-prompt must be at least 2"),
    ],
)
def test_mistakes_are_one_clear_error(work: Path, arguments: list[str], message: str) -> None:
    before = sorted(p.name for p in work.iterdir())
    with pytest.raises(UserError, match=message):
        run(*arguments)
    assert sorted(p.name for p in work.iterdir()) == before  # nothing created


@pytest.mark.long
def test_files_of_the_table_and_options_of_the_numbers(work: Path) -> None:
    options = [
        "--metrics",
        "fd,kid",
        "--metrics",
        "pr,is@digits",
        "--kid-size",
        "15",
        "--kid-subsets",
        "4",
        "--is-splits",
        "2",
        "--is-mode",
        "edm_order",
        "--pr-k",
        "2",
        "--dc-k",
        "2",
        "--pr-dtype",
        "float16",
        "--quantize",
        "dmd_trunc",
        "--repeats",
        "2",
        "--report-as",
        "min",
        "--no-teacher-distance",
        "--work",
        "kept",
        "--neighbours",
        "1",
        "--latency",
    ]
    out = run(
        "student.safetensors",
        "--against",
        "real:digits",
        *SMALL,
        *options,
        "--csv",
        "t.csv",
        "--markdown",
        "t.md",
        "--json",
        "t.json",
    )
    record = json.loads(Path("t.json").read_text())
    assert {"fd", "kid", "precision", "recall", "is@digits"} <= set(record["metrics"]) and "min of 2" in record[
        "metrics"
    ]["fd"]["label"]
    assert (
        record["metrics"]["precision"]["dtype"] == "float16" and record["metrics"]["is@digits"]["mode"] == "edm_order"
    )
    assert (
        "KID(digits)" in out
        and "KID(digits)" in Path("t.md").read_text()
        and "latency_ms" in record["metrics"]["speed"]
    )
    assert record["neighbours"]["k"] == 1 and list(Path("kept").iterdir()) and "student" in Path("t.csv").read_text()
    run("--compare", "t.json", "--markdown", "t.tex")
    assert "\\toprule" in Path("t.tex").read_text()
    for word in ("--metrics fd,kid,pr,is@digits", "--kid-size 15", "--report-as min", "--latency"):
        assert word in record["command"]


@pytest.mark.long
def test_a_table_measures_what_is_here_and_quotes_the_paper(work: Path) -> None:
    Path("mine.yaml").write_text(
        "title: Mine\npaper: A paper\nagainst: real:digits\noptions: {n: 20, batch: 10, distance_n: 4, metrics:"
        " [fd]}\nrows:\n  - {name: here, x: student.safetensors, paper: {fd: [1.5, 0.2]}}\n  - {name: absent, x:"
        " runs/absent, recipe: quickstart, paper: {fd: 9.5}}\n  - {name: broken, x: net.safetensors}\n  - {name:"
        " quoted, paper: {fd: 7.25}}\n"
    )
    out = run("--table", "mine.yaml", "--json", "t.json", "--device", "cpu")
    records = {r["name"]: r for r in json.loads(Path("t.json").read_text())}
    assert list(records) == ["here", "absent", "broken", "quoted"] and records["here"]["paper"] == {"fd": [1.5, 0.2]}
    assert [record.get("status") for record in records.values()] == [None, "not run", "failed", "cited"]
    assert "note: absent: runs/absent is not here; d2o train recipes/quickstart.yaml makes it" in out
    assert records["here"]["protocol"]["n_gen"] == 20 and "7.25" in out and "1.5" in out
    run("--table", "mine.yaml", "--n", "30", "--json", "t.json", "--device", "cpu")  # what is typed beats the table
    assert json.loads(Path("t.json").read_text())[0]["protocol"]["n_gen"] == 30


def test_a_table_of_which_nothing_is_here_is_shown_all_the_same(work: Path) -> None:
    text = (
        "title: None\npaper: A paper\nprotocol: gdd_cifar10\nrows:\n"
        "  - {name: absent, x: runs/absent, paper: {fid: 1.25}}\n"
        "  - {name: bare, x: runs/bare, recipe: quickstart}\n  - {name: quoted, paper: {fid: 2.5}}\n"
    )
    Path("none.yaml").write_text(text)
    out = run("--table", "none.yaml", "--markdown", "t.md", "--csv", "t.csv", "--json", "t.json", "--report", "t.html")
    for shown in (out, Path("t.md").read_text(), Path("t.html").read_text()):
        assert all(words in shown for words in ("absent", "bare", "not run", "cited", "1.25", "2.5"))
        assert "d2o train recipes/quickstart.yaml makes it" in shown
    assert "none of its rows could be measured: what they measure is not here" in " ".join(out.split())
    assert "status" in Path("t.csv").read_text().splitlines()[0]
    assert [record["status"] for record in json.loads(Path("t.json").read_text())] == ["not run", "not run", "cited"]
    assert "not run" in run("--compare", "t.json")

    Path("none.yaml").write_text(text.replace("runs/absent", "student.safetensors"))  # an image of it has 8x8 pixels
    with pytest.raises(UserError, match="none of its rows could be measured"):
        run("--table", "none.yaml", "--markdown", "t.md")
    assert "student.safetensors makes images of 8x8" in Path("t.md").read_text()


def test_a_student_of_another_length_than_its_recipe_s_is_marked(work: Path) -> None:
    from d2o.recipes.load import load_recipe

    recipe = load_recipe("quickstart", mini=True).resolved()
    teacher = {"name": "tiny", "sha256": "0" * 64, "licence": "CC0-1.0"}
    save_student("mini.safetensors", tiny_student(), recipe=recipe, teacher=teacher, metrics={}, provenance=[])
    Path("t.yaml").write_text(
        "title: T\npaper: A paper\nagainst: real:digits\noptions: {n: 20, batch: 20, distance_n: 4, metrics: [fd]}\n"
        "rows:\n  - {name: small, x: mini.safetensors, recipe: quickstart}\n"
    )
    out = run("--table", "t.yaml", "--device", "cpu", "--no-teacher-distance")
    assert "note: small: trained on 12,800 images; its recipe has 80,000" in out


def test_a_table_says_why_a_row_is_only_cited_and_has_columns_of_words(work: Path, monkeypatch) -> None:
    monkeypatch.setattr(judging, "open_triplets", partial(open_triplets, limit=5))
    Path("mine.yaml").write_text(
        "title: Mine\npaper: A paper\nnotes: [two of its numbers disagree]\nagainst: real:digits-2afc/b\nrows:\n"
        "  - {name: here, x: latent-mse-tiny-sd, about: {space: latent}, paper: {2afc: 0.5, a100_days: 43.6}}\n"
        "  - {name: there, paper: {parameters: 900.0e+6, top1: 0.7159}, cited: nobody published it}\n"
    )
    out = run("--table", "mine.yaml", "--json", "t.json", "--device", "cpu")
    here, there = json.loads(Path("t.json").read_text())
    assert (
        here["about"] == {"space": "latent"} and here["notes"][-1] == there["notes"][0] == "two of its numbers disagree"
    )
    assert there["notes"][1] == "there: nobody published it" and 0.3 < here["metrics"]["2afc"]["value"] < 1
    for words in ("space", "900M", "71.59 %", "43.6", "note: there: nobody published it"):
        assert words in out
    run("--compare", "t.json", "--markdown", "t.md", "--csv", "t.csv", "--report", "t.html")


def test_other_workers_say_and_write_nothing(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert (
        run("student.safetensors", "--against", "real:digits", *SMALL, "--json", "e.json") == ""
        and not Path("e.json").exists()
    )


def test_help_needs_no_torch() -> None:
    code = "import sys, d2o.cli.eval; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_what_comes_of_cifar16_is_judged_by_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    once = ["cifar16", "--n", "32", "--solver", "euler", "--steps", "1", "--no-teacher-distance", "--device", "cpu"]
    run(*once, "--json", "record.json")
    record = json.loads(Path("record.json").read_text())
    assert record["metrics"]["fd"]["value"] > 0 and "accuracy" in record["metrics"]
    assert record["protocol"]["ref"] == "d2o-cifar10-16" and "cifar16" in record["protocol"]["features"]
    with pytest.raises(UserError, match="did you mean 'd2o-cifar10-16'"):
        run(*once, "--against", "d2o-cifar10-1")
    with pytest.raises(UserError, match=r"\(cifar16\) cannot be compared with 1280 features \(lite0\)"):
        run(*once, "--extractor", "lite0")
