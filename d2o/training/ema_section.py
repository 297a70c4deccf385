"""`ema:` of a recipe, read by `ema`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, ValidationInfo, field_validator

from d2o.settings.section import Positive, Section, field
from d2o.settings.wording import show


class EmaSection(Section):
    """Moving average of the weights; with neither half_life nor decay there is none."""

    half_life: Positive | None = field(None, "half-life in images")
    decay: Annotated[float, Field(gt=0, lt=1)] | None = field(None, "factor per iteration, instead of half_life")
    ramp: Annotated[float, Field(gt=0, le=1)] | None = field(
        0.05, "limit of half_life, as a part of the images seen so far; null for none"
    )
    start: int = field(0, "images before it begins; until then it is the weights themselves", ge=0)

    @field_validator("decay")
    @classmethod
    def _one_of_two(cls, value: float | None, info: ValidationInfo) -> float | None:
        half_life = info.data.get("half_life")
        if value is not None and half_life is not None:
            raise ValueError(
                f"half_life is given too ({show(half_life)}); give one of the two (null takes the other back)"
            )
        return value
