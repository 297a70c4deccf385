"""Whether a student was trained on what it is now measured by. Such a number flatters (Kynkäänniemi et al. 2023; GDD,
section 5)."""

from __future__ import annotations

from collections.abc import Iterator

from d2o.inputs import JsonObject

FAMILIES = {
    "lite0": ("lite0",),
    "inception": ("inception",),
    "vgg": ("vgg",),
    "dinov2": ("dinov2", "dino"),
    "clip": ("clip",),
    "digits": ("digits",),
    "cifar16": ("cifar16",),
    "dreamsim": ("dreamsim",),
    "lpips": ("lpips",),
}
"""Backbone -> the words by which recipes and extractors name it."""
IMAGENET = ("lite0", "inception", "vgg")
"""Backbones that learned ImageNet's labels: one in the training moves the features of the others, too."""
NETWORKS = (
    "extractor",
    "backbone",
    "backbones",
    "features",
    "critic",
    "critics",
    "perceptual",
    "loss",
    "discriminator",
)
"""Keys of a recipe whose value names a network that the student was trained against."""


def leak_notes(source: str, recipe: JsonObject, extractors: list[str]) -> list[str]:
    """A note for each extractor of the metrics that shares a backbone, or ImageNet's labels, with the training that
    `recipe` describes."""
    options = recipe.get(str(recipe.get("method")))
    if not isinstance(options, dict):
        return []
    trained = dict.fromkeys(name for name in _names(options) if not _idle(options, name))
    notes = []
    for extractor in dict.fromkeys(extractors):
        measured = _family(extractor)
        for name in trained:
            if name == extractor or (measured is not None and _family(name) == measured):
                notes.append(
                    f"{source} was trained on features of {name}: a metric over {extractor}, the same backbone,"
                    " flatters it"
                )
            elif measured in IMAGENET and _family(name) in IMAGENET:
                notes.append(
                    f"{source} was trained on features of {name}, {extractor} learned the same ImageNet labels: the"
                    " metric may flatter it"
                )
    return notes


def _names(value: object, named: bool = False) -> Iterator[str]:
    """Every text under a key that names a network."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _names(item, named or key in NETWORKS)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _names(item, named)
    elif isinstance(value, str) and named:
        yield value


def _idle(options: JsonObject, name: str) -> bool:
    """The extractor of a loss that is not the perceptual one is not used."""
    return options.get("extractor") == name and options.get("loss") not in (None, "perceptual")


def _family(name: str) -> str | None:
    return next((family for family, words in FAMILIES.items() if any(word in name.lower() for word in words)), None)
