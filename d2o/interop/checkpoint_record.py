"""The metadata of d2o's own checkpoints and states, as files that may say anything."""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import Field

from d2o.inputs import JsonObject
from d2o.interop.records import Finite, Record, Sha256, SpecRecord, check_record

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Whole = Annotated[int, Field(ge=0, le=2**53)]
Calls = Annotated[int, Field(ge=1, le=1000)]


class MakerRecord(Record):
    """The teacher that something was made from."""

    name: str | None = None
    sha256: str | None = None
    licence: str | None = None


class ProductRecord(Record):
    """What every checkpoint says: its network, and where it comes from."""

    format: Literal["d2o"] = "d2o"
    version: Literal[1] = 1
    kind: str
    network: JsonObject
    teacher: MakerRecord | None = None
    recipe: JsonObject | None = None
    metrics: JsonObject | None = None
    provenance: list[JsonObject] | None = None
    images: Whole | None = None


class TeacherRecord(ProductRecord):
    """A teacher."""

    spec: SpecRecord


class DenoiserRecord(Record):
    kind: Literal["denoiser"]
    sigma: Positive
    begins: Literal["noise", "x_T"] = "noise"
    guidance: tuple[Finite, Finite] | None = None


class FewStepRecord(DenoiserRecord):
    kind: Literal["few_step"]  # type: ignore[assignment]
    then: Annotated[list[Positive], Field(min_length=1, max_length=1000)]
    last: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0


class MultistepRecord(Record):
    kind: Literal["multistep"]
    steps: Calls


class StyleRecord(Record):
    kind: Literal["style"]
    noise: str
    truncation: Finite


class ConsistencyRecord(Record):
    kind: Literal["consistency"]
    form: str
    sigma: Positive
    steps: Calls
    middle: Positive
    clamp: bool = False


class NeedRecord(Record):
    """A part of another model: its name, and what it has to be."""

    name: str
    revision: str | None = None
    sha256: Sha256 | None = None


class LoraRecord(Record):
    """Adapters, and the teacher whose weights they change."""

    rank: Annotated[int, Field(ge=1, le=2**20)]
    alpha: Positive
    targets: Annotated[list[str], Field(min_length=1)]
    base: NeedRecord


class NeedsRecord(Record):
    text: NeedRecord | None = None
    space: NeedRecord | None = None


class StudentRecord(TeacherRecord):
    """`student`: its kind, and that kind's settings; `needs`: the text encoders and the latent space that it takes from
    elsewhere."""

    needs: NeedsRecord | None = None
    student: Annotated[
        DenoiserRecord | FewStepRecord | MultistepRecord | StyleRecord | ConsistencyRecord,
        Field(discriminator="kind"),
    ]


class OfSpaceRecord(ProductRecord):
    """A classifier of latents, or a perceptual distance between them; `space`: whose."""

    space: NeedRecord


class LossScaleRecord(Record):
    scale: Positive
    clean: Whole


class StateRecord(Record):
    """What a training continues from."""

    version: Literal[1] = 1
    iteration: Whole
    images: Whole
    best: JsonObject | None = None
    scores: dict[str, float] = {}
    bad_gradients: dict[str, Whole] = {}
    products: dict[str, str] = {}
    since: list[list[tuple[str, float]]] = []  # in the order of the log
    watch: JsonObject | None = None
    divergence: JsonObject | None = None
    loss_scale: LossScaleRecord | None = None
    start: str | None = None
    data: dict[str, str] = {}
    recipe: JsonObject = {}


MODELS: dict[str, type[Record]] = {
    "teacher": TeacherRecord,
    "student": StudentRecord,
    "extractor": ProductRecord,
    "autoencoder": ProductRecord,
    "latent_classifier": OfSpaceRecord,
    "latent_lpips": OfSpaceRecord,
    "state": StateRecord,
}
"""Kind of file -> what its metadata must be."""


def check_checkpoint(meta: JsonObject, path: str | os.PathLike) -> JsonObject:
    """The metadata itself. UserError, naming file and key: it is not what a file of its kind says. Other kinds are left
    to who knows them."""
    if (model := MODELS.get(str(meta.get("kind")))) is not None:
        check_record(model, meta, f"{path}: its metadata", "expected a file made by `d2o`; copy or make it again")
    return meta
