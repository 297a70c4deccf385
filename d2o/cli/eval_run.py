"""What `d2o eval` does with its options: check them, measure, write the results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2o.cli import console
from d2o.cli.opening import open_device
from d2o.errors import UserError
from d2o.inputs import JsonObject
from d2o.runtime import Stopped, worker

if TYPE_CHECKING:
    from d2o.evaluation.protocol import Settings
    from d2o.evaluation.request import Request
    from d2o.evaluation.workplace import Workplace
    from d2o.reports.paper_tables import PaperRow

Values = dict[str, Any]
"""The options of `d2o eval` by name, as typer gives them."""
STDOUT = Path("-")


def check_asked(values: Values) -> None:
    """Refuse what contradicts itself before anything is loaded."""
    x, table, compare = values["x"], values["table"], values["compare"]
    if values["act_stat"] != "mean_abs":
        raise UserError("--act-stat says what is taken of layers", "add --activations FILE.svg, or leave it away")
    if compare and table:
        raise UserError("--compare puts results together, --table measures: give one of them")
    if values["runs"] and not table:
        raise UserError("--runs says where the runs of a --table lie", "add --table NAME, or leave --runs away")
    if table and x:
        raise UserError(f"--table names what is measured; {x[0]} is too much", "leave X away, or --table")
    if not table and not x:
        raise UserError("what should be measured? Give X, or --table", "for example: d2o eval runs/quickstart")
    if values["neighbours"] < 0:
        raise UserError(f"--neighbours must be at least 0, not {values['neighbours']}")
    if values["save_stats"] and (len(x or []) != 1 or values["repeats"] > 1 or compare or table):
        raise UserError("--save-stats takes one X, measured once")


@dataclass
class Targets:
    """Where the results go. `json` "-" is the standard output, which then holds nothing else."""

    json: Path | None
    csv: Path | None
    markdown: Path | None
    report: Path | None
    runs: Sequence[Path]
    title: str

    @property
    def piped(self) -> bool:
        return self.json == STDOUT

    def check(self, save_stats: Path | None) -> None:
        """Refuse what cannot end well before anything is measured."""
        if self.runs and not self.report:
            raise UserError("--run shows training curves in a report", "add --report FILE.html")
        if not (self.json or self.csv or self.markdown or self.report or save_stats):
            return
        from d2o.evaluation.results import check_json_target
        from d2o.evaluation.statistics_files import is_statistics
        from d2o.interop.outputs import check_output
        from d2o.reports.formats import check_table_target
        from d2o.reports.report import check_report_target

        if self.json and not self.piped:
            check_json_target(self.json)
        for option, path, suffixes in (("--csv", self.csv, (".csv",)), ("--markdown", self.markdown, (".md", ".tex"))):
            if path is not None:
                if path.suffix not in suffixes:
                    raise UserError(f"{option} {path}: expected a name that ends in {' or '.join(suffixes)}")
                check_table_target(path)
        if self.report:
            check_report_target(self.report)
            for folder in self.runs:
                if not (folder / "metrics.jsonl").exists():
                    raise UserError(
                        f"{folder} is not a run folder: it holds no metrics.jsonl",
                        "--run takes what `d2o train --out` wrote",
                    )
        if save_stats:
            check_output(save_stats, folder=False)
            if save_stats.suffix != ".npz":
                raise UserError(f"--save-stats {save_stats}: statistics are an .npz file")
            if save_stats.exists() and not is_statistics(save_stats):
                raise UserError(
                    f"{save_stats} exists and holds no statistics: it is not overwritten",
                    "choose another name for --save-stats",
                )

    def read(self, paths: Sequence[str]) -> list[JsonObject]:
        """The results in these files and run folders."""
        from d2o.evaluation.results import load_records

        return [record for path in paths for record in load_records(path)]

    def write(self, records: list[JsonObject]) -> None:
        if self.json:
            from d2o.evaluation.results import results_json, save_records

            if self.piped:
                console.out.file.write(results_json(records))
                console.out.file.flush()
            else:
                save_records(self.json, records)
        for path in (self.csv, self.markdown):
            if path is not None:
                from d2o.reports.formats import write_table

                write_table(path, records)
        if self.report:
            from d2o.reports.report import write_report

            write_report(self.report, records, self.runs, self.title)
        for path in (self.json, self.csv, self.markdown, self.report):
            if path is not None and path != STDOUT:
                console.say(f"wrote {path}")


@contextmanager
def measured(values: Values, given: set[str]) -> Iterator[list[JsonObject]]:
    """The records of what these option values ask for; `given` are the options that the user typed. What was kept of
    the work goes when the block, which writes them, has ended well."""
    from d2o.evaluation.workplace import Workplace
    from d2o.runtime import stop_flag

    with stop_flag() as stop:
        if values["table"] is None:
            request, settings = prepare(values, given)
            with Workplace(request.work, stop=stop, say=console.say) as place:
                yield _one_after_another(request, settings, values["save_stats"], place)
        else:
            with Workplace(values["work"], stop=stop, say=console.say) as place:
                table = _table(values, given, place)
                yield table.records
            if table.rows or worker()[0] != 0:
                return
            what = f"{values['table']}: none of its rows could be measured"
            if table.mistakes:  # the table is written all the same, with what the paper prints
                raise UserError(what, "the lines above say why")
            console.say(f"{what}: what they measure is not here")


def prepare(values: Values, given: set[str]) -> tuple[Request, Settings]:
    """The request and settings that these option values mean. UserError: not those of the protocol."""
    from d2o.evaluation.paper_protocols import find_preset
    from d2o.evaluation.presets import apply_preset
    from d2o.evaluation.protocol import Settings
    from d2o.evaluation.request import Request

    preset = find_preset(values["protocol"]) if values["protocol"] else None
    values = values | {
        "metrics": tuple(part.strip() for text in values["metrics"] for part in text.split(",") if part.strip())
    }
    if preset is not None:
        values = values | apply_preset(preset, {key: values[key] for key in values if key in given})
    settings = Settings(**{field.name: values[field.name] for field in fields(Settings)})
    pictures = any(values[key] for key in ("json", "report"))
    request = Request(
        values["x"],
        values["against"],
        values["metrics"],
        values["extractor"],
        values["weights"],
        values["teacher"],
        not values["no_teacher_distance"],
        values["name"],
        values["save_stats"] is None,
        values["on_bad"],
        pictures,
        values["latency"],
        values["neighbours"],
        open_device(values["device"]),
        preset,
        values["work"],
        values.get("paper") or (),
        "steps" in given,
        "cfg" in given,
    )
    return request, settings


def _one_after_another(
    request: Request, settings: Settings, save_stats: Path | None, place: Workplace | None
) -> list[JsonObject]:
    from d2o.evaluation.run import evaluate_all
    from d2o.evaluation.statistics_files import save_statistics

    records = []
    for result in evaluate_all(request, settings, open_meter, place=place):
        records.append(result.record)
        if save_stats and worker()[0] == 0:
            if result.statistics is None:
                raise UserError(
                    f"{request.xs[0]}: no extractor was used, so there are no statistics to save",
                    "name one with --extractor",
                )
            save_statistics(save_stats, result.statistics)
            console.say(f"wrote {save_stats} (n = {result.statistics.n:,}, {result.statistics.dim} features)")
    return records


@contextmanager
def open_meter(title: str, total: int) -> Iterator[_Progress]:
    with console.meter(title, total) as bar:
        yield _Progress(bar)


class _Progress:
    """Images as they are done; those that were found done do not count for the speed."""

    def __init__(self, bar: console.Meter):
        self.bar = bar

    def __call__(self, more: int) -> None:
        self.bar.update(self.bar.done + more)

    def found(self, n: int) -> None:
        self.bar.first += n
        self(n)


@dataclass
class Rows:
    """Of a table: a record for each row, `rows` of them measured; `mistakes`: rows that the user can do something
    about."""

    records: list[JsonObject]
    rows: int = 0
    mistakes: int = 0


def _table(values: Values, given: set[str], place: Workplace | None) -> Rows:
    """The rows of a paper's table: measured where their X is here, with the paper's numbers beside; the others with the
    reason why not. What the user types beats the table."""
    from d2o.evaluation.evaluate import FORMAT
    from d2o.evaluation.paper_protocols import find_preset
    from d2o.evaluation.seeds import over_seeds
    from d2o.recipes.row_students import not_of, remark
    from d2o.reports.cells import CITED, FAILED, NOT_RUN, quoted
    from d2o.reports.paper_tables import absent, load_table, measured_runs, moved
    from d2o.reports.verdicts import MISSING, verdicts

    table, under = load_table(values["table"]), values["runs"]
    protocol = values["protocol"] or table.protocol
    preset = find_preset(protocol) if protocol else None
    done = Rows([])
    by_seed: dict[str, dict[int | None, JsonObject]] = {}

    def unmeasured(row: PaperRow, status: str, why: str | None) -> None:
        if why is not None and status != FAILED:
            console.say(f"not measured: {row.name}: {why}")
        notes = [*table.notes, *([f"{row.name}: {why}"] if why else [])]
        about = {"about": row.about} if row.about else {}
        done.records.append({**FORMAT, **quoted(row.name, dict(row.paper), table.paper, notes, status), **about})

    for i, row in enumerate(table.rows):
        if row.x is None:
            unmeasured(row, CITED, row.cited)
            continue
        runs = measured_runs(table, row, under)
        reason = None if runs else absent(row, under)
        if reason is None and "teacher" not in given:
            lacks = [table.lacks_teacher(row, under, seed) for seed in [run.seed for run in runs] or [None]]
            reason = next(filter(None, lacks), None)
        if reason is not None:
            unmeasured(row, NOT_RUN, reason)
            continue
        xs = [(run.folder, run.seed) for run in runs] or [(moved(row.x, under), None)]
        if others := list(filter(None, (not_of(row, x, preset) for x, _ in xs))):
            unmeasured(row, NOT_RUN, others[0])
            done.mistakes += 1
            continue
        chosen = {
            key: value
            for key, value in {
                "against": table.against_of(row),
                **table.options_of(row),
            }.items()
            if value is not None
        }
        row_values = {
            **values,
            **{key: value for key, value in chosen.items() if key not in given},
            "protocol": protocol,
        }
        try:
            found = []
            for x, seed in xs:
                one = {**row_values, "x": [x], "name": [row.name], "paper": [dict(row.paper)]}
                if "teacher" in chosen and "teacher" not in given:
                    one["teacher"] = table.teacher_of(row, under, seed)
                found += _one_after_another(*prepare(one, (given | set(chosen)) - {"table", "runs"}), None, place)
            by_seed[row.name] = dict(zip([seed for _, seed in xs], found))  # other processes find none
            for record in found if len(found) < 2 else [over_seeds(found, [run.seed for run in runs])]:
                record["notes"] += [*table.notes, *dict.fromkeys(filter(None, (remark(row, x) for x, _ in xs)))]
                done.records.append({**record, "about": row.about} if row.about else record)
            if runs and len(runs) < len(table.seeds):
                console.say(f"{row.name}: {len(runs)} of {len(table.seeds)} seeds are here")
        except UserError as error:
            console.error(f"{row.name}: {error.message}", error.hint)
            unmeasured(row, FAILED, error.message)
            done.mistakes += 1
        except Stopped as stopped:
            raise Stopped(
                f"{row.name}, row {i + 1} of {len(table.rows)}: {stopped.message}", stopped.exit_code - 128
            ) from stopped
        else:
            done.rows += 1
    for verdict in verdicts(table.orders, by_seed):
        for record in done.records:
            if record["name"] == verdict.order.better and verdict.word != MISSING:
                record["notes"].append(verdict.text)
    return done
