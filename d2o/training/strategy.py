"""How the numbers of the players lie among the processes: every process has all of them (replicate), or its share
(shard)."""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from d2o.errors import UserError
from d2o.networks.copying import local
from d2o.networks.edm2_unet import EDM2Precond
from d2o.students.base import Student
from d2o.training import optim
from d2o.training.exchange import Exchange

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

    from d2o.recipes.schema import Recipe

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
LARGE = 2**25
"""Numbers of a block from which on the blocks inside it are gathered one by one too."""


class Replicate:
    """Every process holds every network and moves it by the mean of all processes' gradients."""

    shards = False

    def __init__(self, device: torch.device, world: int):
        self.device, self.world = device, world

    def place(self, network: nn.Module) -> None:
        """Give each process its part of the network's parameters, in place."""

    def exchange(self, parameters: Iterable[nn.Parameter]) -> Exchange:
        """What averages their gradients, see `Exchange`."""
        return Exchange(parameters, self.world)

    def handle(self, parameter: nn.Parameter) -> nn.Parameter:
        """What the optimiser moves: an ordinary tensor that is (a part of) the parameter."""
        return parameter

    def like(self, value: Tensor, parameter: nn.Parameter) -> Tensor:
        """A tensor of the optimiser's as a part of one that belongs to the whole parameter."""
        return value

    def gradients(self, parameters: Iterable[nn.Parameter], handles: Iterable[nn.Parameter]) -> list[Tensor]:
        """Those of the handles, from those of their parameters where there are any."""
        return [p.grad for p in parameters if p.grad is not None]

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """The 2-norm of all gradients together, whoever holds them: a scalar that stays on the device."""
        return optim.norm(gradients)

    def finite(self, gradients: list[Tensor]) -> Tensor:
        """Whether all numbers are finite, whoever holds them: a truth value that stays on the device."""
        return self.agreed(optim.all_finite(gradients))

    def agreed(self, flags: Tensor) -> Tensor:
        """Which of the truth values hold for what every process has."""
        return flags

    def after_backward(self) -> None:
        """What is left to do when a backward pass has ended."""


class Shard(Replicate):
    """FSDP2: each process holds a share of each parameter (rows of its first dimension), of its gradient, its moments
    and its average. A block's parameters are gathered when it is called, forward and backward, and let go after;
    gradients are reduced to the shares in the backward pass itself.

    Parameters that cannot be divided so that every process has some (scalars, a few rows) are held whole by all; their
    gradients are averaged at the update. Buffers are held whole, and parts that are not trained.
    """

    shards = True

    def __init__(self, device: torch.device, world: int):
        from torch.distributed.device_mesh import init_device_mesh

        super().__init__(device, world)
        if device.type == "cpu":
            return_freed_memory()
        self.mesh = init_device_mesh(device.type, (world,))
        self.divided: set[int] = set()  # ids of the gradients that are a share; the others are whole
        self.kept: set[FSDPModule] = set()  # gathered until the end of the backward pass, see `_keep`

    def place(self, network: nn.Module) -> None:
        from torch.distributed.fsdp import FSDPModule, fully_shard

        for p in network.parameters():
            p.data = p.data.contiguous()
        undivided = {p for p in network.parameters() if not divides(p, self.world)}
        undivided |= set(frozen_parts(network))
        if all(p in undivided for p in network.parameters()):
            return
        units = [unit for unit in blocks(network) if any(p not in undivided for p in unit.parameters())]
        if isinstance(network, Student):
            units.append(network.network)  # methods call it directly too
        for unit in [*units, network]:
            fully_shard(unit, mesh=self.mesh, reshard_after_forward=True, ignored_params=undivided)
        # Outputs that are views, as of critics: FSDP's hooks are lost if they are changed in place, which nothing does.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
        assert isinstance(network, FSDPModule)
        for part in network.modules():
            if isinstance(part, EDM2Precond):
                part.normalised_before = True
                part.register_forward_pre_hook(lambda module, _: module.before_forward(), prepend=True)
        fully_shard.state(network)._lazy_init()  # type: ignore[attr-defined]  # the root, whichever block is called first
        network.register_forward_hook(self._watch)

    def exchange(self, parameters: Iterable[nn.Parameter]) -> Exchange:
        return Exchange([p for p in parameters if not is_share(p)], self.world, overlap=False)

    def handle(self, parameter: nn.Parameter) -> nn.Parameter:
        if not is_share(parameter):
            return parameter
        with torch.no_grad():
            return nn.Parameter(local(parameter.detach()))

    def like(self, value: Tensor, parameter: nn.Parameter) -> Tensor:
        from torch.distributed.tensor import DTensor

        if not isinstance(parameter, DTensor) or value.shape != local(parameter.detach()).shape:
            return value
        return share(value, parameter)

    def gradients(self, parameters: Iterable[nn.Parameter], handles: Iterable[nn.Parameter]) -> list[Tensor]:
        self.divided, found = set(), []
        for p, handle in zip(parameters, handles, strict=True):
            if p.grad is None:
                continue
            if handle is not p:
                handle.grad = local(p.grad)
                self.divided.add(id(handle.grad))
            assert handle.grad is not None
            found.append(handle.grad)
        return found

    def norm(self, gradients: list[Tensor]) -> Tensor:
        mine = [g for g in gradients if id(g) in self.divided]
        ours = [g for g in gradients if id(g) not in self.divided]
        square = optim.norm(mine).square() if mine else torch.zeros((), device=self.device)
        dist.all_reduce(square)
        return (square + optim.norm(ours).square()).sqrt() if ours else square.sqrt()

    def agreed(self, flags: Tensor) -> Tensor:
        common = flags.to(torch.int32)
        dist.all_reduce(common, dist.ReduceOp.MIN)
        return common.bool()

    def after_backward(self) -> None:
        from torch.distributed.fsdp import FSDPModule

        for root in self.kept:
            root.set_reshard_after_backward(True)
            for part in root.modules():  # type: ignore[attr-defined]
                if isinstance(part, FSDPModule):
                    part.reshard()
        self.kept.clear()

    def _watch(self, root: nn.Module, args: object, output: object) -> None:
        from torch.utils._pytree import tree_leaves

        for value in tree_leaves(output):
            if isinstance(value, Tensor) and value.requires_grad:
                value.register_hook(lambda gradient: self._keep(cast("FSDPModule", root)))

    def _keep(self, root: FSDPModule) -> None:
        """A backward pass has come to the network's output. If it can itself be differentiated (R1, path lengths), the
        second one goes through the same gathered parameters: they stay until it has ended."""
        if torch.is_grad_enabled():
            root.set_reshard_after_backward(False)
            self.kept.add(root)


def make_strategy(recipe: Recipe, device: torch.device, world: int) -> Replicate:
    """The recipe's strategy; with one process there is nothing to share. UserError: as `check_strategy`."""
    check_strategy(recipe, world)
    return Shard(device, world) if recipe.strategy == "shard" and world > 1 else Replicate(device, world)


def check_strategy(recipe: Recipe, world: int) -> None:
    """UserError: settings that do not go with shares."""
    if recipe.strategy == "replicate" or world == 1:
        return
    if recipe.channels_last is True:
        raise UserError("channels_last: strategy shard divides rows of weights in their usual order", "leave it away")
    if recipe.eight_bit:
        what = "optim.state: 8bit rounds in blocks of a whole tensor, and with strategy shard no process has one"
        raise UserError(what, "shares of moments are small already: optim.state: fp32")
    if recipe.compile:
        raise UserError("compile: torch.compile has not been tried with strategy shard", "compile: false")


def return_freed_memory() -> None:
    """Have the C library give large pieces of memory back when they are freed, as gathered blocks are, instead
    of keeping them for later. On systems whose library has no such switch nothing happens."""
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        for parameter in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            library.mallopt(parameter, 2**18)


def divides(parameter: nn.Parameter, world: int) -> bool:
    """Whether every process gets some rows of it."""
    rows = parameter.shape[0] if parameter.ndim else 0
    return rows >= world and -(-rows // world) * (world - 1) < rows


def blocks(network: nn.Module) -> Iterator[nn.Module]:
    """The members of a network's lists of modules, of large ones their own members first: what is gathered and let go
    together."""
    for child in network.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            for member in child.children():
                if isinstance(member, (nn.ModuleList, nn.ModuleDict)):
                    yield from blocks(nn.ModuleList([member]))
                    continue
                if sum(p.numel() for p in member.parameters()) >= LARGE:
                    yield from blocks(member)
                yield member
        else:
            yield from blocks(child)


def frozen_parts(network: nn.Module) -> Iterator[nn.Parameter]:
    """Those of the parts of a network in training that are not trained, such as an autoencoder: methods call them by
    themselves, and there is little to share of them."""
    if any(p.requires_grad for p in network.parameters()):
        for child in network.children():
            if not any(p.requires_grad for p in child.parameters()):
                yield from child.parameters()


def is_share(tensor: Tensor) -> bool:
    return hasattr(tensor, "to_local")


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor, gathered from the processes, which all have to call this."""
    return tensor.full_tensor() if is_share(tensor) else tensor  # type: ignore[attr-defined]


def share(value: Tensor, of: Tensor) -> Tensor:
    """This process's part `value` of a tensor that is divided as `of` is."""
    from torch.distributed.tensor import DTensor

    assert isinstance(of, DTensor)
    return DTensor.from_local(value, of.device_mesh, of.placements, run_check=False, shape=of.shape, stride=of.stride())


def part_of(value: Tensor, of: Tensor) -> Tensor:
    """Of the whole tensor `value` what this process has of it, divided as `of` is (whole if that is)."""
    from torch.distributed.tensor import DTensor

    if not isinstance(of, DTensor) or value.shape != of.shape:
        return value
    mesh = of.device_mesh
    return share(value.chunk(mesh.size(), dim=0)[mesh.get_local_rank()].contiguous().to(of.device), of)
