"""Reference statistics by name: what papers of the field compare with, fetched when they are first asked for, and
d2o's own, which ship."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from d2o.errors import UserError, unknown
from d2o.evaluation.statistics import Statistics
from d2o.evaluation.statistics_files import load_statistics
from d2o.interop.assets import asset
from d2o.interop.download import download, home
from d2o.interop.transfer import Received

CC_BY_NC_SA = "https://creativecommons.org/licenses/by-nc-sa/4.0/"
EDM_URL = "https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs/"
EDM2_URL = "https://nvlabs-fi-cdn.nvidia.com/edm2/dataset-refs/"
ADM_URL = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/64/"
CLEAN_URL = "https://www.cs.cmu.edu/~clean-fid/stats/"
CLEAN = "clean-fid:"
CLEAN_FORM = (
    f"{CLEAN}NAME_MODE_SPLIT_SIZE, for example {CLEAN}cifar10_legacy_tensorflow_train_32 or"
    f" {CLEAN}ffhq_clean_trainval70k_1024"
)
CLEAN_MODES = {
    "clean": "inception-clean",
    "legacy_pytorch": "inception-legacy_pytorch",
    "legacy_tensorflow": "inception",
}
"""Mode of clean-fid -> the extractor of d2o that does the same."""
IMAGENET = 1_281_167


@dataclass(frozen=True)
class NamedReference:
    """A published file of statistics.

    `extractors` that made them, by d2o's names; `n` images stand behind them (None: the publisher doesn't say);
    `images`: how many it holds itself, for metrics that need single images; `ships`: its file in d2o/assets. Nobody
    published checksums: what is downloaded first is pinned.
    """

    name: str
    url: str
    extractors: tuple[str, ...]
    n: int | None
    licence: str
    licence_url: str
    about: str
    images: int = 0
    ships: str | None = None

    @property
    def path(self) -> Path:
        """Where the file is kept, or may be put by hand."""
        if self.ships is not None:
            return asset(self.ships)
        return home() / "references" / self.url.rpartition("/")[2]


def _edm(name: str, file: str, n: int, about: str) -> NamedReference:
    return NamedReference(name, EDM_URL + file, ("inception",), n, "CC BY-NC-SA 4.0 (NVIDIA)", CC_BY_NC_SA, about)


def _edm2(name: str, file: str, about: str) -> NamedReference:
    return NamedReference(
        name, EDM2_URL + file, ("inception", "dinov2_vitl14"), IMAGENET, "CC BY-NC-SA 4.0 (NVIDIA)", CC_BY_NC_SA, about
    )


REFERENCES = {
    entry.name: entry
    for entry in (
        _edm("edm-cifar10", "cifar10-32x32.npz", 50_000, "CIFAR-10 training set (EDM, SiD, SiDA, GDD)"),
        _edm("edm-ffhq64", "ffhq-64x64.npz", 70_000, "FFHQ at 64x64 (EDM, SiD, SiDA, GDD)"),
        _edm("edm-afhqv2-64", "afhqv2-64x64.npz", 15_803, "AFHQv2 at 64x64 (EDM, SiD, SiDA, GDD)"),
        _edm(
            "edm-imagenet64",
            "imagenet-64x64.npz",
            IMAGENET,
            "ImageNet training set at 64x64 as EDM resized it: for its model and distillates",
        ),
        NamedReference(
            "edm-imagenet64-baseline",
            EDM_URL + "imagenet-64x64-baseline.npz",
            ("inception",),
            IMAGENET,
            "MIT (OpenAI)",
            "https://github.com/openai/guided-diffusion/blob/main/LICENSE",
            "ImageNet training set at 64x64 as ADM resized it: for models trained on ADM's data",
        ),
        _edm2("edm2-img512", "img512.pkl", "ImageNet training set at 512x512 (EDM2, SiDA), for FID and FD-DINOv2"),
        _edm2("edm2-img64", "img64.pkl", "ImageNet training set at 64x64 as EDM2 resized it, for FID and FD-DINOv2"),
        NamedReference(
            "adm-imagenet64-labeled",
            ADM_URL + "VIRTUAL_imagenet64_labeled.npz",
            ("inception",),
            IMAGENET,
            "MIT (OpenAI)",
            "https://github.com/openai/guided-diffusion/blob/main/LICENSE",
            "ImageNet training set at 64x64 (ADM): statistics for FID and sFID of all, and 10,000 of the images for"
            " precision and recall",
            images=10_000,
        ),
        NamedReference(
            "d2o-cifar10-16",
            "https://www.cs.toronto.edu/~kriz/cifar.html",
            ("cifar16",),
            50_000,
            "not stated (CIFAR-10, Krizhevsky 2009)",
            "https://www.cs.toronto.edu/~kriz/cifar.html",
            "CIFAR-10 training set reduced to 16x16, over the classifier cifar16: for the teacher of that name and its"
            " distillates; ships with d2o",
            ships="reference_cifar16.npz",
        ),
    )
}
"""Name -> published reference. clean-fid's are named by its own scheme, see `lookup`."""


def is_named(text: str) -> bool:
    """Whether `text` is meant as a published reference: one of the names, or anything that begins with "clean-fid:"."""
    return text in REFERENCES or text.startswith(CLEAN)


def lookup(name: str) -> NamedReference:
    """What is known of a published reference. UserError: an unknown name, or one that is not in clean-fid's scheme.

    clean-fid's are "clean-fid:" and the name of its file, {name}_{mode}[_clip_vit_b_32]_{split}_{size}[_kid], where
    mode is clean, legacy_pytorch or legacy_tensorflow, and size "na" in the split "custom". "_kid" names the features
    instead of their statistics.
    """
    if not name.startswith(CLEAN):
        if name not in REFERENCES:
            raise unknown("reference", name, [*REFERENCES, CLEAN_FORM])
        return REFERENCES[name]
    modes = "|".join(CLEAN_MODES)
    stem = name.removeprefix(CLEAN).lower().removesuffix(".npz")
    found = re.fullmatch(rf"([a-z0-9][a-z0-9._-]*?)_({modes})(_clip_vit_b_32)?_([a-z0-9]+)_(\d+|na)(_kid)?", stem)
    if not found:
        raise UserError(
            f"{name!r} is not a name of clean-fid's statistics",
            f"expected {CLEAN_FORM}; modes: {', '.join(CLEAN_MODES)}",
        )
    if (found[4] == "custom") != (found[5] == "na"):
        raise UserError(
            f"{name!r}: clean-fid's split custom has the size na, and no other has", f"expected {CLEAN_FORM}"
        )
    extractor = "clip-vit-b-32" if found[3] else CLEAN_MODES[found[2]]
    about = (
        f"{found[1]}, split {found[4]}"
        + (f", {found[5]} pixels" if found[5] != "na" else "")
        + f", clean-fid's mode {found[2]}"
    )
    licence = ("MIT (clean-fid)", "https://github.com/GaParmar/clean-fid/blob/main/LICENSE")
    return NamedReference(CLEAN + stem, f"{CLEAN_URL}{stem}.npz", (extractor,), None, *licence, about)


def find_reference(name: str, progress: Received | None = None) -> Path:
    """The file of a reference, downloaded to `home()/references` unless it is there or ships.

    UserError: an unknown name; no network, or not there (with the URL, and the place to put it).
    """
    entry = lookup(name)
    return entry.path if entry.ships else download(entry.url, entry.path, progress=progress)


def load_reference_statistics(name: str, feature: str | None = None, progress: Received | None = None) -> Statistics:
    """The statistics of a published reference for the extractor `feature`, with the number of images and the extractor
    that its file does not state, so that those of another extractor are refused. UserError: as `find_reference` and
    `load_statistics`."""
    entry = lookup(name)
    found = load_statistics(find_reference(name, progress), feature)
    n, made_by = found.n or entry.n, found.feature or entry.extractors[0]
    spatial = None if found.spatial is None else replace(found.spatial, n=n, feature=made_by)
    return replace(found, n=n, feature=made_by, spatial=spatial)
