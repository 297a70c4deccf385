"""One iteration of SiD and of SiDA in its last phase, by hand: what benchmarks/sid.py compares the training loop
with."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.nn import functional as F

from d2o.data.images import to_float
from d2o.training.loop import Trainer

IMAGES = 512
"""Real images that it goes through."""


class Bare:
    """Algorithm 1 by hand, with copies of a trainer's networks. `passes` 2: the map comes from a pass of its own."""

    def __init__(self, trainer: Trainer, passes: int = 1):
        recipe, setup, o = trainer.recipe, trainer.setup, trainer.recipe.options
        self.batch, self.device, self.alpha, self.pool, self.passes = (
            recipe.batch,
            setup.device,
            o.alpha,
            o.batch_pool or recipe.batch,
            passes,
        )
        assert setup.teacher is not None
        self.teacher, self.sigma, self.classes = (
            setup.teacher.network,
            float(recipe.student.sigma),
            setup.teacher.spec.classes,
        )
        self.student, self.score = (copy.deepcopy(trainer.networks[name]) for name in ("student", "score"))
        self.shape, self.average = setup.teacher.spec.shape, copy.deepcopy(self.student).requires_grad_(False)
        fused = setup.device.type == "cuda"
        self.optimizers = [
            torch.optim.Adam(
                net.parameters(), lr=recipe.optim.lr, betas=recipe.optim.betas, fused=fused, foreach=not fused
            )
            for net in (self.student, self.score)
        ]
        self.clip = recipe.optim_critic.clip_value if recipe.optim_critic else None
        self.real: Tensor | None = None
        if setup.images is not None:
            assert setup.images.labels is not None
            index = torch.arange(IMAGES)
            self.real, self.real_labels = (
                to_float(setup.images.images(index)).to(self.device),
                setup.images.labels[index].to(self.device),
            )
        self.done = 0

    def ask(self, x: Tensor, sigma: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """The score network's denoised images, and its map where there are real images."""
        if self.real is None:
            return self.score(x, sigma.flatten(), labels), None
        if self.passes == 1:
            return self.score(x, sigma.flatten(), labels, part="encoder_decoder")
        return self.score(x, sigma.flatten(), labels), self.score(x, sigma.flatten(), labels, part="encoder")

    def make(self, labels: Tensor) -> Tensor:
        noise = torch.randn(self.batch, *self.shape, device=self.device)
        return self.student.network(self.sigma * noise, noise.new_full((1,), self.sigma), labels)

    def pooled(self, paid: Tensor) -> Tensor:
        return paid.reshape(-1, self.pool * paid[0].numel()).mean(1).repeat_interleave(self.pool)

    def step(self) -> None:
        b, device = self.batch, self.device
        index = torch.arange(self.done * b, (self.done + 1) * b, device=device) % IMAGES
        self.done += 1
        self.student.eval()
        self.score.train()
        labels = torch.randint(0, self.classes, (b,), device=device) if self.real is None else self.real_labels[index]
        with torch.no_grad():
            x = self.make(labels)
        sigma, noise = (1.2 * torch.randn(b, 1, 1, 1, device=device) - 1.2).exp(), torch.randn_like(x)
        weight = (sigma**2 + 0.25) / (0.5 * sigma) ** 2
        denoised, fake = self.ask(x + sigma * noise, sigma, labels)
        loss = (weight * (denoised - x).square()).flatten(1).sum(1)
        if self.real is not None:
            assert fake is not None
            real = self.score(self.real[index] + sigma * noise, sigma.flatten(), labels, part="encoder")
            loss = loss + 0.5 * weight.flatten() * (self.pooled(F.softplus(-real)) + self.pooled(F.softplus(fake)))
        loss.mean().backward()
        if self.clip:
            torch.nn.utils.clip_grad_value_(self.score.parameters(), self.clip, foreach=True)
        self.update(1)

        self.student.train()
        self.score.eval().requires_grad_(False)
        labels = (
            torch.randint(0, self.classes, (b,), device=device)
            if self.real is None
            else labels[torch.randperm(b, device=device)]
        )
        x = self.make(labels)
        low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
        sigma = (high + (1 - 0.8 * torch.rand(b, 1, 1, 1, device=device)) * (low - high)) ** 7
        x_t = x + sigma * torch.randn_like(x)
        true = self.teacher(x_t, sigma.flatten(), labels)
        fake_score, logits = self.ask(x_t, sigma, labels)
        error = (x - true).detach().abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-5)
        delta = true - fake_score
        loss = 100 * (delta * ((true - x) - self.alpha * delta) / error).flatten(1).sum(1)
        if logits is not None:
            paid = self.pooled(F.softplus(-logits.clamp(-10, 10)))
            loss = 0.5 * loss + 0.5 * 0.01 * x[0].numel() * paid / error.flatten()
        loss.mean().backward()
        self.score.requires_grad_(True)
        self.update(0)
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), [p.detach() for p in self.student.parameters()], 0.01)

    def update(self, which: int) -> None:
        self.optimizers[which].step()
        self.optimizers[which].zero_grad(set_to_none=True)
