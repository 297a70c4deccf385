"""Refuse, before hours of work, what cannot be measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from d2o.data.draws import label_mode
from d2o.errors import UserError
from d2o.evaluation.protocol import Settings
from d2o.evaluation.reference import Reference
from d2o.evaluation.sides import Given
from d2o.evaluation.subjects import Generator, Numbers, Pictures, Subject, check_subject
from d2o.evaluation.task import Task


def check_task(x: Subject, reference: Reference | None, plan: Task, settings: Settings) -> None:
    """UserError, before hours of work, for a metric that cannot be had of x: no prompts, no teacher, the statistics of
    another extractor, a network that is not here. `reference` may be opened only."""
    if isinstance(x, Generator) and x.spec.condition != "text":
        if settings.prompts is not None:
            raise UserError(f"{x.source} takes no prompts", "leave --prompt and --prompts away")
        label_mode(settings.labels, x.spec.classes, x.spec.name)
    for want in plan.wants:
        name, kind, extractor = want.metric.name, want.metric.reference, plan.extractor(want)
        if kind == "answers":
            raise UserError(
                f"metric {name} is of a network that judges images; {x.source} is none",
                "X is a run of method latent-classifier or latent-lpips, or a distance by name (lpips-vgg)",
            )
        if want.metric.output and extractor is None:
            raise UserError(
                f"metric {name}: {x.source} doesn't say which extractor made it", "name it with --extractor"
            )
        if (
            name in ("clip-score", "prompt-accuracy")
            and (x.captions if isinstance(x, Pictures) else x.prompts if isinstance(x, Generator) else None) is None
        ):
            raise UserError(
                f"metric {name} needs prompts; {x.source} has none",
                "it is for what is made from text: give --prompts FILE",
            )
        if kind == "diversity" and (not isinstance(x, Generator) or x.prompts is None):
            raise UserError(
                f"metric {name} compares images of one prompt; {x.source} takes no prompts",
                "it is for generators that take text",
            )
        if want.needs_teacher and (plan.teacher is None or not isinstance(x, Generator)):
            raise UserError(
                f"metric {name} compares with the teacher's images of equal noise; {x.source} has no teacher here",
                "name it with --teacher" if isinstance(x, Generator) else "it is for students and teachers",
            )
        if name.startswith("latent-") and isinstance(x, Generator) and not x.spec.latent:
            raise UserError(f"metric {name} compares latents; {x.source} works in pixels", "take lpips")
        if kind == "rows" and not isinstance(x, Numbers):
            counts = [
                settings.n if isinstance(x, Generator) else x.n,
                *([reference.n] if reference and reference.n else []),
            ]
            with told(name):
                check_counts(name, min(counts), settings)
        if kind in ("statistics", "rows") and extractor is not None:
            if reference is None:
                raise UserError(f"metric {name} needs a reference", "give --against REF")
            with told(name):
                if isinstance(x, Generator | Pictures):
                    check_subject(x, extractor)
                sides = [reference.measured] + ([Given(x.source, x.read)] if isinstance(x, Numbers) else [])
                for side in sides:
                    if isinstance(side, Given):
                        (side.statistics if kind == "statistics" else side.column)(extractor, want.metric.output)
        if isinstance(x, Numbers) and kind not in ("statistics", "rows"):
            raise UserError(f"metric {name} needs images; {x.source} is statistics")
        if name == "clip-score":
            plan.tools.clip(settings.clip_model)
        elif kind == "pair" and name != "dreamsim":
            plan.tools.pair_distance(name)
    if (
        plan.neighbours
        and reference is not None
        and not (isinstance(reference.subject, Pictures) and not isinstance(reference.measured, Given))
    ):
        raise UserError(
            f"nearest neighbours are looked for among images; {reference.name} holds none (kind: {reference.kind})",
            "give the training images with --against, or leave --neighbours away",
        )


def check_counts(name: str, n: int, settings: Settings) -> None:
    """UserError if the smaller of both sets, of n images, is too small for the metric's options."""
    if name == "kid" and settings.kid_size > n:
        raise UserError(
            f"a subset has {settings.kid_size} images, the smaller set {n}",
            f"give --kid-size {n} or less, or more images",
        )
    needs = {"pr": settings.pr_k, "dc": settings.dc_k, "prdc": max(settings.pr_k, settings.dc_k)}
    if n <= needs.get(name, 0):
        what = f"{needs[name]} neighbours need more than {needs[name]} images, the smaller set has {n}"
        raise UserError(what, "give more images, or fewer neighbours")


@contextmanager
def told(name: str) -> Iterator[None]:
    """Say which metric a mistake is about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"metric {name}: {error.message}", error.hint) from error
