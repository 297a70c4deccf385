"""What the command line prints: hints that fit the command, the time that is left, --quiet, devices in one line."""

from __future__ import annotations

import pytest

from d2o.cli import console, hints
from d2o.cli.app import app, main
from d2o.errors import UserError
from d2o.training.distributed import devices, pick_device
from tests.helpers import tiny_student


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as done:
        main([str(word) for word in words])
    return done.value.code  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("command", "hint", "shown"),
    [
        ("eval", "choose another --out, or make room and run again", "make room and run again"),
        (
            "train",
            "choose another --out, or make room and run again",
            "choose another --out, or make room and run again",
        ),
        ("train", "put it at X, or name it with --weights inception=PATH", "put it at X"),
        (
            "eval",
            "put it at X, or name it with --weights inception=PATH",
            "put it at X, or name it with --weights inception=PATH",
        ),
        ("train", "leave --cfg away", "leave pairs.cfg away"),
        ("pairs", "leave --cfg away", "leave --cfg away"),
        ("train", "give another --extractor; --resize crop crops", "give another eval.extractor"),
        ("train", "for this teacher: --solver ddim --eta 1", "for this teacher: pairs.solver ddim pairs.eta 1"),
        ("teachers", "choose another --out", ""),
        (
            "train",
            "d2o eval --against takes statistics; here images are needed",
            "d2o eval --against takes statistics; here images are needed",
        ),
        (
            "train",
            "python dataset_tool.py --source=a --dest=b --resolution=64x64",
            "python dataset_tool.py --source=a --dest=b --resolution=64x64",
        ),
        ("eval", "--on-bad skip leaves them out\n--mini does without", "--on-bad skip leaves them out"),
    ],
)
def test_a_hint_names_only_options_of_the_command_that_was_typed(command, hint, shown, monkeypatch, capsys):
    def fail(**_: object) -> None:
        raise UserError("wrong", hint)

    registered = {(info.name or info.callback.__name__): info for info in app.registered_commands}  # type: ignore[union-attr]
    monkeypatch.setattr(registered[command], "callback", _like(registered[command].callback, fail))
    needed = {"train": ["quickstart"]}.get(command, [])
    assert run(command, *needed) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["error: wrong", *(f"  {line}" for line in shown.splitlines())]


def _like(original, replacement):
    """`replacement` with the parameters of `original`, so that typer gives it the same options."""
    import functools

    @functools.wraps(original)
    def call(**given):
        return replacement(**given)

    return call


def test_the_time_that_is_left_shows_from_the_second_update_on(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(console.time, "perf_counter", lambda: now[0])
    meter = console.Meter("train", 100, done=10)
    for seconds, done in ((0.0, 10), (1.0, 20), (2.0, 30), (7.0, 40), (9.0, 100)):
        now[0] = seconds
        meter.update(done)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["train 20/100 images, 10 images/s, ETA 0:08", "train 40/100 images, 4.29 images/s, ETA 0:14"]
    assert lines[2:] == ["train 100/100 images, 10 images/s"]
    assert console._clock(3661) == "1:01:01"


def test_quiet_prints_results_and_errors_only(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny_student(tmp_path / "s.safetensors")
    for words in (("--quiet", "sample"), ("sample", "--quiet")):
        assert run(*words, "s.safetensors", "--n", 4) == 0
        assert capsys.readouterr() == ("", "")
    assert run("sample", "none.safetensors", "--n", 4, "--quiet") == 2 and capsys.readouterr().err.startswith(
        "error: no such file"
    )
    assert run("sample", "s.safetensors", "--n", 4) == 0 and "nothing to do" in capsys.readouterr().err  # as it was


@pytest.mark.parametrize(
    "name", ["mps", "xpu", "cuda:99", "meta", "tpu", "cpu:3", "", "cuda:x:y", "privateuseone", "CPU"]
)
def test_every_device_that_cannot_be_used_is_refused_in_a_line(name):
    if name in devices():
        pytest.skip("it is here")
    with pytest.raises(UserError) as caught:
        pick_device(name)
    assert (
        "\n" not in caught.value.message
        and f"--device {name}" in caught.value.message
        and len(caught.value.message) < 300
    )
    assert caught.value.hint == f"usable here: {', '.join(devices())}"


def test_what_is_printed_is_not_read_as_emoji(capsys):
    console.say("--device cuda:x: and [bold]")
    assert capsys.readouterr().err == "--device cuda:x: and [bold]\n"


def test_names_of_placeholders_are_shown(capsys):
    assert run("train", "--help") == 0 and "runs/<recipe name>" in capsys.readouterr().out
    assert hints.fit("") == ""


def test_what_a_message_quotes_has_an_end(capsys):
    console.error("x is " + 100_000 * "y", "known: z")
    text = "".join(capsys.readouterr().err.split("\n"))
    assert len(text) < 4_200 and "(100,005 characters)" in text and "known: z" in text
