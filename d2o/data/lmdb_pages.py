"""The keys and values of an LMDB file, found without LMDB: the library trusts what is in the file, and a damaged one
ends the process (SIGBUS).

LMDB 0.9 on 64 bits, as LSUN is published (lmdb.h and mdb.c: MDB_meta, MDB_page, MDB_node), little-endian, one value for
each key. Pages are numbered from 0; the first two are the heads, of which the one of the later transaction counts.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator

HEAD = struct.Struct(
    "<IIQQ 48s IHHQQQQQ QQ"
)  # magic, version, address, map size, free list, then the main tree, last page, transaction
PAGE = struct.Struct("<QHHHH")  # number, padding, flags, lower, upper
NODE = struct.Struct(
    "<HHHH"
)  # size (low, high; of a branch the child's number, with the flags), flags, length of the key
MAGIC, BRANCH, LEAF, OVERFLOW, BIG = 0xBEEFC0DE, 1, 2, 4, 1
EMPTY, MAX_DEPTH = 2**64 - 1, 32


class Damaged(Exception):
    """No LMDB file, or one whose pages do not fit each other; the text says why."""


def key_places(data: mmap.mmap | bytes) -> Iterator[tuple[bytes, int, int]]:
    """(key, where its value begins, its length) in the order of the keys. Raises Damaged."""
    size, root, count = _head(data)
    seen = found = 0
    waiting = [(root, 0)] if root != EMPTY else []
    while waiting:
        number, depth = waiting.pop()
        seen += 1
        flags, nodes = _page(data, number, size)
        if seen > len(data) // size or depth > MAX_DEPTH:
            raise Damaged("its pages refer to each other in a circle")
        if flags == BRANCH:
            waiting += [(low | high << 16 | more << 32, depth + 1) for _, low, high, more, _ in reversed(nodes)]
        elif flags == LEAF:
            for begin, low, high, kind, length in nodes:
                found += 1
                yield _value(data, size, (number + 1) * size, begin, low | high << 16, kind, length)
        else:
            raise Damaged(f"page {number} is of an unknown kind")
    if found != count:
        raise Damaged(f"it says that it has {count:,} entries, and {found:,} are there")


def _head(data: mmap.mmap | bytes) -> tuple[int, int, int]:
    """(bytes of a page, root of the main tree, number of entries)."""
    heads = []
    size = int.from_bytes(data[40:44], "little")
    if size not in (2**k for k in range(9, 17)):
        raise Damaged("no LMDB file, or cut off")
    for begin in (PAGE.size, size + PAGE.size):
        if len(data) < begin + HEAD.size:
            raise Damaged("cut off")
        magic, version, _, _, _, _, flags, _, _, _, _, count, root, last, transaction = HEAD.unpack_from(data, begin)
        if magic != MAGIC or version != 1:
            raise Damaged("no LMDB file of version 1")
        heads.append((transaction, last, flags, root, count))
    _, last, flags, root, count = max(heads)
    if flags & 0x3C:  # sorted duplicates and their kin
        raise Damaged("it has several values for a key, which is not read")
    return size, root, count


def _page(data: mmap.mmap | bytes, number: int, size: int) -> tuple[int, list[tuple[int, int, int, int, int]]]:
    """(flags, nodes as (where, low, high, flags, length of the key)) of a page of the tree."""
    begin = number * size
    if begin + size > len(data):
        raise Damaged(f"cut off: page {number} is not there")
    _, _, flags, lower, _ = PAGE.unpack_from(data, begin)
    if not PAGE.size <= lower <= size or lower % 2:
        raise Damaged(f"page {number} is broken")
    places = struct.unpack_from(f"<{(lower - PAGE.size) // 2}H", data, begin + PAGE.size)
    if any(not lower <= place <= size - NODE.size for place in places):
        raise Damaged(f"page {number} is broken")
    return flags & ~0x10, [(begin + place, *NODE.unpack_from(data, begin + place)) for place in places]


def _value(
    data: mmap.mmap | bytes, size: int, end: int, begin: int, count: int, kind: int, length: int
) -> tuple[bytes, int, int]:
    """Of a node at `begin` on the page that ends at `end`: its key, and where its value of `count` bytes is."""
    value = begin + NODE.size + length
    key = data[begin + NODE.size : value]
    if kind not in (0, BIG) or value + (8 if kind else count) > end:
        raise Damaged("a broken entry")
    if kind == BIG:
        page = int.from_bytes(data[value : value + 8], "little")
        value, end = page * size + PAGE.size, len(data)
        if value > end or PAGE.unpack_from(data, page * size)[2] & ~0x10 != OVERFLOW:
            raise Damaged("a broken entry")
    if value + count > end:
        raise Damaged("cut off: a value is not there")
    return bytes(key), value, count
