"""Mutations of pictures and of what holds them: PNG, zip, npz, tar. Checksums are made to fit, so that readers get past
the first check."""

from __future__ import annotations

import io
import random
import struct
import warnings
import zipfile
import zlib

from tests.torture.mutate_text import SIZES, flip, json_node


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
    """One member is renamed, doubled, left out, emptied, blown up, or is itself mutated, in an archive whose checksums
    fit."""
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
            info = zipfile.ZipInfo(
                name.encode("utf-8", "surrogateescape").decode("latin-1") if "\udcff" in name else name
            )
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
    shape, fortran, dtype = (
        np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    )(stream)
    body = stream.read()
    shapes = [
        (),
        (0,),
        (2**40,),
        (2**63,),
        (-1,),
        (1,) * 40,
        (*shape, 1),
        tuple(reversed(shape)),
        (*shape[:1], 2**33),
        (2**20, *shape),
    ]
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
        head[124:136] = rng.choice(
            [
                b"77777777777\0",
                b"00000000000\0",
                b"20000000000\0",
                b"-0000000001\0",
                b"\x80" + (2**40).to_bytes(11, "big"),
                b"\xff" * 12,
                b"zzzzzzzzzzz\0",
            ]
        )
    elif way == 1:
        head[156:157] = rng.choice([b"1", b"2", b"3", b"5", b"6", b"x", b"g", b"L", b"S", b"\xff"])
    elif way == 2:
        head[0:100] = rng.choice([b"../../x.png", b"/x.png", b"\xff\xfe.png", b"x" * 100, b""]).ljust(100, b"\0")
    else:
        head[rng.randrange(100, 500)] = rng.randrange(256)
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return data[:i] + bytes(head) + data[i + 512 :]
