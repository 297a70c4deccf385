"""`d2o env`."""

from __future__ import annotations

import json

import typer

from d2o.cli import console
from d2o.inputs import JsonObject


def env(as_json: bool = typer.Option(False, "--json", help="As JSON, for programs.")) -> None:
    """Tell what d2o finds on this machine: for bug reports, and for finding out what can run here.

    Versions, processor, devices, caches and their sizes, optional packages and what they are for, teachers that are
    here. It fetches and changes nothing; tokens and user names are not in it.
    """
    from d2o.cli.environment import collect

    found = collect()
    if as_json:
        console.out.print_json(json.dumps(found))
        return
    for head, rows in _sections(found):
        console.out.print(f"[bold]{head}[/]")
        width = max(map(len, rows), default=0)
        for name, text in rows.items():
            console.out.print(f"  {name:<{width}}  {text}", markup=False)


def _sections(found: JsonObject) -> list[tuple[str, dict[str, str]]]:
    cpu = found["cpu"]
    processor = (
        cpu
        if "cannot be told" in cpu
        else {
            "model": cpu["model"],
            "cores": f"{cpu['cores']}, {cpu['usable cores']} of them usable; torch takes {cpu['torch threads']}",
            "capability": (
                f"{cpu['capability']}; bf16 {'fast: ' + cpu['bf16'] if cpu['bf16'] else 'slow: the processor has none'}"
            ),
            "memory": console.size(cpu["memory"]) if cpu["memory"] else "unknown",
        }
    )
    caches = {name: _cache(entry) for name, entry in found["caches"].items()}
    caches |= {f"disk free, {name}": console.size(free) for name, free in found["disk free"].items()}
    extras = {
        f"{name}: {package}": version or "not there"
        for name, entry in found["extras"].items()
        for package, version in entry["packages"].items()
    }
    return [
        ("versions", {name: version or "not there" for name, version in found["versions"].items()}),
        ("platform", found["platform"]),
        ("processor", processor),
        ("devices (--device)", found["devices"]),
        *([("settings", found["settings"])] if found["settings"] else []),
        ("caches", caches),
        ("optional packages", extras),
        ("teachers here", found["teachers"]),
        ("can run", found["can run"]),
    ]


def _cache(entry: JsonObject) -> str:
    if not entry["there"]:
        return f"{entry['path']}, not there"
    amount = f"{'more than ' if entry['more'] else ''}{console.size(entry['bytes'])}"
    return f"{entry['path']}, {amount}{'' if entry['writable'] else ', not writable'}"
