"""A one-call student of a diffusers network as diffusers calls it: its network, and a scheduler whose single step is
the student's call.

Discrete schedules: EulerDiscreteScheduler works in EDM's own coordinates, x = sigma z, asks the network at x / sqrt(1 +
sigma^2) and steps to sigma 0 (or, for students that jump along the ODE, to the lowest level). Its betas end at the
student's level, so that one step begins there; the weights stay as they are. A student that begins with x_T = z goes
with DDIMScheduler, whose one step from there to x_0 is the same call.

Flow matching: FlowMatchEulerDiscreteScheduler begins at t = 1 with x = z and gives z - v. A student is A z - B v(C z,
t): C goes into the first layer, B / A into the last, A into the autoencoder's scaling factor, and the difference of the
embeddings of t and 1 into the time embedding's bias. All of it is exact.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from d2o.diffusion.levels import DiscreteLevels, FlowLevels
from d2o.diffusion.schedules import DiscreteSchedule
from d2o.errors import UserError
from d2o.networks.edm_view import EDMView, lowest_level
from d2o.networks.lora import merged
from d2o.networks.second_time import second_time
from d2o.students.base import Student
from d2o.students.consistency import ConsistencyStudent
from d2o.students.few_step import FewStepStudent, spaced_levels

if TYPE_CHECKING:
    from diffusers import ModelMixin, SchedulerMixin


@dataclass(frozen=True)
class OneCall:
    """`network`: diffusers' own; `scheduler`: likewise; `scale`: latents come out as those of the student over
    `scale`."""

    network: ModelMixin
    scheduler: SchedulerMixin
    scale: float = 1.0


def one_call(student: Student, path: str | Path) -> OneCall:
    """UserError, naming `path`: a student of several calls, or of a network that is not diffusers'."""
    view = student.network
    if not isinstance(view, EDMView):
        raise UserError(
            f"{path} is a student of a network that diffusers does not have ({type(view).__name__})",
            "--format onnx, program and safetensors write it; diffusers is for students of teachers in its format",
        )
    if student.guidance is not None and not view.told:
        raise UserError(f"{path} is told a guidance scale by an input that diffusers' {view.kind} does not have")
    if student.nfe != 1 and not _trailing(student):
        what = f"{path} makes an image in {student.nfe} network calls; the folder would hold one of them"
        held = "it holds all of a U-Net's few-step student with the usual `student.levels` that ends at x0 or, begun"
        raise UserError(what, f"{held} from noise, at the lowest level; --format onnx and program write the others")
    with torch.no_grad():
        whole: Any = merged(view)  # a copy, where there was something to merge
        net = (copy.deepcopy(view.net) if whole is view else whole.net).eval()
        _without_variance(net)
        _without_second_time(view, net, student)
        if isinstance(view.levels, FlowLevels):
            return _flow(view, net, student)
        assert isinstance(view.levels, DiscreteLevels)
        return OneCall(net, _discrete(view, view.levels, student))


def unclamped(student: Student) -> Student:
    """The student without the clipping inside of its call, which diffusers does not do."""
    if not isinstance(student, ConsistencyStudent):
        return student
    other = copy.copy(student)
    other.clamp = False
    return other


def _trailing(student: Student) -> bool:
    """Whether its calls are the steps of diffusers' schedulers with trailing spacing, the last one to 0 or, as Euler's
    alone, to the lowest level."""
    if not isinstance(student, FewStepStudent) or not isinstance(student.network.levels, DiscreteLevels):
        return False
    lowest = math.isclose(student.last, lowest_level(student.network), rel_tol=1e-6)
    if student.last and not (lowest and student.begins == "noise"):
        return False
    return list(student.levels[1:]) == spaced_levels(student.network, student.sigma, student.nfe)


def _jumps(student: Student) -> bool:
    """Whether it goes along the ODE to the lowest level, not to 0."""
    return isinstance(student, ConsistencyStudent) or (isinstance(student, FewStepStudent) and student.last > 0)


def _discrete(view: EDMView, levels: DiscreteLevels, student: Student) -> SchedulerMixin:
    import diffusers

    last = int(levels.time(torch.tensor(student.sigma, dtype=torch.float64)).round())
    if last == 0:
        raise UserError("a student that is called at the lowest noise level of its schedule has no step of its own")
    bar = DiscreteSchedule.from_config(view.config["schedule"]).alphas_cumprod[: last + 1]
    betas = DiscreteSchedule(bar).record()["trained_betas"]
    if student.begins == "x_T":
        return diffusers.DDIMScheduler(
            num_train_timesteps=last + 1,
            trained_betas=betas,
            prediction_type=view.prediction,
            timestep_spacing="trailing",
            clip_sample=False,
            set_alpha_to_one=True,
            steps_offset=1,  # which pipelines ask for, and these steps do not use
        )
    return diffusers.EulerDiscreteScheduler(
        num_train_timesteps=last + 1,
        trained_betas=betas,
        prediction_type=view.prediction,
        timestep_spacing="trailing",
        final_sigmas_type="sigma_min" if _jumps(student) else "zero",
    )


def _flow(view: EDMView, net: ModelMixin, student: Student) -> OneCall:
    import diffusers

    sigma, low = student.sigma, lowest_level(view)
    t = sigma / (1 + sigma)
    part = (sigma - low) / sigma if _jumps(student) else 1.0  # of the way to the estimate that is taken
    a, b = (part * (1 - t) + 1 - part) * sigma, part * t
    net.pos_embed.proj.weight.mul_(t)
    for parameter in (net.proj_out.weight, net.proj_out.bias):
        parameter.mul_(b / a)
    steps = view.config["schedule"]["train_steps"]
    embedder = net.time_text_embed.timestep_embedder

    def embedded(time: float) -> Tensor:
        return embedder(net.time_text_embed.time_proj(torch.tensor([time])).to(embedder.linear_1.weight.dtype))[0]

    embedder.linear_2.bias.add_(embedded(steps * t) - embedded(steps))
    return OneCall(net, diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=steps, shift=1.0), a)


def _without_variance(net: ModelMixin) -> None:
    """Keep the channels of the prediction of a network that predicts a variance as well."""
    channels, last = net.config.in_channels, getattr(net, "conv_out", None)
    if last is None or last.out_channels == channels:
        return
    last.weight, last.bias = nn.Parameter(last.weight[:channels]), nn.Parameter(last.bias[:channels])
    last.out_channels = channels
    net.register_to_config(out_channels=channels)


def _without_second_time(view: EDMView, net: ModelMixin, student: Student) -> None:
    """A student by trajectories is told where it goes by a term of the time embedding, here always the same."""
    if view.map_augment is None or getattr(student, "form", "") != "ctm":
        return
    told = view.map_augment(second_time(torch.tensor([lowest_level(view)], dtype=torch.float64)))[0]
    place = net.time_text_embed.timestep_embedder if view.kind == "SD3Transformer2DModel" else net.time_embedding
    place.linear_2.bias.add_(told)
