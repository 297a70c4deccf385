"""The watch of adversarial training: what it calls bad and since when, what it passes over, and that a resumed run goes
on with it."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable

import pytest

from d2o.training.watch import HISTORY, SETTLED, WINDOW, Watch

Values = dict[str, float]
STEP = 20  # iterations a line


def healthy(line: int, chance: random.Random) -> Values:
    """As runs on digits look like: noise on everything, gradients that drift."""
    return {
        "loss_g": 1.4 * chance.lognormvariate(0, 0.3),
        "loss_d": 1.0 * chance.lognormvariate(0, 0.3),
        "logit_real": chance.gauss(0.5, 0.5),
        "logit_fake": chance.gauss(-0.7, 0.5),
        "diversity": chance.lognormvariate(0, 0.2),
        "ada_p": min(0.6, 0.002 * line),
        "grad_generator": (1 + line / 100) * chance.lognormvariate(0, 0.6),
        "grad_critic": chance.lognormvariate(0, 0.6),
    }


def watch(
    lines: int,
    change: Callable[[int], Values] = lambda line: {},
    into: Watch | None = None,
    start: int = 1,
    seed: int = 0,
) -> Watch:
    found = into or Watch()
    for line in range(start, start + lines):
        found.see(line * STEP, healthy(line, random.Random(1000 * seed + line)) | change(line))
    return found


@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_noisy_run_is_stable(seed: int) -> None:
    found = watch(600, seed=seed)
    assert found.verdict == "stable" and found.brief == "stable" and found.state["was"] is None


def test_methods_without_a_critic_and_the_first_lines_get_no_verdict() -> None:
    found = Watch()
    for line in range(30):
        found.see(line, {"loss": 0.0, "grad_student": 1e9})
    assert found.verdict is None and found.brief == "" and not found.started
    assert watch(WINDOW - 1, lambda line: {"loss_d": 0.0}).verdict is None and watch(WINDOW).verdict == "stable"


FAULTY = {
    "critic saturated since iteration 1,000 (loss_d 0.003)": lambda line: {"loss_d": 0.003},
    "collapse since iteration 1,000: fakes of a batch differ 0.04 times as much as real ones": lambda line: {
        "diversity": 0.04
    },
    "fakes out of range since iteration 1,000: they differ 12 times as much as real images": lambda line: {
        "diversity": 12.0
    },
    "ADA p too high since iteration 1,000: at 0.93, augmentation will leak into the samples": lambda line: {
        "ada_p": 0.93
    },
    "generator loses since iteration 1,000: the critic is certain of its fakes (loss_g 25)": lambda line: {
        "loss_g": 25.0
    },
    "critic diverges since iteration 1,000: it does worse than guessing (loss_d 7)": lambda line: {"loss_d": 7.0},
    "losses not finite since iteration 1,000": lambda line: {"loss_g": math.nan},
}


@pytest.mark.parametrize("words", FAULTY)
def test_what_goes_wrong_is_named_with_its_first_iteration(words: str) -> None:
    change = FAULTY[words]
    found = watch(300, lambda line: change(line) if line >= 50 else {})
    assert found.verdict == words and found.brief == words.partition(" since")[0]


def test_exploding_gradients_are_measured_by_their_past_for_ever() -> None:
    found = watch(1000, lambda line: {"grad_critic": 350.0} if line >= 100 else {})
    assert (
        found.verdict is not None
        and found.verdict.startswith("gradients of critic explode since iteration 2,000: 3")
        and "times" in found.verdict
    )
    assert (
        watch(1000, lambda line: {"grad_critic": 1 + line / 20}).verdict == "stable"
    )  # fifty times as large in the end, but slowly
    assert (
        watch(200, lambda line: {"grad_critic": 1e-4} if line < SETTLED // 2 - 1 else {}).verdict == "stable"
    )  # layers that start at zero


def test_the_cause_comes_before_its_consequences() -> None:
    found = watch(200, lambda line: {"loss_d": 0.01} if line >= 50 else {})
    watch(100, lambda line: {"loss_d": 0.01, "diversity": 0.1}, into=found, start=201)
    assert found.verdict is not None and found.brief == "critic saturated, collapse"
    first, second = found.verdict.split("; ")
    assert "since iteration 1,000" in first and "since iteration 4,020" in second


def test_outliers_are_passed_over() -> None:
    bad = {"loss_d": 0.0, "diversity": 0.0, "loss_g": 50.0, "grad_critic": 1e6}
    assert watch(300, lambda line: bad if line % 3 == 0 else {}).verdict == "stable"
    assert watch(300, lambda line: bad if 100 <= line < 100 + WINDOW // 2 else {}).verdict == "stable"


def test_a_fault_that_goes_away_is_remembered() -> None:
    found = watch(120, lambda line: {"loss_d": 0.01 - line * 1e-5} if 50 <= line < 80 else {})
    assert (
        found.verdict
        == "stable; was: critic saturated since iteration 1,000 (loss_d 0.0092), recovered at iteration 1,640"
    )
    assert found.brief == "stable"
    watch(20, lambda line: {"ada_p": 0.9}, into=found, start=121)
    assert found.verdict is not None and found.verdict.startswith("ADA p too high since iteration 2,420")
    watch(40, into=found, start=141)
    assert found.verdict is not None and found.verdict.endswith("recovered at iteration 1,640, and 1 more")


def test_between_the_limits_the_verdict_does_not_flicker() -> None:
    found = Watch()
    verdicts = [
        watch(1, lambda line: {"loss_d": (0.045, 0.06)[line // 10 % 2]}, into=found, start=line).verdict
        for line in range(1, 100)
    ]
    assert len(set(verdicts[20:])) <= 2 and all("since iteration 20" in str(v) for v in verdicts[20:])


def test_the_state_is_small_json_and_a_resumed_watch_goes_on_with_it() -> None:
    def broken(line):
        return {"diversity": 0.1} if line >= 400 else {"loss_g": 30.0} if 100 < line < 130 else {}

    whole = watch(500, broken)
    parts = watch(403, broken)
    text = json.dumps(parts.state, sort_keys=True, allow_nan=False)
    resumed = Watch(json.loads(text))
    assert resumed.verdict == parts.verdict and len(text) < 8000
    watch(97, broken, into=resumed, start=404)
    assert (
        json.dumps(resumed.state, sort_keys=True) == json.dumps(whole.state, sort_keys=True)
        and resumed.verdict == whole.verdict
    )
    assert all(len(past["values"]) < HISTORY for past in whole.state["norms"].values())
