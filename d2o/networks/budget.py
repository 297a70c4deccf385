"""Networks that a file or a recipe describes are built without memory first: what a description asks for may be
anything.

Parameters are counted while the network is built on the meta device, where they take no memory; too many end it,
however long it would go on.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from d2o.errors import UserError
from d2o.networks.fill import fill_network

N = TypeVar("N", bound=nn.Module)

MAX_NUMBER = 2**20
"""The largest integer in a description: channels, blocks, classes, pixels, words."""
MAX_TENSORS, MAX_VALUES = 2**13, 2**40
"""The largest network that anything may describe: SDXL's has 1,680 tensors and 2.6e9 numbers."""
SPARE = 2**22
"""Numbers that a network may hold beside those in its file: buffers that are not saved."""


def build_within(make: Callable[[], N], holds: Mapping[str, Tensor] | None, where: str) -> N:
    """`make()`, after it was tried without memory. `holds`: the tensors of the file that describes the network, which
    must be exactly its own.

    UserError, naming `where`: more tensors or numbers than the file holds, others, more than anything may have, or more
    than this machine can hold. Random numbers are drawn as by one `make()`.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"), counted(holds, where) as values:
        module = make()
    if holds is not None:
        bare = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in holds.items()}
        fill_network(module, bare, where, assign=True)
    if torch.get_default_device().type == "meta":
        return module
    if holds is None and torch.get_default_device().type == "cpu" and 4 * values[0] > (memory := physical_memory()):
        what = (
            f"{where}: {values[0]:,} parameters take {4 * values[0] / 2**30:,.0f} GiB; this machine has"
            f" {memory / 2**30:,.0f}"
        )
        raise UserError(what, "describe a smaller network")
    return make()


def physical_memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@contextmanager
def counted(holds: Mapping[str, Tensor] | None, where: str) -> Iterator[list[int]]:
    """Count the numbers in parameters and buffers of networks that this thread builds in the block. UserError: more
    than `holds`, or the limit."""
    tensors, numbers = MAX_TENSORS, MAX_VALUES
    if holds is not None:
        # Twice: a weight that two modules share is counted for each.
        tensors, numbers = (
            min(tensors, 2 * len(holds) + 64),
            min(numbers, 2 * sum(tensor.numel() for tensor in holds.values()) + SPARE),
        )
    mine, seen, parts, values = threading.get_ident(), 0, 0, [0]
    limit = "the file holds" if holds is not None else "d2o builds"

    def count(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        nonlocal seen
        if threading.get_ident() != mine or tensor is None:
            return
        seen += 1
        values[0] += tensor.numel()
        if seen > tensors or values[0] > numbers:
            raise UserError(
                f"{where}: describes a network of more tensors or numbers than {limit}",
                "expected a file made by `d2o`" if holds else "",
            )

    def part(module: nn.Module, name: str, child: nn.Module | None) -> None:
        nonlocal parts
        if threading.get_ident() == mine:
            parts += 1
            if parts > 16 * tensors:
                raise UserError(f"{where}: describes a network of more parts than {limit}")

    handles = [
        register_module_parameter_registration_hook(count),
        register_module_buffer_registration_hook(count),
        register_module_module_registration_hook(part),
    ]
    try:
        yield values
    finally:
        for handle in handles:
            handle.remove()


def check_numbers(config: object, where: str) -> None:
    """UserError, naming the key: an integer in a description (or in a list or section of it) is beyond any that a
    network has."""
    if isinstance(config, Mapping):
        for key, value in config.items():
            check_numbers(value, f"{where}.{key}")
    elif isinstance(config, (list, tuple)):
        for i, value in enumerate(config):
            check_numbers(value, f"{where}[{i}]")
    elif isinstance(config, int) and abs(config) > MAX_NUMBER:
        shown = f"{config:,}" if abs(config) < 10**15 else "more digits than that"
        raise UserError(f"{where}: expected an integer of at most {MAX_NUMBER:,}, got {shown}")


def file_holdings(files: list[Path]) -> dict[str, Tensor]:
    """Names and shapes of the tensors in safetensors files, without memory. UserError: not safetensors files."""
    from safetensors import SafetensorError, safe_open

    found = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    found[name] = torch.empty(file.get_slice(name).get_shape(), device="meta")
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{path} is truncated or not a safetensors file ({error})", "make it again, or check the download"
            ) from error
    return found
