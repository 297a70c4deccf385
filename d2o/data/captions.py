"""Captions for images that have only class labels: a name of the class in one of several sentences."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from d2o.errors import UserError

NUMERALS = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
    "twenty",
)


def class_names(names: Sequence[str]) -> list[list[str]]:
    """What to call each class, the main name first: "7" -> seven, 7; "golden_retriever" -> golden retriever."""
    called = []
    for name in names:
        if name.isascii() and name.isdigit() and int(name) < len(NUMERALS):
            called.append([NUMERALS[int(name)], str(int(name))])
        else:
            called.append([" ".join(name.replace("_", " ").split()).lower()])
    return called


class Captions:
    """Every caption of every class, as a table, and the choice among them.

    `table[c]` has the captions of class c, the same number for each: `templates` with `{name}` filled in by the class's
    names; the first is the
    main one. UserError: no template, or one without `{name}`.
    """

    def __init__(self, names: Sequence[Sequence[str]], templates: Sequence[str]):
        if not templates:
            raise UserError("captions: no template given", "such as: a photo of {name}")
        for template in templates:
            if template.count("{name}") != 1 or template.replace("{name}", "").count("{"):
                raise UserError(f"caption template {template!r}: expected {{name}} in it, once, and no other braces")
        most = max(len(called) for called in names)
        padded = [[called[i % len(called)] for i in range(most)] for called in names]
        self.table = [
            [template.replace("{name}", name) for template in templates for name in called] for called in padded
        ]

    def main(self, label: int) -> str:
        """The caption that stands for a class wherever one is needed: in previews and metrics."""
        return self.table[label][0]

    def choose(self, u: Tensor, main: float) -> Tensor:
        """Which caption, int64 in the shape of `u`, from uniform numbers in [0, 1): the first with probability `main`,
        else any of the others with equal probability."""
        others = len(self.table[0]) - 1
        if others == 0:
            return torch.zeros_like(u, dtype=torch.int64)
        rest = ((u - main) / max(1 - main, 1e-12) * others).floor().clamp(0, others - 1).to(torch.int64) + 1
        return torch.where(u < main, 0, rest)

    @property
    def all(self) -> list[str]:
        """Class by class."""
        return [caption for row in self.table for caption in row]
