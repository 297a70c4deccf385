"""What describes a network: plain data, as recipes and checkpoints hold it."""

from __future__ import annotations

from d2o.inputs import JsonObject

Config = JsonObject
"""`arch` and that network's arguments (`d2o.networks.build`), or a library's own description of its network."""


def as_json(value: object) -> object:
    """As JSON gives it back."""
    if isinstance(value, (list, tuple)):
        return [as_json(part) for part in value]
    return {key: as_json(part) for key, part in value.items()} if isinstance(value, dict) else value
