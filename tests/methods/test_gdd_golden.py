"""GDD's steps against what the authors' code computed: their student on `edm-ddpmpp`, a critic of one stand-in backbone
(tests/golden/README.md)."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from d2o.condition import Condition
from d2o.critics.official_names import own_names
from d2o.critics.projected import ProjectedCritic
from d2o.features.backbone import Backbone
from d2o.features.common import IMAGENET_MEAN, IMAGENET_STD
from d2o.losses.consistency import SIGMA_MIN
from d2o.methods.base import Batch, Setup
from d2o.methods.gdd import GDD, GDDOptions
from d2o.networks.build import build_network
from d2o.networks.freeze import FREEZE, freeze
from d2o.students.student_section import StudentSection
from d2o.teachers.registry import load_teacher
from tests.methods.recording import Loop
from tests.methods.test_methods import Images

FOLDER = Path(__file__).parents[1] / "golden"
GOLDEN = load_file(FOLDER / "gdd" / "loss.safetensors")
NAMES = json.loads((FOLDER / "gdd" / "loss.json").read_text())


class Pictures(Images):
    shape = (3, 16, 16)


def standin() -> Backbone:
    """Four convolutions, by the rule of the golden files."""
    layers = [
        nn.Conv2d(before, after, side, stride=side)
        for before, after, side in ((3, 12, 4), (12, 16, 2), (16, 24, 2), (24, 32, 2))
    ]
    for i, key in enumerate(sorted(f"layer{k}.{leaf}" for k in range(4) for leaf in ("weight", "bias"))):
        p = getattr(layers[int(key[5])], key.split(".")[1])
        r = torch.randn(p.shape, generator=torch.Generator().manual_seed(3000 + i))
        p.data = r * math.sqrt(2 / r[0].numel()) if r.ndim == 4 else 0.05 * r
    stages = [nn.Sequential(layer, nn.ReLU()) for layer in layers]
    return Backbone(stages, [12, 16, 24, 32], IMAGENET_MEAN, IMAGENET_STD)


def official(first: int = 4000) -> dict[str, torch.Tensor]:
    """The tensors of the critic, by their rule."""
    shapes, state = json.loads((FOLDER / "gdd" / "standin_keys.json").read_text()), {}

    def draw(seed: int, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    for i, key in enumerate(sorted(shapes)):
        r = draw(first + i, *shapes[key])
        if key.endswith("running_var"):
            state[key] = 1 + 0.1 * r.abs()
        elif key.endswith(("running_mean", "bias")):
            state[key] = 0.1 * r
        elif key.endswith("weight_orig"):
            m = r.flatten(1)
            u, v = draw(first + i + 10000, m.shape[0]), draw(first + i + 20000, m.shape[1])
            m = m / (m.shape[0] ** 0.5 + m.shape[1] ** 0.5) + 2 * torch.outer(u / u.norm(), v / v.norm())
            state[key] = m.reshape(r.shape)
            for _ in range(40):  # of singular values about 2 and 1: to the last digit
                v = nn.functional.normalize(m.T @ u, dim=0)
                u = nn.functional.normalize(m @ v, dim=0)
            state[key.replace("orig", "u")], state[key.replace("orig", "v")] = u, v
        elif not key.endswith(("weight_u", "weight_v")):
            state[key] = r / r[0].numel() ** 0.5 if r.ndim == 4 else 1 + 0.1 * r if r.ndim == 1 else r
    return state


@pytest.fixture(scope="module")
def critic() -> ProjectedCritic:
    made = ProjectedCritic([("resnet18", standin())], pool=None)
    made.load_official(official())
    return made


def method(critic: ProjectedCritic, steps: int = 1, levels: list[float] | None = None, **options) -> GDD:
    given = {"main_scale": 4.0, "critic": {"backbones": ["digits"], "size": 8, "embedding": "learned"}, **options}
    setup = Setup(
        GDDOptions.model_validate_json(json.dumps(given)),
        teacher=load_teacher(FOLDER / "edm" / "edm-ddpmpp.pkl"),
        student=StudentSection.model_validate({"dropout": 0.0, "steps": steps, "levels": levels}),
        images=Pictures(),
        batch=4,
    )
    found = GDD(setup)
    for p in critic.parameters():
        p.grad = None
    found.critic = critic.train()
    return found


class Given(Loop):
    """A loop whose normal draws are the golden latents, and whose indices are the golden ones."""

    def micro_batches(self, batch, turn=0):
        for part, draw in super().micro_batches(batch, turn):
            draw.randn = lambda *shape: GOLDEN["z"]
            draw.randint = lambda low, high: GOLDEN["cd_index"].flatten().long()
            yield part, draw


BATCH = Batch(Condition.of_labels(GOLDEN["label"].long()), images=GOLDEN["x_real"])
Z, LABEL = GOLDEN["z"], GOLDEN["label"].long()


def close(found: torch.Tensor, wanted: torch.Tensor, within: float = 1e-4) -> None:
    """Within a share of the largest value."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=within * float(wanted.abs().max()))


@pytest.mark.long
@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "steps", "levels"),
    [("student_out", 1, None), ("two_step_out", 2, [0.8]), ("four_step_out", 4, None)],
)
def test_students(critic, name, steps, levels):
    student = method(critic, steps, levels, last="x0").student
    close(student(Z, LABEL), GOLDEN[name], 1e-3 if steps > 1 else 1e-4)
    if steps > 1:  # the paper's: where the last call leads at sigma_min, which is near its x_0
        ends = method(critic, steps, levels).student
        assert ends.last == SIGMA_MIN and not torch.equal(ends(Z, LABEL), student(Z, LABEL))
        share = SIGMA_MIN / ends.levels[-1]
        torch.testing.assert_close(ends(Z, LABEL), student(Z, LABEL), rtol=0, atol=8 * share)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["nonsaturating", "hinge"])
def test_losses_and_gradients(critic, kind):
    short = "ns" if kind == "nonsaturating" else "hinge"
    gdd = method(critic, loss=kind)
    made = []
    gdd.student.register_forward_hook(lambda module, args, x: (x.requires_grad and x.retain_grad()) or made.append(x))
    loop = Given(gdd)
    gdd.student_step(loop, BATCH, {})
    assert loop.losses[0] == pytest.approx(float(GOLDEN[f"{short}_g_loss"]), rel=1e-4)
    close(made[0].grad, GOLDEN[f"{short}_g_grad"], 1e-2)
    if kind == "nonsaturating":
        close(
            norms(gdd.student.network, loop.gradients["student"], NAMES["g_parameters"]),
            GOLDEN["ns_g_param_grad_norm"],
            1e-2,
        )
    loop = Given(gdd)
    gdd.critic_step(loop, BATCH, {})
    assert loop.losses[0] == pytest.approx(float(GOLDEN[f"{short}_d_loss"]), rel=1e-4)
    check_critic(gdd, loop, short)


@pytest.mark.long
def test_r1_is_a_mean_and_a_step_of_its_own(critic):
    gdd = method(critic, r1={"gamma": NAMES["gamma"]})
    loop = Given(gdd)
    gdd.penalty_step(loop, BATCH, {})
    assert loop.losses[0] == pytest.approx(float(GOLDEN["r1_loss_x16"]), rel=1e-2)
    check_critic(gdd, loop, "r1")


@torch.no_grad()
def test_the_consistency_term(critic):
    gdd = method(critic, cd={"weight": 1.0, "distance": {"kind": "mse"}})
    seen = []
    gdd.distance = lambda x, y: seen.extend([x, y]) or x.flatten(1).mean(1)
    (part, draw), *_ = Given(gdd).micro_batches(BATCH)
    gdd.consistency(part, Z, draw)
    close(seen[0], GOLDEN["cd_pred"])
    close(seen[1], GOLDEN["cd_target"], 1e-3)


def norms(network: nn.Module, flat: torch.Tensor, names: list[str]) -> torch.Tensor:
    """Of the gradient for each parameter of those names, from all of them in a row."""
    sizes = [p.numel() for p in network.parameters()]
    by_name = {name: part for (name, _), part in zip(network.named_parameters(), flat.split(sizes), strict=True)}
    return torch.stack([by_name[name].norm() for name in names])


def check_critic(gdd: GDD, loop: Loop, prefix: str) -> None:
    own = own_names(
        ["resnet18"], [[len(h.blocks) for h in heads] for heads in gdd.critic.heads], gdd.critic.state_dict()
    )
    names = [own[name] for name in NAMES["d_parameters"]]
    close(norms(gdd.critic, loop.gradients["critic"], names), GOLDEN[f"{prefix}_d_grad_norm"], 1e-2)
    sizes = [p.numel() for p in gdd.critic.parameters()]
    parts = loop.gradients["critic"].split(sizes)
    by_name = {name: part for (name, _), part in zip(gdd.critic.named_parameters(), parts, strict=True)}
    small = torch.cat([by_name[own[name]] for name in NAMES["d_small"]])
    close(small, GOLDEN[f"{prefix}_d_grad_small"], 1e-2)


def test_what_the_published_code_freezes():
    wanted = json.loads((FOLDER / "gdd" / "freeze.json").read_text())["cifar10_ncsnpp_uncond"]
    with torch.device("meta"):
        network = build_network({"arch": "ncsnpp", "img_resolution": 32, "img_channels": 3, "channel_mult": [2, 2, 2]})
    names: set[str] = set()
    for number, level in enumerate(FREEZE[1:], 1):
        frozen = freeze(network, level)
        part = wanted[f"level{number}"]
        names |= set(wanted[f"level{number}_names"])
        assert frozen == part["frozen"] and 100 * frozen / wanted["total"] == pytest.approx(part["percent"], abs=0.01)
        assert {name for name, p in network.named_parameters() if not p.requires_grad} == names
