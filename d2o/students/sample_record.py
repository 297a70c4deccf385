"""What a sample archive says of itself, as a file that may say anything."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from d2o.data.pair_record import ComputeRecord, Count
from d2o.inputs import JsonObject
from d2o.interop.records import MAX_SEED, Record, check_record


class SampleSettingsRecord(Record):
    n: Count
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)]
    labels: str


class SampleSource(Record):
    kind: Literal["student", "teacher"]
    sha256: str


class SampleRecord(Record):
    format: Literal["d2o-samples"]
    version: Literal[1]
    settings: SampleSettingsRecord
    source: SampleSource
    compute: ComputeRecord


class Chunked(ComputeRecord):
    chunk: Count


class PartsRecord(SampleRecord):
    """That of an archive that is being made."""

    compute: Chunked


def check_samples(record: JsonObject, where: str) -> JsonObject:
    """The record itself. UserError, naming `where` and the key: not as d2o writes it."""
    check_record(SampleRecord, record, f"{where}: its samples.json is damaged", "move it away, and sample again")
    return record


def check_parts(record: object, where: str) -> JsonObject:
    """As `check_samples`, of the record of parts that are being made."""
    check_record(PartsRecord, record, f"{where}: its record is damaged", f"remove {where} to begin again")
    assert isinstance(record, dict)  # anything else was refused
    return record
