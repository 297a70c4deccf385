"""Results side by side: columns of any metrics, what is bold, and what the lines below say."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from d2o.reports.cells import CITED, FAILED, NOT_RUN, magnitude, milliseconds, number, paper_of, quoted, value_text
from d2o.reports.comparison import Comparison, fold, results_table
from tests.samples import record

RESULTS = Path(__file__).parents[2] / "results" / "mini_methods"


def metric(label: str, value: float, better: str | None, **more: Any) -> dict[str, Any]:
    return {"label": label, "value": value, "runs": [value], "std": None, "better": better, **more}


def with_metrics(name: str = "student", kind: str = "student", **metrics: dict[str, Any]) -> dict[str, Any]:
    r = record(name, kind=kind)
    return r | {"metrics": {key.replace("_", "-"): m for key, m in metrics.items()}}


def with_protocol(r: dict[str, Any], **changes: Any) -> dict[str, Any]:
    r = copy.deepcopy(r)
    r["protocol"] |= changes
    return r


def column(table: Comparison, header: str, nth: int = 0) -> list[str]:
    places = [i for i, h in enumerate(table.headers) if h == header]
    return [row[places[nth]] for row in table.rows]


def bold(table: Comparison, header: str) -> list[int]:
    return sorted(row for row, i in table.best if table.headers[i] == header)


def test_one_protocol_is_stated_below() -> None:
    table = results_table([record(), record(name="teacher", kind="teacher", nfe=35, fd=0.5)])
    assert table.headers == ["name", "n", "FD(digits) ↓", "accuracy ↑", "NFE", "params", "samples/s"]
    assert table.rows[0] == ["student", "4,000", "1.42", "97.5 %", "1", "700k", "1,640"]
    assert table.protocols == 1
    assert table.footer[0].startswith(
        "protocol: n = 4,000 · seeds 1000000..1003999 · labels random · features digits/64, weights 8ac411"
    )
    assert any("samples/s" in line and "Some CPU" in line for line in table.footer)


def test_every_metric_has_a_column_in_the_order_of_the_papers() -> None:
    a = with_metrics(
        "a", recall=metric("recall", 0.6, "higher"), fid=metric("FID-50k", 1.5, "lower"), own=metric("own", 3.0, None)
    )
    b = with_metrics("b", kid_x=metric("KID(x)", 0.00123, "lower"), fid=metric("FID-50k", 2.5, "lower"))
    b["metrics"]["kid@digits"] = metric("KID(digits)", 0.5, "lower")
    table = results_table([a, b])
    assert [h for h, c in zip(table.headers, table.columns, strict=True) if c == "metric"] == [
        "FID-50k ↓",
        "KID(x) ↓",
        "KID(digits) ↓",
        "recall ↑",
        "own",
    ]
    assert column(table, "KID(x) ↓") == ["–", "0.00123"] and column(table, "recall ↑") == ["0.600", "–"]


def test_numbers_of_other_labels_do_not_share_a_column() -> None:
    small = with_protocol(with_metrics("a", fid=metric("FID (n = 1,234)", 3.0, "lower")), n_gen=1234)
    table = results_table([small, with_metrics("b", fid=metric("FID-4k", 2.0, "lower"))])
    assert column(table, "FID (n = 1,234) ↓") == ["3.00", "–"] and column(table, "FID-4k ↓") == ["–", "2.00"]


def test_rows_of_other_protocols_have_letters_and_warnings() -> None:
    table = results_table([record(), with_protocol(record(), n_gen=899, seeds=None, n_ref=898)])
    assert table.headers[-1] == "protocol" and [row[-1] for row in table.rows] == ["a", "b"] and table.protocols == 2
    assert table.footer[0].startswith("a: n = 4,000") and table.footer[1].startswith("b: n = 899")
    assert any(
        line.startswith("not comparable, different n (4,000 against 1,797; 899 against 898)") for line in table.footer
    )
    assert any("rows of equal n only" in line for line in table.footer)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"features": "own/64"},
            "different extractors (digits/64, weights 8ac411ee6b9d; own/64, weights 8ac411ee6b9d)",
        ),
        (
            {"weights_sha256": "f" * 64},
            "different extractors (digits/64, weights 8ac411ee6b9d; digits/64, weights ffffffffffff)",
        ),
        ({"resize": "crop"}, "different resizes (none; crop)"),
        ({"quantize": "dmd_trunc"}, "different ways to 8 bits (edm_round; dmd_trunc)"),
        ({"ref": "real:digits/b"}, "different references (real:digits; real:digits/b)"),
    ],
)
def test_what_must_not_be_compared_is_said(changes: dict[str, Any], words: str) -> None:
    table = results_table([record(), with_protocol(record("other"), **changes)])
    assert f"not comparable, {words}" in table.footer
    assert not table.best


def test_real_images_are_stored_not_quantised() -> None:
    table = results_table([record(), with_protocol(record("real"), quantize="as stored")])
    assert not any("8 bits" in line for line in table.footer)


def test_best_student_is_bold_among_its_protocol_only() -> None:
    rows = [
        record("a", fd=1.0),
        record("b", fd=2.0),
        record("t", kind="teacher", nfe=35, fd=0.1),
        with_protocol(record("c", fd=0.2), n_gen=100),
    ]
    rows[1]["metrics"]["accuracy"]["value"] = 0.99
    table = results_table(rows)
    assert bold(table, "FD(digits) ↓") == [0] and bold(table, "accuracy ↑") == [1]
    assert any(line.startswith("bold:") for line in table.footer)
    hidden = with_protocol(rows[1], ref_seeds=[0, 9])  # differs in a field that the protocol's line does not show
    assert not results_table([rows[0], hidden]).best
    rows[0]["metrics"]["fd"]["small_n"] = rows[1]["metrics"]["fd"]["small_n"] = True
    assert bold(results_table(rows), "FD(digits) ↓") == []
    lone = results_table([rows[0], rows[2]])
    assert not lone.best and not any("bold" in line for line in lone.footer)


def test_metrics_of_other_settings_are_not_compared() -> None:
    rows = [
        with_metrics(name, recall=metric("recall", value, "higher", k=k))
        for name, value, k in (("a", 0.5, 3), ("b", 0.6, 5), ("c", 0.4, 3))
    ]
    assert bold(results_table(rows), "recall ↑") == [0]


def test_wide_tables_fold_into_pieces_with_names() -> None:
    whole = results_table([record("a", fd=1.0), record("b", fd=2.0)])
    pieces = fold(whole, 40)
    assert len(pieces) > 1 and all(p.headers[0] == "name" and [row[0] for row in p.rows] == ["a", "b"] for p in pieces)
    assert [h for p in pieces for h in p.headers[1:]] == whole.headers[1:]
    assert sum(len(p.best) for p in pieces) == len(whole.best) > 0 and bold(pieces[0], "FD(digits) ↓") == [0]
    assert pieces[-1].footer == whole.footer and not pieces[0].footer
    assert all(sum(max(map(len, cells)) + 3 for cells in zip(p.headers, *p.rows, strict=True)) <= 40 for p in pieces)
    assert fold(whole, 500) == [whole] and len(fold(whole, 1)) == len(whole.headers) - 1


def test_equally_good_students_are_both_bold_and_undirected_metrics_never() -> None:
    rows = [with_metrics(n, fid=metric("FID-4k", 1.0, "lower"), own=metric("own", 2.0, None)) for n in "ab"]
    table = results_table(rows)
    assert bold(table, "FID-4k ↓") == [0, 1] and bold(table, "own") == []


def test_marks_repeats_small_n_and_other_extractors() -> None:
    small, other = record(), record()
    small["metrics"]["fd"] |= {"small_n": True, "std": 0.0312, "runs": [1.4, 1.5]}
    other["metrics"]["fd"]["label"] = "FD(own@abc123)"
    table = results_table([small, other])
    assert column(table, "FD(digits) ↓") == ["1.420 ± 0.031†", "–"] and column(table, "FD(own@abc123) ↓") == [
        "–",
        "1.42",
    ]
    assert any(line.startswith("†") for line in table.footer) and any(
        line.startswith("±: standard deviation over runs") for line in table.footer
    )
    assert not any("FID" in cell for row in [*table.rows, table.headers, table.footer] for cell in row)


def test_each_kind_of_error_is_explained() -> None:
    r = with_metrics(
        fid=metric("FID-4k", 2.0, "lower", std=0.1),
        kid=metric("KID", 0.1, "lower", std=0.01, error="subsets"),
        recall=metric("recall", 0.5, "higher", std=0.01, error="bootstrap"),
        precision=metric("precision", 0.5, "higher"),
    ) | {"protocol": record()["protocol"]}
    r["metrics"]["is"] = metric("IS-4k", 9.0, "higher", std=0.2, error="splits")
    lines = [line for line in results_table([r]).footer if line.startswith("±")]
    assert [line.partition(":")[0] for line in lines] == ["± of FID-4k", "± of KID", "± of IS-4k", "± of recall"]
    assert ["disjoint seeds" in lines[0], "subsets" in lines[1], "splits" in lines[2], "bootstrap" in lines[3]] == [
        True
    ] * 4


def test_a_minimum_has_no_deviation_and_says_what_it_is() -> None:
    r = with_metrics(fid=metric("FID-4k, min of 3", 1.9, "lower", std=0.05, report="min") | {"runs": [1.9, 1.95, 2.0]})
    table = results_table([r])
    assert column(table, "FID-4k, min of 3 ↓") == ["1.90"] and not any(line.startswith("±") for line in table.footer)
    assert any(line.startswith("FID-4k, min of 3: the best of the runs") for line in table.footer)


def test_metrics_over_other_numbers_of_images_say_so() -> None:
    table = results_table(
        [with_metrics(fid=metric("FID-4k", 1.9, "lower", n=4000), recall=metric("recall", 0.5, "higher", n=1000))]
    )
    assert "recall: over 1,000 images" in table.footer and not any(
        line.startswith("FID-4k: over") for line in table.footer
    )


def test_papers_numbers_stand_beside() -> None:
    a = with_metrics("a", fid=metric("FID-50k", 1.51234, "lower")) | {
        "paper": {"fid": [1.499, 0.011], "nfe": 1, "is": 9.98}
    }
    b = with_metrics("b", fid=metric("FID-50k", 321.0, "lower"))
    old = quoted("DDPM", {"fid": 3.17, "nfe": 1000, "seconds": 80.5}, "SiDA, Table 1")
    preset = {"preset": {"name": "sida_cifar10", "paper": "SiDA, Table 1"}}
    table = results_table([a | preset, b, old])
    assert column(table, "FID-50k ↓") == ["1.512", "321", "–"]  # as many decimals as the paper
    assert column(table, "paper") == ["1.499 ± 0.011", "–", "3.17"] and column(table, "paper", 1) == ["1", "–", "1,000"]
    assert column(table, "is, paper") == ["9.98", "–", "–"] and column(table, "latency, paper") == ["–", "–", "80.5 s"]
    assert table.rows[2][1] == "–" and column(table, "preset") == ["sida_cifar10", "–", "–"]
    assert "preset sida_cifar10: the protocol of SiDA, Table 1" in table.footer
    assert any("quoted from SiDA, Table 1, not measured here" in line for line in table.footer)
    assert paper_of(a) == {"fid": (1.499, 0.011), "nfe": (1, None), "is": (9.98, None)}


def test_rows_without_numbers_say_why() -> None:
    a = with_metrics("a", fid=metric("FID-50k", 1.5, "lower"))
    rows = [quoted(status, {"nfe": 5}, "A paper", [f"{status}: why"], status) for status in (CITED, NOT_RUN, FAILED)]
    table = results_table([a, *rows])
    assert column(table, "n") == ["4,000", "cited", "not run", "failed"]
    for words in ("cited: quoted from A paper", "not run: d2o makes", "failed: it could not", "note: not run: why"):
        assert any(line.startswith(words) for line in table.footer), words
    alone = results_table(rows)  # nothing is measured
    assert column(alone, "NFE, paper") == ["5", "5", "5"] and not alone.protocols


def test_papers_accuracy_is_per_cent_like_ours() -> None:
    assert column(results_table([record(paper={"accuracy": 0.98})]), "paper") == ["98 %"]


def test_a_papers_number_is_shown_once() -> None:
    a = with_metrics("a", fid=metric("FID-50k", 1.5, "lower")) | {"paper": {"fid": 1.4}}
    b = with_metrics("b", fid=metric("FID-10k", 2.5, "lower")) | {"paper": {"fid": 2.4}}
    table = results_table([a, b])
    assert column(table, "paper", 0) == ["1.4", "–"] and column(table, "paper", 1) == ["–", "2.4"]


def test_speed_latency_forwards_and_notes() -> None:
    r = record(nfe=35)
    r["x"]["forwards"] = 70
    r["notes"] = ["be careful"]
    r["metrics"]["speed"] |= {"latency_ms": 12.34, "dtype": "float16"}
    table = results_table([r])
    assert (
        column(table, "NFE") == ["35 (70 forwards)"]
        and "note: be careful" in table.footer
        and column(table, "latency") == ["12.3 ms"]
    )
    assert any(line.startswith("latency:") for line in table.footer) and any(
        "batch 250, float16" in line for line in table.footer
    )


def test_committed_results_keep_their_table() -> None:
    records = [json.loads(path.read_text())["eval"] for path in sorted(RESULTS.glob("*.json"))]
    table = results_table(records)
    assert len(table.rows) == len(records) >= 9 and {"FD(digits) ↓", "accuracy ↑", "to teacher", "NFE"} <= set(
        table.headers
    )
    values = [r["metrics"]["fd@digits"]["value"] for r in records if r["x"]["kind"] == "student"]
    best = [
        records[row]["metrics"]["fd@digits"]["value"] for row in bold(table, "FD(digits) ↓")
    ]  # of each protocol: with classes, and without
    assert min(best) == min(values)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.01234, "0.0123"),
        (0.7, "0.700"),
        (12.0, "12.0"),
        (99.96, "100"),
        (321.4, "321"),
        (1640.2, "1,640"),
    ],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "std", "more", "text"),
    [
        (1.42, 0.0312, {}, "1.420 ± 0.031"),
        (9.8, 0.11, {}, "9.80 ± 0.11"),
        (321.0, 45.0, {}, "321 ± 45"),
        (0.5, 0.0, {}, "0.500 ± 0"),
        (0.97, 0.012, {"percent": True}, "97.0 ± 1.2 %"),
        (1640.0, 0.001, {}, "1,640.0 ± 0.00100"),
        (-0.2, None, {}, "-0.200"),
    ],
)
def test_values_are_rounded_by_their_deviation(
    value: float, std: float | None, more: dict[str, Any], text: str
) -> None:
    assert value_text(metric("x", value, None, std=std, **more)) == text


def test_counts_and_times_are_short() -> None:
    assert [magnitude(n) for n in (512, 700_000, 749_089, 999_999, 55_700_000, 2_600_000_000)] == [
        "512",
        "700k",
        "749k",
        "1M",
        "55.7M",
        "2.60B",
    ]
    assert [milliseconds(t) for t in (0.5, 56.7, 12_000)] == ["0.500 ms", "56.7 ms", "12.0 s"]
