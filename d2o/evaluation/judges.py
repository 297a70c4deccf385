"""Networks that judge images, as X: classifiers, by their top-1 accuracy, and perceptual distances, by how often they
agree with which of two copies is nearer (2AFC; Kang et al. 2024, Tables A2 and A3)."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from d2o.augment.crop import centre_crops
from d2o.data.images import to_float
from d2o.errors import UserError
from d2o.evaluation.collect import ImageBatch
from d2o.evaluation.extractor import Device
from d2o.evaluation.pair_distances import PAIR_DISTANCES
from d2o.evaluation.tools import Tools
from d2o.inputs import JsonObject
from d2o.interop.checkpoint_record import check_checkpoint
from d2o.interop.safetensors_io import file_sha256, load_file, read_meta, resolve_checkpoint
from d2o.losses.latent_lpips import load_latent_lpips
from d2o.networks.build import count_parameters
from d2o.networks.load import load_weights
from d2o.networks.vgg_classifier import LatentClassifier
from d2o.spaces.base import PIXELS, LatentSpace
from d2o.spaces.load import TINY_SD, load_space

KINDS = {"latent_classifier": "classifier", "latent_lpips": "distance"}
"""Kind of a checkpoint -> what it is as X."""
LATENT = "latent-"
MSE = ("mse", *(f"{LATENT}mse-{space}" for space in (TINY_SD, "sd15", "sdxl", "sd3")))
"""Mean squared differences, which the others have to beat: of pixels, and of latents."""
JUDGES = (*PAIR_DISTANCES, *MSE)
"""Distances by name."""


@dataclass
class Judge:
    """`kind`: "classifier" or "distance". `ask`: a batch of images -> its answers about each: "guess", the class, or
    "d0" and "d1", the distances of both copies of a triplet to its reference. `check`: UserError for images of a shape
    that it does not take. `classes` that it tells apart."""

    name: str
    source: str
    kind: str
    ask: Callable[[ImageBatch], dict[str, Tensor]]
    check: Callable[[tuple[int, int, int]], None]
    record: JsonObject
    classes: int = 0

    @property
    def metric(self) -> str:
        return "top1" if self.kind == "classifier" else "2afc"

    def __post_init__(self) -> None:
        self.identity: JsonObject = {
            "judge": self.name,
            "weights": self.record.get("sha256"),
            "space": self.record.get("space"),
        }

    @torch.inference_mode()
    def __call__(self, batch: ImageBatch) -> dict[str, Tensor]:
        return {name: column.float().cpu() for name, column in self.ask(batch).items()}


def is_judge(text: str) -> bool:
    """Whether X is one: a checkpoint of such a network, a run folder that has one, or a distance by name."""
    if not os.path.exists(text):
        return text in JUDGES
    path = Path(text)
    if path.is_dir() and not (path / "checkpoints").is_dir():
        return False
    path = resolve_checkpoint(path)
    return path.suffix == ".safetensors" and read_meta(path).get("kind") in KINDS


def open_judge(text: str, tools: Tools, device: Device) -> Judge:
    """One of `is_judge`. UserError: weights that are nowhere, or a damaged file."""
    if not os.path.exists(text):
        return _squares(text, device) if text in MSE else _named(text, tools, device)
    path = resolve_checkpoint(Path(text))
    run = path.parent.parent.name if path.parent.name == "checkpoints" else ""
    meta = read_meta(path)
    open_file = _classifier if KINDS[str(meta["kind"])] == "classifier" else _distance
    return open_file(run or path.stem, text, path, check_checkpoint(meta, path), device)


def _classifier(name: str, text: str, path: Path, meta: JsonObject, device: Device) -> Judge:
    tensors, _ = load_file(path)
    network = load_weights(meta["network"], tensors, path)
    if not isinstance(network, LatentClassifier):
        raise UserError(f"{path}: a {type(network).__name__} is no classifier of images or latents")
    network = network.to(device).eval().requires_grad_(False)
    space = load_space(meta["space"]["name"], device)
    if space.name != PIXELS:
        space.check(meta["space"], str(path))
    size = ((meta.get("recipe") or {}).get("latent_classifier") or {}).get("image_size")

    def ask(batch: ImageBatch) -> dict[str, Tensor]:
        x = to_float(batch.images).to(device)
        x = centre_crops(x, size or min(x.shape[2:]))
        return {"guess": network(encoded(space, x)).argmax(1)}

    def check(shape: tuple[int, int, int]) -> None:
        if min(shape[1:]) < (size or 1):
            raise UserError(
                f"{text} looks at {size} x {size} pixels; the images are {shape[2]} x {shape[1]}", f"--resize {size}"
            )
        _check_encoded(space, (3, size or shape[1], size or shape[2]), text)

    record = {**_record(path, meta, network), "image_size": size, "classes": network.classes, **_space(space)}
    return Judge(name, text, "classifier", ask, check, record, network.classes)


def _distance(name: str, text: str, path: Path, meta: JsonObject, device: Device) -> Judge:
    space = load_space(meta["space"]["name"], device)
    space.check(meta["space"], str(path))
    network = load_latent_lpips(space.name, path, device=device)
    record = _record(path, meta, network.features.network)
    return _of_latents(name, text, space, network, record)


def _named(name: str, tools: Tools, device: Device) -> Judge:
    distance = tools.pair_distance(name)
    record = {"sha256": distance.sha256}
    if distance.space == "latent":
        space = load_space(name.removeprefix(f"{LATENT}lpips-"), device)
        return _of_latents(distance.label, name, space, distance, record)
    return Judge(
        distance.label,
        name,
        "distance",
        lambda batch: _choices(batch, lambda x: x, distance),
        lambda shape: distance.check(*shape[1:]),
        record,
    )


def _squares(name: str, device: Device) -> Judge:
    def mse(x: Tensor, y: Tensor) -> Tensor:
        return (x - y).square().flatten(1).mean(1)

    space = load_space(name.removeprefix(f"{LATENT}mse-") if name != "mse" else PIXELS, device)
    return _of_latents("MSE of pixels" if name == "mse" else f"MSE of {space.name}'s latents", name, space, mse, {})


def _of_latents(
    label: str, text: str, space: LatentSpace, distance: Callable[[Tensor, Tensor], Tensor], record: JsonObject
) -> Judge:
    return Judge(
        label,
        text,
        "distance",
        lambda batch: _choices(batch, lambda x: encoded(space, to_float(x).to(space.device)), distance),
        lambda shape: _check_encoded(space, shape, text),
        {**record, **_space(space)},
    )


def _choices(
    batch: ImageBatch, see: Callable[[Tensor], Tensor], distance: Callable[[Tensor, Tensor], Tensor]
) -> dict[str, Tensor]:
    """uint8 triplets [k, 9, H, W] -> the distances of both copies."""
    reference, first, second = map(see, batch.images.split(3, 1))
    return {"d0": distance(first, reference), "d1": distance(second, reference)}


def encoded(space: LatentSpace, x: Tensor) -> Tensor:
    """Images in [-1, 1] -> the means of their latents; in pixels themselves."""
    if space.name == PIXELS:
        return x
    side = [size // space.numbers.factor for size in x.shape[2:]]
    return space.encode(x, x.new_zeros(len(x), space.numbers.channels, *side))


def _check_encoded(space: LatentSpace, shape: tuple[int, int, int], who: str) -> None:
    """UserError: the autoencoder does not take images of that shape, or their latents are too small."""
    factor = space.numbers.factor
    if space.name != PIXELS and (any(side % factor for side in shape[1:]) or min(shape[1:]) < 4 * factor):
        raise UserError(
            f"{who} takes multiples of {factor} pixels from {4 * factor} on; the images are {shape[2]} x {shape[1]}",
            f"--resize {max(4 * factor, min(shape[1:]) // factor * factor)}",
        )


def _space(space: LatentSpace) -> JsonObject:
    return {"space": space.name} | ({} if space.name == PIXELS else {"encode": "mean"})


def _record(path: Path, meta: JsonObject, network: torch.nn.Module) -> JsonObject:
    return {
        "sha256": file_sha256(path),
        "parameters": count_parameters(network),
        "recipe": (meta.get("recipe") or {}).get("name"),
        "licence": meta.get("licence"),
    }
