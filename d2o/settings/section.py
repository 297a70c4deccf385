"""What every section of a file of settings is: typed, strict, frozen; and the kinds of values that many have."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from d2o.settings.wording import show

MAX_SEED = 2**32 - 1  # noise takes seeds modulo 2**32; a larger one would silently repeat another's samples


class Section(BaseModel):
    """The rules of every section: no unknown keys, no silent conversions (an integer may stand for a float), no changes
    afterwards."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def field(default: object, description: str, **limits: Any) -> Any:  # noqa: ANN401 (as pydantic's own)
    """A field whose description ends with its default; `...` is a required one."""
    if default is not ... and "(default" not in description:
        shown = json.dumps(default) if not isinstance(default, str) else default or "empty"
        description += f" (default {'none' if default is None else shown})"
    return Field(default, description=description, **limits)


def _at_most(most: int) -> AfterValidator:
    """A limit that no real setting comes near: said only to those who exceed it."""

    def check(value: int) -> int:
        if value > most:
            raise ValueError(f"expected at most {most}, got {show(value)}")
        return value

    return AfterValidator(check)


NonEmpty = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]  # below 2**63, as every integer of a recipe
BatchSize = Annotated[Count, _at_most(2**20)]
Steps = Annotated[Count, _at_most(100_000)]
Threads = Annotated[Count, _at_most(1024)]
Resolution = Annotated[Count, _at_most(2**13)]
ImageCount = Annotated[Count, _at_most(4096)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Positive = Annotated[float, Field(gt=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]
