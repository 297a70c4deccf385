"""What methods tell of their iterations (losses, norms), between two lines of the log."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from d2o.training import distributed
from d2o.training.divergence import BAD

ScalarRow = dict[str, float]


class Scalars:
    """One row of scalars an iteration. They stay on the device until `rows` is called: what is logged waits for
    nothing."""

    def __init__(self, device: torch.device, world: int):
        self.device, self.world = device, world
        self.kept: list[Mapping[str, Tensor]] = []

    def add(self, row: Mapping[str, Tensor]) -> None:
        self.kept.append(row)

    def clear(self) -> None:
        self.kept = []

    def restore(self, rows: Iterable[Iterable[tuple[str, float]] | ScalarRow]) -> None:
        """Undo `rows` (each may be pairs), for a resumed run whose next line begins before it was stopped."""
        self.kept = [{key: torch.tensor(value, device=self.device) for key, value in dict(row).items()} for row in rows]

    def rows(self) -> list[ScalarRow]:
        """Those of each iteration, means over the processes, which all have to call this. Waits for the device."""
        rows: list[ScalarRow] = [{} for _ in self.kept]
        for key in dict.fromkeys(key for row in self.kept for key in row):
            having = [i for i, row in enumerate(self.kept) if key in row]
            values = torch.stack([self.kept[i][key].float() for i in having])
            for i, value in zip(having, distributed.mean_over_processes(values, self.world).tolist(), strict=True):
                rows[i][key] = value
        return rows


def means(rows: Sequence[ScalarRow]) -> ScalarRow:
    """Mean of each scalar over the iterations that have it (lazy regularisation leaves some out)."""
    found = {}
    for key in dict.fromkeys(key for row in rows for key in row if key != BAD):
        numbers = [row[key] for row in rows if key in row]
        found[key] = sum(numbers) / len(numbers)
    return found
