"""`data:` of a recipe, read by `training.setup` and by `evaluation.quick`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, field_validator

from d2o.data.known import GET
from d2o.settings.section import Count, NonEmpty, Resolution, Section, field
from d2o.settings.wording import show


def _exact_integer(value: object) -> object:
    if isinstance(value, (bool, float)):  # Literal[1, 3] would take true and 3.0
        raise ValueError(f"expected 1 or 3, got {show(value)}")
    return value


class DataSection(Section):
    """Real images."""

    path: NonEmpty = field(
        ...,
        "folder (class = sub-folder), zip with dataset.json, WebDataset tar, LMDB, npz, CIFAR-10's tar.gz, or"
        " `real:digits`",
    )
    licence: NonEmpty | None = field(
        None,
        "under which terms the images are had, recorded in everything trained on them; it is that of `path` and goes "
        "with it: another path has another (default none: not stated)",
    )
    get: NonEmpty | None = field(None, f"how to get them, told where they are missing: a text, or {', '.join(GET)}")
    resolution: Resolution | None = field(
        None, "height and width in pixels after resizing and centre-cropping (default none: as they are)"
    )
    channels: Annotated[Literal[1, 3], BeforeValidator(_exact_integer)] | None = field(
        None, "1 (grey) or 3 (RGB) (default none: as they are)"
    )
    on_bad: Literal["refuse", "skip"] = field(
        "refuse", "a corrupt or odd file: stop and name it, or leave it out and name it"
    )
    limit: Count | None = field(None, "use the first so many images, in order of their names (default none: all)")
    xflip: bool = field(False, "also use every image mirrored left to right")

    @field_validator("get")
    @classmethod
    def _known_or_text(cls, value: str | None) -> str | None:
        if value is not None and value not in GET and " " not in value:
            raise ValueError(f"expected a text, or one of {', '.join(GET)}, got {show(value)}")
        return value
