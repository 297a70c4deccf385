"""Limits of the numbers on the command line, so that a slip of the finger is refused at once and not by whichever
library meets it first."""

from __future__ import annotations

import math

import typer
from typer.core import TyperCommand

from d2o.errors import UserError

MOST = {
    "batch": 2**20,
    "chunk": 2**24,
    "shard_size": 2**24,
    "check_n": 2**16,
    "threads": 1024,
    "steps": 100_000,
    "repeats": 10_000,
    "bootstrap": 1_000_000,
    "kid_subsets": 1_000_000,
    "is_splits": 1_000_000,
    "neighbours": 1000,
}
"""Of the options of these names; all others have OTHERS."""
OTHERS = 2**32 - 1


class Command(TyperCommand):
    """A command whose numbers are looked at before it runs."""

    def invoke(self, ctx: typer.Context) -> object:  # type: ignore[override]
        for parameter in self.params:
            value, name = ctx.params.get(parameter.name or ""), (parameter.opts or [""])[0]
            if isinstance(value, int) and abs(value) > (most := MOST.get(parameter.name or "", OTHERS)):
                raise UserError(f"{name} {value}: the limit is {most:,}")
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{name} {value}: expected a finite number")
        return super().invoke(ctx)
