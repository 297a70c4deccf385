"""The content of a pair store's shards: a teacher's outputs for the noises and conditions of their seeds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from d2o.condition import Condition
from d2o.data.draws import draw_scales, draw_some
from d2o.data.images import to_uint8
from d2o.data.pair_files import ShardContent
from d2o.data.pair_settings import DTYPES, PairSettings
from d2o.data.pair_tools import ShardProgress
from d2o.data.prompts import Prompts
from d2o.diffusion.noise import StepNoise
from d2o.errors import UserError
from d2o.runtime import StopFlag
from d2o.teachers.base import Teacher
from d2o.work.folder import Ahead, Unit


class Maker:
    """Makes the content of one shard."""

    def __init__(
        self,
        settings: PairSettings,
        teacher: Teacher,
        batch: int,
        prompts: Prompts | None,
        progress: ShardProgress,
        stop: StopFlag | None,
        begun: Callable[[Unit], dict[str, Tensor]] = lambda unit: {},
    ):
        self.settings, self.teacher, self.batch, self.prompts, self.progress, self.stop = (
            settings,
            teacher,
            batch,
            prompts,
            progress,
            stop,
        )
        self.begun = begun
        self.solver, self.shown = settings.ode, 0

    def make(self, unit: Unit, before: int) -> ShardContent | None:
        """None when `stop` was seen. `before`: pairs that exist already."""
        settings, shape = self.settings, self.teacher.spec.shape
        target = torch.empty(unit.n, *shape, dtype=DTYPES[settings.dtype])
        noises, conditions, images = [], [], []
        cuts = [(first, min(self.batch, unit.n - first)) for first in range(0, unit.n, self.batch)]
        # A compiled network is given batches of one size only: it would be compiled anew for another, with other last
        # bits.
        size = self.batch if self.teacher.call is not self.teacher.network else 1
        old = self.begun(unit)
        # Of a shard that was shorter, whole batches are taken over: pairs of the last one were made beside fewer
        # others, with other last bits.
        kept = len(old["target"]) // self.batch * self.batch if old else 0
        for (first, count), drawn in zip(
            cuts, Ahead(lambda cut: self.draw(unit.start + cut[0], max(cut[1], size)), cuts)
        ):
            if self.stop:
                return None
            part = slice(first, first + count)
            if part.stop <= kept:
                target[part] = old["target"][part]
                images += [old["image"][part]] if settings.decode else []
            else:
                scales = drawn.condition.guidance
                cfg = settings.cfg if scales is None else scales.to(self.teacher.device)
                assert not isinstance(cfg, tuple)
                x = self.teacher.sample(drawn.start, drawn.condition, self.solver, cfg=cfg, randn=drawn.steps)[:count]
                target[part] = x.cpu()
                check_finite(
                    target[part], settings.seed + unit.start + first, f"teacher {settings.teacher}", settings.dtype
                )
                if settings.decode:
                    with torch.inference_mode():
                        images.append(to_uint8(self.teacher.decode(x)).cpu())
            drawn = drawn.first(count)
            noises.append(drawn.noise)
            conditions.append(drawn.condition)
            self.shown = before + first + count
            self.progress(self.shown, settings.n, "")
        return ShardContent(
            torch.cat(noises),
            target,
            Condition.join(conditions),
            torch.cat(images) if images else None,
        )

    def draw(self, start: int, n: int) -> Drawn:
        """What pairs start .. start + n - 1 are made from; beyond the last pair it is drawn again."""
        settings, spec = self.settings, self.teacher.spec
        mine = [min(i, settings.n - 1) for i in range(start, start + n)]
        sources = [int(settings.sources(i, 1)[0]) for i in mine]
        begin, labels = draw_some(settings.seed, sources, spec.shape, spec.classes, settings.labels)
        noise = begin if settings.rewire == "none" else draw_some(settings.seed, mine, spec.shape, 0, "none")[0]
        condition = Condition.none(n) if labels is None else Condition.of_labels(labels)
        if self.prompts is not None:
            texts = self.prompts.many([int(settings.prompt_numbers(i, 1, len(self.prompts))[0]) for i in sources])
            condition = Condition.of_prompts(texts)
        if isinstance(settings.cfg, tuple):
            condition = condition.guided(draw_scales([settings.seed + i for i in sources], settings.cfg))
        drawn_classes = spec.classes if settings.labels == "random" else 0
        steps = (
            StepNoise([settings.seed + i for i in sources], spec.shape, drawn_classes)
            if self.solver.stochastic
            else None
        )
        return Drawn(noise, begin, condition, steps)


@dataclass
class Drawn:
    """`noise` is what the pairs say they began with, `start` what the teacher begins with: another where pairs are
    rewired."""

    noise: Tensor
    start: Tensor
    condition: Condition
    steps: StepNoise | None

    def first(self, n: int) -> Drawn:
        return Drawn(self.noise[:n], self.start[:n], self.condition[:n], self.steps)


def check_finite(x: Tensor, seed: int, source: str, dtype: str = "fp32") -> None:
    """UserError that names the seed of the first sample of x [k, ...] with a value that is not a number or infinite."""
    bad = ~torch.isfinite(x).flatten(1).all(1)
    if bad.any():
        hint = "the weights may be damaged" + ("" if dtype == "fp32" else f", or {dtype} too narrow: try --dtype fp32")
        raise UserError(f"{source} gives values that are not finite for seed {seed + int(bad.nonzero()[0])}", hint)
