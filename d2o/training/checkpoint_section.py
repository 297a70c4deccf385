"""`checkpoint:` of a recipe, read by `saving`."""

from __future__ import annotations

from d2o.settings.section import Count, Section, field


class CheckpointSection(Section):
    """What is kept on the way; the last state is always saved at the end and when the run is stopped."""

    every: Count = field(50_000, "images between two checkpoints")
    keep: int = field(3, "number of numbered checkpoints kept; `last` and `best` are extra", ge=0)
