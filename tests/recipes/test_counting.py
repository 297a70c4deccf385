"""What a plan counts of a step, against what a real one keeps."""

from __future__ import annotations

import pytest
import torch

from d2o.interop import torchvision_compat
from d2o.recipes.counting import META, CountingLoop, Kept
from d2o.recipes.load import load_recipe
from d2o.recipes.plan import make_plan

UNET = {
    "sample_size": 16,
    "block_out_channels": (32, 32),
    "layers_per_block": 1,
    "cross_attention_dim": 8,
    "attention_head_dim": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


class Regression:
    """A method's step on a U-Net of Stable Diffusion's kind."""

    def __init__(self, device: str, checkpointing: bool):
        torchvision_compat.ensure()
        from diffusers import UNet2DConditionModel

        with torch.device(device):
            self.net = UNet2DConditionModel(**UNET).train()
            self.inputs = torch.zeros(4, 4, 16, 16), torch.zeros(4), torch.zeros(4, 77, 8)
        if checkpointing:
            self.net.enable_gradient_checkpointing()

    def players(self):
        return {"student": self.net}

    def heaviest(self):
        return 0

    def intervals(self):
        return ()

    def loss(self):
        return self.net(*self.inputs).sample.square().mean()

    def step(self, loop, batch, iteration):
        loop.backward(self.loss())


def planned(checkpointing: bool) -> CountingLoop:
    loop = CountingLoop(method := Regression("meta", checkpointing), 4)  # type: ignore[arg-type]
    with META:
        loop.run(method, None)  # type: ignore[arg-type]
    return loop


def test_activations_are_those_that_a_real_step_keeps():
    """Attention's kernels keep no matrix of all pairs of places, which torch would on the meta device."""
    kept, real = Kept(), Regression("cpu", False)
    with kept.watch():
        real.loss()
    plan = planned(False)
    assert plan.passes(3) == 3 * 4 and plan.peak == pytest.approx(kept.bytes, rel=0.08)


class Lazy(Regression):
    """Every third iteration from `begins` on, a pass of one sample of the first micro-batch, and one of all samples of
    each."""

    def __init__(self, begins: int):
        super().__init__("meta", False)
        self.begins = begins

    def heaviest(self):
        return self.begins

    def intervals(self):
        return (3,)

    def step(self, loop, batch, iteration):
        for i, _ in enumerate(loop.micro_batches(batch)):
            loop.backward(self.loss())
            if iteration % 3 == 0 and iteration >= self.begins:
                if i == 0:
                    self.net(*(x[:1] for x in self.inputs))
                self.net(sample=self.inputs[0], timestep=0, encoder_hidden_states=self.inputs[2])


@pytest.mark.parametrize(("begins", "heavy"), [(0, 4), (3, 3)])
def test_what_is_due_in_some_iterations_is_counted_by_samples(begins, heavy):
    """Ten iterations of five micro-batches of 4 samples."""
    loop = CountingLoop(method := Lazy(begins), 4, many=5)  # type: ignore[arg-type]
    with META:
        loop.run(method, None)  # type: ignore[arg-type]
    assert loop.passes(10) == 10 * 5 * 4 + heavy * (5 * 4 + 1)
    assert loop.passes(0) == 0


def test_gdd_s_penalty_is_counted_when_it_is_due():
    """500 iterations of 16, R1 of the whole batch in every 16th but the first."""
    recipe = load_recipe("gdd_digits", ["images=8000", "batch=16", "eval=null"])
    calls = make_plan(recipe).calls["training (forward passes of trained networks)"]
    assert calls == 5 * 8000 + 31 * 16


def test_each_of_spi_gan_s_penalties_is_counted_when_it_is_due():
    """100 iterations of 32 with both times of K = 2, each with five passes; R1 in every fourth, path lengths of half
    the images in every sixth."""
    changes = [
        "images=3200",
        "batch=32",
        "eval=null",
        "spi_gan.r1_every=4",
        "spi_gan.pl_weight=2",
        "spi_gan.pl_every=6",
    ]
    calls = make_plan(load_recipe("spi_gan_digits", changes)).calls["training (forward passes of trained networks)"]
    assert calls == 2 * (5 * 3200 + 25 * 32 + 17 * 16)
    never = make_plan(load_recipe("spi_gan_digits", [*changes, "spi_gan.r1_every=1000000007"]))  # counted at once, too
    assert never.calls["training (forward passes of trained networks)"] == 2 * (5 * 3200 + 32 + 17 * 16)


def test_checkpointing_keeps_what_enters_blocks_and_computes_one_again(monkeypatch):
    """Against the arguments of the real checkpoints, and what the largest of them keeps when it is computed again."""
    outside, real, entering, largest = Kept(), Regression("cpu", True), Kept(), 0
    whole = torch.utils.checkpoint.checkpoint

    def looked_at(block, *args, **options):
        nonlocal largest
        for value in args:
            if isinstance(value, torch.Tensor):
                entering.save(value)
        again = Kept(beside=entering)
        with torch.enable_grad(), again.watch():
            block(*args)
        largest = max(largest, again.bytes)
        return whole(block, *args, **options)

    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", looked_at)
    with outside.watch():
        real.loss()
    monkeypatch.undo()
    plan = planned(True).peak
    both = outside.bytes + sum(t.nbytes for t in entering.tensors if t.untyped_storage()._cdata not in outside.seen)
    assert plan == pytest.approx(both + largest, rel=0.05)
    assert outside.bytes < plan < planned(False).peak
