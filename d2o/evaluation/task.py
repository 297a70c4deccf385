"""What is measured of one X, and what that takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from d2o.evaluation.extractor import Extractor
from d2o.evaluation.known_metrics import Want
from d2o.evaluation.passes import Outputs
from d2o.evaluation.subjects import Generator
from d2o.evaluation.tools import Tools


@dataclass
class Task:
    """What is measured of one X. `main`: the extractor of metrics that name none, of accuracy and of the distance to
    the teacher (None: X is statistics). `teacher`: measured against, from equal noise where it is `paired`, that is
    takes the same conditions. `neighbours`: of each shown sample among the reference's images.
    """

    wants: Sequence[Want]
    main: Extractor | None
    tools: Tools
    teacher: Generator | None = None
    paired: bool = True
    distance: bool = True
    latency: bool = False
    neighbours: int = 0
    grid: bool = True
    notes: list[str] = field(default_factory=list)

    def extractor(self, want: Want) -> Extractor | None:
        """The extractor of a metric; None for one that needs none."""
        if not want.metric.output:
            return None
        return self.tools.extractor(want.extractor) if want.extractor else self.main

    def outputs(self, *references: str) -> Outputs:
        """What metrics whose `reference` is one of these need of the images (all metrics of the main pass, if none is
        named)."""
        found: Outputs = {}
        for want in self.wants:
            extractor = self.extractor(want)
            if extractor is None or (
                want.metric.reference not in references
                if references
                else want.metric.reference in ("diversity", "pair")
            ):
                continue
            found.setdefault(extractor.name, (extractor, set()))[1].add(want.metric.output)
        return found


def reference_outputs(plan: Task) -> tuple[Outputs, bool]:
    """What is needed of the reference, and whether of every image (else statistics are enough)."""
    outputs = plan.outputs("statistics", "rows")
    if plan.neighbours and plan.main is not None:
        outputs.setdefault(plan.main.name, (plan.main, set()))[1].add("features")
    return outputs, bool(plan.neighbours) or any(want.metric.reference == "rows" for want in plan.wants)
