"""The two sides of a comparison: what is known of the features of a set of images, measured just now or read from a
file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property

from torch import Tensor

from d2o.errors import UserError
from d2o.evaluation.columns import Columns
from d2o.evaluation.extractor import Extractor
from d2o.evaluation.statistics import Statistics, check_same_features
from d2o.metrics.frechet import Moments

HOW = {"features": "features", "spatial": "spatial features", "logits": "class logits"}


class Side(ABC):
    """Features of one set of images. `n` is None where a file doesn't say. Answers are kept: several metrics ask for
    the same."""

    n: int | None

    def __init__(self) -> None:
        self._statistics: dict[tuple[str, str], Statistics] = {}

    def statistics(self, extractor: Extractor, output: str = "features") -> Statistics:
        """Mean and covariance of an output. UserError: of another extractor, or fewer than two images."""
        key = extractor.name, output
        if key not in self._statistics:
            self._statistics[key] = self._make_statistics(extractor, output)
        return self._statistics[key]

    @abstractmethod
    def _make_statistics(self, extractor: Extractor, output: str) -> Statistics: ...

    @abstractmethod
    def column(self, extractor: Extractor, output: str = "features") -> Tensor:
        """An output of every image [n, d] float32. UserError where only statistics are known."""


class Measured(Side):
    """`columns` of a pass. `resize`: what was done to the images beforehand, besides what the extractor does."""

    def __init__(self, columns: Columns, resize: str = "none"):
        super().__init__()
        self.columns, self.n, self.resize = columns, columns.n, resize

    def _make_statistics(self, extractor: Extractor, output: str) -> Statistics:
        name = f"{extractor.name}/{output}"
        stream: Moments | None = None
        for block in self.columns.blocks(name):
            stream = stream or Moments(block.shape[1])
            stream.update(block)
        assert stream is not None
        return Statistics.of(stream, extractor, prepared(self.resize, extractor))

    def column(self, extractor: Extractor, output: str = "features") -> Tensor:
        return self.columns.column(f"{extractor.name}/{output}")

    @cached_property
    def labels(self) -> Tensor | None:
        """Class indices [n], where any image has one."""
        if "labels" not in self.columns.names():
            return None
        labels = self.columns.column("labels")
        return labels if bool((labels >= 0).any()) else None


class Given(Side):
    """A file of statistics, read for the extractor that asks: some files hold those of several."""

    def __init__(self, source: str, read: Callable[[str | None], Statistics]):
        super().__init__()
        self.source, self._reader = source, read
        self._known: dict[str | None, Statistics] = {}
        self.n = self.read(None).n

    def read(self, name: str | None) -> Statistics:
        """What the file holds for that extractor, read once."""
        if name not in self._known:
            self._known[name] = self._reader(name)
        return self._known[name]

    def _make_statistics(self, extractor: Extractor, output: str) -> Statistics:
        found = self.read(extractor.name)
        if output == "spatial":
            if found.spatial is None:
                raise UserError(
                    f"{self.source} holds no spatial statistics (mu_s, sigma_s), which sFID needs",
                    "give images as the reference",
                )
            return found.spatial
        check_same_features(found, Statistics.none(extractor))
        return found

    def column(self, extractor: Extractor, output: str = "features") -> Tensor:
        found = self.read(extractor.name)
        if found.features is None or output != "features":
            raise UserError(
                f"{self.source} holds statistics, not the {HOW[output]} of single images, which this metric needs",
                "give images (folder, zip, tar, npz) as the reference",
            )
        check_same_features(found, Statistics.none(extractor))
        return found.features


class Batchwise(Measured):
    """One of ADM's evaluation batches: images whose file also says the statistics of a larger set, which are what FID
    and sFID compare with."""

    def __init__(self, columns: Columns, resize: str, given: Given):
        super().__init__(columns, resize)
        self.given = given

    def _make_statistics(self, extractor: Extractor, output: str) -> Statistics:
        return (
            self.given.statistics(extractor, output)
            if extractor.name == "inception"
            else super()._make_statistics(extractor, output)
        )


def prepared(resize: str, extractor: Extractor) -> str:
    """How images came to the network's size, in one word for results: what was done before, then what the extractor
    does."""
    steps = [step for step in (resize, extractor.resize) if step != "none"]
    return "+".join(steps) or "none"
