"""How far an exported file is from the network it was made from: the same inputs through both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from d2o.errors import UserError
from d2o.export.loaded import Loaded

Runner = Callable[[tuple[Tensor, ...]], Tensor]
"""An exported file, loaded back: inputs in the order of Loaded.inputs -> output."""


@dataclass(frozen=True)
class Parity:
    """`difference`: largest absolute difference over all outputs; `largest`: largest absolute value of the network's
    own output; `tolerance`: of the difference, for outputs of -1 to 1 (larger ones: in proportion); `unrounded`: the
    difference before the weights were rounded, where that was looked at."""

    difference: float
    largest: float
    batch_sizes: tuple[int, ...]
    tolerance: float
    runtime: str
    unrounded: float | None = None

    def __str__(self) -> str:
        sizes = " and ".join(str(n) for n in self.batch_sizes)
        against = f"largest output {self.largest:.2f}, tolerance {limit(self.tolerance, self.largest):.3g}"
        if self.unrounded is not None:
            against += f"; {self.unrounded:.1e} before its weights are rounded"
        return f"max abs difference {self.difference:.1e} ({against}) at batch size {sizes}; {self.runtime}"


def limit(tolerance: float, largest: float) -> float:
    """What a difference may be at most, of outputs up to `largest` in absolute value."""
    return tolerance * max(1.0, largest)


@torch.inference_mode()
def compare(
    source: Loaded,
    run: Runner,
    n: int,
    tolerance: float,
    runtime: str,
    expected: Callable[..., Tensor] | None = None,
) -> Parity:
    """Run both at batch sizes 1 and n; `expected` is what the file stands for (default `source.call`). UserError: the
    largest difference is above `tolerance` (of outputs of -1 to 1; in proportion of larger ones) or not a number."""
    call = expected or source.call
    difference = largest = 0.0
    sizes = (1, n) if n > 1 else (1,)
    for size in sizes:
        inputs = source.example(size)
        wanted = call(*inputs)
        try:
            found = run(inputs)
        except Exception as error:  # each runtime has its own kinds
            why = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"the exported file does not run at batch size {size}, so it is not kept: {why}") from error
        if found.shape != wanted.shape:
            raise UserError(
                f"the exported file gives {tuple(found.shape)}, the network {tuple(wanted.shape)}; the file is not kept"
            )
        worst = (found.to(torch.float32) - wanted).abs().max().item()
        difference = worst if worst != worst else max(difference, worst)  # a NaN stays
        largest = max(largest, wanted.abs().max().item())
        if not difference <= limit(tolerance, largest):
            found_text = f"the exported file differs from the network by {difference:.2e} at batch size {size}"
            raise UserError(
                f"{found_text}: above the tolerance {limit(tolerance, largest):.3g}; the file is not kept",
                "--tolerance sets what is accepted",
            )
    return Parity(difference, largest, sizes, tolerance, runtime)
