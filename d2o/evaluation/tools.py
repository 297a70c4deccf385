"""The networks of an evaluation, each loaded once: extractors, CLIP, perceptual distances, with the weights files that
the user named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from d2o.errors import UserError, unknown
from d2o.evaluation.clip_scorer import ClipScore
from d2o.evaluation.extractor import Device, Extractor
from d2o.evaluation.named_extractors import EXTRACTORS, load_extractor
from d2o.evaluation.pair_distances import PAIR_DISTANCES, PairDistance, load_pair_distance

T = TypeVar("T")


class Tools:
    """`weights`: the `--weights` options, `NAME=PATH` each; a lone PATH is for the one network that takes a file."""

    def __init__(self, weights: Sequence[str] = (), device: Device = "cpu"):
        self.device = device
        self.alone: Path | None = None
        self.files: dict[str, Path] = {}
        for text in weights:
            name, equals, path = text.partition("=")
            if not equals:
                if self.alone is not None:
                    raise UserError(
                        f"--weights {text}: for which network?", "with several files say --weights NAME=PATH"
                    )
                self.alone = Path(text)
            elif name not in EXTRACTORS and name not in PAIR_DISTANCES:
                raise unknown("network (--weights NAME=PATH)", name, [*EXTRACTORS, *PAIR_DISTANCES])
            else:
                self.files[name] = Path(path)
        self._loaded: dict[tuple[str, str], Any] = {}
        self._alone_for: str | None = None

    def extractor(self, name: str) -> Extractor:
        return self._once("extractor", name, lambda path: load_extractor(name, self.device, path))

    def clip(self, name: str) -> ClipScore:
        return self._once("clip", name, lambda path: ClipScore(name, path, self.device))

    def pair_distance(self, name: str) -> PairDistance:
        return self._once("pair", name, lambda path: load_pair_distance(name, path, self.device))

    def _once(self, kind: str, name: str, load: Callable[[Path | None], T]) -> T:
        if (kind, name) not in self._loaded:
            self._loaded[kind, name] = load(self._file(name))
        return self._loaded[kind, name]

    def _file(self, name: str) -> Path | None:
        if name in self.files:
            return self.files[name]
        family = name.partition("-")[0]  # one file serves inception-clean and inception
        if family in self.files:
            return self.files[family]
        if self.alone is None or name == "digits":
            return None
        if self._alone_for not in (None, family):
            raise UserError(
                f"--weights {self.alone} was taken for {self._alone_for}; {name} needs its own",
                "say --weights NAME=PATH for each",
            )
        self._alone_for = family
        return self.alone
