"""A small image classifier, trained with cross-entropy. Its penultimate features serve as an offline feature
extractor."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from d2o.data.images import to_float
from d2o.errors import UserError
from d2o.inputs import JsonObject
from d2o.methods.base import Batch, Loop, Method, Options, Setup
from d2o.methods.holdout import hold_out, need_classes
from d2o.networks.build import build_network


class ClassifierOptions(Options):
    holdout: float = Field(0.2, ge=0, lt=1, description="share of the images that is never trained on, only validated")
    shift: int = Field(1, ge=0, description="largest random translation of a training image, pixels")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="label smoothing")


class ClassifierMethod(Method[ClassifierOptions]):
    name = "classifier"
    Options = ClassifierOptions
    data = "images"
    product = "classifier"

    def __init__(self, setup: Setup[ClassifierOptions]):
        assert setup.images is not None
        self.options = setup.options
        images = setup.images
        need_classes(images, self.name)
        channels, resolution, _ = images.shape
        config = {
            "arch": "classifier",
            "img_resolution": resolution,
            "img_channels": channels,
            "classes": images.classes,
            **(setup.network or {}),
        }
        if config["classes"] != images.classes:
            raise UserError(
                f"network.classes: {config['classes']}, and {images.name} has {images.classes} classes",
                "leave it away: the images say it",
            )
        self.classifier = build_network(config)
        self.train_indices, self.held_indices = hold_out(len(images), self.options.holdout, setup.seed)
        self.images = images

    def players(self) -> dict[str, nn.Module]:
        return {"classifier": self.classifier}

    def step(self, loop: Loop, batch: Batch, iteration: int) -> dict[str, Tensor]:
        losses = []
        for micro, draw in loop.micro_batches(batch):
            assert micro.images is not None and micro.condition.labels is not None
            x = translate(micro.images, draw.randint(-self.options.shift, self.options.shift + 1, 2))
            loss = F.cross_entropy(
                loop.net("classifier")(x), micro.condition.labels, label_smoothing=self.options.label_smoothing
            )
            loop.backward(loss)
            losses.append(loss)
        loop.update("classifier")
        return {"loss": loop.mean(losses)}

    def describe(self) -> JsonObject:
        return {"kind": "extractor", "network": self.classifier.config}

    @torch.inference_mode()
    def validate(self, product: nn.Module) -> dict[str, float]:
        """Accuracy on the images that were held out."""
        if not len(self.held_indices):
            return {}
        training = product.training
        product.eval()
        assert self.images.labels is not None
        device = next(product.parameters()).device
        right = 0
        for part in self.held_indices.split(512):
            predicted = product(to_float(self.images.images(part)).to(device)).argmax(1).cpu()
            right += int((predicted == self.images.labels[part]).sum())
        product.train(training)
        return {"accuracy": right / len(self.held_indices)}


def translate(x: Tensor, shift: Tensor) -> Tensor:
    """Move each image [B, C, H, W] by whole pixels, shift [B, 2] (down, right); the border repeats."""
    height, width = x.shape[2:]
    rows = (torch.arange(height, device=x.device) - shift[:, :1]).clamp(0, height - 1)
    columns = (torch.arange(width, device=x.device) - shift[:, 1:]).clamp(0, width - 1)
    return x[torch.arange(len(x), device=x.device)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(
        0, 3, 1, 2
    )


METHOD = ClassifierMethod
