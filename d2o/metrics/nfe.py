"""Network evaluations as papers count them: pairs, training, and both (Kang et al. 2024, Tables 6 and A1).

A guided evaluation counts once; R1 and mismatched rows count nothing; backward passes are not counted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from d2o.errors import UserError, unknown

PER_SAMPLE = {
    "regression": 1,  # the student
    "adversarial": 5,  # critic's step: student, critic of real, critic of fake; student's step: student, critic of fake
    "adversarial_reuse": 4,  # the same, but that the student makes one sample for both steps
    "consistency": 4,  # as Table 6 counts consistency distillation: the teacher's Heun step (2), student, target
}
"""Phase of training -> evaluations of one sample of the batch in one iteration."""
STUDENT_PASSES = {"regression": 1, "adversarial": 2, "adversarial_reuse": 1}
"""How many of these are the student's, which takes several calls each if it has several steps."""


@dataclass(frozen=True)
class Phase:
    """Iterations of one kind, one of `PER_SAMPLE`, with that batch, of a student of so many calls. UserError: another
    kind; several calls where papers count none."""

    kind: str
    batch: int
    iterations: int
    calls: int = 1

    def __post_init__(self) -> None:
        if self.kind not in PER_SAMPLE:
            raise unknown("phase of training", self.kind, PER_SAMPLE)
        if self.calls != 1 and self.kind not in STUDENT_PASSES:
            raise UserError(f"phase of training {self.kind}: counted for students of one call")

    @property
    def nfe(self) -> int:
        further = (self.calls - 1) * STUDENT_PASSES.get(self.kind, 0)
        return (PER_SAMPLE[self.kind] + further) * self.batch * self.iterations


def training_nfe(phases: Iterable[Phase]) -> int:
    """B_1 N_1 + 5 B_2 N_2 for a first stage of regression and a second with a critic."""
    return sum(phase.nfe for phase in phases)


def total_nfe(phases: Iterable[Phase], pairs: int, per_pair: int) -> int:
    """Training and its pairs together, as Table 6 has it. `per_pair`: evaluations of one pair (`Solver.nfe`)."""
    return training_nfe(phases) + pairs * per_pair
