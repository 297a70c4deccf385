"""The report page: complete in itself, safe against what names hold, honest about protocols; and the charts in it."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest

from d2o.errors import UserError
from d2o.metrics.charts import Series, line_chart, short
from d2o.metrics.curves import read_curves
from d2o.metrics.report import render, write_report
from tests.metrics.samples import DOT, record

VOID = {"meta", "img", "br", "link"}


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
    lines = [{"iteration": i, "images": 128 * i, "loss": 1 / i, "lr": 1e-3, "images_per_s": 900.0} for i in range(1, 200)]
    lines += [{"iteration": i, "images": 128 * i, "eval": {"fd": 30 / i, "accuracy": 0.9}} for i in (50, 100, 150)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"iteration": 200, "ima')  # killed while writing
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
    for part in ("A title", "n = 4,000", "seeds 1000000..1003999", "digits/64, weights 8ac411ee6b9d", "FD(digits)", "d2o eval runs/student"):
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
    page = render([record(evil, notes=[evil], command=evil)], title=evil)
    assert "<script" not in page and "<img src=http" not in page
    check(page)


def test_curves_of_a_run(run: Path, tmp_path: Path) -> None:
    curves = read_curves(run)
    assert len(curves.losses["loss"]) == 199 and curves.scores["fd"] == [(6400, 0.6), (12800, 0.3), (19200, 0.2)]
    page = render([record()], [curves])
    assert "Training loss" in page and "Fréchet distance during training" in page and "not comparable with the table" in page
    assert page.count("<svg") == 3
    with pytest.raises(UserError, match=r"no readable metrics\.jsonl"):
        read_curves(tmp_path / "absent")


def test_per_class_cells() -> None:
    page = render([record()])
    assert "Accuracy by class" in page and "<td" in page and ">95.0</td>" in page and ">100.0</td>" in page


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
    points = [tuple(map(float, p.split(","))) for line in root.findall("polyline") for p in line.get("points", "").split()]
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
