"""Flipped bits, mutations of JSON, YAML and other text, and the values that numbers and names become everywhere."""

from __future__ import annotations

import json
import math
import random
from itertools import pairwise
from typing import Any

SIZES = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)
DEEP, BIG = "\0deep", "\0big"
VALUES: list[Any] = [
    None,
    True,
    False,
    -1,
    0,
    1,
    2**31,
    2**40,
    2**63,
    10**30,
    -0.5,
    1e308,
    math.nan,
    math.inf,
    "",
    "x",
    "\u0000\ud800",
    "0",
    [],
    {},
    [[]],
    {"a": {}},
    [None] * 1000,
    "../../../etc/passwd",
    "y" * 100_000,
    DEEP,
    BIG,
]
"""What a JSON value may become. The last two are written as text: a thousand-fold nesting, and a number of 5,000
digits."""


def flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 3, 16])):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def json_node(data: bytes, rng: random.Random, spare: tuple[str, ...] = ()) -> bytes | None:
    """One value of a JSON text becomes another, or goes, or its key changes. `spare`: keys that stay as they are."""
    try:
        root = json.loads(data)
    except ValueError:
        return None
    holder = [root]
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in list(items)[:200]:
            if key not in spare:
                places.append((value, key))
                walk(inner)

    walk(holder)
    parent, key = rng.choice(places)
    way = rng.random()
    if way < 0.2 and parent is not holder:
        del parent[key]
    elif way < 0.25 and isinstance(parent, dict):
        parent[str(key) + "_"] = parent.pop(key)
    elif way < 0.35 and isinstance(parent[key], (int, float)) and not isinstance(parent[key], bool):
        parent[key] = rng.choice(
            [-parent[key], parent[key] + 1, parent[key] * 2**40, float(parent[key]), str(parent[key])]
        )
    else:
        parent[key] = rng.choice(VALUES)
    text = json.dumps(holder[0], ensure_ascii=True)
    text = text.replace(json.dumps(DEEP), "[" * 100_000 + "]" * 100_000).replace(json.dumps(BIG), "9" * 5000)
    return text.encode()


def json_lines(data: bytes, rng: random.Random) -> bytes | None:
    lines = data.splitlines()
    i = rng.randrange(len(lines))
    changed = json_node(lines[i], rng)
    return None if changed is None else b"\n".join([*lines[:i], changed, *lines[i + 1 :], b""])


# Text and YAML


def words(data: bytes, rng: random.Random) -> bytes:
    """A word of a text becomes something else."""
    parts = data.split(b" ")
    odd = [
        b"",
        b"0",
        b"-1",
        b"1e999",
        b"99999999999999999999",
        b".nan",
        b"null",
        b"[]",
        b"{}",
        b"true",
        b"\xff\xfe",
        b"\0",
        b"~" * 300,
        b"'",
        b"&a [*a]",
        b"!!python/object/apply:os.system [echo]",
        b"${HOME}",
        b"../" * 50,
        b"2026-01-01",
        "名".encode() * 100,
    ]
    parts[rng.randrange(len(parts))] = rng.choice(odd) + (b"\n" if rng.random() < 0.3 else b"")
    return b" ".join(parts)


def lines(data: bytes, rng: random.Random) -> bytes:
    """A line goes, comes twice, moves, or is deeper than it should be."""
    rows = data.split(b"\n")
    i = rng.randrange(len(rows))
    way = rng.randrange(5)
    if way == 0:
        del rows[i]
    elif way == 1:
        rows.insert(i, rows[i])
    elif way == 2:
        rows.insert(rng.randrange(len(rows)), rows.pop(i))
    elif way == 3:
        rows[i] = b"   " + rows[i]
    else:
        rows[i] = (
            rows[i].partition(b":")[0]
            + b": "
            + rng.choice([b"[" * 5000 + b"]" * 5000, b"x" * 10**6, b"{a: 1, a: 2}", b"1" * 5000])
        )
    return b"\n".join(rows)


def laughs(data: bytes, rng: random.Random) -> bytes:
    """A few hundred bytes of YAML that stand for 10^9 values."""
    names = "abcdefghi"
    text = "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
    text += "".join(f"{new}: &{new} [{', '.join(['*' + old] * 10)}]\n" for old, new in pairwise(names))
    return text.encode() + data if rng.random() < 0.5 else data + b"\n" + text.encode()
