"""Damage: what disks, networks and careless or hostile people do to files. Every mutation is a function of (bytes, random generator).

`RAW` fits any file. `FORMATS` know what is inside: they change declared sizes, JSON values, names of members, and keep checksums right, so that
readers get past the first check. None: nothing of that kind is in this file.
"""

from __future__ import annotations

import io
import json
import math
import random
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from itertools import pairwise
from typing import Any

Mutation = Callable[[bytes, random.Random], bytes | None]

SIZES = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)
DEEP, BIG = "\0deep", "\0big"
VALUES: list[Any] = [None, True, False, -1, 0, 1, 2**31, 2**40, 2**63, 10**30, -0.5, 1e308, math.nan, math.inf, "", "x", "\u0000\ud800", "0", [], {},
                     [[]], {"a": {}}, [None] * 1000, "../../../etc/passwd", "y" * 100_000, DEEP, BIG]  # fmt: skip
"""What a JSON value may become. The last two are written as text: a thousand-fold nesting, and a number of 5,000 digits."""


def flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 3, 16])):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


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
    return data[:place] + (value % 2 ** (8 * width)).to_bytes(width, rng.choice(["little", "big"])) + data[place + width :]


RAW: dict[str, Mutation] = {f.__name__: f for f in (flip, run_of, truncate, extend, swap, cut_or_repeat, size_field)}


# JSON


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
        parent[key] = rng.choice([-parent[key], parent[key] + 1, parent[key] * 2**40, float(parent[key]), str(parent[key])])
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
    odd = [b"", b"0", b"-1", b"1e999", b"99999999999999999999", b".nan", b"null", b"[]", b"{}", b"true", b"\xff\xfe", b"\0", b"~" * 300, b"'",
           b"&a [*a]", b"!!python/object/apply:os.system [echo]", b"${HOME}", b"../" * 50, b"2026-01-01", "名".encode() * 100]  # fmt: skip
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
        rows[i] = rows[i].partition(b":")[0] + b": " + rng.choice([b"[" * 5000 + b"]" * 5000, b"x" * 10**6, b"{a: 1, a: 2}", b"1" * 5000])
    return b"\n".join(rows)


def laughs(data: bytes, rng: random.Random) -> bytes:
    """A few hundred bytes of YAML that stand for 10^9 values."""
    names = "abcdefghi"
    text = "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
    text += "".join(f"{new}: &{new} [{', '.join(['*' + old] * 10)}]\n" for old, new in pairwise(names))
    return text.encode() + data if rng.random() < 0.5 else data + b"\n" + text.encode()


# Safetensors


def _split(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def _join(header: bytes, body: bytes) -> bytes:
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + body


def tensor_header(data: bytes, rng: random.Random) -> bytes | None:
    """Names, shapes, types or places of tensors."""
    header, body = _split(data)
    changed = json_node(json.dumps(header).encode(), rng, ("__metadata__",))
    return None if changed is None else _join(changed, body)


def record(data: bytes, rng: random.Random) -> bytes | None:
    """A value of the JSON record in the metadata, whose digest does not fit any more."""
    return _with_record(data, lambda old: json_node(old, rng), seal=False)


def forged_record(data: bytes, rng: random.Random) -> bytes | None:
    """The same with a digest that fits: a file that somebody made to do harm, or that a faulty program wrote."""
    from d2o.interop.seal import BLANK

    return _with_record(data, lambda old: json_node(old, rng, tuple(BLANK)), seal=True)


def forged_tensors(data: bytes, rng: random.Random) -> bytes | None:
    """Tensors that are not finite, huge, or all the same, sealed."""
    import numpy as np

    header, body = _split(data)
    changed = bytearray(body)
    floats = [t for t in header.values() if t.get("dtype") == "F32" and t["data_offsets"][1] > t["data_offsets"][0]]
    if not floats:
        return None
    start, end = rng.choice(floats)["data_offsets"]
    value = np.float32(rng.choice([math.nan, math.inf, 1e38, 0.0]))
    changed[start:end] = np.full((end - start) // 4, value, "<f4").tobytes()
    return _with_record(_join(json.dumps(header).encode(), bytes(changed)), lambda old: old, seal=True)


def _with_record(data: bytes, change: Callable[[bytes], bytes | None], seal: bool) -> bytes | None:
    from d2o.interop.seal import BLANK, sealed

    header, body = _split(data)
    old = header.get("__metadata__", {}).get("d2o")
    if old is None or (changed := change(old.encode())) is None:
        return None
    if seal:
        try:
            found = json.loads(changed)
        except (ValueError, RecursionError):
            return None
        if not isinstance(found, dict):
            return None
        changed = json.dumps({**found, **BLANK}, sort_keys=True).encode()
    header["__metadata__"]["d2o"] = changed.decode()
    plain = _join(json.dumps(header, separators=(",", ":")).encode(), body)
    return b"".join(bytes(piece) for piece in sealed(plain)) if seal else plain


# PNG


def png(data: bytes, rng: random.Random) -> bytes | None:
    """Another size, depth or colour type in the head, or a compressed text of 100 MB, with the checksums that fit."""
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        return None
    fields = list(struct.unpack(">2I5B", data[16:29]))
    way = rng.randrange(4)
    if way < 2:
        fields[way] = rng.choice([0, 1, fields[way] + 1, 30_000, 2**31 - 1, 2**32 - 1])
    elif way == 2:
        fields[rng.randrange(2, 7)] = rng.choice([0, 1, 2, 3, 6, 8, 16, 255])
    head = _chunk(b"IHDR", struct.pack(">2I5B", *fields))
    text = _chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8), 1)) if way == 3 else b""
    return data[:8] + head + text + data[33:]


def vast_png() -> bytes:
    """24,000 x 24,000 black pixels (576 million) in 600 kB."""
    packer, size = zlib.compressobj(1), 24_000
    row = bytes(1 + size)
    pixels = b"".join(packer.compress(row) for _ in range(size)) + packer.flush()
    head = _chunk(b"IHDR", struct.pack(">2I5B", size, size, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + _chunk(b"IDAT", pixels) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


# Zip and npz


def zip_fields(data: bytes, rng: random.Random) -> bytes | None:
    """A field of a local or central entry, or of the end record, becomes another number."""
    kinds = {b"PK\1\2": (4, 42), b"PK\3\4": (4, 26), b"PK\5\6": (4, 18)}
    signature = rng.choice(list(kinds))
    places = [i for i in range(len(data) - 4) if data[i : i + 4] == signature]
    if not places:
        return None
    low, high = kinds[signature]
    place, width = rng.choice(places) + rng.randrange(low, high), rng.choice([2, 4])
    return data[:place] + (rng.choice(SIZES) % 2 ** (8 * width)).to_bytes(width, "little") + data[place + width :]


def zip_member(data: bytes, rng: random.Random) -> bytes | None:
    """One member is renamed, doubled, left out, emptied, blown up, or is itself mutated, in an archive whose checksums fit."""
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        members = [(info.filename, file.read(info)) for info in file.infolist()]
    i = rng.randrange(len(members))
    name, content = members[i]
    odd = ["../../x.png", "/x.png", "x" * 300 + ".png", "\udcff.png", "a/" * 200 + "x.png", "CON.png", ""]
    way = rng.randrange(6)
    if way == 0:
        members[i] = rng.choice(odd), content
    elif way == 1:
        members.insert(rng.randrange(len(members)), members[i])
    elif way == 2:
        del members[i]
    elif way == 3:
        members[i] = name, rng.choice([b"", b"\0" * 10**8, rng.randbytes(100)])
    else:
        changed = inner(name, content, rng)
        if changed is None:
            return None
        members[i] = name, changed
    return pack(members)


def pack(members: list[tuple[str, bytes]]) -> bytes:
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w") as file:
        warnings.simplefilter("ignore")  # a name that comes twice is meant
        for name, content in members:
            info = zipfile.ZipInfo(name.encode("utf-8", "surrogateescape").decode("latin-1") if "\udcff" in name else name)
            info.compress_type = zipfile.ZIP_DEFLATED if len(content) > 10**6 else zipfile.ZIP_STORED
            info.file_size = len(content)
            file.writestr(info, content)
    return out.getvalue()


def inner(name: str, content: bytes, rng: random.Random) -> bytes | None:
    """A member mutated as what its name says it is."""
    suffix = name.rpartition(".")[2]
    if suffix == "json":
        return json_node(content, rng)
    if suffix == "npy":
        return npy(content, rng)
    if suffix == "png":
        return vast_png() if rng.random() < 0.1 else png(content, rng)
    return flip(content, rng) if content else None


def npy(content: bytes, rng: random.Random) -> bytes | None:
    """Shape, type or order in the head of an .npy become others; the data stay."""
    import numpy as np

    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    shape, fortran, dtype = (np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0)(stream)
    body = stream.read()
    shapes = [(), (0,), (2**40,), (2**63,), (-1,), (1,) * 40, (*shape, 1), tuple(reversed(shape)), (*shape[:1], 2**33), (2**20, *shape)]
    kinds = ["|O", "<f8", "<f4", "|u1", "<i8", "<U5", "<M8[s]", "<c16", "|V8", "<f2", "[('a', '<i4')]"]
    way = rng.randrange(3)
    descr = repr(dtype.str) if way != 1 else (kind if (kind := rng.choice(kinds)).startswith("[") else repr(kind))
    head = f"{{'descr': {descr}, 'fortran_order': {fortran if way != 2 else rng.choice(['True', '0', '[]'])}, "
    head += f"'shape': {rng.choice(shapes) if way == 0 else shape}, }}"
    if rng.random() < 0.05:
        head = rng.choice(["{" * 3000, "{}", "[]", "1" * 5000, "__import__('os')"])
    head += " " * (-(len(head) + 11) % 64) + "\n"
    return b"\x93NUMPY\1\0" + len(head).to_bytes(2, "little") + head.encode() + body if len(head) < 2**16 else None


# Tar


def tar_head(data: bytes, rng: random.Random) -> bytes | None:
    """A field of a member's head becomes another, with a checksum that fits."""
    heads = [i for i in range(0, len(data) - 512, 512) if data[i + 257 : i + 262] == b"ustar"]
    if not heads:
        return None
    i = rng.choice(heads)
    head = bytearray(data[i : i + 512])
    way = rng.randrange(4)
    if way == 0:
        head[124:136] = rng.choice([b"77777777777\0", b"00000000000\0", b"20000000000\0", b"-0000000001\0", b"\x80" + (2**40).to_bytes(11, "big"),
                                    b"\xff" * 12, b"zzzzzzzzzzz\0"])  # fmt: skip
    elif way == 1:
        head[156:157] = rng.choice([b"1", b"2", b"3", b"5", b"6", b"x", b"g", b"L", b"S", b"\xff"])
    elif way == 2:
        head[0:100] = rng.choice([b"../../x.png", b"/x.png", b"\xff\xfe.png", b"x" * 100, b""]).ljust(100, b"\0")
    else:
        head[rng.randrange(100, 500)] = rng.randrange(256)
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return data[:i] + bytes(head) + data[i + 512 :]


# Which formats know which mutations. The flag: whether d2o could tell that the file was changed, where the bytes have a digest.

FORMATS: dict[str, dict[str, tuple[Mutation, bool]]] = {
    "sealed": {"record": (record, True), "tensor_header": (tensor_header, True), "forged_record": (forged_record, False),
               "forged_tensors": (forged_tensors, False)},
    "safetensors": {"tensor_header": (tensor_header, False)},
    "json": {"json_node": (json_node, True)},
    "jsonl": {"json_lines": (json_lines, True), "lines": (lines, True)},
    "text": {"words": (words, True), "lines": (lines, True)},
    "yaml": {"words": (words, True), "lines": (lines, True), "laughs": (laughs, True)},
    "png": {"png": (png, False), "vast_png": (lambda data, rng: vast_png(), False)},
    "zip": {"zip_fields": (zip_fields, True), "zip_member": (zip_member, False)},
    "tar": {"tar_head": (tar_head, False)},
    "": {},
}  # fmt: skip
