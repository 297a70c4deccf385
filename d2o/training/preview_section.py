"""`preview:` of a recipe, read by `loop`."""

from __future__ import annotations

from d2o.settings.section import Count, ImageCount, Section, field


class PreviewSection(Section):
    """Grids of samples from the same noises every time."""

    every: Count = field(..., "images between two grids")
    n: ImageCount = field(64, "samples in a grid")
