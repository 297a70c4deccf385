"""What methods with a score network share: how student and score network begin, how both scores are asked, what is
checked of real images."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from d2o.condition import Condition
from d2o.data.latents import LatentSet
from d2o.errors import UserError
from d2o.methods.base import Method, Setup
from d2o.networks.build import build_network, network_config, set_dropout
from d2o.networks.edm2_unet import EDM2Precond, remove_uncertainty
from d2o.networks.precond import Denoiser
from d2o.students.base import Student
from d2o.teachers.base import Spec, Teacher


class ScoreMethod(Method):
    """A method that trains a student and, beside it, a score network of the student's images."""

    product = "student"
    student: Student
    takes = "edm"
    score: Any  # the teacher's class of network
    teacher: Teacher

    def networks(self) -> dict[str, nn.Module]:
        return {"student": self.student, "score": self.score}

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "student",
            "network": network_config(self.student.network),
            "spec": self.student.spec,
            "student": self.student.record,
        }

    def spec(self) -> Spec:
        return self.student.spec

    def generate(self, product: nn.Module, noise: Tensor, condition: Condition) -> Tensor:
        return self.teacher.decode(product(noise, condition))


def start_student(method: str, setup: Setup, teacher: Teacher, at_sigma_max: bool = False) -> Student:
    """A copy of `setup.start`, or what `setup.student` says, without EDM2's uncertainty head. UserError: it does not
    fit the teacher, or is not called where the recipe says, or (unless `at_sigma_max`) at the teacher's highest noise
    level, the recipes' default, where it starts as a mean.
    """
    sigma = float(setup.student.sigma)
    if setup.start is not None:
        student = copy.deepcopy(setup.start)
        if type(student) is not Student or not isinstance(student.network, Denoiser):
            raise UserError(
                f"method {method} trains students of one call of a denoiser; the one to start from is of kind"
                f" {student.record['kind']}"
            )
        if (student.spec.shape, student.spec.classes) != (teacher.spec.shape, teacher.spec.classes):
            theirs = f"{student.spec.shape} with {student.spec.classes} classes"
            raise UserError(f"the student to start from makes {theirs}, teacher {teacher.spec.name!r} other images")
        if student.sigma != sigma:
            raise UserError(
                f"student.sigma is {sigma:g}, but the student to start from is called at {student.sigma:g}",
                f"set student.sigma: {student.sigma:g}",
            )
    else:
        if sigma >= teacher.spec.sigma_max and not at_sigma_max:
            raise UserError(
                f"student.sigma is {sigma:g}, the teacher's highest noise level, of which its denoiser makes a mean of"
                " all images",
                f"method {method} calls its student at sigma_init: set student.sigma: 2.5",
            )
        scratch = setup.student.init == "scratch"
        config = {**network_config(teacher.network), **(setup.network or {})}
        student = Student(build_network(config) if scratch else copy.deepcopy(teacher.network), teacher.spec, sigma)
    if setup.student.dropout is not None:
        set_dropout(student.network, setup.student.dropout)
    remove_uncertainty(student.network)  # it is about noise levels, and a student has one
    return student.requires_grad_(True).train()


def start_score(teacher: Teacher, dropout: float | None = None, uncertainty: bool = True) -> Any:
    """The score network: a copy of the teacher's to be trained, with another dropout if given, without EDM2's
    uncertainty head if asked."""
    score = copy.deepcopy(teacher.network)
    if dropout is not None:
        set_dropout(score, dropout)
    if not uncertainty:
        remove_uncertainty(score)
    return score.requires_grad_(True).train()


def has_uncertainty(network: nn.Module) -> bool:
    """Whether this is an EDM2 denoiser with the head for u(sigma)."""
    return isinstance(network, EDM2Precond) and network.logvar_linear is not None


def look(
    net: nn.Module,
    x_t: Tensor,
    sigma: Tensor,
    labels: Tensor | None,
    part: str = "decoder",
    augment_labels: Tensor | None = None,
) -> Any:
    """(denoised, map, uncertainty) from one pass of a score network at sigma [B, 1, 1, 1]; None for what `part` leaves
    out or the network has not."""
    asked: dict[str, Any] = {} if part == "decoder" else {"part": part}
    if augment_labels is not None:
        asked["augment_labels"] = augment_labels
    uncertain = has_uncertainty(net)
    if uncertain:
        asked["return_logvar"] = True
    found = net(x_t, sigma.flatten(), labels, **asked)
    results = list(found) if isinstance(found, tuple) else [found]
    denoised = results.pop(0) if part != "encoder" else None
    return denoised, results.pop(0) if part != "decoder" else None, results.pop() if uncertain else None


def true_score(
    teacher: Teacher, x_t: Tensor, sigma: Tensor, labels: Tensor | None, precision: str | None = None
) -> Tensor:
    """The teacher's denoised images at sigma [B, 1, 1, 1], in "fp32", "bf16", "fp16", or as the surroundings are
    (None). Gradients flow to x_t; the weights are frozen, and nothing is kept for theirs."""
    half: AbstractContextManager = nullcontext()
    if precision is not None and x_t.device.type != "meta":
        half = torch.autocast(
            x_t.device.type, torch.float16 if precision == "fp16" else torch.bfloat16, enabled=precision != "fp32"
        )
    with half:
        return teacher.network(x_t, sigma.flatten(), labels)


def labels_of_images(method: str, setup: Setup, spec: Spec) -> Tensor | None:
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


def check_real_images(method: str, setup: Setup, teacher: Teacher) -> None:
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
