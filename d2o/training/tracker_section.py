"""`tracker:` of a recipe, read by `tracker`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator

from d2o.settings.section import NonEmpty, Section, field
from d2o.settings.wording import show


class TrackerSection(Section):
    """Where the log goes besides metrics.jsonl and TensorBoard."""

    name: Literal["wandb", "mlflow"] = field(
        ..., "Weights & Biases (pip install 'd2o[wandb]') or MLflow (pip install 'd2o[mlflow]')"
    )
    project: NonEmpty = field("d2o", "project of wandb, experiment of MLflow")
    run: NonEmpty | None = field(None, "name of the run there (default none: the recipe's)")
    uri: NonEmpty | None = field(
        None, "server; of MLflow also sqlite:///FILE.db (default none: what the package's own settings say)"
    )


def _named(value: object) -> object:
    """`tracker: wandb` is short for `tracker: {name: wandb}`."""
    if isinstance(value, str) and value not in ("wandb", "mlflow"):
        raise ValueError(f"expected 'wandb', 'mlflow' or a section, got {show(value)}")
    return TrackerSection(name=value) if isinstance(value, str) else value  # type: ignore[arg-type]


NamedTracker = Annotated[TrackerSection, BeforeValidator(_named)]
