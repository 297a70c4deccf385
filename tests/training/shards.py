"""Small sharded trainings as several processes of their own, one of which can be killed in a chosen change of the run's
folder."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed.checkpoint  # so that the server of processes has them
import torch.distributed.fsdp
from torch import Tensor, nn

from d2o.critics.projected import ProjectedCritic
from d2o.features import Backbone
from d2o.losses.adversarial import critic_loss, generator_loss, r1_penalty
from d2o.methods.base import METHODS, Method, Setup
from d2o.networks.edm2_unet import EDM2Precond
from d2o.training import precision
from tests import workers
from tests.torture.events import Events
from tests.training.processes import Job, main
from tests.training.test_two_networks import TinyGAN

NAN = float("nan")


class Uneven(nn.Module):
    """Layers whose rows divide among 2 and 4 processes unevenly (7), among 2 alone (6), and not at all (1). In an
    iteration that stumbles, the gradients of the first of the 7 rows are NaN: one process has them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(1, 7), nn.Linear(7, 6), nn.Linear(6, 1)
        self.stumbles = False

    def forward(self, z: Tensor) -> Tensor:
        h = self.first(z)
        if self.stumbles and h.requires_grad:
            h.register_hook(lambda g: torch.cat([g[:, :1] * NAN, g[:, 1:]], 1))
        return self.last(torch.tanh(self.middle(torch.tanh(h))))


class UnevenGAN(TinyGAN):
    def __init__(self, setup: Setup):
        super().__init__(setup)
        self.generator = Uneven()  # type: ignore[assignment]


class Stumbles(UnevenGAN):
    def step(self, loop: Any, batch: Any, iteration: int) -> dict[str, Tensor]:
        self.generator.stumbles = iteration == 2  # type: ignore[assignment]
        return super().step(loop, batch, iteration)


class Explodes(UnevenGAN):
    """The last process's weights leave the numbers."""

    def step(self, loop: Any, batch: Any, iteration: int) -> dict[str, Tensor]:
        result = super().step(loop, batch, iteration)
        if iteration == 2 and loop.rank == loop.world - 1:
            with torch.no_grad():
                weight: Any = self.generator.first.weight
                getattr(weight, "to_local", lambda: weight)()[0] = float("inf")
        return result


class EDM2(Method):
    """EDM2's denoiser, whose weights are normalised before each pass, learns to give 0."""

    data = "none"
    product = "denoiser"

    def __init__(self, setup: Setup):
        shape: dict[str, Any] = {"model_channels": 8, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": ()}
        self.denoiser = EDM2Precond(4, 1, logvar_channels=8, force_wn="pre_forward", channels_per_head=8, **shape)
        with torch.no_grad():  # at 0 only this number would be trained at first
            self.denoiser.unet.out_gain.fill_(1.0)

    def players(self) -> dict[str, nn.Module]:
        return {"denoiser": self.denoiser}

    def step(self, loop: Any, batch: Any, iteration: int) -> dict[str, Tensor]:
        losses = []
        for _, draw in loop.micro_batches(batch):
            sigma = draw.rand() + 0.1
            x = sigma[:, None, None, None] * draw.randn(1, 4, 4)
            found, u = loop.net("denoiser")(x, sigma, return_logvar=True)
            losses.append((found.square() / u.exp() + u).mean())
            loop.backward(losses[-1])
        loop.update("denoiser")
        return {"loss": loop.mean(losses)}

    def describe(self) -> dict[str, Any]:
        return {"kind": "denoiser", "network": self.denoiser.config}


class Projected(Method):
    """A layer that makes 8 x 8 images against GDD's critic, whose batch norms take 4 images together; with R1."""

    data = "none"
    product = "generator"
    pools_across = True

    @classmethod
    def micro_multiple(cls, options: Any, batch: int) -> int:
        return 4

    def __init__(self, setup: Setup):
        self.generator = nn.Linear(8, 3 * 64)
        stages = [nn.Sequential(nn.Conv2d(c, 4, k, k), nn.SiLU()) for c, k in ((3, 2), (4, 2), (4, 1), (4, 1))]
        backbone = Backbone(stages, [4] * 4, (0.5,) * 3, (0.5,) * 3, size=16)
        self.critic = ProjectedCritic([("small", backbone)], classes=3, embedding="learned", width=4, pool=4)

    def players(self) -> dict[str, nn.Module]:
        return {"generator": self.generator, "critic": self.critic}

    def step(self, loop: Any, batch: Any, iteration: int) -> dict[str, Tensor]:
        losses = []
        for _, draw in loop.micro_batches(batch):
            labels, z = draw.randint(0, 3), draw.randn(8)
            with loop.frozen("critic") as critic:
                losses.append(generator_loss(critic(self.images(loop, z), labels)).mean())
                loop.backward(losses[-1])
        loop.update("generator")
        for _, draw in loop.micro_batches(batch, 1):
            labels, z, real = draw.randint(0, 3), draw.randn(8), draw.randn(3, 8, 8) / 2
            fake = self.images(loop, z).detach()
            loop.backward(critic_loss(loop.net("critic")(real, labels), loop.net("critic")(fake, labels)).mean())
        loop.update("critic")
        for _, draw in loop.micro_batches(batch, 2):
            labels, real = draw.randint(0, 3), draw.randn(3, 8, 8) / 2
            loop.backward(0.01 * r1_penalty(loop.net("critic"), real, labels).mean())
        loop.update("critic")
        return {"loss": loop.mean(losses)}

    def images(self, loop: Any, z: Tensor) -> Tensor:
        return torch.tanh(loop.net("generator")(z)).unflatten(1, (3, 8, 8))

    def settle(self) -> None:
        self.critic.settle()

    def describe(self) -> dict[str, Any]:
        return {"kind": "generator", "network": {}}


OWN = {
    "tiny-projected": Projected,
    "tiny-uneven": UnevenGAN,
    "tiny-stumbles": Stumbles,
    "tiny-explodes": Explodes,
    "tiny-edm2": EDM2,
}


def register(patch: pytest.MonkeyPatch) -> None:
    """Let recipes name these methods, in this process. Loss scales begin so high that the first updates overflow."""
    for name, method in OWN.items():
        patch.setitem(METHODS, name, f"tests.{name}")
        patch.setitem(sys.modules, f"tests.{name}", SimpleNamespace(METHOD=method))  # type: ignore[arg-type]
    patch.setattr(precision, "START", 2.0**21)


class Kill(NamedTuple):
    """Which process dies, and where: in the `nth` (from 1) change of that kind of such a file; of a run whose changes
    are not yet known, counted from the end."""

    rank: int
    what: str
    of: str
    nth: int = -1


def _work(rank: int, world: int, port: int, out: str, jobs: list[Job], watched: str, kill: Kill | None) -> None:
    given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in given.items()})
    torch.set_num_threads(1)
    register(pytest.MonkeyPatch())
    sys.stdout = sys.stderr = open(Path(out) / f"{watched}{rank}.log", "w", buffering=1)  # noqa: SIM115
    met = 0

    def here(what: str, path: str) -> bool:
        nonlocal met
        if kill is None or kill.rank != rank or what != kill.what or kill.of not in path:
            return False
        met += 1
        return met == kill.nth

    events = Events(Path(out) / watched, where=here)
    events.install()
    main(Path(out), jobs)
    events.save(Path(out) / f"{watched}{rank}.events")


def train(
    world: int, out: Path, jobs: list[Job], watched: str = "", kill: Kill | None = None
) -> list[list[tuple[str, str]]]:
    """Train, or go on with, each of the jobs in so many processes. One may be killed in a change of the folder
    `watched`; the others end with it. The changes that each process made there: what and which file."""
    out.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = [(rank, world, port, str(out), jobs, watched, kill) for rank in range(world)]
    started = [workers.CONTEXT.Process(target=_work, args=arguments) for arguments in given]
    for process in started:
        process.start()
    codes = [workers.finish(process, 120) for process in started]
    if kill is not None:
        assert codes[kill.rank] == -9 and all(codes), codes
        return []
    assert not any(codes), [(out / f"{watched}{rank}.log").read_text() for rank in range(world)]
    listed = [json.loads((out / f"{watched}{rank}.events").read_text()) for rank in range(world)]
    return [[(what, path) for what, path in events] for events in listed]
