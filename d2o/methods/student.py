"""What all methods that train a student share: how the student begins, which conditions it is asked for, and what its
checkpoints say."""

from __future__ import annotations

import copy
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from d2o.condition import Asked, Condition, Embedded, Guided
from d2o.data.prompts import Prompts
from d2o.diffusion.guidance import Range
from d2o.errors import UserError
from d2o.inputs import JsonObject
from d2o.methods.adapters import begin_lora
from d2o.methods.base import Batch, Draws, Method, O, Setup
from d2o.networks.build import build_network, network_config, set_dropout
from d2o.networks.config import Config
from d2o.networks.lora import merged, train_lora
from d2o.networks.scale_input import add_scale_input
from d2o.students.base import Student, make_student
from d2o.students.few_step import FewStepStudent, spaced_levels
from d2o.teachers.base import Spec, Teacher, embed_labels


class StudentMethod(Method[O]):
    """Trains a student: from a teacher, or (GANs) from images alone.

    What is trained under the name `product` is the student itself, or its network where `made` makes the student of
    it.
    """

    product = "student"
    continues: ClassVar[tuple[str, ...]] = ("denoiser",)  # kinds of students that `d2o finetune --from` may start from
    teacher: Teacher | None = None
    labels_of_data: Tensor | None = None  # classes to draw from, [n]; None: all are equally likely
    prompts: Prompts | None = None  # to draw from, for a teacher that takes text
    device: torch.device = torch.device("cpu")
    _spec: Spec  # of what the student makes

    # How it begins ----------------------------------------------------------------------------------------------------

    def begin(self, setup: Setup[O], spec: Spec, own: Config | None = None) -> nn.Module:
        """The student's network as training begins, all of it to be trained: a copy of that of `setup.start`, of the
        teacher's, or, for `student.init: scratch` and without a teacher, one with random weights, whose configuration
        `own` (default: the teacher's) the recipe's `network:` changes. For `student.lora` the teacher's own weights
        with adapters, which alone are trained; without it, those of `setup.start` are merged into its weights.
        UserError: `setup.start` does not fit."""
        self.device, self.prompts = setup.device, setup.prompts
        if getattr(setup.student, "steps", 1) != 1 and not self.few_steps:
            what = f"student.steps: method {self.name} has no students of {setup.student.steps} steps by these losses"
            raise UserError(what, "leave it away, or take method diffusion2gan, gdd or ode")
        teacher = None if self.teacher is None else self.teacher.network
        lora = getattr(setup.student, "lora", None)
        if setup.start is not None:
            self.check_start(setup, setup.start, spec)
        if lora is not None:
            if type(self).copied is not StudentMethod.copied:
                what = f"student.lora: method {self.name} changes the network itself, which a LoRA cannot hold"
                raise UserError(what, "student.lora: null trains all weights")
            network: nn.Module = begin_lora(lora, self.teacher, setup)
        elif setup.start is not None:
            network = self.copied(merged(setup.start.network), setup.start)
        elif teacher is not None and setup.student.init == "teacher":
            network = self.copied(teacher)
        else:
            given = own if teacher is None else network_config(teacher)
            network = self.scratch({**(given or {}), **(setup.network or {})})
        if setup.student.dropout is not None:
            set_dropout(network, setup.student.dropout)
        if lora is not None:
            train_lora(network)
        else:
            network.requires_grad_(True)
        return network.train()

    def begin_student(self, setup: Setup[O], spec: Spec) -> Student:
        """`begin`, as a student: called at `student.sigma`, or of the kind and as the one that it starts from; told the
        guidance scale where each pair has its own."""
        network, start, guidance = self.begin(setup, spec), setup.start, setup.guidance
        if guidance is not None and (start is None or start.guidance is None):
            if getattr(setup.student, "lora", None) is not None:
                what = "student.lora: a LoRA has no place for the input by which a student is told the guidance scale"
                raise UserError(what, "give pairs.cfg one number, or train all weights (student.lora: null)")
            add_scale_input(network)
        if start is not None:
            told = {} if guidance is None else {"guidance": guidance}
            student = make_student(network, start.spec, {**start.record, **told})
        else:
            student = Student(network, spec, setup.student.sigma, getattr(setup.student, "begins", "noise"), guidance)
        return self.of_steps(setup, student)

    def of_steps(self, setup: Setup[O], student: Student) -> Student:
        """The student, called `student.steps` times for a sample. UserError: it is another number's already."""
        asked = setup.student
        steps, levels = getattr(asked, "steps", 1), getattr(asked, "levels", None)
        if levels is not None and len(levels) != steps - 1:
            raise UserError(
                f"student.levels: {len(levels)} levels for {steps} steps; the first step is at student.sigma",
                f"give {steps - 1}, or leave it away",
            )
        if steps == 1 or (steps == student.nfe and levels is None):
            return student
        if type(student) is not Student:
            raise UserError(
                f"student.steps: {steps}, and the student to start from makes an image in {student.nfe} calls",
                "leave student.steps and student.levels away",
            )
        then = spaced_levels(student.network, student.sigma, steps) if levels is None else levels
        return FewStepStudent(student.network, student.spec, student.sigma, then, student.begins, student.guidance)

    def copied(self, network: nn.Module, start: Student | None = None) -> nn.Module:
        """A copy of the teacher's network, or of that of the student `start`, in the form that is trained."""
        return copy.deepcopy(network)

    def scratch(self, config: Config) -> nn.Module:
        """A network of this configuration with random weights, in the form that is trained."""
        return build_network(config)

    def check_start(self, setup: Setup[O], start: Student, spec: Spec) -> None:
        """UserError: this method cannot go on with that student, or it makes something else."""
        if (kind := start.record["kind"]) not in self.continues:
            known = " and ".join(self.continues)
            raise UserError(
                f"method {self.name} goes on with students of kind {known}; the one to start from is of kind {kind}"
            )
        if start.guidance is not None and setup.guidance is None:
            what = f"the student to start from is told the guidance scale, {start.guidance[0]:g} to"
            hint = "diffusion2gan and ode go on with it, with `pairs.cfg: [1, 8]`"
            raise UserError(f"{what} {start.guidance[1]:g}, and here samples have none", hint)
        if (start.spec.shape, start.spec.classes) != (spec.shape, spec.classes):
            theirs = f"{start.spec.shape} with {start.spec.classes} classes"
            who = "the data has" if self.teacher is None else f"teacher {spec.name!r} makes"
            raise UserError(f"the student to start from makes {theirs}, {who} other images")

    # What it is asked for ---------------------------------------------------------------------------------------------

    def draw_condition(self, draw: Draws) -> Condition:
        """Of a micro-batch's samples: prompts of the recipe, classes, all equally likely or as they occur in the data,
        or nothing. UserError: a teacher that takes text, and no prompts."""
        if self._spec.condition == "text":
            if self.prompts is None:
                raise UserError(
                    f"method {self.name} draws prompts for its student, and the recipe names none",
                    "prompts: FILE (txt, jsonl, parquet)",
                )
            return Condition.of_prompts(self.prompts.many(draw.picks(len(self.prompts))))
        if not self._spec.classes:
            return Condition.none(draw.count)
        if self.labels_of_data is None:
            return Condition.of_labels(draw.randint(0, self._spec.classes))
        return Condition.of_labels(self.labels_of_data[draw.randint(0, len(self.labels_of_data))])

    def condition_of(self, micro: Batch) -> Condition:
        """Of the samples of the batch, as far as the student is asked; a plan without its images has no classes, and
        counts with 0."""
        if self._spec.condition == "none":
            return Condition.none(len(micro))
        if self._spec.classes and micro.condition.kind == "none":
            return Condition.of_labels(torch.zeros(len(micro), dtype=torch.int64, device=self.device))
        return micro.condition

    def check_guidance(self, key: str, cfg: float) -> None:
        """UserError: the recipe's `key` asks for guidance, and the teacher cannot be guided."""
        assert self.teacher is not None
        try:
            self.teacher.check_cfg(cfg)
        except UserError as error:
            raise UserError(f"{self.name}.{key}: {error.message}", f"leave {self.name}.{key} away") from error

    def check_latents(self, key: str, asked: str, images_only: tuple[str, ...]) -> None:
        """UserError: the recipe's `key` asks for a distance of images, and the teacher makes latents."""
        if asked in images_only and self.teacher is not None and self.teacher.spec.latent:
            raise UserError(
                f"{self.name}.{key}: {asked} compares images, and teacher {self.teacher.spec.name!r} makes latents",
                f"{self.name}.{key}: {'l2' if self.name in ('cd', 'pd', 'ctm') else 'mse'} compares latents as well",
            )

    def reals(self, micro: Batch, draw: Draws) -> Tensor:
        """The real images, in the teacher's space."""
        assert micro.images is not None
        if self.teacher is None or not self._spec.latent:
            return micro.images
        return self.teacher.space.encode(micro.images, draw.randn(*self._spec.shape))

    def embedded(self, condition: Condition | Embedded) -> Embedded:
        """What the networks take, on the device; what is embedded already comes back as it is."""
        if self.teacher is None:
            return embed_labels(self._spec, condition, self.device)
        return self.teacher.embed(condition)

    def asked(self, condition: Condition | Embedded) -> Asked:
        """`embedded`, with the guidance scales where the student is told them."""
        found = self.embedded(condition)
        scale = condition.guidance if isinstance(condition, Condition) else None
        return found if scale is None else Guided(found, scale)

    # The product ------------------------------------------------------------------------------------------------------

    def made(self, product: nn.Module) -> Student:
        """The student of which `product`, the trained network or its average, is the network."""
        return cast(Student, product)

    def describe(self) -> JsonObject:
        student = self.made(self.players()[self.product])
        network = network_config(student.network)
        return {"kind": "student", "network": network, "spec": student.spec, "student": student.record}

    def spec(self) -> Spec:
        return self._spec

    def nfe(self) -> int:
        return self.made(self.players()[self.product]).nfe

    def scales(self) -> Range | None:
        return self.made(self.players()[self.product]).guidance

    def generate(self, product: nn.Module, noise: Tensor, condition: Condition) -> Tensor:
        student = self.made(product)
        return student.decode(student(noise, self.asked(condition)))
