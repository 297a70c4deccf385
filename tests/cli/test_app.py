"""The command line as a whole: help, versions, exit codes."""

from __future__ import annotations

import errno

import pytest
import typer
from typer.main import get_command

import d2o
from d2o.cli.app import app, main


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as done:
        main(list(arguments))
    return done.value.code  # type: ignore[return-value]


def test_version(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out.strip() == f"d2o {d2o.__version__}"


def test_every_command_and_every_option_has_help():
    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert sorted(commands) == ["env", "eval", "export", "finetune", "pairs", "recipes", "sample", "teachers", "train"]
    for name, command in commands.items():
        assert len(command.help) > 20, name
        for parameter in command.params:
            if parameter.name != "help":
                assert parameter.help and len(parameter.help) > 10, (name, parameter.name)


@pytest.mark.parametrize("command", ["pairs", "train", "finetune", "sample", "eval", "export"])
def test_help_of_each_command(command, capsys):
    assert run(command, "--help") == 0
    assert "Usage: d2o" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [("trian",), ("train",), ("train", "quickstart", "--nope"), ("sample", "x", "--n", "many")]
)
def test_usage_errors_exit_with_2_and_no_traceback(arguments, capsys):
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err and "fault of d2o" not in captured.err


def test_unknown_recipe_teacher_and_format_name_the_nearest(capsys, tmp_path):
    assert run("train", "quickstrat") == 2 and "did you mean 'quickstart'" in capsys.readouterr().err
    assert run("pairs", "--teacher", "digitz", "--n", "4", "--out", str(tmp_path / "p")) == 2
    assert "did you mean 'digits'" in capsys.readouterr().err
    assert not (tmp_path / "p").exists()


def test_a_fault_of_ours_is_said_to_be_one(monkeypatch, capsys):
    import d2o.cli.app as module

    def broken(*_, **__):
        raise RuntimeError("oh")

    monkeypatch.setattr(module, "app", broken)
    assert run("train") == 1 and "RuntimeError: oh" in capsys.readouterr().err
    with pytest.raises(RuntimeError):
        main(["--debug", "train"])


def test_a_full_disk_is_not_our_fault(monkeypatch, capsys):
    import d2o.cli.app as module

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "runs/x/metrics.jsonl")

    monkeypatch.setattr(module, "app", full)
    assert run("train") == 2 and "runs/x/metrics.jsonl: No space left" in capsys.readouterr().err


def test_interruption_before_anything_is_saved(monkeypatch, capsys):
    import d2o.cli.app as module

    def stopped(*_, **__):
        raise typer.Abort

    monkeypatch.setattr(module, "app", stopped)
    assert run("train") == 130 and "stopped" in capsys.readouterr().err
