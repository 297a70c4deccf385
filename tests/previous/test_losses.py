"""The first losses of three recipes are those of the version before the rebuild (all 50: `baseline.py`)."""

from __future__ import annotations

import json

import pytest

from tests.previous import baseline

ITERATIONS = {"quickstart": 10, "sid_digits": 5, "spi_gan_digits": 10}


@pytest.mark.parametrize("name", baseline.RECIPES)
def test_the_first_losses_are_those_of_the_previous_version(name: str) -> None:
    known = json.loads(baseline.LOSSES.read_text())[name]
    assert all(len(values) == baseline.ITERATIONS for values in known.values()) and "loss" in "".join(known)
    apart = baseline.differences(baseline.losses(name, ITERATIONS[name]), known, ITERATIONS[name])
    assert max(apart.values()) <= 1, {key: f"{value * baseline.CLOSE:.1e}" for key, value in apart.items()}
