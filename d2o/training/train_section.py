"""How a recipe trains: the keys at its top that the loop reads, and their sections."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from d2o.settings.section import BatchSize, Count, Section, Threads, field
from d2o.training.checkpoint_section import CheckpointSection
from d2o.training.ema_section import EmaSection
from d2o.training.eval_section import EvalSection
from d2o.training.optim_section import OptimSection
from d2o.training.preview_section import PreviewSection
from d2o.training.tracker_section import NamedTracker


class TrainSection(Section):
    """The part of a recipe that is training's own."""

    optim: OptimSection = field(..., "optimiser")
    optim_critic: OptimSection | None = field(
        None, "second optimiser, of methods with two players (default none: as optim)"
    )
    optim_critics: dict[str, OptimSection] = field(
        {},
        "optimisers of networks by name, for methods with several critics or where their rates differ (default: none;"
        " optim of the product, optim_critic of the others)",
    )
    strategy: Literal["replicate", "shard"] = field(
        "replicate",
        "of several processes: each holds all trained networks, or its share of every one (FSDP): weights, gradients,"
        " moments and average",
    )
    ema: EmaSection = Field(EmaSection(), description="moving average of the weights (default: no average)")
    batch: BatchSize = field(..., "images per iteration, all processes together")
    micro_batch: BatchSize | None = field(
        None, "images per process and forward pass (default none: as large as the share of the batch)"
    )
    images: Count = field(..., "length of training in images")
    precision: Literal["fp32", "bf16", "fp16", "auto"] = field(
        "fp32",
        "fp32; bf16 autocast; fp16 autocast with dynamic loss scaling; auto: bf16 where the processor computes in it."
        " The run's recipe.yaml says what was chosen",
    )
    channels_last: bool | Literal["auto"] = field(
        "auto",
        "keep images and weights in channels-last memory order; auto: where that is faster. The run's recipe.yaml says"
        " what was chosen",
    )
    checkpointing: bool = field(
        False, "recompute activations in the backward pass instead of keeping them: less memory, a third more computing"
    )
    compile: bool = field(False, "compile the networks (torch.compile)")
    bad_gradients: Literal["raise", "skip", "zero"] = field(
        "raise", "infinite or undefined gradients: stop, skip the iteration, or zero them; counted"
    )
    threads: Threads | Literal["auto"] | None = field(
        None,
        "CPU threads of torch; auto: a few iterations are measured with one and with all, the faster is kept, and the"
        " run's recipe.yaml says which (default none: torch's choice)",
    )
    log_every: Count = field(20, "iterations between two lines of metrics.jsonl")
    eval: EvalSection | None = field(None, "metric measured on the way")
    tracker: NamedTracker | None = field(
        None, "where the log goes besides metrics.jsonl and TensorBoard: wandb or mlflow, or a section"
    )
    preview: PreviewSection | None = field(None, "grids of samples on the way")
    checkpoint: CheckpointSection = Field(CheckpointSection(), description="what is kept on the way")

    @property
    def eight_bit(self) -> bool:
        """Whether an optimiser keeps its moments in eight bits."""
        given = (self.optim, self.optim_critic, *self.optim_critics.values())
        return "8bit" in [section.state for section in given if section is not None]

    @field_validator("micro_batch")
    @classmethod
    def _part_of_batch(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and value > info.data.get("batch", value):
            raise ValueError(f"expected at most batch = {info.data['batch']}, got {value}")
        return value
