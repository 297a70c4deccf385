"""Mutations of safetensors files: of their header, and of the JSON record that d2o keeps in it, with and without a
digest that fits."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from typing import Any

from tests.torture.mutate_text import json_node


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
