"""The manifest of a pair store, as a file that may say anything: types, limits, and sizes that its shards can hold."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator

from d2o.inputs import JsonObject
from d2o.interop.records import MAX_SEED, Finite, Record, Sha256, SpecRecord, check_record

MAX_SHARDS = 2**20
DTYPE_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
Count = Annotated[int, Field(ge=1, le=MAX_SEED + 1)]
Steps = Annotated[int, Field(ge=1, le=10**6)]
Scale = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class SettingsRecord(Record):
    """`PairSettings` as it is recorded; an older store's lack what was the default then."""

    teacher: str
    n: Count
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] = 0
    solver: str
    steps: Steps
    spacing: Literal["leading", "trailing", "linspace"] | None = None
    final: Literal["scheduler", "x0"] = "scheduler"
    eta: Finite = 0.0
    s_churn: Finite = 40.0
    s_min: Finite = 0.05
    s_max: Finite = 50.0
    s_noise: Finite = 1.003
    cfg: Scale | tuple[Scale, Scale] = 1.0
    labels: str = "random"
    prompts: str | None = None
    per_prompt: Count = 1
    rewire: Literal["none", "permute"] = "none"
    shard_size: Count = 1024
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    store_noise: bool = False
    decode: bool = False
    sdxl_uncond: Literal["zeros", "encode_empty"] | None = None

    @model_validator(mode="after")
    def _possible(self) -> SettingsRecord:
        if -(-self.n // self.shard_size) > MAX_SHARDS:
            raise ValueError(f"{self.n:,} pairs in shards of {self.shard_size}: more than {MAX_SHARDS:,} files")
        if isinstance(self.cfg, tuple) and self.cfg[0] >= self.cfg[1]:
            raise ValueError(f"cfg: {list(self.cfg)} is no range")
        return self


class PairTeacherRecord(Record):
    name: str
    sha256: str
    licence: str = "unstated"


class ComputeRecord(Record):
    """How the teacher was run."""

    batch: Count
    threads: Annotated[int, Field(ge=1, le=4096)]
    device: str
    torch: str
    processor: str
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    channels_last: bool = False
    compile: Literal["none", "default", "graphs"] = "none"


class PromptsRecord(Record):
    path: str
    sha256: str
    count: Annotated[int, Field(ge=1, le=2**27)]


class ShardRecord(Record):
    file: Annotated[str, Field(pattern=r"^shard-\d{5,}\.safetensors$")]
    start: Annotated[int, Field(ge=0, le=MAX_SEED)]
    n: Count
    bytes: Annotated[int, Field(ge=0)]
    sha256: Sha256
    noise_sha256: Sha256


class Manifest(Record):
    """The whole manifest. Nothing that is not named is allowed at its top: a key whose name has changed is missed, not
    overlooked."""

    model_config = ConfigDict(extra="forbid")

    format: Literal["d2o-pairs"]
    version: Literal[1]
    d2o: str
    settings: SettingsRecord
    teacher: PairTeacherRecord
    spec: SpecRecord
    compute: ComputeRecord
    noise_probe: Annotated[list[Finite], Field(max_length=8)]
    shards: Annotated[list[ShardRecord], Field(max_length=MAX_SHARDS)]
    prompts: PromptsRecord | None = None

    @model_validator(mode="after")
    def _holds_what_it_says(self) -> Manifest:
        values = math.prod(self.spec.shape)
        if len(self.noise_probe) != min(8, values):
            raise ValueError(f"noise_probe: expected {min(8, values)} numbers, got {len(self.noise_probe)}")
        if (self.spec.condition == "text") != (self.prompts is not None):
            raise ValueError(
                f"prompts: a teacher of condition {self.spec.condition!r} {'has' if self.prompts is None else 'has no'}"
                " prompts"
            )
        if len({shard.file for shard in self.shards}) != len(self.shards):
            raise ValueError("shards: a file is listed twice")
        for shard in self.shards:
            number = int(shard.file[6:].split(".")[0])
            if shard.start != number * self.settings.shard_size or shard.n > min(
                self.settings.shard_size, self.settings.n - shard.start
            ):
                raise ValueError(
                    f"shards: {shard.file} with pairs {shard.start:,} to {shard.start + shard.n - 1:,} is no shard of"
                    " this store"
                )
            if shard.bytes < (least := shard.n * values * DTYPE_BYTES[self.settings.dtype]):
                raise ValueError(
                    f"shards: {shard.file} of {shard.bytes:,} bytes cannot hold {shard.n:,} pairs, which take {least:,}"
                )
        return self


def check_manifest(manifest: JsonObject, where: str) -> None:
    """UserError, naming `where` and the key: the manifest of a pair store is not as d2o writes it."""
    check_record(Manifest, manifest, f"{where} is damaged", "move it away and make the store again, or copy it again")
