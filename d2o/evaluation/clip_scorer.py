"""The network of the CLIP score, and how images and prompts come to it: the protocol of GigaGAN's evaluation, which
DMD2 and Diffusion2GAN share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from d2o.errors import unknown
from d2o.evaluation.resizing import clip_input, crop_square, each_image
from d2o.features.clip import full_name, load_clip, tokenizer
from d2o.features.common import CHUNK, at_once
from d2o.metrics.clip_score import clip_score

LENGTH = 77
"""Tokens of a text, with the two marks and the padding."""
END = 49407
PREFIX = "A photo depicts "
"""Put before every prompt, after Hessel et al. 2021 (CLIPScore)."""
SIDE = 256
TEMPLATES = ("gigagan", "none")


class ClipScore:
    """Cosines of image and text embeddings: not times 100, not clipped at zero.

    `name`: "clip-vit-g-14" (with LAION's weights laion2b_s12b_b42k, what Diffusion2GAN and DMD2 report) or
    "clip-vit-b-32" (OpenAI's, GigaGAN's default). `template`: "gigagan" puts PREFIX before every prompt, "none" takes
    it as it is. Always in single precision.
    UserError: unknown name or template; no weights to be had, or another network's.
    """

    def __init__(
        self,
        name: str = "clip-vit-g-14",
        weights: Path | None = None,
        device: str | torch.device = "cpu",
        template: str = "gigagan",
    ):
        if template not in TEMPLATES:
            raise unknown("CLIP template", template, TEMPLATES)
        self.name, self.template, self.device = full_name(name), template, torch.device(device)
        network, self.sha256 = load_clip(name, weights)
        self.network = network.to(self.device)

    @torch.inference_mode()
    def image(self, images: Tensor) -> Tensor:
        """uint8 images [n, 3, H, W] on any device -> unit vectors [n, d] float32 on this one.

        The central square, by Pillow's Lanczos to 256 pixels, then OpenAI's preparation (bicubic to 224).
        """
        return self._unit(
            self.network.encode_image(clip_input(scale(part)).to(self.device))
            for part in images.split(at_once(self.device))
        )

    @torch.inference_mode()
    def text(self, prompts: Sequence[str]) -> Tensor:
        """n prompts -> unit vectors [n, d] float32; those that are too long are cut."""
        return self._unit(self.network.encode_text(part.to(self.device)) for part in self.tokens(prompts).split(CHUNK))

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """uint8 images [n, 3, H, W] and their n prompts -> cosines [n] float32. UserError: not as many of one as of the
        other."""
        return clip_score(self.image(images), self.text(prompts))

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """n prompts -> token ids [n, 77] int64, by the template."""
        tokens = self.tokenizer(list(prompts), LENGTH)
        return tokens if self.template == "none" else insert_tokens(tokens, self.tokenizer([PREFIX], LENGTH)[0, 1:4])

    @cached_property
    def tokenizer(self) -> Callable[[list[str], int], Tensor]:
        """OpenAI's byte-pair encoding, which open_clip brings."""
        return tokenizer()  # the module's

    @staticmethod
    def _unit(parts: Iterable[Tensor]) -> Tensor:
        return F.normalize(torch.cat(list(parts)).float(), dim=1)


def insert_tokens(tokens: Tensor, inserted: Tensor) -> Tensor:
    """Token ids [n, L] with `inserted` [k] right after the start mark, cut to L again; where a text then fills the last
    place, the end mark takes it (so a long prompt loses k tokens before its end)."""
    longer = torch.cat([tokens[:, :1], inserted.to(tokens).expand(len(tokens), -1), tokens[:, 1:]], 1)[
        :, : tokens.shape[1]
    ]
    longer[:, -1] = torch.where(longer[:, -1] > 0, END, longer[:, -1])
    return longer


def scale(images: Tensor) -> Tensor:
    """uint8 images [n, 3, H, W] -> uint8 [n, 3, 256, 256]: central square, Pillow's Lanczos, and the rounding of
    GigaGAN's code."""
    return round_trip().to(images.device)[each_image(images, scale_one).long()]


def scale_one(image: Image.Image) -> Image.Image:
    return crop_square(image, min(image.size)).resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def round_trip() -> Tensor:
    """uint8 [256]: where each level comes out when it goes to [-1, 1] and back in single precision and is truncated
    there."""
    levels = torch.arange(256, dtype=torch.float32).div(255).sub(0.5).div(0.5)
    return ((levels + 1) * 127.5).clamp(0, 255).to(torch.uint8)
