"""The second half of all recipes and variants with --mini; test_minis_a has the others, on another core."""

from __future__ import annotations

from pathlib import Path

import pytest

from d2o.recipes.find import recipe_names
from tests.recipes.minis import stores, teachers, train_die_resume_and_sample

__all__ = ["stores", "teachers"]
NAMES = recipe_names()


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES[len(NAMES) // 2 :])
def test_it_trains_dies_resumes_and_samples(
    name: str, stores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train_die_resume_and_sample(name, stores, tmp_path, monkeypatch) >= 10
