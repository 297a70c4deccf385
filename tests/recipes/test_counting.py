"""What a plan counts of a step, against what a real one keeps."""

from __future__ import annotations

import pytest
import torch

from d2o.interop import torchvision_compat
from d2o.recipes.counting import META, CountingLoop, Kept

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

    def period(self):
        return 1

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
    assert plan.calls == 1 and plan.peak == pytest.approx(kept.bytes, rel=0.08)


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
