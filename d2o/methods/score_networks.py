"""What methods with a score network share: how student and score network begin, how both scores are asked, what is
checked of real images."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor, nn

from d2o.augment import edm
from d2o.condition import Embedded, join_embedded
from d2o.data.stored_latents import LatentSet
from d2o.diffusion.guidance import guide
from d2o.errors import UserError
from d2o.methods.base import Draws, O, Setup
from d2o.methods.student import StudentMethod
from d2o.networks.build import network_config, set_dropout
from d2o.networks.edm2_unet import EDM2Precond, remove_uncertainty
from d2o.networks.edm_view import EDMView, called_at
from d2o.networks.precond import Denoiser
from d2o.students.base import Student
from d2o.teachers.base import Spec, Teacher


class Guidance(TypedDict, total=False):
    """Arguments of `look`."""

    cfg: float
    empty: Embedded


class ScoreMethod(StudentMethod[O]):
    """A method that trains a student and, beside it, a score network of the student's images."""

    takes = "edm"
    teacher: Teacher
    student: Student
    score: Denoiser | EDMView  # the teacher's class of network
    at_sigma_max: ClassVar[bool] = False  # whether a student called at the teacher's highest level makes sense

    def begin_student(self, setup: Setup[O], spec: Spec) -> Student:
        """Without EDM2's uncertainty head, which is about noise levels, and a student has one."""
        if setup.start is None and setup.student.sigma >= spec.sigma_max and not self.at_sigma_max:
            raise UserError(
                f"student.sigma is {setup.student.sigma:g}, the teacher's highest noise level, of which its denoiser"
                " makes a mean of all images",
                f"method {self.name} calls its student at sigma_init: set student.sigma: 2.5",
            )
        student = super().begin_student(setup, spec)
        remove_uncertainty(student.network)
        return student

    def check_start(self, setup: Setup[O], start: Student, spec: Spec) -> None:
        super().check_start(setup, start, spec)
        if start.sigma != called_at(start.network, setup.student.sigma):
            raise UserError(
                f"student.sigma is {setup.student.sigma:g}, but the student to start from is called at {start.sigma:g}",
                f"set student.sigma: {start.sigma:g}",
            )

    def begin_score(self, dropout: float | None = None, uncertainty: bool = True) -> Denoiser | EDMView:
        """The score network: a copy of the teacher's to be trained, with another dropout if given, without EDM2's
        uncertainty head if asked."""
        score = copy.deepcopy(self.teacher.network)
        assert isinstance(score, Denoiser | EDMView)  # `check_teacher`
        if dropout is not None:
            set_dropout(score, dropout)
        if not uncertainty:
            remove_uncertainty(score)
        return score.requires_grad_(True).train()

    def check_augment(self, p: float) -> None:
        """UserError: augmentations with probability p, of which the score network cannot be told."""
        if p and network_config(self.score).get("augment_dim") != edm.LABELS:
            raise UserError(
                f"{self.name}.augment: the teacher's network takes no augmentation labels (augment_dim {edm.LABELS}),"
                " so that the augmentations would come out of the student",
                f"set {self.name}.augment: 0",
            )

    def augmented(self, x: Tensor, p: float, draw: Draws) -> tuple[Tensor, Tensor | None]:
        """x [B, C, H, W] under EDM's augmentations with probability p, and what the score network is told of them
        [B, 9]; x itself and None for p = 0."""
        return edm.augment(x, p, draw.randn, draw.rand) if p else (x, None)

    def guidance(self, cfg: float, embedded: Embedded) -> Guidance:
        """How `look` guides a network by `cfg`: nothing to say of 1, which does not."""
        return {} if cfg == 1 else {"cfg": cfg, "empty": self.teacher.unconditional(embedded)}

    def players(self) -> dict[str, nn.Module]:
        return {"student": self.student, "score": self.score}

    def frozen(self) -> dict[str, nn.Module]:
        return {"teacher": self.teacher.network}


def has_uncertainty(network: nn.Module) -> bool:
    """Whether this is an EDM2 denoiser with the head for u(sigma)."""
    return isinstance(network, EDM2Precond) and network.logvar_linear is not None


def look(
    net: nn.Module,
    x_t: Tensor,
    sigma: Tensor,
    embedded: Embedded,
    part: str = "decoder",
    augment_labels: Tensor | None = None,
    cfg: float = 1.0,
    empty: Embedded = None,
) -> tuple[Any, Any, Any]:
    """(denoised, map, uncertainty) from one pass of a score network at sigma [B, 1, 1, 1]; None for what `part` leaves
    out or the network has not. `cfg`: the denoised are guided away from those of the condition `empty`."""
    if cfg != 1:
        both = join_embedded(embedded, empty)
        told = None if augment_labels is None else torch.cat([augment_labels, augment_labels])
        denoised, features, _ = look(net, torch.cat([x_t, x_t]), torch.cat([sigma, sigma]), both, part, told)
        d_c, d_u = denoised.chunk(2)
        return guide(d_c, d_u, cfg), None if features is None else features[: len(x_t)], None
    asked: dict[str, Any] = {} if part == "decoder" else {"part": part}
    if augment_labels is not None:
        asked["augment_labels"] = augment_labels
    uncertain = has_uncertainty(net)
    if uncertain:
        asked["return_logvar"] = True
    found = net(x_t, sigma.flatten(), embedded, **asked)
    results = list(found) if isinstance(found, tuple) else [found]
    denoised = results.pop(0) if part != "encoder" else None
    return denoised, results.pop(0) if part != "decoder" else None, results.pop() if uncertain else None


def true_score(
    teacher: Teacher,
    x_t: Tensor,
    sigma: Tensor,
    embedded: Embedded,
    precision: str | None = None,
    cfg: float = 1.0,
) -> Tensor:
    """The teacher's denoised images at sigma [B, 1, 1, 1], guided by `cfg` (1: not), in "fp32", "bf16", "fp16", or as
    the surroundings are (None). Gradients flow to x_t; the weights are frozen, and nothing is kept for theirs."""
    half: AbstractContextManager = nullcontext()
    if precision is not None and x_t.device.type != "meta":
        half = torch.autocast(
            x_t.device.type, torch.float16 if precision == "fp16" else torch.bfloat16, enabled=precision != "fp32"
        )
    with half:
        if cfg == 1:
            return teacher.network(x_t, sigma.flatten(), embedded)
        if (other := teacher.guide) is not None:
            d_u = other.network(x_t, sigma.flatten(), other.taken(embedded))
            return guide(teacher.network(x_t, sigma.flatten(), embedded), d_u, cfg)
        empty = teacher.unconditional(embedded)
        return look(teacher.network, x_t, sigma, embedded, cfg=cfg, empty=empty)[0]


def note(log: dict[str, list[Tensor]], **values: Tensor) -> None:
    """Values of a micro-batch into the log of an iteration."""
    for key, value in values.items():
        log.setdefault(key, []).append(value.detach())


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Without dropout for a while."""
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)


def pool_size(method: str, asked: int | None, batch: int, count: int) -> int:
    """Samples of a pooling group: `asked`, or the whole batch (None). UserError: such groups do not fit in a
    micro-batch of `count` samples."""
    size, key = asked or batch, f"{method}.batch_pool"
    if count % size:
        groups = f"{size}, the whole batch ({key}: null)," if asked is None else f"{size} ({key})"
        raise UserError(
            f"adversarial losses are averaged over groups of {groups} and a forward pass of one process has {count}"
            " samples",
            f"make micro_batch, and the share of each process, a multiple of {key}",
        )
    return size


def labels_of_images(method: str, setup: Setup[O], spec: Spec) -> Tensor | None:
    """The images' classes [n] on the device; None for an unconditional teacher. UserError: there are none, or others
    than the teacher's."""
    images = setup.images
    assert images is not None
    if not spec.classes or (images.labels is None and setup.device.type == "meta"):  # a plan may not have the images
        return None
    if images.labels is None or images.classes != spec.classes:
        theirs = f"{images.classes} classes" if images.labels is not None and images.classes else "no classes"
        raise UserError(
            f"{images.name} has {theirs}, teacher {spec.name!r} has {spec.classes}, and method {method} takes the"
            " classes from the data"
        )
    return images.labels.to(setup.device)


def check_real_images(setup: Setup[O], teacher: Teacher) -> None:
    """UserError: the images are not what the teacher makes, or cannot be brought into its latent space."""
    images, spec = setup.images, teacher.spec
    assert images is not None
    wanted = teacher.space.image_shape(spec.shape)
    if isinstance(images, LatentSet):
        wanted = (2 * spec.shape[0], *spec.shape[1:])
        if not spec.latent or tuple(images.shape) != wanted:
            need, have = (" x ".join(map(str, shape)) for shape in (spec.shape, images.shape))
            raise UserError(
                f"teacher {spec.name!r} makes {need} in space {spec.space}, {images.name} has means and standard"
                f" deviations of {have}"
            )
    elif tuple(images.shape) != tuple(wanted):
        need, have = (" x ".join(map(str, shape)) for shape in (wanted, images.shape))
        raise UserError(
            f"teacher {spec.name!r} makes images of {need}, {images.name} has {have}",
            "data.resolution and data.channels change them",
        )
