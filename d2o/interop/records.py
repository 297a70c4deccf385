"""Records in files that d2o reads (checkpoints' metadata, manifests): typed like recipes, since what a file says is
input too.

A record may hold more than its model names (what another d2o adds, notes of its maker); what the model names has the
type and the limits that it states, or the file is refused with the key and what was expected.
"""

from __future__ import annotations

import json
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from d2o.errors import UserError
from d2o.settings.wording import Shape, dotted, tree, word

MAX_VALUES = 2**26
"""Numbers in one sample at most: 3 x 4096 x 4096 and a third more."""
MAX_CLASSES = 2**20
MAX_SEED = 2**32 - 1

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Length = Annotated[int, Field(ge=1, le=2**20)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Record(BaseModel):
    """The rules of every record: no silent conversions, keys that are not named are left alone."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)


R = TypeVar("R", bound=Record)


class SpecRecord(Record):
    """`d2o.teachers.base.Spec` as files hold it."""

    name: str
    shape: tuple[Length, Length, Length]
    space: Literal["pixel", "latent"] = "pixel"
    condition: Literal["none", "label", "text"] = "none"
    classes: Annotated[int, Field(ge=0, le=MAX_CLASSES)] = 0
    value_range: tuple[Finite, Finite] = (-1.0, 1.0)
    sigma_min: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.002
    sigma_max: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 80.0
    licence: str = "unstated"
    solver: str = "heun"
    steps: Annotated[int, Field(ge=1, le=10**6)] = 18
    guidable: bool = True
    latents: str = ""
    text: str = ""

    @model_validator(mode="after")
    def _small_enough(self) -> SpecRecord:
        channels, height, width = self.shape
        if channels * height * width > MAX_VALUES:
            raise ValueError(f"shape {list(self.shape)}: expected at most {MAX_VALUES:,} numbers in a sample")
        if (self.condition == "label") != (self.classes > 0):
            raise ValueError(
                f"condition {self.condition!r} with {self.classes} classes: there are classes where, and only where, it"
                " is 'label'"
            )
        return self


def check_record(model: type[R], record: object, where: str, hint: str = "") -> R:
    """The record as its model. UserError: a line for each key that is missing or wrong, with `where` in front."""
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected a record (a JSON object)", hint)
    try:
        # JSON mode: strict, but lists may stand for tuples. What cannot be JSON (an infinite number) is written as
        # JSON's readers take it.
        return model.model_validate_json(json.dumps(record))
    except ValidationError as error:
        problems = word(error, record, (), Shape(tree(model)))[:5]
        raise UserError(
            "\n".join(f"{where}: {dotted(p.path)}: {p.text}" if p.path else f"{where}: {p.text}" for p in problems),
            hint,
        ) from error
