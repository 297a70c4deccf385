"""Damage: what disks, networks and careless or hostile people do to files. Every mutation is a function of (bytes,
random generator).

`RAW` fits any file. `FORMATS` know what is inside: they change declared sizes, JSON values, names of members, and keep
checksums right, so that readers get past the first check. None: nothing of that kind is in this file.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from tests.torture.mutate_containers import png, tar_head, vast_png, zip_fields, zip_member
from tests.torture.mutate_sealed import forged_record, forged_tensors, record, tensor_header
from tests.torture.mutate_text import SIZES, flip, json_lines, json_node, laughs, lines, words

Mutation = Callable[[bytes, random.Random], bytes | None]


def run_of(data: bytes, rng: random.Random) -> bytes:
    start, length = rng.randrange(len(data)), rng.choice([1, 4, 64, 512, 4096])
    length = min(length, len(data) - start)
    return data[:start] + (bytes(length) if rng.random() < 0.5 else rng.randbytes(length)) + data[start + length :]


def truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.choice([0, 1, 8, len(data) - 1, rng.randrange(len(data))])]


def extend(data: bytes, rng: random.Random) -> bytes:
    return data + rng.choice([b"\0", b"\n", bytes(4096), rng.randbytes(rng.randrange(1, 300)), data])


def swap(data: bytes, rng: random.Random) -> bytes:
    size = rng.choice([1, 16, 512])
    a, b = sorted(rng.randrange(max(len(data) - size, 1)) for _ in range(2))
    b = max(b, a + size)
    return data[:a] + data[b : b + size] + data[a + size : b] + data[a : a + size] + data[b + size :]


def cut_or_repeat(data: bytes, rng: random.Random) -> bytes:
    start, length = rng.randrange(len(data)), rng.choice([1, 8, 512])
    if rng.random() < 0.5:
        return data[:start] + data[start + length :]
    return data[: start + length] + data[start:]


def size_field(data: bytes, rng: random.Random) -> bytes:
    """A number of 4 or 8 bytes, near the beginning or the end or anywhere, becomes a large one."""
    width, value = rng.choice([4, 8]), rng.choice(SIZES)
    place = rng.choice([0, rng.randrange(64), len(data) - 8 - rng.randrange(64), rng.randrange(len(data))])
    place = max(0, min(place, len(data) - width))
    return (
        data[:place] + (value % 2 ** (8 * width)).to_bytes(width, rng.choice(["little", "big"])) + data[place + width :]
    )


RAW: dict[str, Mutation] = {f.__name__: f for f in (flip, run_of, truncate, extend, swap, cut_or_repeat, size_field)}


# Which formats know which mutations. The flag: whether d2o could tell that the file was changed, where the bytes have a
# digest.

FORMATS: dict[str, dict[str, tuple[Mutation, bool]]] = {
    "sealed": {
        "record": (record, True),
        "tensor_header": (tensor_header, True),
        "forged_record": (forged_record, False),
        "forged_tensors": (forged_tensors, False),
    },
    "safetensors": {"tensor_header": (tensor_header, False)},
    "json": {"json_node": (json_node, True)},
    "jsonl": {"json_lines": (json_lines, True), "lines": (lines, True)},
    "text": {"words": (words, True), "lines": (lines, True)},
    "yaml": {"words": (words, True), "lines": (lines, True), "laughs": (laughs, True)},
    "png": {"png": (png, False), "vast_png": (lambda data, rng: vast_png(), False)},
    "zip": {"zip_fields": (zip_fields, True), "zip_member": (zip_member, False)},
    "tar": {"tar_head": (tar_head, False)},
    "": {},
}
