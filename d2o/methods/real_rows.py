"""Real images in the place of some of the teacher's samples, which a critic sees as real (beyond Kang et al. 2024,
whose students learn of the teacher's samples alone)."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from d2o.condition import Asked, Condition, Guided, join_embedded
from d2o.data.captions import Captions, class_names
from d2o.data.stored_latents import LatentSet
from d2o.data.triplets import TripletSet
from d2o.errors import UserError
from d2o.methods.base import Batch, Draws, Options, Setup
from d2o.methods.score_networks import check_real_images, labels_of_images
from d2o.teachers.base import Teacher


class RealDataOptions(Options):
    """`real_data:` of a method with a critic that learns from pairs."""

    share: float = Field(
        0.0,
        ge=0,
        le=1,
        description=(
            "share of the critic's real rows that are images of `data:`, by their classes or captions (`prompts:`, one"
            " for each), with a noise drawn for them; 0: none, the teacher's samples alone"
        ),
    )
    templates: list[str] = Field(
        ["a photo of a {name}"],
        min_length=1,
        description=(
            "captions of images with classes and no `prompts:`, for teachers that take text; {name} becomes the class's"
        ),
    )


class RealRows:
    """Puts them into a batch. UserError: `options.share` without images that fit the teacher, or without classes or
    captions that it takes."""

    def __init__(self, method: str, options: RealDataOptions, setup: Setup, teacher: Teacher):
        self.teacher, self.captions = teacher, None
        spec, images = teacher.spec, setup.images
        if images is None:
            raise UserError(f"{method}.real_data.share: the recipe has no `data:` section", "data: {path: ...}")
        check_real_images(setup, teacher)
        labels_of_images(method, setup, spec)
        if spec.condition != "text" or (setup.captioned and setup.prompts is not None):
            return
        assert not isinstance(images, LatentSet | TripletSet)
        if not images.classes or (images.labels is None and setup.device.type != "meta"):
            raise UserError(
                f"{method}.real_data.share: {images.name} has neither classes nor captions, which teacher"
                f" {spec.name!r} asks for",
                "prompts: FILE, one a line for each image in their order",
            )
        self.captions = Captions(class_names(images.class_names), options.templates)

    def put(self, micro: Batch, z: Tensor, x: Tensor, c: Asked, draw: Draws) -> tuple[Tensor, Tensor, Asked]:
        """(z, x, c) of a micro-batch with real images in the rows of `micro.reals`: the image, in the teacher's space,
        in the place of x, a new noise in that of z, its class or caption in that of c; guidance scales stay."""
        fresh, noise = draw.randn(*z.shape[1:]), draw.randn(*z.shape[1:])
        choice = draw.picks(2**31)
        found = micro.reals
        if found is None or found.images is None:
            return z, x, c
        rows = torch.tensor(found.rows, device=z.device)
        space = self.teacher.space
        real = space.encode(found.images, noise[rows]) if self.teacher.spec.latent else found.images
        asked = self.teacher.embed(self.asked(found.condition, [choice[row] for row in found.rows]))
        order = torch.arange(len(z), device=z.device).index_copy(0, rows, len(z) + torch.arange(len(rows)).to(rows))
        embedded = c.embedded if isinstance(c, Guided) else c
        if embedded is not None:
            embedded = join_embedded(embedded, asked)[order]  # type: ignore[index]
        z, x = z.index_copy(0, rows, fresh[rows]), x.index_copy(0, rows, real.to(x))
        return z, x, Guided(embedded, c.scale) if isinstance(c, Guided) else embedded

    def asked(self, condition: Condition, choice: list[int]) -> Condition:
        """What a teacher is asked of images with this condition."""
        if self.teacher.spec.condition == "none":
            return Condition.none(len(condition))
        if self.captions is None or condition.kind == "prompts":
            return condition
        labels = [0] * len(condition) if condition.labels is None else condition.labels.tolist()
        table = self.captions.table
        return Condition.of_prompts([table[i][k % len(table[i])] for i, k in zip(labels, choice, strict=True)])
