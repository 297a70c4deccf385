"""`d2o sample` on the command line."""

from pathlib import Path

import pytest
from PIL import Image

from d2o.cli.app import main
from d2o.cli.sample import _default_out
from d2o.data.images import open_images
from tests.helpers import tiny_student, tiny_teacher


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run("s.safetensors", "--n", 8, ...) -> (exit code, stdout, stderr) of `d2o sample`, beside a student and a
    teacher."""
    monkeypatch.chdir(tmp_path)
    tiny_teacher(tmp_path / "t.safetensors")
    tiny_student(tmp_path / "s.safetensors")

    def call(*words):
        with pytest.raises(SystemExit) as end:
            main(["sample", *(str(word) for word in words), "--device", "cpu"])
        captured = capsys.readouterr()
        return end.value.code, captured.out, captured.err

    return call


def test_sample_again_and_with_other_settings(run, tmp_path):
    words = [
        "s.safetensors",
        "--n",
        12,
        "--out",
        "x.zip",
        "--batch",
        4,
        "--seed",
        5,
        "--labels",
        "balanced",
        "--threads",
        1,
    ]
    code, out, err = run(*words, "--grid", "grids/g.png")
    assert code == 0 and out == "" and "x.zip: 12 images, 1 network call each" in err
    assert len(open_images(tmp_path / "x.zip")) == 12
    with Image.open(tmp_path / "grids" / "g.png") as grid:
        assert grid.size == (
            4 * 68 + 4,
            3 * (68 + 15) + 4,
        )  # two of classes 0 and 1, one of the others: each named below its image
    code, out, err = run(*words)
    assert code == 0 and "x.zip holds all 12 images already; nothing to do" in err
    code, out, err = run(*words, "--n", 13)
    assert code == 0 and "x.zip grows to 13 images" in err and len(open_images(tmp_path / "x.zip")) == 13
    code, out, err = run(*words, "--seed", 6)
    assert code == 2 and "seed: 5 -> 6" in err


def test_a_run_folder_means_its_best_checkpoint(run, tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    tiny_student(tmp_path / "run" / "checkpoints" / "last.safetensors", seed=5)
    assert run("run", "--n", 3, "--out", "last.npz")[0] == 0
    (tmp_path / "run" / "checkpoints" / "best.safetensors").write_bytes((tmp_path / "s.safetensors").read_bytes())
    assert run("run", "--n", 3, "--out", "best.npz")[0] == 0
    assert run("s.safetensors", "--n", 3, "--out", "s.npz")[0] == 0
    best, last, student = ((tmp_path / f"{name}.npz").read_bytes() for name in ("best", "last", "s"))
    assert best == student != last


def test_a_teacher(run, tmp_path):
    words = ["--teacher", "t.safetensors", "--n", 4, "--out", "t", "--solver", "euler", "--steps", 3, "--cfg", 2]
    code, _, err = run(*words)
    assert (
        code == 0
        and "t: 4 images, 3 network calls (6 passes) each" in err
        and (tmp_path / "t" / "samples.json").exists()
    )
    code, _, err = run(*words, "--steps", 4)
    assert code == 2 and "steps: 3 -> 4" in err


@pytest.mark.parametrize(
    "words, message",
    [
        (["--n", 3, "--out", "x.zip"], "give a student's checkpoint or --teacher"),
        (["s.safetensors", "--teacher", "t.safetensors", "--n", 3, "--out", "x.zip"], "one of them"),
        (["s.safetensors", "--out", "x.zip"], "--n is missing"),
        (["--teacher", "sd15"], "--n and --prompt (or --prompts FILE) are missing"),
        (["s.safetensors", "--n", 3, "--out", "x.rar"], "unknown output format '.rar'"),
        (["s.safetensors", "--n", 3, "--out", "x.zip", "--steps", 3], "makes an image in one network call"),
        (["s.safetensors", "--n", 3, "--out", "x.zip", "--solver", "heun"], "is a teacher's"),
        (["s.safetensors", "--n", 3, "--out", "x.zip", "--grid", "g.jpg"], "expected the name of a .png file"),
        (["s.safetensors", "--n", 3, "--out", "x.zip", "--labels", "11"], "class 11 is out of range"),
        (["t.safetensors", "--n", 3, "--out", "x.zip"], "holds a teacher, not a student"),
        (["--teacher", "s.safetensors", "--n", 3, "--out", "x.zip"], "holds a student, not a teacher"),
        (["missing.safetensors", "--n", 3, "--out", "x.zip"], "no such file"),
        (["digits", "--n", 3], "d2o sample --teacher digits samples it"),
        (["--teacher", "digitz", "--n", 3, "--out", "x.zip"], "did you mean 'digits'"),
        (["s.safetensors", "--n", 3, "--out", "t.safetensors/x.zip"], "t.safetensors is a file"),
    ],
)
def test_mistakes_are_one_line_and_create_nothing(run, tmp_path, words, message):
    code, out, err = run(*words)
    assert code == 2 and message in err and "Traceback" not in err and out == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.safetensors", "t.safetensors"]


def test_without_out_the_name_says_what_was_made(run, tmp_path):
    code, _, err = run("s.safetensors", "--n", 5)
    assert code == 0 and "writing samples/s-n5-seed0.zip (--out names another" in err
    assert run("s.safetensors", "--n", 5, "--labels", "0,1")[0] == 0
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        "s-labels0_1-n5-seed0.zip",
        "s-n5-seed0.zip",
    ]
    for source, name in (
        ("runs/quickstart", "quickstart"),
        ("runs/q/checkpoints/best.safetensors", "q-best"),
        ("a/v1.5", "v1.5"),
    ):
        assert _default_out(Path(source), 50000, 0, cfg=None) == Path(f"samples/{name}-n50000-seed0.zip")
    code, _, err = run("gone.safetensors", "--n", 5)
    assert code == 2 and "writing" not in err
