"""SPI-GAN's iteration against the paper's formulas, its switches, and through the loop."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from d2o.condition import Condition
from d2o.errors import UserError
from d2o.methods.base import Batch, Draws, Setup, get_method
from d2o.methods.spi_gan import SPIGAN, SPIGANOptions, spread
from d2o.recipes.load import load_recipe
from d2o.runtime import StopFlag
from d2o.students.base import load_student
from d2o.students.style import StyleStudent
from d2o.training.gather import gather_pools
from d2o.training.loop import Trainer
from d2o.training.setup import prepare
from tests.helpers import check_same_bytes, tiny_student
from tests.methods.test_latent import train
from tests.methods.test_methods import CPU, Images, OneStep

NETWORK = {"arch": "style_generator", "h_dim": 16, "synthesis": {"base": 64, "max_channels": 8}}
CRITIC = {"base": 64, "max_channels": 8, "mbstd_group": 4, "time_dim": 16, "cmap_dim": 16}


def spi_gan(start=None, network=None, **options) -> SPIGAN:
    torch.manual_seed(0)
    options = {"critic": CRITIC, "ada": None, **options}
    return get_method("spi-gan")(
        Setup(SPIGANOptions(**options), network=network or NETWORK, images=Images(), start=start, name="t", batch=8)
    )


def batch(n: int = 8) -> Batch:
    return Batch(
        images=torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(5)) * 2 - 1,
        condition=Condition.of_labels(torch.arange(n) % 10),
    )


class Seeing(OneStep):
    """A loop that notes what the critic was shown."""

    def __init__(self, method, batch):
        super().__init__(method, batch)
        self.shown: list[tuple[torch.Tensor, float]] = []
        method.critic.register_forward_pre_hook(
            lambda module, args: self.shown.append((args[0].detach().clone(), args[1]))
        )


def test_x_T_has_unit_variance_and_the_path_is_straight() -> None:
    method = spi_gan()
    images = torch.randn(1500, 1, 8, 8)
    micro, draw = Batch(images=images), Draws(0, 0, 1500, 1500, CPU)
    x_T = method.x_T(micro, draw)
    assert float(x_T.var()) == pytest.approx(1, abs=0.02) and abs(float((x_T * images).mean())) < 0.02
    torch.testing.assert_close(method.straight_path(micro, x_T, [1.0], draw), images)
    torch.testing.assert_close(method.straight_path(micro, x_T, [0.0], draw), x_T)
    torch.testing.assert_close(method.straight_path(micro, x_T, [0.25, 1.0], draw)[:1500], 0.25 * images + 0.75 * x_T)
    unpaired = spi_gan(pair_noise=False).straight_path(micro, x_T, [0.0], draw)
    assert abs(float((unpaired * x_T).mean())) < 0.02


@pytest.mark.parametrize("sampling", ["uniform_sorted", "stratified", "fixed", "fixed_with_0"])
@pytest.mark.parametrize("K", [1, 2, 5])
def test_times_rise_to_one(sampling: str, K: int) -> None:
    method = spi_gan(K=K, j_sampling=sampling)
    for seed in range(20):
        times = method.times(Draws(seed, 0, 8, 8, CPU))
        if sampling == "fixed_with_0":
            assert times == pytest.approx([k / K for k in range(K + 1)])
            continue
        assert len(times) == K and times[-1] == 1 and times == sorted(times) and times[0] > 0
        assert times == method.times(Draws(seed, 4, 4, 8, CPU))  # every process draws the same
        if sampling == "stratified":
            assert all(k / K <= t <= (k + 1) / K for k, t in enumerate(times))
        if sampling == "fixed":
            assert times == pytest.approx([(k + 1) / K for k in range(K)])


def test_an_iteration_is_algorithm_1() -> None:
    method, data = spi_gan(K=2, r1_gamma=0.0), batch()
    loop = Seeing(method, data)
    scalars = method.step(loop, data, 0)
    assert loop.updated == ["generator", "critic"] * 2  # for each time, the generator and then the critic
    first, second = loop.shown[0][1], loop.shown[3][1]
    assert [t for _, t in loop.shown] == [first] * 3 + [second] * 3 and 0 < first < second == 1
    real = loop.shown[4][0]
    torch.testing.assert_close(real, data.images)  # i(1) is the image
    fake = loop.shown[0][0]
    x_T = method.x_T(data, Draws(3, 0, 8, 8, CPU))  # times come first in the stream
    draw = Draws(3, 0, 8, 8, CPU)
    method.times(draw)
    x_T = method.x_T(data, draw)
    torch.testing.assert_close(loop.shown[1][0], first * data.images + (1 - first) * x_T)
    assert fake.shape == data.images.shape and set(scalars) == {
        "loss_g",
        "loss_d",
        "logit_real",
        "logit_fake",
        "diversity",
    }
    logits = method.critic(fake, first)
    assert float(loop.losses[0].detach()) == pytest.approx(float(F.softplus(-logits).mean().detach()), rel=1e-4)


def test_fixed_j_can_begin_with_the_noise_itself() -> None:
    """Section 4.4: "when K = 2, j in {0, 1, 2}"."""
    method, data = spi_gan(K=2, j_sampling="fixed_with_0", r1_gamma=0.0), batch()
    loop = Seeing(method, data)
    method.step(loop, data, 0)
    assert [t for _, t in loop.shown] == [0.0] * 3 + [0.5] * 3 + [1.0] * 3 and loop.updated == [
        "generator",
        "critic",
    ] * 3
    draw = Draws(3, 0, 8, 8, CPU)
    method.times(draw)
    torch.testing.assert_close(loop.shown[1][0], method.x_T(data, draw))  # i(0)


def test_styles_are_mixed_image_by_image() -> None:
    """Appendix B.3: mixing_prob says how many of the generated images come from two noises."""
    method = spi_gan(mixing_prob=0.25)
    num_ws, shape = method.generator.synthesis.num_ws, (1, 8, 8)
    second, cutoffs = method.mix(Draws(0, 0, 4000, 4000, CPU))
    assert second.shape == (4000, *shape) and float((cutoffs < num_ws).float().mean()) == pytest.approx(0.25, abs=0.03)
    assert set(cutoffs.tolist()) == set(range(1, num_ws + 1))  # each mixed image with a place of its own
    part = method.mix(Draws(0, 1000, 500, 4000, CPU))[1]
    assert torch.equal(part, cutoffs[1000:1500])  # however the batch is divided
    z, other = torch.randn(3, *shape), torch.randn(3, *shape)
    times, network = (0.5, 1.0), method.generator
    _, ws, _ = network(z=z, times=times, mix=(other, torch.tensor([1, num_ws, 2])))
    (_, own, _), (_, its, _) = network(z=z, times=times), network(z=other, times=times)
    for row in range(6):
        cutoff = (1, num_ws, 2)[row % 3]
        assert torch.equal(ws[row], torch.cat([own[row, :cutoff], its[row, cutoff:]]))
    assert spi_gan().mix(Draws(0, 0, 8, 8, CPU)) is None


def test_every_image_that_is_generated_in_training_may_be_mixed() -> None:
    method, data, seen = spi_gan(mixing_prob=1.0, pl_weight=1.0), batch(), []
    method.generator.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((len(kwargs["z"]), kwargs["mix"])), with_kwargs=True
    )
    method.step(OneStep(method, data), data, 0)
    assert [n for n, _ in seen] == [
        8,
        4,
        8,
    ] * 2  # the generator's turn, its path lengths, the critic's turn, at both times
    assert all(len(second) == len(cutoffs) == n for n, (second, cutoffs) in seen)


def test_the_lazy_correction_is_a_switch() -> None:
    optim = load_recipe("spi_gan_digits").optim
    assert spi_gan(pl_every=4).optim("generator", optim) is optim
    method = spi_gan(pl_every=4, r1_every=16, lazy_correction=True)
    for name, c in (("generator", 4 / 5), ("critic", 16 / 17)):
        found = method.optim(name, optim)
        assert (found.lr, found.final_lr) == (pytest.approx(0.01 * c), pytest.approx(0.001 * c))
        assert found.betas == (0.0, pytest.approx(0.99**c)) and found.schedule == optim.schedule


def tiny(*changes: str):
    return load_recipe(
        "spi_gan_digits",
        overrides=[
            "images=256",
            "batch=16",
            "network.h_dim=16",
            "network.synthesis.base=64",
            "network.synthesis.max_channels=8",
            "spi_gan.critic.base=64",
            "spi_gan.critic.max_channels=8",
            "spi_gan.ada_kimg=0.2",
            "spi_gan.r1_every=3",
            "log_every=1",
            "eval=null",
            "preview=null",
            *changes,
        ],
    )


def test_the_average_moves_once_an_iteration_whatever_its_updates(tmp_path) -> None:
    """Table 8's decay is of an iteration: four updates of the generator (two times, path lengths at each) are one step
    of the average."""
    recipe = tiny(
        "ema={decay: 0.75, half_life: null}",
        "spi_gan.K=2",
        "spi_gan.pl_weight=1.0",
        "spi_gan.lazy_correction=true",
        "images=4",
        "batch=4",
    )
    setup = prepare(recipe, CPU, None, lambda text: None, lambda *_: None, StopFlag())
    trainer = Trainer(recipe, setup, tmp_path)
    assert trainer.players["generator"].optimizer.param_groups[0]["betas"][1] == pytest.approx(0.99 ** (4 / 5))
    before = [p.detach().clone() for p in trainer.networks["generator"].parameters()]
    trainer.run(lambda images, text: None, StopFlag())  # one iteration
    for mine, old, new in zip(
        trainer.ema.network.parameters(), before, trainer.networks["generator"].parameters(), strict=True
    ):
        torch.testing.assert_close(mine, torch.lerp(old, new.detach(), 0.25))
    moved = max(
        float((old - new.detach()).abs().max())
        for old, new in zip(before, trainer.networks["generator"].parameters(), strict=True)
    )
    assert moved > 0.01
    torch.testing.assert_close(trainer.ema.network.mapping.w_avg, trainer.networks["generator"].mapping.w_avg)


def test_k_1_is_a_gan_of_clean_images() -> None:
    method, data = spi_gan(K=1, r1_gamma=0.0), batch()
    loop = Seeing(method, data)
    method.step(loop, data, 0)
    assert {t for _, t in loop.shown} == {1.0} and loop.updated == ["generator", "critic"]


def test_regularisers_are_lazy_and_scaled() -> None:
    method, data = spi_gan(r1_gamma=0.1, r1_every=4, pl_weight=2.0, pl_every=2), batch()
    for iteration, updates in (
        (0, ["generator", "generator", "critic", "critic"]),
        (1, ["generator", "critic"]),
        (2, ["generator", "generator", "critic"]),
    ):
        loop = OneStep(method, data)
        scalars = method.step(loop, data, iteration)
        assert loop.updated == updates * 2  # at each of both times
        assert ("r1" in scalars) == (iteration == 0) and ("path_length" in scalars) == (iteration % 2 == 0)
        if iteration == 0:
            assert float(loop.losses[3].detach()) == pytest.approx(4 * float(scalars["r1"]), rel=0.9)


@pytest.mark.parametrize(
    "options",
    [
        {"update_mode": "joint"},
        {"update_mode": "joint", "ivp": "incremental"},
        {"ivp": "incremental_detach"},
        {"latent": "z"},
        {"latent": "alternate"},
        {"process": "ve"},
        {"process": "subvp"},
        {"mixing_prob": 1.0},
        {"ada": "bgc", "ada_fixed": 0.5},
        {"pair_noise": False, "K": 3},
        {"critic": {**CRITIC, "time": "cmap", "blocks": "resnet"}},
        {"j_sampling": "fixed_with_0", "ivp": "incremental_detach"},
        {"j_sampling": "fixed_with_0", "update_mode": "joint", "ivp": "incremental"},
    ],
)
def test_every_switch_trains_both_networks(options: dict) -> None:
    method, data = spi_gan(pl_weight=1.0, **options), batch()
    loop = OneStep(method, data)
    scalars = method.step(loop, data, 0)
    assert all(torch.isfinite(value) for value in scalars.values())
    for name, network in method.players().items():
        got = [p for p in network.parameters() if p.grad is not None and float(p.grad.abs().max()) > 0]
        assert len(got) > 0.7 * len(list(network.parameters())), name


@pytest.mark.long
def test_micro_batches_have_the_gradients_of_the_batch() -> None:
    """Path lengths among them, whose target is the mean of all."""

    class InParts(OneStep):
        def __init__(self, method, data, size):
            super().__init__(method, data)
            self.size, self.found = size, []

        def micro_batches(self, batch, turn=0):
            n = len(batch)
            for start in range(0, n, self.size):
                draw = Draws(3 + 1000 * turn, start, self.size, n, CPU)
                yield batch.part(start, start + self.size), draw

        def backward(self, loss):
            (loss * self.size / len(self.batch)).backward()

        def update(self, name):
            gradients = [p.grad for p in self.networks[name].parameters() if p.grad is not None]
            self.found.append(torch.cat([g.flatten() for g in gradients]))
            for p in self.networks[name].parameters():
                p.grad = None

    found, means = [], []
    for size in (8, 4):
        data = batch(8)
        method = spi_gan(pl_weight=2.0, mixing_prob=0.5, r1_gamma=0.1, critic={**CRITIC, "mbstd_group": 4})
        gather_pools([method.critic], 0, 1)
        for iteration in (0, 4):  # the running mean has moved before the second
            loop = InParts(method, data, size)
            method.step(loop, data, iteration)
        found.append(loop.found)
        means.append(method.path_length.mean)
    assert len(found[0]) == 6 and float(means[0]) > 0
    torch.testing.assert_close(means[1], means[0])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-3 * float(one.abs().max()))


def test_joint_and_incremental_have_the_gradients_of_one_solve() -> None:
    """Over one step grid both ways of solving to each time are the same integral."""
    found = []
    for ivp in ("restart", "incremental"):
        method, data = spi_gan(update_mode="joint", ivp=ivp, r1_gamma=0.0, K=3, j_sampling="fixed"), batch()
        method.step(OneStep(method, data), data, 1)
        found.append(torch.cat([p.grad.flatten() for p in method.generator.mapping.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-6)


def test_ada_moves_its_probability_by_what_the_critic_says() -> None:
    method, data = spi_gan(ada="bgc", ada_interval=1, ada_kimg=0.1), batch()
    for _ in range(3):
        method.step(OneStep(method, data), data, 1)
    assert float(method.controller.p) in (0.0, pytest.approx(0.08), pytest.approx(0.16), pytest.approx(0.24))
    assert "ada_p" in method.step(OneStep(method, data), data, 1)
    fixed = spi_gan(ada="bgc", ada_fixed=0.3)
    fixed.step(OneStep(fixed, data), data, 1)
    assert float(fixed.controller.p) == pytest.approx(0.3)


def test_the_mean_style_is_tracked_at_t_1() -> None:
    method, data = spi_gan(K=2), batch()
    before = method.generator.mapping.w_avg.clone()
    method.step(OneStep(method, data), data, 1)
    assert not torch.equal(before, method.generator.mapping.w_avg)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ada": "bgx"}, "unknown spi_gan.ada: augmentation pipeline 'bgx'"),
        ({"ivp": "incremental"}, "does not go with update_mode per_j"),
        ({"update_mode": "joint", "ivp": "incremental_detach"}, "does not go with update_mode joint"),
        ({"network": {**NETWORK, "img_resolution": 16}}, "of the data's 1 x 8 x 8 pixels"),
        ({"network": {"arch": "ddpmpp"}}, "style_generator"),
        ({"start": tiny_student()}, "goes on with students of kind style"),
    ],
)
def test_mistakes(options: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        spi_gan(**options)


@pytest.mark.long
def test_a_stopped_and_resumed_run_ends_with_the_same_bytes(tmp_path) -> None:
    recipe = tiny()
    train(recipe, tmp_path / "whole")
    for stop in (5, 9):
        train(recipe, tmp_path / "parts", stop)
    train(recipe, tmp_path / "parts")
    check_same_bytes(tmp_path / "whole", tmp_path / "parts")
    student = load_student(tmp_path / "whole/checkpoints/last.safetensors")
    assert isinstance(student, StyleStudent) and student.spec.condition == "none" and student.nfe == 1


def test_spread_is_the_deviation_between_images() -> None:
    assert float(spread(torch.ones(4, 1, 2, 2))) == 0
    assert float(spread(torch.tensor([0.0, 2.0])[:, None, None, None].expand(2, 1, 2, 2))) == pytest.approx(2**0.5)
