"""A paper's table as a file: which models its rows are, how they are measured, and what the paper prints (`d2o eval
--table FILE`).

title: "SiDA, Table 1: CIFAR-10, unconditional"
paper: "SiDA (arXiv 2410.14919), Table 1"
protocol: sida_cifar10              # or `options:` alone; both: the options must not contradict the protocol
rows:
  - {name: "EDM, 35 NFE", x: edm-cifar10-uncond-vp, options: {solver: heun, steps: 18}, paper: {nfe: 35, fid: 1.97}}
  - {name: SiDA, x: runs/sida_cifar10_uncond, recipe: sida_cifar10_uncond, paper: {nfe: 1, fid: [1.516, 0.010]}}
  - {name: DDPM, cited: "WHY", paper: {nfe: 1000, fid: 3.17}}   # without x: quoted, never measured
notes: [...]                        # on the whole table, printed below it
orders:                             # what the paper says of two rows, judged by the numbers that are measured
  - {claim: "SiDA is better than DDPM", better: SiDA, than: DDPM, by: fid}
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import yaml
from pydantic import BaseModel, Field, ValidationError, create_model

from d2o.errors import UserError, nearest, unknown
from d2o.evaluation.judges import JUDGES
from d2o.evaluation.known_metrics import METRICS, parse_metrics
from d2o.evaluation.paper_protocols import PRESETS
from d2o.evaluation.presets import contradictions
from d2o.evaluation.protocol import Settings
from d2o.inputs import JsonObject
from d2o.reports.verdicts import PaperOrder
from d2o.settings.recipe_names import is_shipped, parted
from d2o.settings.section import NonEmpty, Section
from d2o.settings.wording import KeyPath, Shape, dotted, tree, word
from d2o.settings.yaml_text import Mark, Problems, build, plain, read
from d2o.shipped import shown, table_folders
from d2o.teachers.registry import teacher_names

PRINTED = (
    "nfe",
    "seconds",
    "accuracy",
    "parameters",
    "batch",
    "images_per_s",
    "pairs",
    "nfe_pairs",
    "nfe_train",
    "nfe_total",
    "a100_days",
    "milliseconds",
    "gigabytes",
    "seconds_per_kimg",
    "hours_per_10mimg",
    "days_per_100mimg",
)
"""What a paper may print besides the numbers of d2o's metrics: network calls and seconds for one image, share of right
classes; what a model took: batch, images a second, pairs, network calls in all, days of one GPU; of a loss or a
training milliseconds of one image, memory of one GPU, time for 1,000, 10 million and 100 million images."""

Number = Annotated[float, Field(allow_inf_nan=False)]
Printed = Number | Annotated[list[Number], Field(min_length=2, max_length=2)]


def _optional(cls: type) -> dict[str, Any]:
    """Every field of a dataclass as one that may be left away."""
    hints = get_type_hints(cls)
    return {field.name: (hints[field.name], field.default) for field in fields(cls)}


RowOptions = create_model(
    "Options",
    __base__=Section,
    metrics=(list[NonEmpty], None),
    extractor=(NonEmpty, None),
    teacher=(NonEmpty, None),
    **_optional(Settings),
)
"""Options of `d2o eval` as a table gives them: the names of the command line with `_` for `-`."""


class PaperRow(Section):
    """A row. `x`: what is measured, None for what the paper only quotes; `paper`: what it prints, a value or [value,
    standard deviation]; `about`: columns of words.

    `recipe` makes x, with the changes of `set` (key of the recipe -> value), as `--set` makes them; `start`: the run
    that it begins from (`d2o finetune RECIPE --from START`). `once`: it is trained once, by the recipe's seed, whatever
    seeds the table has. `against`: another reference than the table's. `cited`: why the paper's own row can only be
    quoted.
    """

    name: NonEmpty
    x: NonEmpty | None = None
    options: RowOptions = RowOptions()  # type: ignore[valid-type]
    paper: dict[str, Printed] = Field(default_factory=dict)
    about: dict[str, NonEmpty] = Field(default_factory=dict)
    against: NonEmpty | None = None
    recipe: NonEmpty | None = None
    set: dict[str, bool | int | Number | NonEmpty] = Field(default_factory=dict)
    start: NonEmpty | None = None
    once: bool = False
    cited: NonEmpty | None = None

    def printed(self, key: str) -> tuple[float, float | None] | None:
        """(value, standard deviation or None) as the paper prints it, or None."""
        value = self.paper.get(key)
        return None if value is None else (value[0], value[1]) if isinstance(value, list) else (value, None)

    @property
    def changes(self) -> list[str]:
        """`set`, as `--set` takes it."""
        return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in self.set.items()]

    @property
    def command(self) -> str | None:
        """The command that makes x."""
        if self.recipe is None:
            return None
        name = self.recipe if parted(self.recipe).variant else f"recipes/{self.recipe}.yaml"
        line = f"d2o finetune {name} --from {self.start}" if self.start else f"d2o train {name}"
        return " ".join(
            [line, *(f"--set {change}" for change in self.changes), *([f"--out {self.x}"] * bool(self.set))]
        )


@dataclass(frozen=True)
class RowRun:
    """One training of a row: its folder, the run that it begins from (None: none), and the seed of training (None: the
    recipe's)."""

    folder: str
    start: str | None
    seed: int | None


class PaperTable(Section):
    """A table. `options` hold for every row that does not give its own; `against`: the reference, where no protocol
    names one; `notes`: what to know of its numbers; `seeds`: a row that a recipe makes is trained with each of these,
    and its numbers are their mean; `orders`: what the paper claims of pairs of rows."""

    title: NonEmpty
    paper: NonEmpty
    protocol: NonEmpty | None = None
    options: RowOptions = RowOptions()  # type: ignore[valid-type]
    against: NonEmpty | None = None
    notes: list[NonEmpty] = Field(default_factory=list)
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], Field(max_length=1000)] = Field(default_factory=list)
    rows: Annotated[list[PaperRow], Field(min_length=1)]
    orders: list[PaperOrder] = Field(default_factory=list)

    def options_of(self, row: PaperRow) -> JsonObject:
        """The row's options over the table's, only those that are written there."""
        return {**_given(self.options), **_given(row.options)}

    def teacher_of(self, row: PaperRow, under: str | None = None, seed: int | None = None) -> str | None:
        """What the row is measured against from equal noise, where the table says it; runs in the folder `under`. A run
        that this table trains with seeds is the one of that `seed`."""
        teacher = self.options_of(row).get("teacher")
        if teacher is None:
            return None
        made = seed is not None and any(o.recipe and o.x == teacher and not o.once for o in self.rows)
        return moved(teacher, under) + (f"_seed{seed}" if made else "")

    def lacks_teacher(self, row: PaperRow, under: str | None = None, seed: int | None = None) -> str | None:
        """Why that teacher is not there, and how to make it; None where it is, or is no run."""
        named, teacher = self.options_of(row).get("teacher"), self.teacher_of(row, under, seed)
        makers = [other for other in self.rows if other.x and other.x == named]
        if not makers or os.path.exists(str(teacher)):
            return None
        why = absent(makers[0], under)
        return f"its teacher {why}" if why else None

    def against_of(self, row: PaperRow) -> str | None:
        return row.against or self.against

    def runs_of(self, row: PaperRow, under: str | None = None) -> list[RowRun]:
        """The trainings whose product a row measures; [] for what no recipe makes. `under`: the folder of runs, instead
        of `runs`."""
        if row.recipe is None or row.x is None:
            return []
        x, start = moved(row.x, under), row.start and moved(row.start, under)
        if not self.seeds or row.once:
            return [RowRun(x, start, None)]
        return [RowRun(f"{x}_seed{seed}", start and f"{start}_seed{seed}", seed) for seed in self.seeds]


def _given(options: BaseModel) -> JsonObject:
    return options.model_dump(exclude_unset=True)


def moved(path: str, under: str | None) -> str:
    """The run `runs/NAME` in another folder of runs; other paths as they are."""
    head, _, name = path.partition("/")
    return os.path.join(under, name) if under is not None and head == "runs" and name else path


def measured_runs(table: PaperTable, row: PaperRow, under: str | None = None) -> list[RowRun]:
    """Those runs of a row that are here; of a table with seeds also the one that was trained without the table."""
    found = [run for run in table.runs_of(row, under) if os.path.exists(run.folder)]
    if not found and table.seeds and row.x is not None and os.path.exists(x := moved(row.x, under)):
        return [RowRun(x, row.start, None)]
    return found


def absent(row: PaperRow, under: str | None = None) -> str | None:
    """Why a row that has an x cannot be measured now, and how to make it; None where it can be (or, a published
    teacher, fetched)."""
    x = row.x and moved(row.x, under)
    if x is None or x.startswith("real:") or x in (*teacher_names(), *JUDGES) or os.path.exists(x):
        return None
    if row.command is None:
        return f"{x} is not here"
    return (
        f"{x} is not here; {row.command} makes it"
        if row.recipe is not None and is_shipped(row.recipe)
        else f"{x} is not here, and this d2o has no recipe {row.recipe} that makes it"
    )


# ---- finding and reading ---------------------------------------------------------------------------------------------


def table_names() -> list[str]:
    """Names of the tables that come with d2o, sorted."""
    return sorted({path.stem for folder in table_folders() for path in folder.glob("*.yaml")})


def find_table(name: str | os.PathLike[str]) -> Path:
    """The file of a table: a path as it is given; else one that comes with d2o, with or without `recipes/tables/` and
    `.yaml`.

    UserError: no such table, with the nearest one and the list.
    """
    given = os.fspath(name)
    if os.path.isfile(given):
        return Path(given)
    stem = given.removeprefix("recipes/").removeprefix("tables/").removesuffix(".yaml")
    for folder in table_folders() if stem and "/" not in stem else []:
        if (folder / f"{stem}.yaml").is_file():
            return folder / f"{stem}.yaml"
    if stem and "/" not in stem:
        raise unknown("table", stem, table_names())
    near = nearest(Path(stem).name, table_names())
    raise UserError(
        f"no such table file: {given!r}" + (f"; did you mean {near!r}?" if near else ""),
        f"known tables: {', '.join(table_names())}",
    )


def load_table(path_or_name: str | os.PathLike[str]) -> PaperTable:
    """Read and check a table. UserError: a line for everything that is wrong, with file, line, key and what was
    expected."""
    path = find_table(path_or_name)
    root, where = read(path, "table"), shown(path)
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{where} is not a table: expected lines of `key: value` with title, paper and rows")
    problems = Problems(what="table")
    data = plain(build(root, Mark(where, line=1), problems))
    table: PaperTable | None = None
    try:  # JSON mode: strict, but an integer may stand for a float
        table = PaperTable.model_validate_json(json.dumps(data))
        wrong = list(_wrong(table))
    except ValidationError as error:
        wrong = [(problem.path, problem.text) for problem in word(error, data, (), Shape(tree(PaperTable)))]
    for keys, text in wrong:
        problems.add(Mark(where, _line(root, keys)), f"{dotted(keys)}: {text}")
    if problems or table is None:
        raise problems.error()
    return table


def _line(node: yaml.Node, path: KeyPath) -> int:
    """The line (from 1) of a key, or of what lacks it."""
    line = node.start_mark.line
    for part in path:
        if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line
            continue
        found = (
            [(key, value) for key, value in node.value if key.value == part]
            if isinstance(node, yaml.MappingNode)
            else []
        )
        if not found:
            break
        line, node = found[0][0].start_mark.line, found[0][1]
    return line + 1


def _wrong(table: PaperTable) -> Iterator[tuple[KeyPath, str]]:
    """What is wrong beyond the types: unknown names, numbers out of range, options against the protocol, rows that say
    nothing."""
    preset = PRESETS.get(table.protocol or "")
    if table.protocol is not None and preset is None:
        yield ("protocol",), _words(unknown("protocol", table.protocol, PRESETS))
    yield from _wrong_orders(table)
    known = {key for metric in METRICS.values() for key in metric.keys} | set(PRINTED)
    names: set[str] = set()
    if len(set(table.seeds)) < len(table.seeds):
        yield ("seeds",), "a seed is there twice"
    for options, key in (
        (table.options, ("options",)),
        *((row.options, ("rows", i, "options")) for i, row in enumerate(table.rows)),
    ):
        yield from ((key, text) for text in _wrong_options(_given(options)))
    for i, row in enumerate(table.rows):
        if row.name in names:
            yield ("rows", i, "name"), f"another row is called {row.name!r}, too"
        names.add(row.name)
        if row.x is None and not (row.paper or row.about):
            yield ("rows", i), "neither x nor paper: there is nothing to measure and nothing to quote"
        if row.set and row.recipe is None:
            yield ("rows", i, "set"), "there is no recipe that it could change"
        if row.cited is not None and (row.x or row.recipe):
            yield ("rows", i, "cited"), "the row is measured: it has x or a recipe"
        for name in row.paper:
            base = name.partition("@")[0]
            if base not in known:
                yield ("rows", i, "paper", name), _words(unknown("number", base, known))
        if preset is not None:
            for flag, wanted in contradictions(preset, table.options_of(row)):
                yield (
                    ("rows", i, "options") if _given(row.options) else ("options",),
                    f"{flag} is not the protocol {preset.name} ({wanted})",
                )


def _wrong_orders(table: PaperTable) -> Iterator[tuple[KeyPath, str]]:
    names, measures = [row.name for row in table.rows], {key for metric in METRICS.values() for key in metric.keys}
    for i, order in enumerate(table.orders):
        for key, name in (("better", order.better), ("than", order.than)):
            if name not in names:
                yield ("orders", i, key), _words(unknown("row", name, names))
        if (base := order.by.partition("@")[0]) not in measures:
            yield ("orders", i, "by"), _words(unknown("number", base, measures))


def _wrong_options(given: JsonObject) -> Iterator[str]:
    try:
        parse_metrics(given.pop("metrics", None) or ())
        for other in ("extractor", "teacher"):
            given.pop(other, None)
        Settings(**given)
    except UserError as error:
        yield _words(error)


def _words(error: UserError) -> str:
    return f"{error.message} ({error.hint})" if error.hint else error.message
