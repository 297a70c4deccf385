"""What docs/results.md, docs/orders.md and the README print is what the records in results/ say, and no record is older
than what it names."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from d2o import load_teacher

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/results.md", "docs/orders.md")


@pytest.fixture(scope="module")
def tools() -> Iterator[tuple[ModuleType, ModuleType]]:
    sys.path.insert(0, str(ROOT / "tools"))
    import table_results

    import results

    yield results, table_results
    sys.path.remove(str(ROOT / "tools"))


@pytest.mark.long
def test_the_pages_are_what_the_records_make_of_them(
    tools: tuple[ModuleType, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for page in PAGES:
        (tmp_path / page).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / page, tmp_path / page)
    (tmp_path / "results").symlink_to(ROOT / "results")
    for module in tools:
        monkeypatch.setattr(module, "ROOT", tmp_path)
    tools[0].write()
    for page in PAGES:
        assert (tmp_path / page).read_text() == (ROOT / page).read_text(), f"{page} is not current: `make results`"


def test_no_record_is_older_than_its_recipe_and_commands(tools: tuple[ModuleType, ModuleType]) -> None:
    known = set()
    for name in tools[1].COLUMNS:
        for job in tools[1].jobs(name, tools[1].load_table(name)):
            known.add(job.record)
            assert not job.record.exists() or tools[1].current(job) is not None, f"measure {job.record.name} again"
    there = {path for name in tools[1].COLUMNS for path in (ROOT / "results" / name).glob("*.json")}
    assert there <= known, "records of no row"


def test_the_repeated_measurements_are_of_runs_as_the_table_makes_them(tools: tuple[ModuleType, ModuleType]) -> None:
    jobs = {(job.row.name, job.seed): job for job in tools[1].jobs("mini_methods", tools[1].load_table("mini_methods"))}
    for row in json.loads((ROOT / "results" / "repeats.json").read_text())["rows"]:
        job = jobs[row["row"], row["seed"]]
        *made, measured = row["commands"]
        assert made == job.commands()[:-1] and measured.startswith(job.commands()[-1]), "python tools/repeats.py"
        assert tools[1].same(row["recipe"], job.made_by()), "python tools/repeats.py"


def test_the_other_records_are_of_recipes_as_they_are(tools: tuple[ModuleType, ModuleType]) -> None:
    import activations

    made = {
        "activations": ("teacher_digits", activations.CHANGES),
        "latent_lpips": ("latent_reconstruction:lpips", []),
    }
    for name, (recipe, changes) in made.items():
        record = json.loads((ROOT / "results" / f"{name}.json").read_text())
        now = tools[0].made_by(recipe, changes)["recipe"]
        assert tools[1].same(record["recipe"], now), f"python tools/{name}.py"
        assert {"commit", "hardware", "date"} <= {*record}


def test_the_shipped_text_teacher_is_the_one_that_was_measured() -> None:
    record = json.loads((ROOT / "results" / "tiny_sd.json").read_text())
    assert record["teacher_sha256"] == load_teacher("tiny-sd").fingerprint, "python tools/tiny_sd.py"


def test_a_record_is_stale_when_a_setting_changes_and_not_when_one_comes_or_is_renamed(
    tools: tuple[ModuleType, ModuleType],
) -> None:
    same = tools[1].same
    before = {"name": "a", "optim": {"lr": 0.1}, "gdd": {"r1": {"gamma": 1e-4}}}
    now = json.loads(json.dumps(before)) | {"name": "b", "strategy": "replicate"}
    assert same(before, now)
    now["gdd"]["r1"]["gamma"] = 1e-3
    assert not same(before, now)
    assert not same(before, {"name": "a", "optim": {"lr": 0.1}})
    assert not same(before, None) and same(None, None)


def test_a_job_knows_all_that_made_it(tools: tuple[ModuleType, ModuleType]) -> None:
    jobs = {job.row.name: job for job in tools[1].jobs("d2g_mini", tools[1].load_table("d2g_mini"))}
    made = jobs["Table 2: + R1"].made_by()
    assert made["diffusion2gan"]["critic"]["inputs"] == "none" and made["seed"] == 2
    assert made["start"]["diffusion2gan"]["lambda_gan"] != made["diffusion2gan"]["lambda_gan"]
    assert made["start"]["seed"] == 2
    assert jobs["tiny-sd, the teacher"].made_by() is None
