"""What a result of `d2o eval` holds, as far as tables and reports look at it: a file is checked against this before
anything is made of it."""

from __future__ import annotations

from collections.abc import Sized
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from d2o.inputs import JsonObject

Count = Annotated[int, Field(ge=0, le=2**63)]
M = TypeVar("M")
Pair = Annotated[list[int], Field(min_length=2, max_length=2)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class _X(_Model):
    kind: str
    source: str
    sha256: str | None = None
    parameters: Count | None = None
    nfe: Count | None = None
    forwards: Count | None = None
    teacher: str | None = None
    licence: str | None = None


class _Teacher(_Model):
    source: str
    solver: str | None = None  # of diffusion teachers
    steps: Count | None = None
    nfe: Count
    samples_per_s: FiniteFloat | None = None


class _Metric(_Model):
    value: FiniteFloat | None = None
    label: str = ""
    better: Literal["lower", "higher"] | None = None
    std: Annotated[FiniteFloat, Field(ge=0)] | None = None
    runs: list[FiniteFloat] = []
    per_class: dict[str, FiniteFloat] | None = None
    percent: bool | None = None
    small_n: bool | None = None
    report: str | None = None
    error: str | None = None
    # of "speed" and "distance"
    samples_per_s: Annotated[FiniteFloat, Field(gt=0)] | None = None
    batch: Count | None = None
    device: str | None = None
    dtype: str | None = None
    latency_ms: FiniteFloat | None = None
    latency_p90_ms: FiniteFloat | None = None
    text_ms: FiniteFloat | None = None
    network_ms: FiniteFloat | None = None
    decode_ms: FiniteFloat | None = None
    peak_memory_bytes: Count | None = None
    rmse: FiniteFloat | None = None
    n: Count | None = None
    teacher: _Teacher | None = None


class _Protocol(_Model):
    n_gen: Count | None
    seeds: Pair | None
    repeats: Count
    labels: str | None
    features: str
    weights_sha256: str | None
    resize: str | None
    quantize: str | None
    ref: str | None
    n_ref: Count | None


class _Env(_Model):
    cpu: str
    cores: Count
    threads: Count
    torch: str
    gpu: str | None = None


class _Timings(_Model):
    seconds: FiniteFloat
    generating: FiniteFloat


class _Grid(_Model):
    png: str
    columns: Annotated[int, Field(ge=1, le=64)]
    n: Annotated[int, Field(ge=1, le=4096)]
    labels: list[int] | None = None
    seeds: Pair | None = None
    prompts: list[str] | None = None
    teacher_png: str | None = None
    teacher: str | None = None


class _Sheet(_Model):
    png: str
    samples: list[int]
    neighbours: list[Annotated[list[int], Field(min_length=1)]]
    distances: list[Annotated[list[FiniteFloat], Field(min_length=1)]]

    @model_validator(mode="after")
    def _rows(self) -> _Sheet:
        return _equal(self, self.samples, self.neighbours, self.distances)


class _Curve(_Model):
    sample: Annotated[list[FiniteFloat], Field(min_length=2)]
    real: Annotated[list[FiniteFloat], Field(min_length=2)]

    @model_validator(mode="after")
    def _points(self) -> _Curve:
        return _equal(self, self.sample, self.real)


class _Neighbours(_Model):
    extractor: str
    n: Count
    n_ref: Count
    k: Annotated[int, Field(ge=1, le=4096)]
    columns: Annotated[int, Field(ge=2, le=4097)]
    near: FiniteFloat
    spaced: _Sheet
    closest: _Sheet
    median: FiniteFloat
    median_real: FiniteFloat
    closer: FiniteFloat
    closer_real: FiniteFloat
    curve: _Curve


class _Row(_Model):
    format: Literal["d2o-eval"]
    version: int
    name: str
    x: _X
    metrics: dict[str, _Metric]
    notes: list[str]
    paper: dict[str, FiniteFloat | list[FiniteFloat | None] | None] | None = None
    about: dict[str, str] | None = None
    preset: JsonObject | None = None


class _Quoted(_Row):
    """A row that was not measured here."""

    metrics: Annotated[dict[str, _Metric], Field(max_length=0)]
    protocol: None = None


class _Measured(_Row):
    d2o: str
    protocol: _Protocol
    env: _Env
    timings: _Timings
    command: str = ""
    grid: _Grid = Field(default=None)  # type: ignore[assignment]  # absent, or whole
    neighbours: _Neighbours = Field(default=None)  # type: ignore[assignment]


def mistake(record: JsonObject) -> str | None:
    """What is wrong with a result, in a line; None: nothing."""
    x = record.get("x")
    model = _Quoted if isinstance(x, dict) and x.get("kind") == "quoted" else _Measured
    try:
        model.model_validate(record)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
    return None


def _equal(model: M, *lists: Sized) -> M:
    if len({len(values) for values in lists}) > 1:
        raise ValueError("lists of different lengths")
    return model
