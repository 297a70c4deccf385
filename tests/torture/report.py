"""What the trials came to: a table for people, JSON for tests."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Result = dict[str, Any]
"""{"what": command or format, "kind": of trial, "failures": [str], "replay": how to repeat it alone, ...}."""


class Report:
    """Results as they come; failures are printed at once."""

    def __init__(self) -> None:
        self.results: list[Result] = []

    def add(self, result: Result) -> None:
        self.results.append(result)
        if result["failures"]:
            print(
                f"FAILED {result['what']}, {result['kind']} {result.get('at', '')} {result.get('where', '')}".rstrip()
            )
            for failure in result["failures"][:6]:
                print(f"    {failure}")
            if len(result["failures"]) > 6:
                print(f"    ... and {len(result['failures']) - 6} more")
            if result.get("replay"):
                print(f"    python -m tests.torture {result['replay']}", flush=True)

    @property
    def failed(self) -> list[Result]:
        return [result for result in self.results if result["failures"]]

    def table(self) -> str:
        """One line for each format, or command and kind of trial: how many, how many failed, and how in short."""
        groups: dict[tuple[str, str], list[Result]] = {}
        for result in self.results:
            groups.setdefault((result["what"], "damage" if "code" in result else result["kind"]), []).append(result)
        lines = [("what", "kind", "trials", "failed", "kills", "exit 0 / 2", "worst MB", "most frequent failures")]
        for (what, kind), results in sorted(groups.items()):
            lines.append((what, kind, *_counts(results), _frequent(results)))
        lines.append(("all", "", *_counts(self.results), ""))
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)

    def save(self, path: Path) -> None:
        counts = {
            "trials": len(self.results),
            "failed": len(self.failed),
            "kills": sum(r.get("kills", 0) for r in self.results),
        }
        path.write_text(json.dumps({**counts, "failures": self.failed, "results": self.results}, indent=1) + "\n")


def _counts(results: list[Result]) -> tuple[str, ...]:
    failed, kills = sum(bool(r["failures"]) for r in results), sum(r.get("kills", 0) for r in results)
    codes = Counter(r["code"] for r in results if "code" in r)
    worst = max((r["peak"] for r in results if "peak" in r), default=0)
    exits = f"{codes[0]} / {codes[2]}" if codes else ""
    return str(len(results)), str(failed), str(kills or ""), exits, f"{worst:.0f}" if worst else ""


def _frequent(results: Iterable[Result]) -> str:
    found = Counter(r["failures"][0].split("(")[0].strip()[:60] for r in results if r["failures"])
    return "; ".join(f"{count} x {what}" for what, count in found.most_common(3))
