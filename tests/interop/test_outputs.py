"""Outputs that cannot be written are refused before the work, by every command."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from d2o.cli.app import main
from d2o.errors import UserError
from d2o.interop.outputs import check_output


def test_what_can_be_written_leaves_no_trace(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("x")
    for path in (tmp_path / "new.json", tmp_path / "there", tmp_path / "a" / "b" / "c.npz", tmp_path):
        check_output(path)
    assert [p.name for p in tmp_path.iterdir()] == ["there"] and (tmp_path / "there").read_text() == "x"


def fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


def dangling(path: Path) -> Path:
    path.symlink_to(path.parent / "nowhere" / "x")
    return path


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: dangling(folder / "link"), "it is a link to nothing"),
        (lambda folder: dangling(folder / "link") / "below.json", "link is a link to nothing"),
        (lambda folder: fifo(folder / "pipe"), "it is a named pipe"),
        (lambda folder: Path("/dev/null"), "it is a device"),
        (lambda folder: folder / ("x" * 256), "File name too long"),
        (lambda folder: folder / ("x" * 300) / "y", "File name too long"),
        (lambda folder: folder / "file" / "y", "file is a file"),
        (lambda folder: folder, "a folder of that name is in the way"),
        (lambda folder: Path("/proc/d2o.json"), "cannot write /proc/d2o.json"),
        (lambda folder: folder / "a\0b", "cannot write"),
    ],
)
def test_what_cannot_be_written(tmp_path: Path, make, words: str) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=words):
        check_output(make(tmp_path), folder=False)


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file; expected a folder"):
        check_output(tmp_path / "file", folder=True)


def test_a_read_only_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    with pytest.raises(UserError, match="the file system is read-only"):
        check_output(tmp_path / "x")


@pytest.mark.parametrize(
    "arguments",
    [
        ("sample", "--teacher", "digits", "--n", "4", "--out", "{}.zip"),
        ("sample", "--teacher", "digits", "--n", "4", "--out", "x.zip", "--grid", "{}.png"),
        ("pairs", "--teacher", "digits", "--n", "4", "--out", "{}"),
        ("train", "quickstart", "--out", "{}"),
        ("train", "quickstart", "--sweep", "optim.lr=1e-3,2e-3", "--out", "{}"),
        ("export", "digits", "--out", "{}.onnx"),
        *(
            ("eval", "real:digits", option, f"{{}}{suffix}")
            for option, suffix in (
                ("--json", ".json"),
                ("--csv", ".csv"),
                ("--markdown", ".md"),
                ("--report", ".html"),
                ("--save-stats", ".npz"),
            )
        ),
    ],
    ids=lambda arguments: " ".join(arguments[:1] + arguments[-2:-1]),
)
def test_every_command_refuses_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, arguments
) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    for suffix in ("", ".zip", ".png", ".onnx", ".json", ".csv", ".md", ".html", ".npz"):
        dangling(tmp_path / f"out{suffix}")
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(
        "d2o.teachers.base.Teacher.denoise",
        lambda *_: pytest.fail("worked before it looked at the output"),
        raising=False,
    )
    with pytest.raises(SystemExit) as done:
        main([argument.format("out") for argument in arguments])
    assert done.value.code == 2 and "link to nothing" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before
