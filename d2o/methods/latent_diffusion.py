"""Latent diffusion with text: the noise that was added to an autoencoder's latents is predicted from them and a
caption.

Rombach et al. 2022, eq. 3, with the noise schedule of Stable Diffusion 1.5 and captions left away now and then for
classifier-free guidance (Ho and Salimans 2022, Algorithm 1). It trains teachers. Captions are made from class labels.
"""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from d2o.condition import Condition
from d2o.data.captions import Captions, class_names
from d2o.data.images import ImageSet, to_float, to_uint8
from d2o.data.stored_latents import LatentSet
from d2o.data.triplets import TripletSet
from d2o.diffusion.noise import noise_for_seeds
from d2o.diffusion.schedules import DiscreteSchedule
from d2o.diffusion.solvers import Solver
from d2o.errors import UserError
from d2o.features.base import Features
from d2o.features.load import load_features
from d2o.inputs import JsonObject
from d2o.interop.assets import asset
from d2o.methods.base import Batch, Loop, Method, Options, Setup
from d2o.networks.bpe import WORD
from d2o.networks.latent import Autoencoder, TextToImage, load_autoencoder
from d2o.spaces.base import UNNAMED
from d2o.teachers.base import Spec
from d2o.teachers.latent import text_to_image_teacher

SCALE_IMAGES = 4096  # enough for a standard deviation to three digits
CHECK_SEED = 2_000_000  # away from the seeds of pairs (from 0) and of previews


class LatentDiffusionOptions(Options):
    vae: str = Field(
        description=(
            "frozen autoencoder: run folder or checkpoint of method autoencoder, a diffusers folder, or tiny-sd (that"
            " ships)"
        )
    )
    templates: list[str] = Field(
        ["a photo of a {name}", "{name}"], description="captions; {name} becomes the class's; the first is the main one"
    )
    main: float = Field(
        0.5, ge=0, le=1, description="share of samples with the main caption; the others share the rest"
    )
    caption_dropout: float = Field(
        0.1, ge=0, le=1, description='share of samples trained with the caption "" (for classifier-free guidance)'
    )
    steps: int = Field(20, ge=1, description="DDIM steps of previews and of the accuracy")
    cfg: float = Field(3.0, ge=0, description="guidance weight of previews and of the accuracy; 1 is none")
    extractor: str | None = Field(
        None, description="classifier whose agreement with the prompts is the metric `accuracy`"
    )
    check_n: int = Field(500, ge=1, description="generated samples of that metric")


class LatentDiffusion(Method[LatentDiffusionOptions]):
    name = "latent-diffusion"
    Options = LatentDiffusionOptions
    data = "images"
    product = "model"

    def __init__(self, setup: Setup[LatentDiffusionOptions]):
        assert setup.images is not None and not isinstance(setup.images, LatentSet | TripletSet)
        self.options = setup.options
        if not setup.images.classes or setup.images.labels is None:
            raise UserError(
                f"{setup.images.name} has no labels; captions are made from them",
                "give a folder with one sub-folder per class",
            )
        self.captions = Captions(class_names(setup.images.class_names), self.options.templates)
        vae = (
            load_autoencoder(asset("tiny-sd") if self.options.vae == "tiny-sd" else Path(self.options.vae))
            .to(setup.device)
            .eval()
        )
        channels, resolution, _ = setup.images.shape
        if (vae.vae.config.in_channels, resolution % vae.factor) != (channels, 0):
            raise UserError(
                f"the autoencoder {self.options.vae} is not for images of {channels} x {resolution} x {resolution}"
            )
        config = dict(setup.need_network())
        if config.pop("arch", "text_to_image") != "text_to_image":
            raise UserError("network.arch: method latent-diffusion trains text_to_image")
        if unknown := set(config) - {"unet", "text_encoder"}:
            raise UserError(f"network.{min(unknown)}: unknown key for text_to_image", "known: arch, unet, text_encoder")
        scale = 1.0 if setup.device.type == "meta" else latent_scale(vae, setup.images, setup.device)
        frozen = {key: value for key, value in vae.config.items() if key != "arch"} | {
            "sample_size": resolution,
            "scaling_factor": scale,
        }
        words = {word for caption in self.captions.all for word in WORD.findall(caption.lower())}
        self.model = TextToImage(frozen, config.get("unet", {}), config.get("text_encoder", {}), sorted(words))
        self.model.vae.load_state_dict(vae.vae.state_dict())
        self.schedule = DiscreteSchedule.scaled_linear()
        self.ids = self.model.tokens.encode(self.captions.all).reshape(setup.images.classes, -1, 77).to(setup.device)
        self.no_caption = self.model.tokens.encode([""]).to(setup.device)
        licence = setup.licence
        self._spec = Spec(
            setup.name, self.model.latent_shape, UNNAMED, "text", licence=licence, solver="ddim", steps=50
        )

    def players(self) -> dict[str, nn.Module]:
        return {"model": self.model}

    def step(self, loop: Loop, batch: Batch, iteration: int) -> dict[str, Tensor]:
        losses = []
        for micro, draw in loop.micro_batches(batch):
            assert micro.images is not None and micro.condition.labels is not None
            with torch.no_grad():
                mean, std = self.model.encode_images(micro.images)
            shape = self.model.latent_shape
            x = mean + std * draw.randn(*shape)
            t, noise = draw.randint(0, len(self.schedule.alphas_cumprod)), draw.randn(*shape)
            x_t = self.schedule.alpha(t)[:, None, None, None] * x + self.schedule.sigma(t)[:, None, None, None] * noise
            ids = self.ids[micro.condition.labels, self.captions.choose(draw.rand(), self.options.main)]
            ids = torch.where((draw.rand() < self.options.caption_dropout)[:, None], self.no_caption, ids)
            loss = F.mse_loss(loop.net("model")(x_t, t, ids), noise)
            loop.backward(loss)
            losses.append(loss)
        loop.update("model")
        return {"loss": loop.mean(losses)}

    def describe(self) -> JsonObject:
        return {"kind": "teacher", "network": self.model.config, "spec": self._spec}

    def spec(self) -> Spec:
        return self._spec

    def generate(self, product: nn.Module, noise: Tensor, condition: Condition) -> Tensor:
        """Without prompts these are the classes' main captions, class by class in equal parts."""
        if condition.prompts is None:
            condition = self.asked(torch.arange(len(noise)) * len(self.captions.table) // max(len(noise), 1))
        assert isinstance(product, TextToImage)
        teacher = text_to_image_teacher(product, self._spec, noise.device)
        return teacher.decode(teacher.sample(noise, condition, "ddim", self.options.steps, self.options.cfg))

    def asked(self, labels: Tensor) -> Condition:
        """The main captions of these classes."""
        return Condition.of_prompts([self.captions.main(label) for label in labels.tolist()])

    def nfe(self) -> int:
        return Solver("ddim", self.options.steps).forwards(self.options.cfg)

    @torch.inference_mode()
    def validate(self, product: nn.Module) -> dict[str, float]:
        """How often the classifier sees the digit (or whatever the classes are) in a sample that its prompt asked
        for."""
        if self.options.extractor is None:
            return {}
        extractor = load_features(self.options.extractor, self.no_caption.device)
        n, classes = self.options.check_n, len(self.captions.table)
        if extractor.classes != classes:
            raise UserError(
                f"latent_diffusion.extractor: {self.options.extractor} tells {extractor.classes} classes apart, the"
                f" data has {classes}"
            )
        right = 0
        for part in torch.arange(n).split(250):
            noise = noise_for_seeds((CHECK_SEED + part).tolist(), self._spec.shape).to(self.no_caption.device)
            images = self.generate(product, noise, self.asked(part % classes))
            right += int((classify(extractor, images).cpu() == part % classes).sum())
        return {"accuracy": right / n}


def classify(extractor: Features, images: Tensor) -> Tensor:
    """The extractor's class [B] of images [B, C, H, W] in [-1, 1], which are averaged over areas (and to grey) to the
    shape that it takes, if it takes one alone, and rounded to 8 bits."""
    if extractor.shape is not None:
        channels, height, width = extractor.shape
        if channels == 1:
            images = images.mean(1, keepdim=True)
        images = F.interpolate(images, (height, width), mode="area")
    return extractor.logits(to_float(to_uint8(images))).argmax(1)


@torch.inference_mode()
def latent_scale(autoencoder: Autoencoder, images: ImageSet, device: torch.device) -> float:
    """1 / (standard deviation of the latents over all their numbers), of at most 4096 images spread over the set: the
    `scaling_factor`."""
    count, total, square = 0, 0.0, 0.0
    picked = torch.linspace(0, len(images) - 1, min(len(images), SCALE_IMAGES)).round().long()
    for part in picked.split(256):
        mean, std = (m.double() for m in autoencoder.encode(to_float(images.images(part)).to(device)))
        count, total, square = count + mean.numel(), total + float(mean.sum()), square + float((mean**2 + std**2).sum())
    return 1 / (square / count - (total / count) ** 2) ** 0.5


METHOD = LatentDiffusion
