"""What a batch of samples is asked to be: nothing, class labels or prompts, and where a student is told it, the
guidance scale.

One value that travels whole through pairs, training batches, students, previews, sampling and evaluation. Only teachers
and students look into it: their `embed` makes of it what their network takes (`Embedded`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from d2o.errors import UserError

NO_CLASS = -1
"""The label of a sample that is of no class in particular."""
Kind = Literal["none", "labels", "prompts"]


@dataclass(frozen=True)
class Text:
    """Encoded prompts: `states` [B, L, D] of the text encoder, and `pooled` [B, P] for networks that take one vector
    per prompt as well."""

    states: Tensor
    pooled: Tensor | None = None

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, index: slice | Tensor) -> Text:
        return Text(self.states[index], None if self.pooled is None else self.pooled[index])

    def to(self, device: str | torch.device) -> Text:
        return Text(self.states.to(device), None if self.pooled is None else self.pooled.to(device))


Embedded = Tensor | Text | None
"""What a network takes of a condition: class indices [B] int64 (-1: no class), encoded prompts, or nothing."""


@dataclass(frozen=True)
class Guided:
    """What a network that is told the guidance scale takes: what it takes else, and the `scale` [B] float32."""

    embedded: Embedded
    scale: Tensor

    def __len__(self) -> int:
        return len(self.scale)

    def __getitem__(self, index: slice | Tensor) -> Guided:
        return Guided(None if self.embedded is None else self.embedded[index], self.scale[index])


Asked = Embedded | Guided
"""What students and critics take, of which some are told the guidance scale."""


@dataclass(frozen=True, eq=False)
class Condition:
    """Of `n` samples: `labels` [n] int64 (-1: no class), or `prompts`, or neither; with either `guidance` [n] float32,
    the guidance scale of each, for those who are told it. ValueError: both, or another number of them."""

    n: int
    labels: Tensor | None = None
    prompts: tuple[str, ...] | None = None
    guidance: Tensor | None = None

    def __post_init__(self) -> None:
        if self.labels is not None and self.prompts is not None:
            raise ValueError("a condition is of labels or of prompts, not of both")
        named = (("labels", self.labels), ("prompts", self.prompts), ("guidance scales", self.guidance))
        for name, values in named:
            if values is not None and len(values) != self.n:
                raise ValueError(f"{len(values)} {name} for {self.n} samples")

    @classmethod
    def none(cls, n: int) -> Condition:
        """Samples of which nothing is asked."""
        return cls(n)

    @classmethod
    def of_labels(cls, labels: Tensor | Sequence[int]) -> Condition:
        """Class indices [n]; -1 for no class in particular."""
        found = torch.as_tensor(labels, dtype=torch.int64)
        return cls(len(found), labels=found)

    @classmethod
    def of_prompts(cls, prompts: Sequence[str]) -> Condition:
        """Prompts; "" for none. UserError: a single str in place of a list, or something that is no str."""
        if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
            raise UserError("prompts must be a list of strings")
        return cls(len(prompts), prompts=tuple(prompts))

    @classmethod
    def join(cls, parts: Sequence[Condition]) -> Condition:
        """One after the other. ValueError: they are of different kinds, or some have guidance scales."""
        kinds = sorted({part.kind for part in parts})
        if len(kinds) > 1:
            raise ValueError(f"conditions of kinds {', '.join(kinds)} cannot be joined")
        scales = [part.guidance for part in parts if part.guidance is not None]
        if len(scales) not in (0, len(parts)):
            raise ValueError("conditions with and without guidance scales cannot be joined")
        labels = [part.labels for part in parts if part.labels is not None]
        prompts = [text for part in parts for text in part.prompts or ()]
        return cls(
            sum(part.n for part in parts),
            torch.cat(labels) if kinds == ["labels"] else None,
            tuple(prompts) if kinds == ["prompts"] else None,
            torch.cat(scales) if scales else None,
        )

    @property
    def kind(self) -> Kind:
        return "labels" if self.labels is not None else "prompts" if self.prompts is not None else "none"

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: slice | Tensor) -> Condition:
        """Those of a slice, or of an index tensor [k] int64."""
        rows = range(self.n)[index] if isinstance(index, slice) else index.tolist()
        return Condition(
            len(rows),
            None if self.labels is None else self.labels[index],
            None if self.prompts is None else tuple(self.prompts[i] for i in rows),
            None if self.guidance is None else self.guidance[index],
        )

    def to(self, device: str | torch.device, non_blocking: bool = False) -> Condition:
        """With its labels and guidance scales on that device."""
        labels, guidance = (
            None if values is None else values.to(device, non_blocking=non_blocking)
            for values in (self.labels, self.guidance)
        )
        return Condition(self.n, labels, self.prompts, guidance)

    def guided(self, scale: float | Tensor | None) -> Condition:
        """With this guidance scale, of all or [n] of each; None: without."""
        if scale is None:
            return Condition(self.n, self.labels, self.prompts)
        each = torch.as_tensor(scale, dtype=torch.float32)
        return Condition(self.n, self.labels, self.prompts, each.expand(self.n) if each.ndim == 0 else each)

    def repeat(self, k: int) -> Condition:
        """All of it k times, one after the other."""
        return Condition.join([self] * k) if k else self[:0]

    def empty(self) -> Condition:
        """The unconditional one of this kind and length: no class, or the empty prompt."""
        return Condition(
            self.n,
            None if self.labels is None else torch.full_like(self.labels, NO_CLASS),
            None if self.prompts is None else ("",) * self.n,
            self.guidance,
        )


def join_embedded(first: Embedded, second: Embedded) -> Embedded:
    """Two embedded conditions of one kind, one after the other."""
    if isinstance(first, Text):
        assert isinstance(second, Text)
        pooled = None
        if first.pooled is not None and second.pooled is not None:
            pooled = torch.cat([first.pooled, second.pooled])
        return Text(torch.cat([first.states, second.states]), pooled)
    if first is None:
        return None
    assert isinstance(second, Tensor)
    return torch.cat([first, second])


Generate = Callable[[Tensor, Condition], Tensor]
"""(noise [b, C, H, W], condition of b) -> [b, C, H, W] float32."""
