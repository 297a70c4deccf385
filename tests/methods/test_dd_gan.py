"""DD-GAN's iteration against the paper's losses, and through the loop."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from d2o.condition import Condition
from d2o.diffusion.ddgan import DDGANProcess
from d2o.diffusion.noise import noise_for_seeds
from d2o.errors import UserError
from d2o.interop.safetensors_io import read_meta
from d2o.methods.base import Batch, Draws, Setup, get_method
from d2o.methods.dd_gan import DDGAN, DDGANOptions
from d2o.recipes.load import load_recipe
from d2o.students.base import load_student
from tests.helpers import tiny_student
from tests.methods.test_latent import train
from tests.methods.test_methods import CPU, Images, OneStep
from tests.networks.test_ncsnpp_z import SMALL, perturbed


def dd_gan(images=None, start=None, network=None, **options) -> DDGAN:
    torch.manual_seed(0)
    options = {"critic_width": 8, "critic_temb": 16, **options}
    network, images = {**SMALL, **(network or {})}, images or Images()
    method = get_method("dd-gan")(Setup(DDGANOptions(**options), network=network, images=images, start=start, name="t"))
    perturbed(method.critic)
    if start is None:
        perturbed(method.generator)
    return method


def batch(n: int = 8) -> Batch:
    return Batch(
        images=torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(5)) * 2 - 1,
        condition=Condition.of_labels(torch.arange(n) % 10),
    )


class Learning(OneStep):
    """A loop that takes steps, and notes what each of them changed."""

    def __init__(self, method, batch):
        super().__init__(method, batch)
        self.changed, self.seen = [], []

    def update(self, name):
        before = {
            key: p.detach().clone()
            for key, net in self.networks.items()
            for p in [torch.cat([q.flatten() for q in net.parameters()])]
        }
        torch.optim.SGD(self.networks[name].parameters(), 0.1).step()
        for p in self.networks[name].parameters():
            p.grad = None
        after = {key: torch.cat([q.detach().flatten() for q in net.parameters()]) for key, net in self.networks.items()}
        self.changed.append({key for key in before if not torch.equal(before[key], after[key])})
        self.seen.append(
            {key for key, net in self.networks.items() if any(p.grad is not None for p in net.parameters())}
        )
        self.updated.append(name)

    def frozen(self, name):
        self.networks[name].requires_grad_(False)
        try:
            return super().frozen(name)
        finally:
            self.frozen_now = name

    def backward(self, loss):
        super().backward(loss)
        for net in self.networks.values():
            net.requires_grad_(True)


def test_an_iteration_is_the_critic_s_turn_and_then_the_generator_s():
    method = dd_gan()
    loop = Learning(method, batch())
    method.step(loop, loop.batch, 0)
    assert loop.updated == ["critic", "generator"] and loop.changed == [{"critic"}, {"generator"}]
    assert loop.seen == [set(), set()]  # no gradient is left for the other's step


def test_the_losses_are_the_paper_s():
    method, data = dd_gan(steps=3, r1_gamma=0.3), batch(6)
    loop = OneStep(method, data)
    scalars = method.step(loop, data, 0)
    process = DDGANProcess(3)

    def turn(draw):
        t, n1, n2, z, noise = (
            draw.randint(0, 3),
            draw.randn(1, 8, 8),
            draw.randn(1, 8, 8),
            draw.randn(8),
            draw.randn(1, 8, 8),
        )
        A, S, a, b = (
            table[t + i].float()[:, None, None, None]
            for table, i in ((process.A, 0), (process.S, 0), (process.a, 1), (process.b, 1))
        )
        x_t = (A * data.images + S * n1).requires_grad_()
        x_next = (a * x_t + b.sqrt() * n2).detach()
        return t, x_t, x_next, process.posterior(method.generator(x_next, t, z), x_next, t, noise)

    t, x_t, x_next, fake = turn(Draws(3, 0, 6, 6, CPU))
    real = method.critic(x_t, t, x_next)
    (gradient,) = torch.autograd.grad(real.sum(), x_t)
    expected = F.softplus(-real).mean() + F.softplus(method.critic(fake, t, x_next)).mean()
    r1 = 0.15 * gradient.square().sum((1, 2, 3)).mean()  # gamma / 2, and not times the interval
    assert scalars["loss_d"].item() == pytest.approx(expected.item(), rel=1e-5) and scalars[
        "r1"
    ].item() == pytest.approx(r1.item(), rel=1e-4)
    assert loop.losses[0].item() == pytest.approx((expected + r1).item(), rel=1e-5)
    t2, _, x_next, fake = turn(Draws(1003, 0, 6, 6, CPU))  # other steps and noises, the same images
    assert not torch.equal(t, t2)
    assert scalars["loss_g"].item() == pytest.approx(
        F.softplus(-method.critic(fake, t2, x_next)).mean().item(), rel=1e-5
    )
    assert all(p.grad is not None for p in method.generator.parameters())


def test_r1_is_lazy_and_of_x_t_alone():
    method = dd_gan(r1_every=3, r1_gamma=1.0)
    assert ["r1" in method.step(loop := OneStep(method, batch()), loop.batch, i) for i in range(4)] == [
        True,
        False,
        False,
        True,
    ]
    assert "r1" not in dd_gan(r1_gamma=0).step(loop := OneStep(dd_gan(r1_gamma=0), batch()), loop.batch, 0)

    class OfTheNext(torch.nn.Module):
        def forward(self, x_t, t, x_next, labels=None):
            return 5 * x_next.sum((1, 2, 3)) + 0 * x_t.sum((1, 2, 3))

    method.critic, loop = OfTheNext(), OneStep(method, batch())
    loop.networks["critic"] = method.critic
    loop.backward = lambda loss: None
    assert method.step(loop, loop.batch, 0)["r1"] == 0


@pytest.mark.long
def test_a_stopped_and_resumed_run_ends_with_the_same_bytes_and_gives_a_student(tmp_path):
    changes = [
        "batch=8",
        "images=48",
        "log_every=1",
        "eval=null",
        "preview={every: 48, n: 4}",
        "network={nf: 8, nz: 4, zdim: 8, n_mlp: 0}",
    ]
    changes += ["dd_gan={critic_width: 4, critic_temb: 8, r1_every: 2}", "micro_batch=4"]
    recipe = load_recipe("dd_gan_digits", changes, mini=True)
    train(recipe, tmp_path / "whole")
    train(recipe, tmp_path / "parts", stop_after=3)
    train(recipe, tmp_path / "parts")
    for name in ("last", "state"):
        whole, parts = (tmp_path / folder / "checkpoints" / f"{name}.safetensors" for folder in ("whole", "parts"))
        assert whole.read_bytes() == parts.read_bytes()
    meta = read_meta(tmp_path / "whole" / "checkpoints" / "last.safetensors")
    assert (
        meta["kind"] == "student"
        and meta["student"] == {"kind": "multistep", "steps": 4}
        and meta["network"]["arch"] == "ddgan"
    )
    student = load_student(tmp_path / "whole")
    assert student.nfe == 4 and student.spec.condition == "none" and student.spec.licence == "CC-BY-4.0"
    assert student(noise_for_seeds(range(3), student.spec.shape)).shape == (3, 1, 8, 8)
    assert (tmp_path / "whole" / "previews" / "000000048.png").exists()


def test_generating_is_the_student_s_way_and_takes_k_calls():
    method, noise, calls = dd_gan(steps=3), torch.randn(4, 1, 8, 8), []
    method.generator.register_forward_hook(lambda *_: calls.append(1))
    images = method.generate(method.generator, noise, Condition.none(len(noise)))
    assert len(calls) == method.nfe() == 3 and images.abs().max() <= 1
    assert torch.equal(images, method.made(method.generator)(noise))


def test_classes_reach_both_networks_only_when_asked_for():
    method = dd_gan(conditional=True)
    assert method.spec().classes == method.generator.classes == method.critic.classes == 10
    method.step(loop := OneStep(method, batch()), loop.batch, 0)
    assert all(net.label.weight.grad.abs().sum() > 0 for net in (method.generator, method.critic))
    assert method.generate(method.generator, torch.randn(2, 1, 8, 8), torch.tensor([1, 2])).shape == (2, 1, 8, 8)
    assert dd_gan().spec().condition == "none"


def test_training_can_start_from_a_student_of_the_same_kind():
    first = dd_gan(steps=2)
    again = dd_gan(steps=2, start=first.made(first.generator))
    assert again.generator is not first.generator
    assert all(
        torch.equal(a, b) and b.requires_grad
        for a, b in zip(first.generator.parameters(), again.generator.parameters(), strict=True)
    )
    with pytest.raises(UserError, match="dd_gan.steps is 4, but the student to start from makes an image in 2"):
        dd_gan(start=first.made(first.generator))
    with pytest.raises(UserError, match="goes on with students of kind multistep"):
        dd_gan(start=tiny_student())
    with pytest.raises(UserError, match="the data has other images"):
        dd_gan(steps=2, conditional=True, start=first.made(first.generator))


def test_mistakes_are_named():
    images = Images()
    images.classes = 0
    with pytest.raises(UserError, match="images has no classes"):
        dd_gan(images, conditional=True)
    with pytest.raises(UserError, match="trains ddgan, not adm"):
        dd_gan(network={"arch": "adm"})
    with pytest.raises(UserError, match="other images than the data has"):
        dd_gan(network={"img_channels": 3})
