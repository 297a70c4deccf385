"""`d2o eval --activations` and `--curves` as a user types them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from d2o.cli.app import main
from d2o.errors import UserError
from tests.cli.test_eval import run, work  # noqa: F401 (a fixture)
from tests.helpers import tiny_student

QUICK = ["--n", "2", "--steps", "4", "--device", "cpu"]
SVG = "{http://www.w3.org/2000/svg}"


def texts(path: str) -> list[str]:
    return [element.text or "" for element in ElementTree.parse(path).iter(f"{SVG}text")]


def logged(name: str, scores: list[tuple[int, float]], key: str = "fid") -> Path:
    folder = Path("runs") / name
    folder.mkdir(parents=True)
    lines = [{"iteration": 1, "images": 8, "loss": 1.0}]
    lines += [{"iteration": i, "images": i, "eval": {key: value, "is": 9.0}} for i, value in scores]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_layers_as_picture_and_numbers(work: Path) -> None:  # noqa: F811
    out = run("teacher.safetensors", "--activations", "layers.svg", *QUICK, "--name", "mine", "--act-stat", "rms")
    record = json.loads(Path("layers.json").read_text())
    assert (record["format"], record["name"], record["settings"]["act_stat"]) == ("d2o-activations", "mine", "rms")
    assert record["settings"]["steps"] == 4 and record["i"] == [4, 3, 2, 1] and len(record["layers"]) == 5
    words = texts("layers.svg")
    assert {"Encoder", "Decoder", "σ 40"} <= set(words) and "mine" in words[0]
    assert any("root mean square" in text and "2 images" in text for text in words)
    lines = [element for element in ElementTree.parse("layers.svg").iter(f"{SVG}polyline")]
    assert len(lines) == 5 and all(len(line.get("points", "").split()) == 4 for line in lines)
    assert "encoder  0  model.enc.8x8_block0: greatest at sigma" in out
    before = Path("layers.json").read_bytes()
    run("teacher.safetensors", "--activations", "layers.svg", *QUICK, "--name", "mine", "--act-stat", "rms")
    assert Path("layers.json").read_bytes() == before  # the same seeds, the same bytes


def test_curves_of_several_runs(work: Path) -> None:  # noqa: F811
    a = logged("a", [(8, 9.0), (16, 4.0), (24, 5.0)])
    b = logged("b", [(8, 8.0), (16, 6.0)])
    out = run("--run", str(a), "--run", str(b), "--curves", "fid.svg", "--json", "fid.json", "--title", "Both")
    record = json.loads(Path("fid.json").read_text())
    assert record["metric"] == "fid" and [c["name"] for c in record["curves"]] == ["a", "b"]
    assert record["curves"][0]["images"] == [8, 16, 24] and record["curves"][0]["values"] == [9.0, 4.0, 5.0]
    assert "Both" in texts("fid.svg") and "images seen" in texts("fid.svg") and {"a", "b"} <= set(texts("fid.svg"))
    assert "a: fid 4 at best, 5 after 24 images" in out
    run("--run", str(a), "--run", str(b), "--curves", "is.svg", "--metrics", "is", "--name", "x", "--name", "y")
    assert {"x", "y"} <= set(texts("is.svg"))


def test_curves_of_a_table(work: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    logged("one", [(8, 9.0), (16, 4.0)])
    Path("t.yaml").write_text(
        "title: Figure\npaper: A paper\nrows:\n  - {name: first, x: runs/one, recipe: quickstart}\n"
        "  - {name: absent, x: runs/two, recipe: quickstart}\n  - {name: quoted, paper: {fid: 3}}\n"
        "  - {name: also & absent, x: runs/three, recipe: quickstart, paper: {fid: [2.5, 0.1], is: 9}}\n"
    )
    out = run("--table", "t.yaml", "--curves", "t.svg", "--json", "t.json")
    assert "Figure" in texts("t.svg") and "first" in texts("t.svg") and "absent" not in texts("t.svg")
    assert json.loads(Path("t.json").read_text())["paper"] == [
        {"name": "quoted", "value": 3},
        {"name": "also & absent", "value": 2.5},
    ]
    assert texts("t.svg").count("quoted") == 2 and "3" in texts("t.svg")  # by its line, and in the legend
    lines = ElementTree.parse("t.svg").findall(f".//{SVG}svg/{SVG}line[@class='level']")
    heights = [float(line.get("y1", "")) for line in lines]
    assert len(lines) == 2 and heights[0] < heights[1]  # 3 is above 2.5
    assert "quoted: fid 3, as the paper prints it" in out and "dashed" in " ".join(texts("t.svg"))
    run("--table", "t.yaml", "--curves", "is.svg", "--metrics", "is")  # of which "quoted" has none
    assert "quoted" not in texts("is.svg") and "also & absent" in texts("is.svg")


def test_runs_without_the_score_are_left_out(work: Path) -> None:  # noqa: F811
    a, b, none = logged("a", [(8, 9.0), (16, 4.0)]), logged("b", [(8, 1.0)], key="fd"), logged("none", [])
    runs = ("--run", str(a), "--run", str(b), "--run", str(none))
    out = run(*runs, "--curves", "fid.svg", "--metrics", "fid")
    assert "a" in texts("fid.svg") and "b" not in texts("fid.svg") and "none" not in texts("fid.svg")
    assert "not drawn: b: no fid (its log has fd, is)" in out
    assert "not drawn: none: no fid (it was not measured while it was trained)" in out
    run(*runs, "--curves", "is.svg")  # what most of them have
    assert {"a", "b"} <= set(texts("is.svg"))


def test_a_table_of_distances_to_one_of_its_rows(work: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    """Fig. 2 as a table: the teacher of every row is a run of the table, in whichever folder the runs are."""
    text = (
        "title: Figure 2\npaper: A paper\nagainst: real:digits\n"
        "options: {n: 20, batch: 20, distance_n: 4, metrics: [rel-fd], teacher: runs/one}\nrows:\n"
        "  - {name: one, x: runs/one, recipe: quickstart}\n  - {name: other, x: runs/other, recipe: quickstart}\n"
    )
    Path("t.yaml").write_text(text)
    (Path("here/other/checkpoints")).mkdir(parents=True)
    tiny_student(Path("here/other/checkpoints/last.safetensors"), seed=2)
    with pytest.raises(SystemExit):
        main(["eval", "--table", "t.yaml", "--runs", "here", "--device", "cpu"])
    said = capsys.readouterr().err
    assert "other: its teacher here/one is not here; d2o train recipes/quickstart.yaml makes it" in said
    assert "none of its rows could be measured" in said
    (Path("here/one/checkpoints")).mkdir(parents=True)
    tiny_student(Path("here/one/checkpoints/last.safetensors"))
    run("--table", "t.yaml", "--runs", "here", "--device", "cpu", "--json", "t.json")
    one, other = json.loads(Path("t.json").read_text())
    assert abs(one["metrics"]["rel-fd"]["value"]) < 1e-6 < other["metrics"]["rel-fd"]["value"]
    assert other["metrics"]["rel-fd"]["to"] == "here/one"
    Path("s.yaml").write_text(text.replace("rows:", "seeds: [1, 2]\nrows:"))
    Path("here/one").rename("here/one_seed2")
    Path("here/other").rename("here/other_seed2")
    run("--table", "s.yaml", "--runs", "here", "--device", "cpu", "--json", "s.json")
    assert json.loads(Path("s.json").read_text())[1]["metrics"]["rel-fd"]["to"] == "here/one_seed2"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["student.safetensors", "--activations", "a.svg"], "holds a student, not a teacher"),
        (["real:digits", "--activations", "a.svg"], "a set of images, not a teacher"),
        (["--activations", "a.svg"], "takes one X, a teacher"),
        (["teacher.safetensors", "--activations", "a.png"], "ends in .svg"),
        (["teacher.safetensors", "--activations", "a.svg", "--metrics", "fd"], "--metrics is not for --activations"),
        (["teacher.safetensors", "--activations", "a.svg", "--act-stat", "max"], "unknown statistic of activations"),
        (["teacher.safetensors", "--activations", "a.svg", "--solver", "sde"], "unknown solver"),
        (["teacher.safetensors", "--activations", "a.svg", "--prompt", "x"], "takes no prompts"),
        (["teacher.safetensors", "--activations", "a.svg", "--json", "foreign.json"], "foreign.json exists"),
        (["teacher.safetensors", "--activations", "foreign.svg"], "foreign.svg exists and is no picture"),
        (["teacher.safetensors", "--against", "real:digits", "--act-stat", "rms"], "add --activations"),
        (["--curves", "c.svg"], "name them: --run"),
        (["student.safetensors", "--run", "runs/a", "--curves", "c.svg"], "X is not for --curves"),
        (["--run", "nowhere", "--curves", "c.svg"], "nowhere is not a run folder"),
        (["--run", "runs/a", "--run", "runs/b", "--curves", "c.svg", "--metrics", "kid"], "unknown score"),
        (["--run", "runs/none", "--curves", "c.svg"], "runs/none: not measured while trained"),
        (["--run", "runs/a", "--run", "runs/a", "--curves", "c.svg"], "several runs have one name"),
        (["--run", "runs/a", "--name", "x", "--name", "y", "--curves", "c.svg"], "2 --name for 1 --run"),
        (["--run", "runs/a", "--curves", "c.svg", "--metrics", "fid,is"], "draws one score"),
        (["--table", "digits", "--curves", "c.svg"], "none of its runs is here"),
    ],
)
def test_what_is_refused(work: Path, arguments: list[str], message: str) -> None:  # noqa: F811
    Path("foreign.json").write_text("{}")
    Path("foreign.svg").write_text("my notes")
    logged("a", [(8, 1.0)])
    logged("b", [(8, 1.0)], key="fd")
    logged("none", [])
    with pytest.raises(UserError) as caught:
        run(*arguments)
    assert re.search(message, f"{caught.value.message} {caught.value.hint or ''}"), caught.value
    assert not Path("c.svg").exists() and not Path("a.svg").exists()
