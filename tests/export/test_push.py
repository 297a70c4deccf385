"""Exports on the hub: what would go there, and that nothing does which should not."""

from __future__ import annotations

from types import SimpleNamespace

import huggingface_hub
import pytest

from d2o.cli.app import main
from tests.export.conftest import save_conditional


class Hub:
    """In the place of the hub's client: keeps what it is asked for."""

    asked: list

    def __init__(self, **options):
        pass

    def create_repo(self, repo, **options):
        Hub.asked.append(("create", repo, options))

    def create_commit(self, repo, operations, commit_message):
        Hub.asked.append(("commit", repo, sorted(operation.path_in_repo for operation in operations)))
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo}/commit/1")


@pytest.fixture
def hub(monkeypatch):
    Hub.asked = []
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_of_a_test")
    for name in ("D2O_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    return Hub


@pytest.fixture
def student(tmp_path, monkeypatch):
    save_conditional(tmp_path / "s.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "s.safetensors"


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["export", "s.safetensors", "--format", "safetensors", *arguments])
    return int(end.value.code or 0)


def test_a_dry_run_says_what_would_go_and_asks_nothing_of_the_hub(hub, student, capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert run("--push", "me/mine", "--dry-run") == 0
    out = capsys.readouterr().out
    assert "would upload 2 files" in out and "to me/mine (if it is new: private)" in out
    assert "  README.md (0.0" in out and "  s-fp32.safetensors (0." in out
    assert "license: cc-by-nc-4.0" in out and "## Numerical parity" in out
    assert hub.asked == []


def test_file_and_card_go_in_one_commit_into_a_private_repository(hub, student, capsys):
    assert run("--push", "me/mine") == 0
    files = ["README.md", "s-fp32.safetensors"]
    assert hub.asked == [("create", "me/mine", {"private": True, "exist_ok": True}), ("commit", "me/mine", files)]
    assert "uploaded 2 files" in capsys.readouterr().out
    hub.asked = []
    assert run("--push", "me/mine", "--public") == 0
    assert hub.asked[0][2]["private"] is False


def test_what_fails_the_comparison_is_not_uploaded(hub, student, capsys):
    assert run("--dtype", "bf16", "--tolerance", "1e-9", "--push", "me/mine") == 2
    assert "above the tolerance" in capsys.readouterr().err and hub.asked == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--push", "mine"], "expected OWNER/NAME"),
        (["--push", "me/mi ne"], "expected OWNER/NAME"),
        (["--dry-run"], "--dry-run is for --push"),
        (["--public"], "--public is for --push"),
    ],
)
def test_what_is_no_repository_is_said_before_the_export(hub, student, tmp_path, capsys, options, message):
    assert run(*options) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["s.safetensors"] and hub.asked == []


def test_no_token_no_network_and_a_refusal_are_said_in_words(hub, student, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Hub, "create_repo", lambda *given, **options: exec("raise OSError('403 Forbidden')"))
    assert run("--push", "me/mine") == 2
    assert "cannot upload to me/mine: 403 Forbidden" in capsys.readouterr().err
    monkeypatch.setenv("D2O_OFFLINE", "1")
    assert run("--push", "me/mine") == 2
    assert "the network is switched off (D2O_OFFLINE=1)" in capsys.readouterr().err
    monkeypatch.delenv("D2O_OFFLINE")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert run("--push", "me/mine") == 2
    err = capsys.readouterr().err
    assert "no token" in err and "hf auth login" in err


def test_a_folder_goes_with_all_that_is_in_it(hub, tmp_path):
    from d2o.export.exporter import Exported
    from d2o.export.push import push

    for name in ("README.md", "unet/config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    done = Exported(tmp_path, tmp_path / "README.md", None, "", "", False)  # type: ignore[arg-type]
    assert push(done, "me/mine").startswith("https://")
    assert hub.asked[-1] == ("commit", "me/mine", ["README.md", "unet/config.json"])
