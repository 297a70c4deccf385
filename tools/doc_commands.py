"""The `d2o ...` commands of README and docs: found, and run in small (`make commands`; PAGE ...: of these pages alone).

A command that no CPU in CI can run says why in its comment: `# GPU`, `# download`, or `# yours` where it needs the
reader's own files or runs. All others are run, page by page, in a folder of their own: trainings by the recipes' small
versions, samples and evaluations of few images; runs that a page takes for granted are trained first.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MADE = ("results.md",)
"""Pages whose commands were run to make their numbers: they are parsed, not run again."""
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINE = re.compile(r"^(?:torchrun .*? -m |srun )?(d2o [^#\n]*)(#[^\n]*)?$", re.MULTILINE)
MARK = re.compile(r"\b(GPU|download|yours)\b")
SMALL = {
    "train": "--mini --set images=128 --set eval=null --set preview=null",
    "finetune": "--mini --set images=128 --set eval=null --set preview=null",
    "pairs": "--n 32",
    "sample": "--n 16",
    "eval": "",
    "export": "",
}


@dataclass(frozen=True)
class Shown:
    """A command as a page shows it: `words` without `d2o`; `mark`: why it is not run ("" if it is)."""

    page: Path
    words: tuple[str, ...]
    mark: str

    @property
    def line(self) -> str:
        return shlex.join(["d2o", *self.words])


def pages() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def shown(page: Path) -> Iterator[Shown]:
    """The commands in a page's blocks, in order; lines that end in a backslash go on."""
    for language, text in FENCE.findall(page.read_text(encoding="utf-8")):
        if language in ("", "bash"):
            for line, comment in LINE.findall(text.replace("\\\n", " ")):
                found = MARK.search(comment)
                words = shlex.split(line.replace("$SLURM_ARRAY_TASK_ID", "3"))[1:]
                yield Shown(page, tuple(words), found[1] if found else "")


def placeholder(one: Shown) -> bool:
    """`d2o COMMAND --help`, `d2o pairs ...`: no command, but the form of one."""
    return any(word == "..." or word.isupper() for word in one.words if not word.startswith("-"))


def in_small(one: Shown) -> list[str]:
    """Its words for a run of seconds."""
    words = list(one.words)
    verb = words[0]
    if verb not in SMALL or "--plan" in words or {"--merge", "--verify", "--stats", "--compare"} & {*words}:
        return words
    small = shlex.split(SMALL[verb])
    if verb in ("train", "finetune") and not {"--out", "--sweep", "--table"} & {*words}:
        small += ["--out", f"runs/{run_of(words[1])}"]
    if verb in ("train", "finetune") and makes_pairs(words):
        small += ["--set", "pairs.n=256", "--set", "pairs.steps=2"]
    if verb == "eval":
        small = small_evaluation(words)
    if verb in ("pairs", "sample") and "tiny-sd" in words:
        small += ["--steps", "2"]
    return words + small + ["--resume"] * (verb in ("train", "finetune") and not {"--sweep", "--table"} & {*words})


def makes_pairs(words: list[str]) -> bool:
    """Whether the training that they ask for makes pairs, and has none."""
    from d2o.recipes.load import load_recipe

    if "--table" in words or any(word.startswith(("pairs.path=", "variant=")) for word in words):
        return False
    return load_recipe(words[1], mini=True).pairs is not None


def small_evaluation(words: list[str]) -> list[str]:
    """Networks that judge have their own number of images; KID has subsets of 1,000."""
    if "--table" in words:
        return ["--table", small_table(words[words.index("--table") + 1])]
    if any("2afc" in word for word in words):
        return ["--repeats", "1"]
    if "--activations" in words:
        return ["--n", "4", "--steps", "16"]
    return ["--n", "1000"] if any("kid" in word for word in words) else ["--n", "200"]


def small_table(name: str) -> str:
    """A copy of a table that measures 200 images a row, beside which it runs."""
    from d2o.reports.paper_tables import find_table

    made = Path(f"small_{Path(name).stem}.yaml")
    made.write_text(re.sub(r"\bn: \d+", "n: 200", find_table(name).read_text(encoding="utf-8")), encoding="utf-8")
    return str(made)


def run_of(recipe: str) -> str:
    """The run that a recipe trains, by its name."""
    file, colon, variant = recipe.partition(":")
    return Path(file).stem + (f"_{variant}" if colon else "")


def taken_for_granted(one: Shown) -> Iterator[str]:
    """Recipes of the runs that it reads."""
    from d2o.recipes.table_runs import default_recipe

    for word in one.words:
        found = re.match(r"runs/\w+", word)
        recipe = default_recipe(found[0]) if found else None
        if recipe is not None:
            yield recipe


def run_page(page: Path) -> list[str]:
    """Run what a page shows. Returns what failed, each with what it said."""
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.symlink(ROOT / "recipes", "recipes")
        for one in shown(page):
            if one.mark or placeholder(one):
                continue
            needed = [] if one.words[0] == "train" else taken_for_granted(one)
            before = [name for name in needed if not Path("runs", run_of(name)).exists()]
            todo = [Shown(page, ("train", name), "") for name in before] + [one]
            failed += [said for each in todo if (said := run(each))]
        os.chdir(ROOT)
    return failed


def run(one: Shown) -> str:
    """In this process, whose imports are shared. Returns "" or what it said."""
    from d2o.cli.app import main as d2o

    words, start, code = in_small(one), time.perf_counter(), 0
    with open("said.txt", "w+", encoding="utf-8") as said, into(said.fileno()):
        try:
            d2o(words)
        except SystemExit as end:
            code = int(end.code or 0)
        if code > 128:  # stopped from outside: not this command alone
            raise KeyboardInterrupt
        said.seek(0)
        text = said.read()
    good = code == 0 or (code == 1 and "--plan" in words)  # it says what is missing here
    print(f"{one.page.name}: {one.line} [{time.perf_counter() - start:.0f} s{'' if good else ', FAILED'}]", flush=True)
    return "" if good else f"{one.page}: {one.line}\n  run as: d2o {shlex.join(words)}\n{text[-2000:]}"


@contextlib.contextmanager
def into(file: int) -> Iterator[None]:
    """Standard output and error go there."""
    kept = [os.dup(stream) for stream in (1, 2)]
    try:
        for stream in (1, 2):
            os.dup2(file, stream)
        yield
    finally:
        sys.stdout.flush()
        for stream, was in zip((1, 2), kept):
            os.dup2(was, stream)
            os.close(was)


def main(names: list[str]) -> int:
    os.environ |= {"OMP_NUM_THREADS": "1", "D2O_OFFLINE": "1"}
    chosen = [page for page in pages() if (not names or page.name in names) and page.name not in MADE]
    chosen.sort(key=lambda page: -len([*shown(page)]))  # the longest first
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        failed = [said for page in pool.map(run_page, chosen) for said in page]
    print("\n".join(failed) or "all commands of README and docs ran", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
