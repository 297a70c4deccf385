"""Each metric of one run of X, from the two sides that are compared."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from d2o.errors import UserError
from d2o.evaluation.extractor import Extractor
from d2o.evaluation.protocol import Settings
from d2o.evaluation.sides import Measured, Side
from d2o.inputs import JsonObject
from d2o.metrics.frechet import TRACE_METHOD


@dataclass
class Score:
    """A number, `n` generated images behind it, and (`error` says of what: "subsets", "splits", "bootstrap") its
    deviation. `more`: what else a result says of it."""

    value: float
    n: int | None = None
    std: float | None = None
    error: str | None = None
    more: JsonObject = field(default_factory=dict)


@dataclass
class Sides:
    """What a metric is computed from: a run of X, the reference, the extractor whose `output` is compared. `key`: of
    the metric."""

    x: Side
    reference: Side | None
    extractor: Extractor | None
    output: str
    key: str

    @property
    def network(self) -> Extractor:
        assert self.extractor is not None
        return self.extractor

    @property
    def other(self) -> Side:
        assert self.reference is not None
        return self.reference

    @property
    def run(self) -> Measured:
        if not isinstance(self.x, Measured):
            raise UserError(f"{self.key} needs images; X is statistics")
        return self.x


def frechet(sides: Sides, settings: Settings) -> dict[str, Score]:
    """Section 4 of docs/evaluation.md. With `bootstrap` the deviation over resampled images, where they are known one
    by one."""
    ours, theirs = (side.statistics(sides.network, sides.output) for side in (sides.x, sides.other))
    more = {"trace": TRACE_METHOD, "small_n": ours.rank_deficient or theirs.rank_deficient}
    score = Score(ours.distance(theirs), ours.n, more=more)
    if settings.bootstrap and isinstance(sides.x, Measured):
        from d2o.metrics.bootstrap import bootstrap_frechet

        features = sides.x.column(sides.network, sides.output)
        score.std, low, high = bootstrap_frechet(features, theirs.mu, theirs.sigma, settings.bootstrap, settings.seed)
        score.error = "bootstrap"
        score.more["interval"] = [low, high]
    return {sides.key: score}


def frechet_by_class(sides: Sides, settings: Settings) -> dict[str, Score]:
    """The Fréchet distance within each class that both sides have, where there are more images than features; the mean
    over these classes."""
    from d2o.metrics.frechet import Moments, frechet_distance

    x, other = sides.run, sides.other
    if not isinstance(other, Measured) or x.labels is None or other.labels is None:
        raise UserError(
            f"{sides.key} needs labelled images on both sides",
            "leave the metric away, or give a reference with one folder per class",
        )
    ours, theirs = (side.column(sides.network, sides.output) for side in (x, other))
    values, dim = {}, ours.shape[1]
    for c in sorted(set(x.labels.tolist()) & set(other.labels.tolist()) - {-1}):
        parts = []
        for features, labels in ((ours, x.labels), (theirs, other.labels)):
            stream = Moments(dim)
            stream.update(features[labels == c])
            parts.append(stream)
        if min(part.n for part in parts) > dim:
            values[str(c)] = frechet_distance(parts[0].mean, parts[0].cov, parts[1].mean, parts[1].cov)
    if not values:
        raise UserError(
            f"{sides.key}: no class has more than {dim} images (the number of features) on both sides",
            "raise --n, or leave it away",
        )
    return {
        sides.key: Score(sum(values.values()) / len(values), x.n, more={"per_class": values, "classes": len(values)})
    }


def kernel(sides: Sides, settings: Settings) -> dict[str, Score]:
    from d2o.metrics.kid import kid

    ours, theirs = (side.column(sides.network, sides.output) for side in (sides.x, sides.other))
    found = kid(ours, theirs, settings.kid_subsets, settings.kid_size)
    return {
        sides.key: Score(
            found.mean, len(ours), found.std, "subsets", {"subsets": found.subsets, "subset_size": found.size}
        )
    }


def inception(sides: Sides, settings: Settings) -> dict[str, Score]:
    from d2o.metrics.inception_score import inception_score

    logits = sides.run.column(sides.network, "logits")
    found = inception_score(logits, settings.is_splits, settings.is_mode)
    return {
        sides.key: Score(
            found.mean,
            len(logits),
            found.std,
            "splits" if found.std is not None else None,
            {"splits": found.splits, "mode": settings.is_mode},
        )
    }


def prdc(sides: Sides, settings: Settings) -> dict[str, Score]:
    from d2o.metrics.prdc import manifold

    ours, theirs = (side.column(sides.network, sides.output) for side in (sides.x, sides.other))
    found = manifold(theirs, ours, settings.pr_k, settings.dc_k, dtype=settings.pr_dtype)
    pr = {"k": settings.pr_k, "n_ref": len(theirs), "dtype": settings.pr_dtype, "inside": "<="}
    dc = {"k": settings.dc_k, "n_ref": len(theirs), "dtype": settings.pr_dtype, "inside": "<"}
    values = {
        "precision": (found.precision, pr),
        "recall": (found.recall, pr),
        "density": (found.density, dc),
        "coverage": (found.coverage, dc),
    }
    return {key: Score(value, len(ours), more=dict(more)) for key, (value, more) in values.items()}


def _precision_recall(sides: Sides, settings: Settings) -> dict[str, Score]:
    from d2o.metrics import prdc as distances

    ours, theirs = (side.column(sides.network, sides.output) for side in (sides.x, sides.other))
    precision, recall = distances.precision_recall(theirs, ours, settings.pr_k, dtype=settings.pr_dtype)
    more = {"k": settings.pr_k, "n_ref": len(theirs), "dtype": settings.pr_dtype, "inside": "<="}
    return {
        "precision": Score(precision, len(ours), more=dict(more)),
        "recall": Score(recall, len(ours), more=dict(more)),
    }


def _density_coverage(sides: Sides, settings: Settings) -> dict[str, Score]:
    from d2o.metrics import prdc as distances

    ours, theirs = (side.column(sides.network, sides.output) for side in (sides.x, sides.other))
    density, coverage = distances.density_coverage(theirs, ours, settings.dc_k, dtype=settings.pr_dtype)
    more = {"k": settings.dc_k, "n_ref": len(theirs), "dtype": settings.pr_dtype, "inside": "<"}
    return {
        "density": Score(density, len(ours), more=dict(more)),
        "coverage": Score(coverage, len(ours), more=dict(more)),
    }


def mean_score(values: torch.Tensor, settings: Settings, **more: object) -> Score:
    """The mean of one value an image, in float64, with the error of that mean if it was asked for."""
    score = Score(float(values.double().mean()), len(values), more=more)
    if settings.bootstrap:
        from d2o.metrics.bootstrap import bootstrap_mean

        score.std, low, high = bootstrap_mean(values, settings.bootstrap, settings.seed)
        score.error = "bootstrap"
        score.more["interval"] = [low, high]
    return score


def _clip_score(sides: Sides, settings: Settings) -> dict[str, Score]:
    return {sides.key: mean_score(sides.run.columns.column("clip-score"), settings, model=settings.clip_model)}


def paired(sides: Sides, settings: Settings) -> dict[str, Score]:
    """The mean of what was measured between an image and the teacher's of equal noise."""
    return {sides.key: mean_score(sides.run.columns.column(f"pair/{sides.key}"), settings)}


def _dream_diversity(sides: Sides, settings: Settings) -> dict[str, Score]:
    from d2o.metrics.diversity import dream_diversity as diversity

    embeddings = sides.run.column(sides.network, sides.output)
    mean, std = diversity(embeddings, settings.per_prompt)
    prompts = len(embeddings) // settings.per_prompt
    return {
        sides.key: Score(
            mean, prompts, more={"per_prompt": settings.per_prompt, "images": len(embeddings), "std_of_prompts": std}
        )
    }


def prompt_accuracy(sides: Sides, settings: Settings) -> dict[str, Score]:
    """Of the images whose prompt names a digit (`PromptProbe`), the share in which the extractor sees it."""
    asked = sides.run.columns.column("prompt-class")
    known = asked >= 0
    if not bool(known.any()):
        raise UserError(f"{sides.key}: no prompt names a digit", 'it is for prompts such as "a handwritten seven"')
    seen = sides.run.column(sides.network, "logits").argmax(1)
    return {sides.key: mean_score((seen == asked)[known].float(), settings, percent=True)}


def of_a_judge(sides: Sides, settings: Settings) -> dict[str, Score]:
    """Stands for `d2o.evaluation.judges`, whose X makes no images."""
    raise UserError(f"{sides.key} is of a network that judges images, not of images")
