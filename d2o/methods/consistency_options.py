"""The switches of method `consistency`, and which of them go together."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from d2o.errors import UserError
from d2o.methods.base import Options
from d2o.students.consistency import MIDDLE


class ConsistencyOptions(Options):
    kind: Literal["cd", "pd", "ctm"] = Field(
        "cd", description="consistency or progressive distillation, or the trajectory loss of CTM"
    )
    distance: Literal["l2", "l1", "pseudo_huber", "lpips"] = Field(
        "l2", description="distance to the target; lpips: over VGG-16, at 224 x 224"
    )
    huber_reduce: Literal["vector", "element"] = Field(
        "vector", description="pseudo-Huber norm over the whole sample, or value by value"
    )
    lpips_pooling: Literal["avg", "max"] = Field(
        "avg", description="poolings of LPIPS: as Song et al. 2023, or as VGG-16 was trained"
    )
    weight: Literal["uniform", "inverse_gap", "truncated_snr"] | None = Field(
        None,
        description=(
            "weight of a sample: 1, 1 / (t - u), or max(1 / t^2, 1) (default none: pd truncated_snr, others uniform)"
        ),
    )
    N: int = Field(18, ge=1, description="noise levels; pd: the student's steps in the first stage")
    n_counts: Literal["points", "steps"] = Field(
        "points",
        description=(
            "what N counts: the points of the grid (Song et al. 2023), or its steps (Table 5); pd always has N steps"
        ),
    )
    n_schedule: Literal["constant", "doubling", "adaptive"] = Field(
        "constant",
        description=(
            "N in the course of training: constant; doubled from N to n_max (iCT); by CT's square root (both count"
            " points)"
        ),
    )
    n_max: int | None = Field(None, ge=2, description="s1 of the schedule, the largest N less 1; its s0 is N")
    schedule_images: int | None = Field(None, ge=1, description="images over which the schedule of N runs")
    i_min: Literal[1, 2] | None = Field(
        None,
        description=(
            "lowest index of t on the grid (default none: as Table 5, 2 for ctm, whose solver then stops one step above"
            " sigma_min, else 1; the authors' code has 2 for cd too)"
        ),
    )
    i_sampling: Literal["uniform", "lognormal"] = Field(
        "uniform", description="distribution of that index: uniform, or after ln t ~ N (iCT)"
    )
    p_mean: float = Field(-1.1, description="mean of ln t for lognormal")
    p_std: float = Field(2.0, gt=0, description="standard deviation of ln t for lognormal")
    solver: Literal["heun", "euler", "none"] = Field(
        "heun", description="teacher's solver; none: x + u z instead of the teacher, which is consistency training (cd)"
    )
    target: Literal["stopgrad", "ema"] = Field(
        "stopgrad", description="network of the target: the student itself, or a moving average of it"
    )
    mu: float = Field(
        0.95, ge=0, lt=1, description="decay of that average, an iteration; with n_schedule adaptive its mu_0"
    )
    form: Literal["f", "F"] = Field(
        "f", description="what cd compares: f(x_t, t) (Song et al. 2023), or F(x_t, t, sigma_min) (Table 5)"
    )
    last_hop: Literal["student", "solver"] = Field(
        "student",
        description=(
            "the way from one step above sigma_min, in cd's target: the student's, or the solver's (Zheng & Yang's"
            " code)"
        ),
    )
    max_hops: int | None = Field(
        None, ge=1, description="most solver steps from t to u (ctm; default none: down to sigma_min)"
    )
    hops: Literal["from_1", "from_0"] = Field(
        "from_1", description="fewest solver steps from t to u (ctm): one, or none (Table 5 has u <= t)"
    )
    final_steps: int = Field(1, ge=1, description="steps at which halving ends (pd); the student's network calls")
    stage_images: int | None = Field(
        None, ge=1, description="images of a stage (pd); those of 2 steps and of 1 are twice as long"
    )
    stage_decay: bool = Field(True, description="let the learning rate fall to 0 in every stage, linearly (pd)")
    stage_target: Literal["previous", "student"] = Field(
        "previous",
        description=(
            "who takes the two steps after the first stage (pd): the student of the stage before, or the one in"
            " training"
        ),
    )
    middle: float = Field(
        MIDDLE,
        gt=0,
        lt=1,
        description="place of the second call's noise level on Karras' scale, 0 the lowest, 1 the highest",
    )
    clamp: bool = Field(
        True,
        description=(
            "the student brings its estimate of the clean image into [-1, 1] at every call, as the sampler of Song et "
            "al. 2023 does; never in latent spaces"
        ),
    )

    @property
    def lowest(self) -> int:
        """`i_min`, or what the kind has."""
        return self.i_min or (2 if self.kind == "ctm" else 1)


def check(o: ConsistencyOptions) -> None:
    """UserError for options that contradict each other."""
    kinds = {
        "solver: none (consistency training)": (o.solver == "none", ("cd",)),
        "form: F": (o.form == "F", ("cd",)),
        "last_hop: solver": (o.last_hop == "solver", ("cd",)),
        "target: ema": (o.target == "ema", ("cd", "ctm")),
        "i_min: 2": (o.i_min == 2, ("cd", "ctm")),
        f"n_schedule: {o.n_schedule}": (o.n_schedule != "constant", ("cd", "ctm")),
        "i_sampling: lognormal": (o.i_sampling == "lognormal", ("cd", "ctm")),
        "max_hops": (o.max_hops is not None, ("ctm",)),
        "hops: from_0": (o.hops == "from_0", ("ctm",)),
        "final_steps": (o.final_steps != 1, ("pd",)),
        "stage_images": (o.stage_images is not None, ("pd",)),
    }
    for what, (asked, fit) in kinds.items():
        if asked and o.kind not in fit:
            raise UserError(f"consistency.{what} is for kind {' and '.join(fit)}, not for {o.kind}")
    if o.solver == "none" and o.last_hop == "solver":
        raise UserError("consistency.last_hop: solver needs a solver, and there is none")
    if o.kind == "pd":
        ratio = o.N // o.final_steps
        if o.N % o.final_steps or ratio & (ratio - 1):
            raise UserError(
                f"consistency.N: {o.N} steps cannot be halved down to {o.final_steps}",
                "N is final_steps times a power of 2",
            )
        if o.stage_images is None:
            raise UserError("consistency.stage_images is missing: pd needs the length of a stage in images")
    elif o.N < 2 and o.n_counts == "points":
        raise UserError(
            "consistency.N: a grid has at least 2 points", "consistency.n_counts: steps counts its steps instead"
        )
    if o.n_schedule != "constant" and (o.n_max is None or o.schedule_images is None):
        raise UserError(f"consistency.n_schedule: {o.n_schedule} needs n_max and schedule_images")
    if o.n_max is not None and o.n_max < o.N:
        raise UserError(f"consistency.n_max: {o.n_max} is below N = {o.N}, with which the schedule begins")
