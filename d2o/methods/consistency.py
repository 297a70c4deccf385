"""Distillation by jumps along the teacher's ODE: consistency distillation (Song et al. 2023, Algorithm 2), progressive
distillation (Salimans & Ho 2022, Algorithm 2), and the trajectory loss of consistency trajectory models (Kim et al.
2024), each as in Table 5 of Zheng & Yang 2024.

x_t = x + t z for real images x. One network call learns to go where small steps of the teacher's solver lead. CD-I of
Zheng & Yang is CD with
`student.freeze: conv`. What papers and code do differently are options; their defaults are those of the paper that is
named above.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from d2o.condition import Condition
from d2o.errors import UserError
from d2o.losses import consistency as c
from d2o.losses.perceptual import load_lpips
from d2o.methods.base import Batch, Draws, Loop, Method, Setup
from d2o.methods.consistency_options import ConsistencyOptions, check
from d2o.methods.teachers import check_teacher
from d2o.networks.build import build_network, network_config, set_dropout
from d2o.networks.copying import follow
from d2o.networks.edm_unet import EDMPrecond
from d2o.networks.second_time import second_time_config, with_second_time
from d2o.students.base import Student
from d2o.students.consistency import ConsistencyStudent, estimate
from d2o.teachers.base import Spec


class Consistency(Method):
    Options = ConsistencyOptions
    data = "images"
    takes = "edm pixel"
    product = "student"

    def __init__(self, setup: Setup):
        self.options: ConsistencyOptions = setup.options
        check(self.options)
        if setup.images is None:
            raise UserError("method consistency needs `data:`")
        self.teacher, self.device, self.batch = check_teacher("consistency", setup.teacher), setup.device, setup.batch
        self.sigma = float(setup.student.sigma)
        self._spec = spec = self.teacher.spec
        teacher = self.teacher.network
        assert isinstance(teacher, EDMPrecond)
        if tuple(setup.images.shape) != spec.shape:
            have, want = (" x ".join(map(str, shape)) for shape in (setup.images.shape, spec.shape))
            raise UserError(
                f"the images are of {have}, those of teacher {spec.name!r} of {want}",
                "data.resolution and data.channels make them fit",
            )
        if setup.images.classes < spec.classes and self.device.type != "meta":
            have = f"{setup.images.classes} classes" if setup.images.classes else "none"
            raise UserError(f"teacher {spec.name!r} has {spec.classes} classes, and the images have {have}")
        self.student = self.first_student(setup, teacher)
        self.stage = Stage(self.options.N if self.options.kind == "pd" else 1)
        self.states_: dict[str, nn.Module] = {}
        if self.options.target == "ema":
            self.states_["target"] = copy.deepcopy(self.student).requires_grad_(False)
        if self.options.kind == "pd":
            self.states_["stage"] = self.stage
            if self.options.stage_target == "previous":
                self.states_["previous"] = copy.deepcopy(self.student).requires_grad_(False).eval()
        self.lpips = (
            load_lpips(self.device, pooling=self.options.lpips_pooling) if self.options.distance == "lpips" else None
        )

    def first_student(self, setup: Setup, teacher: EDMPrecond) -> nn.Module:
        """The teacher's network, or the one to start from, in the preconditioning of its kind: cd has f(x, sigma_min) =
        x built in."""
        kind, precond = self.options.kind, "consistency" if self.options.kind == "cd" else "edm"
        if setup.start is not None:
            old = setup.start
            if not isinstance(old.network, EDMPrecond) or (old.spec.shape, old.spec.classes) != (
                self._spec.shape,
                self._spec.classes,
            ):
                raise UserError(
                    f"the student to start from is not one that teacher {self._spec.name!r} could teach",
                    "its shape or kind is another",
                )
            ready = isinstance(old, ConsistencyStudent) and old.form == "ctm"
            network = copy.deepcopy(old.network) if ready or kind != "ctm" else with_second_time(old.network)
        elif setup.student.init == "teacher":
            network = with_second_time(teacher) if kind == "ctm" else copy.deepcopy(teacher)
        else:
            config = {**network_config(teacher), **(setup.network or {})}
            network = build_network(second_time_config(config) if kind == "ctm" else config)  # type: ignore[assignment]
        network.precond = precond  # type: ignore[assignment]
        network_config(network)["precond"] = precond
        if setup.student.dropout is not None:
            set_dropout(network, setup.student.dropout)
        return network.requires_grad_(True).train()

    def networks(self) -> dict[str, nn.Module]:
        return {"student": self.student}

    def states(self) -> dict[str, nn.Module]:
        return self.states_

    def step(self, loop: Loop, batch: Batch, iteration: int) -> dict[str, Tensor]:
        loss_of = {"cd": self.consistency, "pd": self.progressive, "ctm": self.trajectory}[self.options.kind]
        n, first_stage = self.begin(iteration)
        losses = []
        for micro, draw in loop.micro_batches(batch):
            assert micro.images is not None
            loss = loss_of(loop, micro.images, self.labels(micro), draw, n, first_stage).mean()
            loop.backward(loss)
            losses.append(loss)
        loop.update("student")
        self.follow(iteration)
        course = (
            {"N": torch.tensor(float(n), device=self.device)}
            if self.options.n_schedule != "constant" or self.options.kind == "pd"
            else {}
        )
        return {"loss": loop.mean(losses), **course}

    # One kind each: losses [B] of images x ----------------------------------------------------------------------------

    def consistency(self, loop: Loop, x: Tensor, labels: Tensor | None, draw: Draws, n: int, _: bool) -> Tensor:
        """d(f(x_t, t), sg f(x_u, u)) with u one step below t, x_u one solver step from x_t (Song et al. 2023, eq.
        7)."""
        i, z = self.index(draw, n), draw.randn(*x.shape[1:])
        t, u, end = self.T(i, n), self.T(i - 1, n), self.T(0 * i, n)
        x_t = x + c.column(t, x) * z
        with torch.no_grad():
            x_u = self.solve(x_t, t, u, labels) if self.options.solver != "none" else x + c.column(u, x) * z
            with self.target(loop) as target, self.replayed():
                goal = self.to_end(target, x_u, u, end, labels)
            if self.options.last_hop == "solver":
                goal = torch.where((i == 2)[:, None, None, None], self.solve(x_u, u, end, labels), goal)
        y = self.to_end(loop.net("student"), x_t, t, end, labels)
        return self.weighted(t, u) * self.distance(y, goal)

    def progressive(
        self, loop: Loop, x: Tensor, labels: Tensor | None, draw: Draws, n: int, first_stage: bool
    ) -> Tensor:
        """d(f(x_t, t), the estimate that goes in one step where two half steps lead), over n steps (Table 5, PD)."""
        i = self.index(draw, n)
        t, u, s = self.T(i, n), self.T(i - 0.5, n), self.T(i - 1, n)
        x_t = x + c.column(t, x) * draw.randn(*x.shape[1:])
        with torch.no_grad():
            if first_stage:
                h = self.solve(self.solve(x_t, t, u, labels), u, s, labels)
            else:
                with self.halver(loop) as teacher, self.replayed():
                    h = self.hop(teacher, self.hop(teacher, x_t, t, u, labels), u, s, labels)
        y = estimate(loop.net("student"), "pd", x_t, t, s, labels)
        return self.weighted(t, s) * self.distance(y, c.progressive_target(x_t, h, t, s))

    def trajectory(self, loop: Loop, x: Tensor, labels: Tensor | None, draw: Draws, n: int, _: bool) -> Tensor:
        """d(F(x_t, t, s), H), both taken on to sigma_min by the target network; H goes by the solver to u, and from
        there by the target network to s (Table 5, CTM)."""
        i, z = self.index(draw, n), draw.randn(*x.shape[1:])
        longest = min(self.options.max_hops or n, n)
        most = (i - (min(self.options.lowest, n) - 1)).clamp(max=longest)  # with 1 <= j, where 2 <= i
        hops = _upto(draw, most) + 1 if self.options.hops == "from_1" else _upto(draw, most + 1)
        j = i - hops
        k = _upto(draw, j + 1)
        t, u, s, end = self.T(i, n), self.T(j, n), self.T(k, n), self.T(0 * i, n)
        x_t = x + c.column(t, x) * z
        with torch.no_grad():
            x_u = x_t
            for hop in range(longest):
                at = (i - hop).clamp(min=1)
                x_u = torch.where(
                    (hop < hops)[:, None, None, None], self.solve(x_u, self.T(at, n), self.T(at - 1, n), labels), x_u
                )
            with self.target(loop) as target, self.replayed():
                goal = self.hop(target, self.hop(target, x_u, u, s, labels), s, end, labels)
        x_s = self.hop(loop.net("student"), x_t, t, s, labels)
        with self.target(loop) as target:
            y = self.hop(target, x_s, s, end, labels)
        return self.weighted(t, u) * self.distance(y, goal)

    # Parts ------------------------------------------------------------------------------------------------------------

    def begin(self, iteration: int) -> tuple[int, bool]:
        """The number of steps of this iteration's grid, and whether it is in the first stage. A new stage learns from
        the student as it is now."""
        o = self.options
        if o.kind == "pd":
            n, begin, _ = self.stage_of(iteration)
            if iteration == begin:
                self.stage.steps.fill_(n)
                if "previous" in self.states_:
                    self.states_["previous"].load_state_dict(self.student.state_dict())
            return n, begin == 0
        if o.n_schedule == "constant":
            return o.N - 1 if o.n_counts == "points" else o.N, False
        return self.points(iteration) - 1, False

    def points(self, iteration: int) -> int:
        """N(k) of the schedule."""
        o = self.options
        assert o.schedule_images is not None and o.n_max is not None
        return {"doubling": c.doubling, "adaptive": c.adaptive}[o.n_schedule](
            iteration, -(-o.schedule_images // self.batch), o.N, o.n_max
        )

    def stage_of(self, iteration: int) -> tuple[int, int, int]:
        assert self.options.stage_images is not None
        return c.stage(
            iteration, self.options.N, self.options.final_steps, max(self.options.stage_images // self.batch, 1)
        )

    def rate(self, iteration: int) -> float:
        if self.options.kind != "pd" or not self.options.stage_decay:
            return 1.0
        _, begin, length = self.stage_of(iteration)
        return max(1 - (iteration - begin) / length, 0.0)

    def T(self, i: Tensor, n: int) -> Tensor:
        return c.karras_time(i, n, sigma_max=self.sigma)

    def index(self, draw: Draws, n: int) -> Tensor:
        """i of t = T(i, n), from i_min to n."""
        lowest = min(self.options.lowest, n)
        if self.options.i_sampling == "lognormal":
            return c.lognormal_index(draw.rand(), n, self.options.p_mean, self.options.p_std, self.sigma).clamp(
                min=lowest
            )
        return draw.randint(lowest, n + 1)

    def solve(self, x: Tensor, t: Tensor, u: Tensor, labels: Tensor | None) -> Tensor:
        """One step of the teacher's solver."""
        return c.SOLVERS[self.options.solver](lambda y, level: self.teacher.denoise(y, level, labels), x, t, u)

    def hop(self, network: nn.Module, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
        """F(x_t, t, s) by that network."""
        return c.jump(x, estimate(network, self.options.kind, x, t, s, labels), t, s)

    def to_end(self, network: nn.Module, x: Tensor, t: Tensor, end: Tensor, labels: Tensor | None) -> Tensor:
        """f(x_t, t), or F(x_t, t, sigma_min)."""
        return (
            self.hop(network, x, t, end, labels)
            if self.options.form == "F"
            else estimate(network, "cd", x, t, end, labels)
        )

    def target(self, loop: Loop) -> Any:
        """The network of targets, its parameters held fixed."""
        return _Kept(self.states_["target"]) if self.options.target == "ema" else loop.frozen("student")

    def halver(self, loop: Loop) -> Any:
        """Who takes the two half steps of a later stage."""
        return _Kept(self.states_["previous"]) if self.options.stage_target == "previous" else loop.frozen("student")

    def replayed(self) -> Any:
        """Random numbers drawn inside (dropout) are drawn again after: both forward passes leave out the same
        values."""
        return torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else [])

    @torch.no_grad()
    def follow(self, iteration: int) -> None:
        """theta^- <- mu theta^- + (1 - mu) theta."""
        if self.options.target != "ema":
            return
        mu = self.options.mu
        if self.options.n_schedule == "adaptive":
            mu = c.adaptive_mu(self.points(iteration), self.options.N, mu) if mu else 0.0
        follow(self.states_["target"].parameters(), self.student.parameters(), 1 - mu)

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        return c.distance(self.options.distance, x, y, self.options.huber_reduce, self.lpips)

    def weighted(self, t: Tensor, u: Tensor) -> Tensor:
        kind = self.options.weight or ("truncated_snr" if self.options.kind == "pd" else "uniform")
        return c.weight(kind, t, u).float()

    def labels(self, micro: Batch) -> Tensor | None:
        """Classes for a teacher that takes them; a plan without its images has none, and counts with 0."""
        assert micro.images is not None
        if not self._spec.classes:
            return None
        return (
            micro.condition.labels
            if micro.condition.labels is not None
            else micro.images.new_zeros(len(micro.images), dtype=torch.int64)
        )

    # The product ------------------------------------------------------------------------------------------------------

    def made(self, network: nn.Module) -> ConsistencyStudent:
        return ConsistencyStudent(
            network,
            self._spec,
            self.sigma,
            self.options.kind,
            int(self.stage.steps),
            self.options.middle,
            self.options.clamp,
        )

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "student",
            "network": network_config(self.student),
            "spec": self._spec,
            "student": self.made(self.student).record,
        }

    def spec(self) -> Spec:
        return self._spec

    def nfe(self) -> int:
        return self.options.final_steps if self.device.type == "meta" else int(self.stage.steps)

    def generate(self, product: nn.Module, noise: Tensor, condition: Condition) -> Tensor:
        student: Student = self.made(product)
        return student.decode(student(noise, condition))


class Stage(nn.Module):
    """The steps that the student can do now, kept for runs that are resumed."""

    def __init__(self, steps: int):
        super().__init__()
        self.steps: Tensor
        self.register_buffer("steps", torch.tensor(steps))


class _Kept:
    """A network that is fixed anyway, as a context like `Loop.frozen`."""

    def __init__(self, network: nn.Module):
        self.network = network

    def __enter__(self) -> nn.Module:
        return self.network

    def __exit__(self, *_: object) -> None: ...


def _upto(draw: Draws, n: Tensor) -> Tensor:
    """Uniform integers of {0, ..., n - 1}, for each sample its own n [B]."""
    return (draw.rand().to(torch.float64) * n).floor().to(torch.int64)


METHOD = Consistency
