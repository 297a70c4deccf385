"""Numbers that nobody means: refused before anything is made."""

from __future__ import annotations

from pathlib import Path

import pytest

from d2o.cli.app import main

HUGE = "1" + "0" * 30


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as done:
        main(list(arguments))
    text = capsys.readouterr().err
    assert done.value.code == 2 and "fault of d2o" not in text, text
    return text


@pytest.mark.parametrize("option", ["--n", "--seed", "--batch", "--steps", "--threads", "--chunk"])
def test_options_of_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str) -> None:
    given = {"--n": "4", "--teacher": "digits", "--out": str(tmp_path / "x.zip"), option: HUGE}
    assert f"{option} {HUGE}: the limit is" in refused(
        capsys, "sample", *(word for pair in given.items() for word in pair)
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--batch", "--shard-size", "--per-prompt", "--threads", "--steps", "--n", "--seed"])
def test_options_of_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str) -> None:
    given = {"--n": "4", "--teacher": "digits", "--out": str(tmp_path / "x"), option: HUGE}
    assert f"{option} {HUGE}: the limit is" in refused(
        capsys, "pairs", *(word for pair in given.items() for word in pair)
    )


@pytest.mark.parametrize(
    "option",
    [
        "--n",
        "--batch",
        "--repeats",
        "--bootstrap",
        "--distance-n",
        "--pr-k",
        "--kid-subsets",
        "--kid-size",
        "--is-splits",
        "--neighbours",
        "--per-prompt",
    ],
)
def test_options_of_eval(capsys: pytest.CaptureFixture[str], option: str) -> None:
    assert f"{option} {HUGE}: the limit is" in refused(capsys, "eval", "real:digits", option, HUGE)


def test_options_that_are_no_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    for value in ("nan", "inf", "-inf"):
        assert "expected a finite number" in refused(
            capsys, "sample", "--teacher", "digits", "--n", "4", "--out", "x.zip", "--cfg", value
        )


@pytest.mark.parametrize(
    "key",
    [
        "batch",
        "micro_batch",
        "images",
        "threads",
        "seed",
        "log_every",
        "pairs.n",
        "pairs.steps",
        "pairs.batch",
        "preview.n",
        "eval.batch",
        "optim.warmup",
    ],
)
def test_keys_of_recipes(tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str) -> None:
    assert key.rpartition(".")[2] in refused(
        capsys, "train", "quickstart", "--set", f"{key}={HUGE}", "--out", str(tmp_path / "r")
    )
    assert not list(tmp_path.iterdir())
