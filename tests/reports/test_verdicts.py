"""Orders that papers claim, verdicts by pairs of trainings with equal seeds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from d2o.errors import UserError
from d2o.reports.paper_tables import load_table
from d2o.reports.verdicts import PaperOrder, verdict_on

ORDER = PaperOrder(claim="A is better", better="A", than="B", by="fd")


def rows(a: dict[int | None, float], b: dict[int | None, float], key: str = "fd@digits", better: str = "lower") -> Any:
    def records(values: dict[int | None, float]) -> dict[int | None, Any]:
        return {s: {"metrics": {key: {"label": key, "value": v, "better": better}}} for s, v in values.items()}

    return {"A": records(a), "B": records(b)}


def test_three_seeds_need_more_than_two_standard_errors() -> None:
    near = verdict_on(ORDER, rows({0: 1.0, 1: 2.0, 2: 3.0}, {0: 1.1, 1: 2.2, 2: 3.05}))
    assert near.gain is not None and near.error is not None and 2 < near.gain / near.error < 4.3
    assert (near.word, near.agree) == ("not decided", 3)


def test_seen_when_the_interval_of_the_pairs_leaves_out_0() -> None:
    verdict = verdict_on(ORDER, rows({0: 1.0, 1: 2.0, 2: 3.0}, {0: 1.5, 1: 2.4, 2: 3.6}))
    assert (verdict.word, verdict.agree, verdict.seeds) == ("seen", 3, 3)
    assert verdict.first == pytest.approx(2.0) and verdict.second == pytest.approx(2.5)
    assert verdict.gain == pytest.approx(0.5) and verdict.error == pytest.approx(0.1 / math.sqrt(3))
    assert verdict.text == "A is better: seen (fd 2.00 and 2.50; gain 0.500 ± 0.0577, 3 of 3 seeds)"


def test_seeds_that_only_one_row_has_are_left_out() -> None:
    verdict = verdict_on(ORDER, rows({0: 1.0, 1: 1.0, 5: 99.0}, {0: 2.0, 1: 2.5, 7: 0.0}))
    assert verdict.seeds == 2 and verdict.gain == pytest.approx(1.25)


def test_the_other_way_round_and_higher_is_better() -> None:
    values = {0: 1.0, 1: 1.1}, {0: 2.0, 1: 2.2}
    assert verdict_on(ORDER, rows(*values)).word == "seen"
    assert verdict_on(ORDER, rows(*values, better="higher")).word == "the other way round"


def test_what_decides_nothing() -> None:
    assert verdict_on(ORDER, rows({0: 1.0}, {0: 9.0})).word == "not decided"
    assert verdict_on(ORDER, rows({0: 1.0, 1: 3.0}, {0: 2.0, 1: 2.0})).word == "not decided"
    assert verdict_on(ORDER, rows({0: 1.0}, {1: 9.0})).word == "not measured"
    assert verdict_on(ORDER, {"A": {}, "B": {}}).word == "not measured"
    assert verdict_on(ORDER, rows({0: 1.0}, {0: 9.0}, key="recall")).word == "not measured"


def test_a_row_without_trainings_stands_against_every_seed() -> None:
    verdict = verdict_on(ORDER, rows({0: 1.0, 1: 1.2, 2: 1.1}, {None: 2.0}))
    assert (verdict.word, verdict.seeds) == ("seen", 3) and verdict.second == 2.0


def test_a_metric_over_one_network_is_not_that_over_another() -> None:
    order = PaperOrder(claim="A is better", better="A", than="B", by="fd@lite0")
    assert verdict_on(order, rows({0: 1.0, 1: 1.0}, {0: 2.0, 1: 2.0})).word == "not measured"


def test_orders_name_rows_and_metrics_that_are_there(tmp_path: Path) -> None:
    text = """title: t
paper: p
rows:
  - {name: "first", x: digits}
  - {name: "second", x: digits}
orders:
  - {claim: "c", better: first, than: secnd, by: fd}
  - {claim: "c", better: first, than: second, by: fdd}
"""
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        load_table(tmp_path / "t.yaml")
    assert "t.yaml:7: orders[0].than: unknown row 'secnd'" in error.value.message
    assert "did you mean 'second'" in error.value.message
    assert "t.yaml:8: orders[1].by: unknown number 'fdd'" in error.value.message
