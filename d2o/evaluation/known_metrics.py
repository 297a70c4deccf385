"""The metrics by name: what each needs to know of the images, and how the numbers of a run become one."""

from __future__ import annotations

import statistics as stats
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from d2o.errors import UserError, unknown
from d2o.evaluation import measures
from d2o.evaluation.extractor import Extractor
from d2o.evaluation.labels import label
from d2o.evaluation.measures import Score, Sides
from d2o.evaluation.protocol import Settings
from d2o.inputs import JsonObject

LOWER, HIGHER = "lower", "higher"


@dataclass(frozen=True)
class Metric:
    """`extractor`: the one that it is defined over; None: the one chosen for X. `output`: what it needs of each image,
    and (`reference`) of
    the reference: "statistics", "rows" (every image's), "answers" (X is a network that judges: `judges`), or "" for
    nothing. `compute` gives one Score for each of
    `keys`.
    """

    name: str
    about: str
    compute: Callable[[Sides, Settings], dict[str, Score]]
    keys: dict[str, str]  # key -> "lower" or "higher", whichever is better
    output: str = "features"
    extractor: str | None = None
    reference: str = "statistics"
    labels: str = ""  # how its keys are called, where not by their names


METRICS = {
    metric.name: metric
    for metric in (
        Metric("fd", "Fréchet distance over the extractor's features", measures.frechet, {"fd": LOWER}),
        Metric(
            "fid",
            "the same over the 2015 Inception network, TF-style bilinear resize (EDM, torch-fidelity)",
            measures.frechet,
            {"fid": LOWER},
            extractor="inception",
        ),
        Metric(
            "fid-clean",
            "clean-fid's: bicubic antialiased resize",
            measures.frechet,
            {"fid-clean": LOWER},
            extractor="inception-clean",
        ),
        Metric(
            "fid-pytorch",
            "pytorch-fid's: half-pixel bilinear resize",
            measures.frechet,
            {"fid-pytorch": LOWER},
            extractor="inception-legacy_pytorch",
        ),
        Metric(
            "sfid",
            "over spatial features of Inception (guided-diffusion)",
            measures.frechet,
            {"sfid": LOWER},
            "spatial",
            "inception",
        ),
        Metric(
            "fd-dinov2",
            "over DINOv2 ViT-L/14 (EDM2, dgm-eval)",
            measures.frechet,
            {"fd-dinov2": LOWER},
            extractor="dinov2_vitl14",
        ),
        Metric(
            "clip-fid",
            "over OpenAI's CLIP ViT-B/32 (clean-fid)",
            measures.frechet,
            {"clip-fid": LOWER},
            extractor="clip",
        ),
        Metric(
            "fd-class",
            "mean over the classes of the Fréchet distance within each",
            measures.frechet_by_class,
            {"fd-class": LOWER},
            reference="rows",
        ),
        Metric(
            "kid", "kernel distance, polynomial kernel, unbiased", measures.kernel, {"kid": LOWER}, reference="rows"
        ),
        Metric(
            "is",
            "Inception Score: of the extractor's classes",
            measures.inception,
            {"is": HIGHER},
            "logits",
            "inception",
            reference="",
        ),
        Metric(
            "pr",
            "improved precision and recall",
            measures._precision_recall,
            {"precision": HIGHER, "recall": HIGHER},
            reference="rows",
        ),
        Metric(
            "dc",
            "density and coverage",
            measures._density_coverage,
            {"density": HIGHER, "coverage": HIGHER},
            reference="rows",
        ),
        Metric(
            "prdc",
            "all four in one pass over the distances",
            measures.prdc,
            {"precision": HIGHER, "recall": HIGHER, "density": HIGHER, "coverage": HIGHER},
            reference="rows",
        ),
        Metric(
            "rel-fd",
            "Fréchet distance to the teacher's images of the same seeds (or of --teacher-seed)",
            measures.frechet,
            {"rel-fd": LOWER},
            reference="teacher",
        ),
        Metric(
            "rel-fid",
            "the same over Inception (GDD)",
            measures.frechet,
            {"rel-fid": LOWER},
            extractor="inception",
            reference="teacher",
        ),
        Metric(
            "clip-score",
            "mean cosine of image and prompt (GigaGAN's protocol)",
            measures._clip_score,
            {"clip-score": HIGHER},
            "",
            reference="",
        ),
        Metric(
            "dreamdiv",
            "DreamDiv: mean DreamSim distance among images of one prompt",
            measures._dream_diversity,
            {"dreamdiv": HIGHER},
            extractor="dreamsim",
            reference="diversity",
        ),
        Metric(
            "dreamsim",
            "mean DreamSim distance to the teacher's image of equal noise",
            measures.paired,
            {"dreamsim": LOWER},
            "",
            reference="pair",
        ),
        Metric(
            "lpips",
            "mean LPIPS (AlexNet) to the teacher's image of equal noise",
            measures.paired,
            {"lpips": LOWER},
            "",
            reference="pair",
        ),
        Metric("lpips-vgg", "mean LPIPS (VGG-16)", measures.paired, {"lpips-vgg": LOWER}, "", reference="pair"),
        *(
            Metric(
                f"latent-lpips-{space}",
                f"mean LatentLPIPS of {space} latents",
                measures.paired,
                {f"latent-lpips-{space}": LOWER},
                "",
                reference="pair",
            )
            for space in ("sd15", "sd21", "sdxl", "sd3", "flux", "tiny-sd")
        ),
        Metric(
            "prompt-accuracy",
            "share of images that show the digit which their prompt names",
            measures.prompt_accuracy,
            {"prompt-accuracy": HIGHER},
            "logits",
            reference="",
        ),
        Metric(
            "diversity",
            "mean 1 - cosine of features among images of one prompt",
            measures._dream_diversity,
            {"diversity": HIGHER},
            reference="diversity",
        ),
        Metric(
            "top1",
            "of a classifier (latent_classifier): share of images whose class it sees",
            measures.of_a_judge,
            {"top1": HIGHER},
            "",
            reference="answers",
        ),
        Metric(
            "2afc",
            "of a distance (latent_lpips, lpips-vgg, ...): share of judgements of triplets that it shares",
            measures.of_a_judge,
            {"2afc": HIGHER, "2afc-traditional": HIGHER, "2afc-cnn": HIGHER, "2afc-real": HIGHER},
            "",
            reference="answers",
        ),
    )
}


@dataclass(frozen=True)
class Want:
    """A metric over an extractor. `named`: the user chose the extractor with `metric@extractor`."""

    metric: Metric
    extractor: str | None
    named: bool = False

    def key(self, key: str) -> str:
        return f"{key}@{self.extractor}" if self.named else key

    @property
    def needs_teacher(self) -> bool:
        return self.metric.reference in ("teacher", "pair")


def parse_metrics(names: Sequence[str]) -> list[Want]:
    """`fid`, `kid@lite0`, ... UserError: unknown metric (with the nearest), an extractor where none can be chosen."""
    wants = []
    for text in dict.fromkeys(names):
        name, at, extractor = text.partition("@")
        if name not in METRICS:
            raise unknown("metric", name, METRICS)
        metric = METRICS[name]
        fixed = metric.extractor not in (None, extractor) and name != "is"
        if at and (fixed or not metric.output):
            raise UserError(
                f"metric {text!r}: {name} has no choice of extractor",
                "fd@..., kid@..., is@..., pr@..., dc@... and rel-fd@... have",
            )
        wants.append(Want(metric, extractor or metric.extractor, bool(at)))
    return wants


def combine(
    want: Want, extractor: Extractor | None, runs: Sequence[dict[str, Score]], settings: Settings
) -> dict[str, JsonObject]:
    """The entries of a result's "metrics": over several runs the mean with its deviation, or (report "min") the
    least."""
    entries = {}
    for key, better in want.metric.keys.items():
        if not all(key in run for run in runs):  # of a kind of triplets that is not in the set
            continue
        found = [run[key] for run in runs]
        values = [score.value for score in found]
        spread = stats.stdev(values) if len(values) > 1 else found[0].std
        best = min(values) if better == LOWER else max(values)
        least = settings.report_as == "min" and len(values) > 1
        extreme = f", {'min' if better == LOWER else 'max'} of {len(values)}" if least else ""
        entries[want.key(key)] = {
            "label": label(key, extractor, settings, found[0].n) + extreme,
            "value": best if least else stats.fmean(values),
            "runs": values,
            "std": spread,
            "error": ("runs" if len(values) > 1 else found[0].error) if spread is not None else None,
            "better": better,
            "report": settings.report_as if len(values) > 1 else "single",
            **found[0].more,
        }
        if len(values) > 1:
            entries[want.key(key)] |= {"mean": stats.fmean(values), "best": best}
    return entries
