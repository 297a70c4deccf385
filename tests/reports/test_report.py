"""The report page: complete in itself, safe against what names hold, honest about protocols; and the charts in it."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from d2o.data.pictures import to_png
from d2o.errors import UserError
from d2o.evaluation.neighbours import neighbours_record
from d2o.reports.cells import quoted
from d2o.reports.charts import Dot, Series, dot_chart, line_chart, short
from d2o.reports.curves import read_curves
from d2o.reports.report import render, write_report
from tests.samples import DOT, record

VOID = {"meta", "img", "br", "link", "wbr"}


class Checker(HTMLParser):
    """Every tag closed in order; the addresses that attributes name."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for key, value in attrs if key in ("src", "href", "data", "action", "srcset")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def check(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    assert not checker.open
    return checker


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "quick"
    folder.mkdir()
    lines = [
        {"iteration": i, "images": 128 * i, "loss": 1 / i, "lr": 1e-3, "images_per_s": 900.0} for i in range(1, 200)
    ]
    lines += [{"iteration": i, "images": 128 * i, "eval": {"fd": 30 / i, "accuracy": 0.9}} for i in (50, 100, 150)]
    (folder / "metrics.jsonl").write_text(
        "\n".join(map(json.dumps, lines)) + '\n{"iteration": 200, "ima'
    )  # killed while writing
    return folder


def trio() -> list[dict]:
    return [
        record("teacher, heun 18", kind="teacher", nfe=35, fd=0.78, grid={**record()["grid"], "png": DOT + "A"}),
        record("teacher, euler 1", kind="teacher", nfe=1, fd=321.0, grid={**record()["grid"], "png": DOT + "B"}),
        record(grid={**record()["grid"], "teacher_png": DOT + "A", "teacher": "digits, heun 18"}),
    ]


def test_page_is_well_formed_and_fetches_nothing(run: Path, tmp_path: Path) -> None:
    write_report(tmp_path / "r.html", trio(), [run], "A title")
    page = (tmp_path / "r.html").read_text()
    found = check(page)
    assert found.addresses and all(address.startswith("data:image/png;base64,") for address in found.addresses)
    assert not re.search(r"https?://|@import|url\(|<script", page)
    assert "default-src 'none'" in page and "prefers-color-scheme: dark" in page
    for part in (
        "A title",
        "n = 4,000",
        "seeds 1000000..1003999",
        "digits/64, weights 8ac411ee6b9d",
        "FD(digits)",
        "d2o eval runs/student",
    ):
        assert part in found.text
    assert "FID" not in found.text


def test_headline_compares_rows_of_one_protocol() -> None:
    text = check(render(trio())).text
    assert "35 → 1" in text and "teacher 0.780 · teacher called once 321" in text
    rows = trio()
    for row in rows[:2]:
        row["protocol"]["n_gen"] = 1000
    text = check(render(rows)).text
    assert "35 → 1" not in text and "teacher 0.780" not in text and "rows of equal n only" in text


def test_equal_noise_columns_without_doubles() -> None:
    page = render(trio())
    figures = re.findall(r"<figcaption>(.*?)<span>(.*?)</span>", page)
    assert figures == [
        ("teacher, heun 18", "teacher, 35 network calls"),
        ("teacher, euler 1", "teacher, 1 network call"),
        ("student", "student, 1 network call"),
    ]
    alone = re.findall(r"<figcaption>(.*?)<span>", render(trio()[2:]))
    assert alone == ["digits, heun 18", "student"]  # the teacher that came with the student's result
    other = trio()
    other[0]["grid"]["seeds"] = [0, 63]
    assert render(other).count("Samples from equal noise") == 2  # other noises never stand side by side


def test_names_cannot_inject() -> None:
    evil = '<script>alert(1)</script>"><img src=http://x>'
    rows = [
        record(evil, notes=[evil], command=evil, preset={"name": evil, "paper": evil}, paper={evil: 1.0})
        for _ in range(3)
    ]
    for r in rows:
        r["metrics"][evil] = {
            "label": evil,
            "value": 1.0,
            "runs": [],
            "std": 0.1,
            "better": "lower",
            "per_class": {evil: 1.0},
        }
        r["metrics"]["speed"] |= {"dtype": evil, "latency_ms": 1.0}
    rows[0]["neighbours"] = near() | {"extractor": evil}
    page = render(rows, title=evil)
    assert "<script" not in page and "<img src=http" not in page
    check(page)


def test_curves_of_a_run(run: Path, tmp_path: Path) -> None:
    curves = read_curves(run)
    assert len(curves.losses["loss"]) == 199 and curves.scores["fd"] == [(6400, 0.6), (12800, 0.3), (19200, 0.2)]
    page = render([record()], [curves])
    assert (
        "Training loss" in page
        and "Fréchet distance during training" in page
        and "not comparable with the table" in page
    )
    assert page.count("<svg") == 3
    with pytest.raises(UserError, match=r"no readable metrics\.jsonl"):
        read_curves(tmp_path / "absent")


def test_an_adversarial_run_shows_its_verdict_and_what_it_rests_on(tmp_path: Path) -> None:
    verdicts = {
        "good": "stable",
        "bad": "collapse since iteration 3,000: fakes of a batch differ 0.04 times as much as real ones",
    }
    for name, verdict in verdicts.items():
        values = {
            "loss_g": 1.4,
            "loss_d": 1.0,
            "logit_real": 0.5,
            "logit_fake": -0.5,
            "diversity": 0.9,
            "ada_p": 0.0,
            "grad_critic": 1.0,
        }
        lines = [
            {"iteration": i, "images": 64 * i, **values, "watch": verdict if i > 10 else "stable"} for i in range(1, 20)
        ]
        lines.append({"iteration": 19, "images": 64 * 19, "eval": {"fd": 3.0}})
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    curves = [read_curves(tmp_path / name) for name in verdicts]
    page = render([record()], curves)
    text = check(page).text
    assert "<li>good: stable</li>" in page and f"<li class=warning>bad: {verdicts['bad']}</li>" in page
    for title in (
        "Training loss",
        "Critic's logits",
        "Diversity of the fakes",
        "Augmentation",
        "Gradient norms",
        "Fréchet distance during training",
    ):
        assert text.count(title) == 1
    assert "good: logit_real" in text and "bad: logit_fake" in text
    assert "logit_real" in check(render([record()], curves[:1])).text
    evil = read_curves(tmp_path / "good")
    evil.watch = "<script>"
    assert "<script" not in render([record()], [evil])


def test_per_class_cells() -> None:
    page = render([record()])
    assert "Accuracy by class" in page and "<td" in page and ">95.0</td>" in page and ">100.0</td>" in page


def near() -> dict[str, Any]:
    real = torch.randint(0, 256, (40, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    fresh = real.flip(2)[:10].clone()
    fresh[3] = real[7]
    return neighbours_record(
        fresh, fresh.flatten(1).float(), real.flatten(1).float(), lambda i: real[i], k=2, rows=6, extractor="pixels"
    )


def test_nearest_training_images_are_shown_with_how_to_read_them() -> None:
    page = render([record(neighbours=near()), record("other")])
    found = check(page)
    assert (
        "Nearest training images" in found.text
        and "10.0 % of 10 samples are nearer" in found.text
        and "Features pixels, 40 training" in found.text
    )
    ratios = re.findall(
        r'<li title="sample (\d+), training image (\d+)">(.*?)<b( class=close)?>([\d.]+)</b></li>', page
    )
    assert (
        len(ratios) == 6
        and ratios[0][:2] + ratios[0][3:] == ("3", "7", " class=close", "0.00")
        and sum(bool(r[3]) for r in ratios) == 1
    )
    assert all(r[2].count("<img") == 1 + 2 for r in ratios)  # the sample and its two neighbours
    assert page.count("<svg") == 1  # how near, over all samples
    assert "Nearest training images" not in render([record()])


def test_metrics_of_three_rows_are_charted_and_others_not() -> None:
    rows = trio()
    for r, error in zip(rows, (0.02, 3.0, 0.05), strict=True):
        r["metrics"]["fd"]["std"] = error
    rows[2]["paper"] = {"fd": 1.4}
    page = render(rows)
    charts = re.findall(r'<svg class="dots".*?</svg>', page)
    assert (
        len(charts) == 2
        and "FD(digits) of 3 rows" in charts[0]
        and charts[0].count(" error") == 3
        and charts[0].count('class="mark"') == 1
    )
    assert "Lower is better, logarithmic axis" in page and "printed by the paper" in page
    assert '<svg class="dots"' not in render(rows[:2])
    rows[0]["protocol"]["n_gen"] = 100
    assert '<svg class="dots"' not in render(rows)  # never three rows of two protocols on one axis


def test_best_cells_presets_papers_and_what_speed_is_made_of() -> None:
    rows = [record("a", fd=1.0), record("b", fd=2.0)]
    rows[0] |= {
        "paper": {"fd": 0.8},
        "preset": {"name": "sida_cifar10", "paper": "SiDA, Table 1", "tool": "EDM fid.py"},
    }
    rows[0]["metrics"]["fd"] |= {"runs": [1.0, 1.1], "std": 0.07, "k": 3}
    rows[1]["metrics"]["fd"]["k"] = 3
    rows[0]["metrics"]["speed"] |= {
        "latency_ms": 12.0,
        "latency_p90_ms": 14.0,
        "network_ms": 10.0,
        "decode_ms": 2.0,
        "peak_memory_bytes": 3 * 2**30,
        "dtype": "float16",
    }
    rows.append(quoted("DDPM", {"fd": 3.17}, "SiDA, Table 1"))
    page = render(rows)
    text = check(page).text
    assert "<strong>1.000 ± 0.070</strong>" in page and '<td class="paper" data-label="paper">3.17</td>' in page
    assert "sida_cifar10 · SiDA, Table 1 · tool EDM fid.py" in text and "the paper prints 0.8 (+25.0 %)" in text
    assert "12.0 ms (median) · nine of ten within 14.0 ms; network 10.0 ms, decoder 2.00 ms" in text
    assert (
        "runs 1.00, 1.10 · k 3 · the paper" in text
        and "3.00 GiB" in text
        and "batch 250 · float16" in text
        and "paper 0.8" in text
    )
    assert page.count("<details") == 2  # a quoted row was not measured


def test_samples_are_shown_one_by_one_with_class_or_prompt() -> None:
    images = torch.randint(0, 256, (6, 3, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    grid = {"png": to_png(images, 2), "columns": 2, "n": 6, "labels": [0, 0, 1, 1, 2, 2], "seeds": [0, 5]}
    page = render([record(grid=grid)])
    assert re.findall(r"<span>(class \d)</span>", page) == ["class 0"] * 2 + ["class 1"] * 2 + ["class 2"] * 2
    assert page[page.index("Samples from") :].count("<img") == 6 and 'style="--wide:2;--narrow:2"' in page
    page = render(
        [record(grid=grid | {"labels": None, "prompts": ["<b>a cat</b>"] + ["a dog"] * 5, "n": 6, "columns": 4})]
    )
    assert (
        page.count("<span>a dog</span>") == 5 and "&lt;b&gt;a cat" in page and "--wide:6;--narrow:3" in page
    )  # none of its cells is empty


def test_wide_tables_fold_and_narrow_pages_name_each_cell() -> None:
    rows = [record(f"student {i}") for i in range(3)]
    for r in rows:
        r["metrics"] |= {
            f"kid@{i}": {"label": f"KID(network-{i})", "value": 1.5, "runs": [1.5], "std": 0.1, "better": "lower"}
            for i in range(12)
        }
    page = render(rows)
    tables = re.findall(r'<table class="results">.*?</table>', page)
    assert 2 <= len(tables) <= 5 and all(table.count('<th scope="row">student ') == 3 for table in tables)
    assert [len(re.findall(rf'data-label="KID\(network-{i}\) ↓"', page)) for i in range(12)] == [3] * 12
    assert (
        all(len(re.findall("<th scope=.col", table)) <= 10 for table in tables) and 'aria-label="Results"' not in page
    )


def test_arrows_are_read_as_words() -> None:
    page = render([record()])
    assert 'aria-label="lower is better">↓</span>' in page and 'aria-label="higher is better">↑</span>' in page
    assert '<th scope="row">student' in page


def test_other_metrics_by_class_and_many_classes() -> None:
    r = record()
    del r["metrics"]["accuracy"]
    r["metrics"]["fd-class"] = {
        "label": "FD by class(digits)",
        "value": 3.0,
        "runs": [3.0],
        "std": None,
        "better": "lower",
        "per_class": {str(c): 1.0 + c for c in range(100)},
    }
    page = render([r])
    assert (
        "The 20 worst of 100 classes" in page
        and '<th scope="col">99</th>' in page
        and '<th scope="col">79</th>' not in page
    )
    shades = dict(re.findall(r'--v:([\d.]+)">([\d.]+)</td>', page[page.index("FD by class") :]))
    assert shades["0.000"] == "100" and shades["1.000"] == "81.0"  # low is good


def test_committed_results_render() -> None:
    results = Path(__file__).parents[2] / "results" / "mini_methods"
    records = [json.loads(path.read_text())["eval"] for path in sorted(results.glob("*.json"))]
    found = check(render(records))
    assert all(r["name"] in found.text for r in records) and "Accuracy by class" in found.text


def test_page_without_generators_or_curves() -> None:
    real = record("real:digits/a", kind="images")
    real["metrics"].pop("speed")
    real["grid"].pop("seeds")
    found = check(render([real]))
    assert "Images" in found.text and "Samples from equal noise" not in found.text and "Training" not in found.text


def test_foreign_pages_are_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "index.html"
    path.write_text("<html>mine</html>")
    with pytest.raises(UserError, match="not overwritten"):
        write_report(path, [record()])
    assert path.read_text() == "<html>mine</html>"
    write_report(tmp_path / "r.html", [record()])
    write_report(tmp_path / "r.html", [record("again")])
    assert "again" in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("y", [[1.0, 0.5, 0.25], [3.0, 3.0, 3.0], [1e-6, 1.0, 1e6], [2.0, 2.1, 2.2], [5.0]])
def test_charts_stay_inside_their_frame(y: list[float], log: bool) -> None:
    chart = line_chart([Series("a", list(range(len(y))), y, smooth=True, marks=True)], "x & y", "loss", log_y=log)
    root = ET.fromstring(chart)
    points = [
        tuple(map(float, p.split(","))) for line in root.findall("polyline") for p in line.get("points", "").split()
    ]
    assert points and all(62 <= px <= 640 - 18 and 14 <= py <= 300 - 50 for px, py in points)
    ticks = [t for t in root.findall("text") if t.get("text-anchor") == "end"]
    assert 1 <= len(ticks) <= 12 and len({t.text for t in ticks}) == len(ticks)


def test_charts_leave_out_what_has_no_place() -> None:
    chart = line_chart([Series("a", [0, 1, 2, 3], [1.0, float("nan"), -1.0, 2.0])], "x", "y", log_y=True)
    assert len(ET.fromstring(chart).find("polyline").get("points").split()) == 2
    assert line_chart([Series("a", [0], [float("inf")])], "x", "y") == ""
    long = line_chart([Series("a", list(range(10_000)), [1.0 + i for i in range(10_000)])], "x", "y")
    assert len(ET.fromstring(long).find("polyline").get("points").split()) <= 400
    assert [short(v) for v in (0, 0.02, 1.5, 20_000, 1_500_000)] == ["0", "0.02", "1.5", "20k", "1.5M"]


@pytest.mark.parametrize("log", [False, True])
def test_dots_stay_inside_their_frame(log: bool) -> None:
    dots = [
        Dot("a & b", 1.0, "1.00", 0.5, mark=1.2),
        Dot("c" * 200, 300.0, "300 ± 400", 400.0, 1),
        Dot("d", -1.0, "-1.00"),
        Dot("e", 2.0, "2.00"),
    ]
    root = ET.fromstring(dot_chart(dots, "x & y", log))
    assert all(8 <= float(c.get("cx", "")) <= 452 for c in root.findall("circle")) and len(root.findall("circle")) == 4
    bars = [line for line in root.findall("line") if "error" in (line.get("class") or "")]
    assert len(bars) == 2 and all(8 <= float(bar.get(end, "")) <= 452 for bar in bars for end in ("x1", "x2"))
    names = [t.text for t in root.findall("text") if t.get("class") == "name"]
    assert "a & b" in names and all(len(name or "") < 60 for name in names) and "300 ± 400" in names
    labels = [t.text for t in root.findall("text") if t.get("class") == "small"]
    assert len(labels) >= 2 and len(set(labels)) == len(labels)


def test_dots_of_equal_and_close_values() -> None:
    assert dot_chart([], "x") == "" and dot_chart([Dot("a", float("nan"), "–")], "x") == ""
    for values in ([3.0, 3.0, 3.0], [0.11801, 0.11902, 0.11953]):
        root = ET.fromstring(dot_chart([Dot(str(v), v, str(v)) for v in values], "x"))
        labels = [t.text for t in root.findall("text") if t.get("class") == "small"]
        assert labels and len(set(labels)) == len(labels)
