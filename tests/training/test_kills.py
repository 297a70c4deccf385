"""A run that is killed at any change of its folder, and continued, leaves every byte that a whole one leaves, log
included."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.kills import RECIPE, content, train


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[int, str]]]:
    """A folder with a recipe and the run that nothing happened to, and its changes: number, what and which file."""
    folder = tmp_path_factory.mktemp("kills")
    (folder / "recipe.yaml").write_text(RECIPE)
    code, events = train(folder / "recipe.yaml", folder / "whole")
    assert code == 0
    return folder, [
        (i, f"{what} {Path(path).name}") for i, (what, path) in enumerate(events, 1) if "tensorboard" not in path
    ]


def test_the_order_of_writes(whole):
    """So that the kills below are where they are meant to be."""
    folder, events = whole
    names = sorted(path.name for path in (folder / "whole" / "checkpoints").iterdir())
    assert names == [
        f"{name}.safetensors" for name in ("best", "images-000000000160", "images-000000000168", "last", "state")
    ]
    renames = [text.split()[1] for _, text in events if text.startswith("os.rename")]
    last, number = "last.safetensors", "images-000000000168.safetensors"
    assert renames[-5:] == [f"{last}.next", f"{number}.next", "state.safetensors", number, last]
    assert events[-1][1] == "os.remove images-000000000120.safetensors"


@pytest.mark.parametrize("back", [1, 2, 3, 4, 5, 8, 13, 22, 31])
def test_killed_in_a_change_of_the_last_checkpoint(whole, back, tmp_path):
    folder, events = whole
    at, what = events[-back]
    assert train(folder / "recipe.yaml", tmp_path / "run", at)[0] == -9
    assert train(folder / "recipe.yaml", tmp_path / "run")[0] == 0
    assert content(tmp_path / "run") == content(folder / "whole"), what
