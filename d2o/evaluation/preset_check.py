"""Whether something is measured by a protocol: before anything is generated as far as that is known, and at the end."""

from __future__ import annotations

import re
from collections.abc import Sequence

from d2o.errors import UserError
from d2o.evaluation.extractor import Extractor
from d2o.evaluation.prepare import parse_preparation
from d2o.evaluation.presets import Preset, as_written
from d2o.inputs import JsonObject
from d2o.interop.weights import WEIGHTS

_WHERE = {"n": "n_gen", "seed": "seeds", "against": "ref"}
"""Setting -> its key in a record's protocol, where that has another name."""
_WORDS = {"n": "generated images", "seed": "first seed", "against": "reference", "n_ref": "images of the reference"}
_UNSTATED = (None, "own", "as stored", "not stated")
"""Of images that were made elsewhere this is all that is known; it contradicts nothing."""


def check_result(preset: Preset, protocol: JsonObject) -> list[str]:
    """What in a record's `protocol`, as far as it is known, is not the preset's; empty: comparable. Keys that are
    absent or None are passed over, so that it can be asked before anything is generated as well as at the end."""
    found = []
    for name, wanted in {**preset.fixed, "n_ref": preset.n_ref}.items():
        value = protocol.get(_WHERE.get(name, name))
        if name in ("metrics", "extractor") or wanted is None or value in _UNSTATED:
            continue
        value = value[0] if name == "seed" else value
        if _prepared(wanted, value) if name == "resize" else wanted == value:
            continue
        found.append(f"{_WORDS.get(name, name.replace('_', ' '))}: {_count(value)}, the protocol has {_count(wanted)}")
    return [*found, *_wrong_networks(preset, protocol)]


def hold_to(preset: Preset, extractors: Sequence[Extractor], reference: str | None, n_ref: int | None) -> None:
    """Refuse before hours of work what is known not to be the protocol."""
    known: JsonObject = {
        "features": ", ".join(f"{e.name}/{e.dim}" for e in extractors) or None,
        "ref": reference,
        "n_ref": n_ref,
    }
    refuse(preset, check_result(preset, {**known, "weights": {e.name: e.sha256 for e in extractors}}))


def sides_of(preset: Preset) -> set[int]:
    """Pixels of a side of the protocol's images, as the words for its data say it; empty: of any size (COCO, BAPPS)."""
    named = {int(side) for side in re.findall(r"(\d+)x\1", preset.data)}
    return named | ({32} if "CIFAR-10" in preset.data else set())


def refuse(preset: Preset, differences: Sequence[str]) -> None:
    """UserError if there are any."""
    if differences:
        raise UserError(
            f"this is not the protocol {preset.name} ({preset.paper}):\n  " + "\n  ".join(differences),
            "give what it asks for, or leave the protocol away",
        )


def _wrong_networks(preset: Preset, protocol: JsonObject) -> list[str]:
    """Feature networks that are not the protocol's, or whose weights are not those that were published."""
    stated = protocol.get("features")
    names = [] if stated in _UNSTATED else [part.partition("/")[0] for part in str(stated).split(", ")]
    found = [
        f"features: {name}, the protocol has {as_written(sorted(preset.extractors))}"
        for name in names
        if name not in preset.extractors
    ]
    weights = protocol.get("weights") or dict.fromkeys(names[:1], protocol.get("weights_sha256"))
    for name, sha in weights.items():
        known = _published(name)
        if sha and known and sha not in known:
            found.append(
                f"weights of {name}: sha256 {sha[:12]}... is no published file of this network (known:"
                f" {as_written([k[:12] for k in known])})"
            )
    return found


def _published(extractor: str) -> list[str]:
    """sha256 of the files that hold an extractor's weights; none where nobody published one."""
    names = (
        ("inception", "inception-nvidia") if extractor.startswith("inception") else (extractor,)
    )  # one network, two packagings
    return [sha for name in names if name in WEIGHTS and (sha := WEIGHTS[name].sha256) is not None]


def _prepared(wanted: str, value: str) -> bool:
    """Whether a record's account of resizing ("center_crop+lanczos256+clean_pil299") begins with what the option
    `wanted` does, and no more."""
    before = parse_preparation(wanted).describe()
    if before == "none":
        return not value.startswith(("center_crop", "lanczos+"))
    return value == before or value.startswith(f"{before}+")


def _count(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else as_written(value)
