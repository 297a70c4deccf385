"""Results as files: what `d2o eval --json` writes, and what `--compare` reads back."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from d2o.errors import UserError
from d2o.evaluation.evaluate import FORMAT
from d2o.evaluation.result_model import mistake
from d2o.inputs import MAX_JSON_BYTES, JsonObject, parse_json, read_file
from d2o.interop.outputs import check_output
from d2o.interop.safetensors_io import atomic_write


def save_records(path: str | Path, records: Sequence[JsonObject]) -> None:
    """Write one record as an object, several as a list (atomically)."""
    check_json_target(path)
    atomic_write(path, results_json(records))


def results_json(records: Sequence[JsonObject]) -> str:
    """The content of such a file."""
    data = records[0] if len(records) == 1 else list(records)
    return json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def compact_json(record: JsonObject) -> str:
    """The content of a file of figures: JSON in which a list of numbers is one line."""

    def line(found: re.Match[str]) -> str:
        return re.sub(r"\s+", " ", found[0]).replace("[ ", "[").replace(" ]", "]") if "\n" in found[0] else found[0]

    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False)
    return re.sub(r"\[[-+.\deE,\s]+\]", line, text) + "\n"


def load_records(path: str | Path) -> list[JsonObject]:
    """The results in a JSON file, or in the eval.json of a run folder. UserError: missing, damaged, or not such a
    file."""
    path = Path(path)
    if path.is_dir():
        if not (path / "eval.json").exists():
            raise UserError(f"{path} holds no eval.json", f"make it: d2o eval {path} --json {path / 'eval.json'}")
        path = path / "eval.json"
    records = _parse(path)
    if records is None:
        raise UserError(f"{path} is not a result of `d2o eval`", "expected a file made with --json")
    for record in records:
        if record["version"] > FORMAT["version"]:
            raise UserError(f"{path} was written by a newer d2o ({record.get('d2o')})")
        if (wrong := mistake(record)) is not None:
            raise UserError(f"{path} is not a whole result of `d2o eval`: {wrong}", "was it edited? Measure again")
    return records


def _parse(path: Path) -> list[JsonObject] | None:
    """The records, or None when the file holds something else. UserError when it can't be read."""
    data = read_file(path, MAX_JSON_BYTES, "a file of results")
    try:
        content = parse_json(data)
    except ValueError:
        return None
    found = content if isinstance(content, list) else [content]
    records = [
        r
        for r in found
        if isinstance(r, dict) and r.get("format") == FORMAT["format"] and isinstance(r.get("version"), int)
    ]
    return records if records and len(records) == len(found) else None


def check_json_target(path: str | Path) -> None:
    """UserError if writing a result to `path` would overwrite something else, or cannot work."""
    check_output(path, folder=False)
    path = Path(path)
    if path.exists() and path.stat().st_size and _parse(path) is None:
        raise UserError(
            f"{path} exists and is not a result of `d2o eval`: it is not overwritten", "choose another name for --json"
        )
