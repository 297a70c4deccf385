"""A run that is killed at any change of its folder, and continued, leaves every byte that a whole one leaves, log included."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.kills import RECIPE, content, train


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("kills")
    (folder / "recipe.yaml").write_text(RECIPE)
    code, events = train(folder / "recipe.yaml", folder / "whole")
    assert code == 0
    return folder, events


def test_the_order_of_writes(whole):
    """So that the kills below are where they are meant to be."""
    folder, events = whole
    names = sorted(path.name for path in (folder / "whole" / "checkpoints").iterdir())
    assert names == [f"{name}.safetensors" for name in ("best", "images-000000000160", "images-000000000168", "last", "state")]
    renames = [event.split()[1].partition(".safetensors")[0].lstrip(".") for event in events if event.startswith("os.rename")]
    assert renames[-5:] == ["last", "images-000000000168", "state", "images-000000000168", "last"]
    assert events[-1] == "os.remove images-000000000120.safetensors"


@pytest.mark.parametrize("back", [0, 1, 2, 3, 4, 7, 12, 20, 29])
def test_killed_at_a_change_of_the_last_checkpoint(whole, back, tmp_path):
    folder, events = whole
    at = len(events) - back
    assert train(folder / "recipe.yaml", tmp_path / "run", at)[0] == -9
    assert train(folder / "recipe.yaml", tmp_path / "run")[0] == 0
    assert content(tmp_path / "run") == content(folder / "whole"), events[at - 1]
