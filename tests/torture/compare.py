"""What a command left, as a table that must be the same however often it was killed.

Not compared, because they are times: `timing/` of a pair store, images_per_s in metrics.jsonl and TensorBoard,
`timings` and samples_per_s of results and of the tables made from them. TensorBoard files carry host, process and wall
clock: their scalars are compared.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from pathlib import Path
from typing import Any

TIMES = {"images_per_s", "samples_per_s", "timings", "seconds"}
LEFTOVER = re.compile(r"(\.tmp|\.part|\.lock|\.locks|\.parts|\.done|\.trash|\.old|\.bak|~)(/|$)|^home/eval/.")
"""Names of what only a running command may have."""


def snapshot(folder: Path, leave_out: tuple[str, ...] = ()) -> dict[str, str]:
    """Relative name -> what must be equal. `leave_out`: first parts of names, and what is below them."""
    found: dict[str, str] = {}
    boards: set[Path] = set()
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        parts = path.relative_to(folder).parts
        if parts[0] in leave_out or "timing" in parts:
            continue
        if path.is_dir():
            if not any(path.iterdir()):
                found[name + "/"] = "an empty folder"
        elif ".tfevents." in path.name:
            boards.add(path.parent)
        else:
            found[name] = _content(path)
    for board in boards:
        found[str(board.relative_to(folder)) + "/ (scalars)"] = json.dumps(scalars(board), sort_keys=True)
    return found


def leftovers(names: Any) -> list[str]:
    return sorted(name for name in names if LEFTOVER.search(name))


def differences(reference: dict[str, str], found: dict[str, str]) -> list[str]:
    """Each difference in a few words, the most telling first."""
    missing = [f"missing: {name}" for name in sorted(reference.keys() - found.keys())]
    more = [f"left over: {name}" for name in sorted(found.keys() - reference.keys())]
    other = [
        f"differs: {name}{_where(reference[name], found[name])}"
        for name in sorted(reference.keys() & found.keys())
        if reference[name] != found[name]
    ]
    return missing + other + more


def scalars(board: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag -> (step, value), as TensorBoard shows them: what a resumed run has purged is gone. A point that stands there
    twice is one point."""
    import logging

    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(board), size_guidance={"scalars": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.rsplit("/", 1)[-1] not in TIMES]
    return {tag: sorted({(event.step, event.value) for event in events.Scalars(tag)}) for tag in tags}


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(inner) for key, inner in value.items() if key not in TIMES}
    return [without_times(inner) for inner in value] if isinstance(value, list) else value


def _content(path: Path) -> str:
    data = path.read_bytes()
    if path.suffix in (".json", ".jsonl", ".csv", ".md", ".html"):
        text = data.decode("utf-8", "backslashreplace")
        if path.suffix in (".json", ".jsonl"):
            lines = text.splitlines() if path.suffix == ".jsonl" else [text]
            try:
                return "\n".join(json.dumps(without_times(json.loads(line))) for line in lines)
            except (ValueError, RecursionError):
                return text
        if path.suffix == ".csv":
            text = _csv(text)
        text = re.sub(r'samples_per_s"*: [\d.e+-]+', "samples_per_s", text)
        text = re.sub(r"[\d,.]+ (images|samples)/s", "# images/s", text)
        text = re.sub(r"[\d.]+ s, of these [\d.]+ s generating", "# s", text)
        return _without_speeds(text)
    return hashlib.sha256(data).hexdigest()


def _csv(text: str) -> str:
    rows = list(csv.reader(io.StringIO(text)))
    if not rows:
        return text
    keep = [i for i, name in enumerate(rows[0]) if name.rsplit(".", 1)[-1] not in TIMES]
    return "\n".join(",".join(row[i] for i in keep if i < len(row)) for row in rows)


def _without_speeds(text: str) -> str:
    """Without what stands under samples/s in tables, and in the tile of the sampling speed."""
    text = re.sub(r'(data-label="samples/s">)[\d,.]+', r"\1#", text)
    text = re.sub(r'(Sampling speed</div><div class="value">)[^<]*(</div><div class="beside">)[^<]*', r"\1#\2#", text)
    column, lines = None, []
    for line in text.split("\n"):
        cells = line.split("|") if line.startswith("|") else []
        if "samples/s" in (names := [cell.strip() for cell in cells]):
            column = names.index("samples/s")
        elif not cells:
            column = None
        elif column is not None and column < len(cells):
            cells[column] = "#"
        lines.append("|".join(cells) if cells else line)
    return "\n".join(lines)


def _where(one: str, other: str) -> str:
    """The first line that differs, of texts."""
    if "\n" not in one and "\n" not in other and not one.startswith("{"):
        return ""
    a, b = (re.split(r"\n|(?<=,) (?=\")|(?<=>)", text) for text in (one, other))
    for i, (left, right) in enumerate(zip(a, b)):
        if left != right:
            return f" (part {i}: {left[:90]!r} became {right[:90]!r})"
    return f" ({len(a)} parts became {len(b)})"
