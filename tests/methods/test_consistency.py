"""Each kind's step against its equation and against an ODE that is known, its switches, and through the loop."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from d2o.condition import Condition
from d2o.errors import UserError
from d2o.features import common, lpips
from d2o.losses import consistency as c
from d2o.methods.base import Batch, Draws, Setup, get_method
from d2o.methods.cd import CDOptions
from d2o.methods.jumps import JumpMethod
from d2o.methods.pd import PDOptions
from d2o.networks.second_time import second_time
from d2o.recipes.load import load_recipe
from d2o.recipes.plan import make_plan
from d2o.recipes.schema import Recipe
from d2o.students.base import Student, load_student
from d2o.students.consistency import ConsistencyStudent
from d2o.teachers.base import Spec, Teacher
from tests.helpers import SPEC, tiny_network, tiny_student, tiny_teacher
from tests.methods.test_latent import train
from tests.methods.test_methods import CPU, Images, OneStep

N = 6


def method(teacher=None, student=None, start=None, images=None, batch=8, kind="cd", **options) -> JumpMethod:
    torch.manual_seed(0)
    section = SimpleNamespace(sigma=80.0, init="teacher", dropout=None, **(student or {}))
    made = get_method(kind)
    return made(
        Setup(
            made.Options(**{"N": N + 1, **options}),
            teacher=teacher or tiny_teacher(),
            student=section,
            images=images or Images(),
            start=start,
            batch=batch,
        )
    )


def batch(n: int = 8) -> Batch:
    return Batch(
        images=torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(5)) * 2 - 1,
        condition=Condition.of_labels(torch.arange(n) % 10),
    )


def pd(**options) -> JumpMethod:
    return method(**{"kind": "pd", "N": 4, "stage_images": 16, **options})


def step(m: JumpMethod, data: Batch | None = None, iteration: int = 0):
    loop = OneStep(m, data or batch())
    return m.step(loop, loop.batch, iteration), loop


def T(i, n=N):
    return c.karras_time(i, n)


def col(t):
    return t.float()[:, None, None, None]


def test_the_student_begins_as_the_teacher_and_is_the_identity_at_the_end():
    teacher, x, labels = tiny_teacher(), torch.randn(4, 1, 8, 8), torch.arange(4)
    m = method(teacher)
    assert torch.equal(m.student(x, torch.full((4,), 0.002), labels), x)
    high = torch.full((4,), 80.0)
    assert torch.allclose(m.student(80 * x, high, labels), teacher.denoise(80 * x, 80.0, labels), atol=0.02)
    assert (
        m.student.config["precond"] == "consistency" and "precond" not in teacher.network.config
    )  # and the teacher stays what it was
    for other in (pd(), method(kind="ctm")):
        assert other.student.config["precond"] == "edm"


def test_cd_is_algorithm_2():
    m, data = method(), batch()
    scalars, loop = step(m, data)
    draw, teacher = Draws(3, 0, 8, 8, CPU), tiny_teacher()
    i, z = draw.randint(1, N + 1), draw.randn(1, 8, 8)
    t, u = T(i), T(i - 1)
    x_t = data.images + col(t) * z
    slope = (x_t - teacher.denoise(x_t, t, data.condition.labels)) / col(t)
    x_u = x_t + col(u - t) * slope
    x_u = x_t + col(u - t) * 0.5 * (slope + (x_u - teacher.denoise(x_u, u, data.condition.labels)) / col(u))
    f = method().student
    expected = (f(x_t, t, data.condition.labels) - f(x_u, u, data.condition.labels)).square().mean()
    assert scalars["loss"].item() == pytest.approx(expected.item(), rel=1e-4) and loop.updated == ["student"]
    goal = f(x_u, u, data.condition.labels).detach()  # the target has no gradient
    (f(x_t, t, data.condition.labels) - goal).square().mean().backward()
    for (name, mine), theirs in zip(f.named_parameters(), m.student.parameters()):
        assert torch.allclose(mine.grad, theirs.grad, rtol=1e-3, atol=1e-6), name


def test_cd_in_the_form_of_table_5():
    m, data = method(form="F", last_hop="solver", i_min=2, weight="inverse_gap", distance="l1", solver="euler"), batch()
    scalars, _ = step(m, data)
    draw, teacher, f = Draws(3, 0, 8, 8, CPU), tiny_teacher(), method().student
    i, z = draw.randint(2, N + 1), draw.randn(1, 8, 8)
    t, u, s = T(i), T(i - 1), T(0 * i)
    x_t = data.images + col(t) * z
    x_u = c.euler_step(lambda x, at: teacher.denoise(x, at, data.condition.labels), x_t, t, u)
    H = c.jump(x_u, f(x_u, u, data.condition.labels), u, s)
    by_solver = c.euler_step(lambda x, at: teacher.denoise(x, at, data.condition.labels), x_u, u, s)
    assert (i == 2).any() and (i > 2).any()
    H = torch.where((i == 2)[:, None, None, None], by_solver, H)
    d = (c.jump(x_t, f(x_t, t, data.condition.labels), t, s) - H).abs().flatten(1).mean(1)
    assert scalars["loss"].item() == pytest.approx((d / (t - u)).mean().item(), rel=1e-4)


def test_consistency_training_needs_no_teacher_s_score():
    m, data = method(solver="none", n_counts="steps", N=N), batch()
    scalars, _ = step(m, data)
    draw, f = Draws(3, 0, 8, 8, CPU), method().student
    i, z = draw.randint(1, N + 1), draw.randn(1, 8, 8)
    y, goal = (f(data.images + col(T(j)) * z, T(j), data.condition.labels) for j in (i, i - 1))
    assert scalars["loss"].item() == pytest.approx((y - goal).square().mean().item(), rel=1e-4)


def test_pd_is_algorithm_2_and_learns_from_the_stage_before():
    m, data, teacher = pd(solver="euler"), batch(), tiny_teacher()

    def by_hand(f, n, take):
        draw = Draws(3, 0, 8, 8, CPU)
        i, z = draw.randint(1, n + 1), draw.randn(1, 8, 8)
        t, u, s = T(i, n), T(i - 0.5, n), T(i - 1, n)
        x_t = data.images + col(t) * z
        h = take(take(x_t, t, u), u, s)
        target = x_t - col(t) * (h - x_t) / col(s - t)
        return (
            ((f(x_t, t, data.condition.labels) - target).square().flatten(1).mean(1) * (1 / t**2).clamp(min=1))
            .mean()
            .item()
        )

    def solver(x, t, u):
        return c.euler_step(lambda y, at: teacher.denoise(y, at, data.condition.labels), x, t, u)

    first, _ = step(m, data)
    assert first["loss"].item() == pytest.approx(by_hand(pd().student, 4, solver), rel=1e-4) and first["N"] == 4
    with torch.no_grad():  # training goes on
        m.student.model.map_layer0.weight.mul_(1.5)
    before = copy.deepcopy(m.student)
    second, _ = step(m, data, 2)  # stages of 16 images are 2 iterations
    assert second["N"] == 2 == m.nfe() and second["loss"].item() == pytest.approx(
        by_hand(before, 2, lambda x, t, u: c.jump(x, before(x, t, data.condition.labels), t, u)), rel=1e-4
    )
    with torch.no_grad():
        m.student.model.map_layer0.weight.mul_(1.5)
    third, _ = step(m, data, 3)  # the one before is still the teacher
    assert third["loss"].item() == pytest.approx(
        by_hand(m.student, 2, lambda x, t, u: c.jump(x, before(x, t, data.condition.labels), t, u)), rel=1e-4
    )
    assert [m.rate(k) for k in range(9)] == pytest.approx([1, 0.5, 1, 0.75, 0.5, 0.25, 1, 0.75, 0.5])
    assert pd(stage_decay=False).rate(3) == 1 == method().rate(3)
    step(m, data, 6)
    assert m.describe()["student"] == {**m.made(m.student).record, "form": "pd", "steps": 1}


def test_the_clamp_of_the_sampler_goes_into_the_checkpoint():
    assert (
        method().describe()["student"]["clamp"] is True and method(clamp=False).describe()["student"]["clamp"] is False
    )
    m = method(clamp=False)
    assert m.made(m.student).with_steps(2).clamp is False


@pytest.mark.parametrize("low", [2, 1])
def test_ctm_is_table_5(low):
    options = {"kind": "ctm", "max_hops": 3, "distance": "l1", **({} if low == 2 else {"i_min": low})}
    m, data, teacher = method(**options), batch(16), tiny_teacher()
    with torch.no_grad():
        m.student.model.map_augment.weight.normal_(0, 0.1)
    f = copy.deepcopy(m.student)
    scalars, _ = step(m, data)

    def hop(x, t, s):
        return c.jump(x, f(x, t, data.condition.labels, second_time(s)), t, s)

    draw = Draws(3, 0, 16, 16, CPU)
    i, z = draw.randint(low, N + 1), draw.randn(1, 8, 8)
    hops = 1 + (draw.rand().double() * (i - (low - 1)).clamp(max=3)).long()
    j = i - hops
    assert (j >= low - 1).all()  # T(j), 1 <= j: the target network always has a way to go
    k = (draw.rand().double() * (j + 1)).long()
    assert hops.min() >= 1 and hops.max() <= 3 and (j >= 0).all() and (k <= j).all() and len(hops.unique()) > 1
    x_t = data.images + col(T(i)) * z
    ends = []
    for b in range(16):  # each sample's own number of solver steps
        x = x_t[b : b + 1]
        for at in range(int(i[b]), int(j[b]), -1):
            x = c.heun_step(
                lambda y, level, b=b: teacher.denoise(y, level, data.condition.labels[b : b + 1]),
                x,
                *(T(torch.tensor([n])) for n in (at, at - 1)),
            )
        ends.append(x)
    s, end = T(k), T(0 * k)
    goal = hop(hop(torch.cat(ends), T(j), s), s, end).detach()
    kept = copy.deepcopy(f).requires_grad_(False)  # the way from s to the end: fixed, but gradients pass
    x_s = hop(x_t, T(i), s)
    y = c.jump(x_s, kept(x_s, s, data.condition.labels, second_time(end)), s, end)
    loss = (y - goal).abs().mean()
    assert scalars["loss"].item() == pytest.approx(loss.item(), rel=1e-4)
    loss.backward()
    other = method(**options, target="ema")  # a target of its own: this loop fixes no parameters
    for network in (other.student, other.states()["target"]):
        network.load_state_dict(f.state_dict())
    step(other, data)
    for mine, theirs in zip(f.parameters(), other.student.parameters()):
        assert torch.allclose(mine.grad, theirs.grad, rtol=1e-3, atol=1e-6)


class Gaussian(nn.Module):
    """The consistency function of N(0.3, 0.25) from any t down to sigma_min or s, which is known."""

    def __init__(self, form):
        super().__init__()
        self.form, self.tilt = form, nn.Parameter(torch.zeros(()))  # tilted, it is another one at every level

    def forward(self, x, t, labels=None, toward=None, s=0.002):
        t = torch.as_tensor(t, dtype=torch.float64)
        if toward is not None:  # undo the embedding: its first sine and cosine are of ln(s) / 4
            s = (4 * torch.atan2(toward[:, 64], toward[:, 0]).double()).exp()
        shrink = ((0.25 + torch.as_tensor(s, dtype=torch.float64) ** 2) / (0.25 + t**2)).sqrt()
        there = 0.3 + col(shrink) * (x - 0.3) + self.tilt * col((t / s).log())
        if self.form == "cd":
            return there
        share = t / (t - s)  # the estimate that `jump` takes there; nothing to say where t = s
        return torch.where(col((t - s).abs()) < 1e-6, x, x + col(torch.nan_to_num(share, posinf=0.0)) * (there - x))


class GaussianDenoiser(nn.Module):
    def forward(self, x, t, labels=None):
        return 0.3 + col(0.25 / (0.25 + t.double() ** 2)) * (x - 0.3)


def gaussian(kind, **options) -> JumpMethod:
    m = method(kind=kind, **options)
    m.teacher = Teacher(GaussianDenoiser(), Spec("gaussian", (1, 8, 8)))
    m._spec, m.student = m.teacher.spec, Gaussian(kind)
    return m


def gaussian_batch():
    generator = torch.Generator().manual_seed(1)
    return Batch(
        images=0.3 + 0.5 * torch.randn(64, 1, 8, 8, generator=generator),
        condition=Condition.of_labels(torch.zeros(64)),
    )


@pytest.mark.parametrize("kind", ["cd", "ctm"])
def test_the_exact_function_of_a_known_ode_is_a_fixed_point(kind):
    """Its loss is what the solver errs; that falls with the fourth power of N (Heun: one step errs as the third, the
    whole way as the second)."""
    losses = {}
    for n in (24, 48, 96):
        losses[n] = step(gaussian(kind, N=n + 1), gaussian_batch())[0]["loss"].item()
    assert losses[24] > 6 * losses[48] > 36 * losses[96] and losses[96] < 3e-6
    m = gaussian(kind, N=97)
    with torch.no_grad():
        m.student.tilt.fill_(0.1)
    away = step(m, gaussian_batch())[1]
    assert away.losses[0] > 3 * losses[96] and m.student.tilt.grad > 0


def test_the_exact_hops_of_a_known_ode_are_pd_s_fixed_point():
    class Exact(Gaussian):
        def forward(self, x, t, labels=None):
            return super().forward(x, t, labels, s=c.karras_time((_index(t, 64) - 1).clamp(min=0), 64))

    m = gaussian("pd", N=64, stage_images=100_000, weight="uniform", stage_target="student")
    m.student = Exact("pd")
    assert step(m, gaussian_batch())[0]["loss"] < 1e-5


def _index(t, n):
    grid = c.karras_time(torch.arange(n + 1), n)
    return (grid.log() - t.double().log()[:, None]).abs().argmin(1)


def test_the_target_network_follows():
    m = method(target="ema", mu=0.75)
    target = m.states()["target"]
    assert not any(p.requires_grad for p in target.parameters())
    start = [p.clone() for p in target.parameters()]
    with torch.no_grad():
        for p in m.student.parameters():
            p.add_(1)
    step(m)
    for before, now in zip(start, target.parameters()):
        assert torch.allclose(now, before + 0.25, atol=1e-5)
    assert method(target="stopgrad").states() == {}
    adaptive = method(target="ema", mu=0.9, n_schedule="adaptive", N=2, n_max=150, schedule_images=8000)
    start = [p.clone() for p in adaptive.states()["target"].parameters()]
    with torch.no_grad():
        for p in adaptive.student.parameters():
            p.add_(1)
    step(adaptive)
    assert torch.allclose(
        next(adaptive.states()["target"].parameters()), start[0] + 1 - 0.81, atol=1e-5
    )  # N(0) = 2: mu_0^2


@pytest.mark.parametrize("target", ["stopgrad", "ema"])
def test_both_passes_leave_out_the_same_values(target):
    """With the target's input equal to the student's, dropout makes no difference only if it is the same."""
    teacher = tiny_teacher()
    m = method(teacher, target=target)
    for network in (m.student, *m.states().values()):
        for part in network.modules():
            if hasattr(part, "dropout"):
                part.dropout = 0.5
        network.train()
    m.solve = lambda x, t, u, labels: x
    m.T = lambda i, n: torch.full((len(i),), 1.0, dtype=torch.float64)
    scalars, _ = step(m)
    assert scalars["loss"] < 1e-12
    assert not torch.allclose(
        *(m.student(torch.ones(1, 1, 8, 8), torch.ones(1), torch.zeros(1, dtype=torch.int64)) for _ in range(2))
    )


@pytest.mark.parametrize(
    "options",
    [
        {"distance": "l1"},
        {"distance": "pseudo_huber", "huber_reduce": "element"},
        {"i_sampling": "lognormal", "weight": "inverse_gap"},
        {"i_sampling": "lognormal", "i_min": 2},
        {"n_schedule": "doubling", "N": 2, "n_max": 8, "schedule_images": 800},
        {"kind": "ctm", "hops": "from_0"},
        {"kind": "pd", "N": 4, "final_steps": 2, "stage_images": 8, "stage_target": "student"},
        {"N": 1, "n_counts": "steps"},
        {"kind": "ctm"},
        {"kind": "ctm", "target": "ema"},
        {"kind": "pd", "N": 1, "stage_images": 8, "weight": "uniform"},
    ],
)
def test_every_switch_trains_the_student(options):
    m = method(**options)
    for iteration in (0, 1):
        scalars, _ = step(m, iteration=iteration)
        assert torch.isfinite(scalars["loss"])
    got = [p for p in m.student.parameters() if p.grad is not None and float(p.grad.abs().max()) > 0]
    assert len(got) > 0.8 * len(list(m.student.parameters()))


def test_lpips_pools_as_song_et_al_and_needs_no_weights_for_a_plan(monkeypatch):
    class Small(nn.Module):  # as the package's: a scaling, a trunk that gives maps, linear heads
        def __init__(self):
            super().__init__()
            self.chns, self.scaling_layer = [4], nn.Identity()
            self.net = nn.ModuleDict({"slice": nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2, 2))})
            self.net.forward = lambda x: [self.net["slice"](x)]
            head = nn.Module()
            head.model = nn.Sequential(nn.Dropout(), nn.Conv2d(4, 1, 1, bias=False))
            head.model[1].weight.data.fill_(1)
            self.lins = nn.ModuleList([head])

    read = []
    monkeypatch.setattr(common, "find_weights", lambda name, given: Path(name))
    monkeypatch.setattr(common, "file_sha256", lambda path: "0" * 64)
    monkeypatch.setattr(lpips, "read_lpips", lambda trunk, path: read.append(path) or Small())
    for pooling, kind in (("avg", nn.AvgPool2d), ("max", nn.MaxPool2d)):
        m = method(distance="lpips", lpips_pooling=pooling)
        assert type(m.lpips.features.network.net["slice"][1]) is kind
        assert step(m, batch(2))[0]["loss"] > 0 and any(
            float(p.grad.abs().max()) > 0 for p in m.student.parameters() if p.grad is not None
        )
    assert read == [Path("lpips-vgg")] * 2
    recipe = load_recipe("cd_digits", ["cd.distance=lpips"])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (missing,) = make_plan(recipe).missing
    assert "lpips-vgg" in missing
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    plan = make_plan(recipe)
    assert not plan.missing and any("lpips-vgg" in line for line in plan.first) and len(read) == 2


def test_starting_from_a_student():
    ode = tiny_student(seed=4)
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([80.0, 80.0]), torch.arange(2)
    m = method(start=ode)
    assert isinstance(m.made(m.student), ConsistencyStudent) and torch.allclose(
        m.student(80 * x, t, labels), ode(x, labels), atol=0.02
    )
    trained = ConsistencyStudent(m.student, SPEC)
    assert torch.equal(method(start=trained).student(x, t, labels), m.student(x, t, labels))
    ctm = method(kind="ctm", start=trained)
    again = method(kind="ctm", start=ConsistencyStudent(ctm.student, SPEC, form="ctm"))
    s = second_time(t / 2)
    assert torch.equal(again.student(x, t, labels, s), ctm.student(x, t, labels, s))


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("pd_digits", "pd.stage_images=null", "pd: stage_images is missing"),
        ("pd_digits", "pd.N=12", "pd: N: 12 steps cannot be halved down to 1"),
        ("pd_digits", "pd.target=ema", "pd.target: unknown key"),
        ("ctm_digits", "ctm.form=F", "ctm.form: unknown key"),
        ("ctm_digits", "ctm.solver=none", "ctm.solver: expected 'heun' or 'euler', got 'none'"),
        ("cd_digits", "cd={solver: none, last_hop: solver}", "cd: last_hop: solver needs a solver, and there is none"),
        ("cd_digits", "cd.N=1", "cd: N: a grid has at least 2 points"),
        ("cd_digits", "cd.max_hops=2", "cd.max_hops: unknown key"),
        ("cd_digits", "cd.n_schedule=doubling", "cd: n_schedule: doubling needs n_max and schedule_images"),
        ("cd_digits", "cd={N: 9, n_max: 4, n_schedule: adaptive, schedule_images: 8}", "n_max: 4 is below N = 9"),
        # as the release before wrote it
        ("cd_digits", "consistency.max_hops=2", "max_hops: unknown key"),
        ("cd_digits", "consistency.kind=cdd", "kind: unknown key"),
        ("cd_digits", "consistency={kind: pd, N: 12, stage_images: 8}", "N: 12 steps cannot be halved down to 1"),
    ],
)
def test_mistakes_are_found_before_anything_is_loaded(name, change, words):
    with pytest.raises(UserError, match=re.escape(words)):
        load_recipe(name, [change])


def test_a_student_that_the_teacher_could_not_teach():
    with pytest.raises(UserError, match="the student to start from makes .* teacher 'tiny' makes other images"):
        method(start=Student(tiny_network(), Spec("t", (3, 8, 8))))


OLD = """\
name: old
method: consistency
teacher: digits
data: {path: 'real:digits'}
optim: {lr: 1.0e-3}
batch: 8
images: 80
"""


@pytest.mark.parametrize(
    ("section", "kind", "options"),
    [
        ("{}", "cd", {}),
        ("{kind: cd, N: 10, form: F, weight: null, i_min: null, max_hops: null}", "cd", {"N": 10, "form": "F"}),
        (
            "{kind: pd, N: 8, stage_images: 16, form: f, last_hop: student, target: stopgrad, mu: 0.9, middle: 0.4}",
            "pd",
            {"N": 8, "stage_images": 16},
        ),
        ("{kind: ctm, max_hops: 2, final_steps: 1, stage_decay: false, i_min: 2}", "ctm", {"max_hops": 2}),
    ],
)
def test_recipes_of_the_release_before_go_on(section, kind, options, tmp_path):
    """`method: consistency` with a kind, as files, runs and checkpoints of it have it."""
    (tmp_path / "old.yaml").write_text(f"{OLD}consistency: {section}\n")
    recipe = load_recipe(tmp_path / "old.yaml")
    made = get_method(kind).Options(**options)
    assert (recipe.method, recipe.options) == (kind, made)
    assert recipe.notes == [
        f"method: consistency is cd, pd, ctm now, this one {kind}; the old name goes with the next release"
    ]
    again = load_recipe(tmp_path / "old.yaml", ["consistency.distance=l1", "consistency.clamp=false"])
    assert again.options == made.model_copy(update={"distance": "l1", "clamp": False})
    assert Recipe.from_dict(recipe.resolved()).notes == []


def test_recipes_that_extend_a_shipped_one_by_the_old_names(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "extends: cd_digits\nname: mine\nconsistency: {kind: pd, N: 8, stage_images: 32, solver: euler}\n"
    )
    recipe = load_recipe(tmp_path / "mine.yaml")
    assert recipe.method == "pd" and recipe.options == PDOptions(N=8, stage_images=32, solver="euler")
    (tmp_path / "mine.yaml").write_text("extends: pd_cifar10\nname: mine\nconsistency: {final_steps: 2}\n")
    recipe = load_recipe(tmp_path / "mine.yaml")
    assert recipe.method == "pd" and (recipe.options.final_steps, recipe.options.N) == (2, 4096)


def test_what_does_not_fit_the_teacher():
    small = Images()
    small.shape = (1, 4, 4)
    with pytest.raises(UserError, match="the images are of 1 x 4 x 4, those of teacher 'tiny' of 1 x 8 x 8"):
        method(images=small)
    unlabelled = Images()
    unlabelled.classes = 0
    with pytest.raises(UserError, match="has 10 classes, and the images have none"):
        method(images=unlabelled)
    vp = Teacher(tiny_network(precond="vp"), SPEC)
    with pytest.raises(UserError, match="is in preconditioning vp"):
        method(teacher=vp)
    with pytest.raises(UserError, match="needs a `teacher:`"):
        get_method("cd")(Setup(CDOptions(), images=Images()))


SMALL = [
    "images=160",
    "batch=16",
    "log_every=1",
    "eval=null",
    "preview=null",
    "checkpoint.every=64",
    "student.dropout=0.1",
]


def tiny(name: str, tmp_path, *more: str):
    tiny_teacher(tmp_path / "teacher.safetensors")
    own = f"{'pd' if name.startswith('pd') else 'ctm' if name.startswith('ctm') else 'cd'}.N=8"
    return load_recipe(name, [*SMALL, own, f"teacher={tmp_path / 'teacher.safetensors'}", *more])


def saved(run, name: str) -> bytes:
    return (run / "checkpoints" / f"{name}.safetensors").read_bytes()


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("cd_digits", ("cd.target=ema",)),
        ("cd_i_digits", ()),
        ("pd_digits", ("pd.stage_images=32",)),
        ("ctm_digits", ()),
    ],
)
def test_a_stopped_and_resumed_run_ends_with_the_same_bytes(tmp_path, name, more):
    recipe = tiny(name, tmp_path, *more)
    train(recipe, tmp_path / "whole")
    train(recipe, tmp_path / "parts", 6)  # pd: where a stage begins
    train(recipe, tmp_path / "parts")
    for kind in ("last", "state"):
        assert saved(tmp_path / "whole", kind) == saved(tmp_path / "parts", kind)
    student = load_student(tmp_path / "whole")
    assert isinstance(student, ConsistencyStudent) and student.nfe == 1
    assert torch.isfinite(student(torch.randn(2, 1, 8, 8), torch.tensor([1, 2]))).all()
    first = dict(tiny_network().named_parameters())
    same = {
        key.split(".")[-2]
        for key, p in student.network.named_parameters()
        if key in first and torch.equal(p, first[key])
    }
    assert same == ({"conv0", "conv1", "proj"} if name == "cd_i_digits" else set())  # frozen weights keep their bytes


@pytest.mark.long
@pytest.mark.parametrize("name", ["cd_digits", "pd_digits", "ctm_digits"])
def test_micro_batches_change_nothing(tmp_path, name):
    weights = []
    for micro in (16, 4):
        more = ["pd.stage_images=16"] if name == "pd_digits" else []
        recipe = tiny(
            name,
            tmp_path,
            *more,
            "student.dropout=0",
            "images=96",
            f"micro_batch={micro}",
            "optim={name: sgd, lr: 0.05}",
        )
        train(recipe, tmp_path / f"{name}{micro}")
        weights.append(load_student(tmp_path / f"{name}{micro}").network.state_dict())
    assert max(float((weights[0][key] - weights[1][key]).abs().max()) for key in weights[0]) < 1e-5
