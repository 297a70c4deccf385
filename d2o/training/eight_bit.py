"""Adam with its two moments in eight bits (Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization), by the
package torchao: a byte for each number, and a scale for each 256 of them. Tensors of fewer than 4096 numbers, or of no
multiple of 256, keep theirs in float32."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from d2o.errors import UserError

if TYPE_CHECKING:
    from d2o.training.optim_section import OptimSection

CLASSES = {"adam": "Adam8bit", "adamw": "AdamW8bit"}
BLOCK, LEAST = 256, 4096
_PARTS = ("codes", "scale")


def check_installed() -> ModuleType:
    """torchao's optimisers. UserError: it is not installed."""
    logging.disable(logging.WARNING)  # of kernels for other devices, which it cannot load
    try:
        import torchao.optim

        return torchao.optim
    except ImportError as error:
        raise UserError(
            f"optim.state: 8bit needs the package torchao ({error})", "pip install 'd2o[8bit]', or optim.state: fp32"
        ) from error
    finally:
        logging.disable(logging.NOTSET)


def eight_bit_adam(
    groups: list[dict[str, Any]], options: OptimSection, common: dict[str, Any]
) -> torch.optim.Optimizer:
    """The optimiser of parameter groups. UserError as `check_installed`."""
    base: Any = getattr(check_installed(), CLASSES[options.name])

    class EightBit(base):  # type: ignore[misc]
        def step(self, closure: Callable[[], float] | None = None) -> float | None:
            """torchao compiles the update for each shape of tensor, which takes a CPU a minute each, and spares it
            little."""
            cpu = all(p.device.type == "cpu" for group in self.param_groups for p in group["params"])
            with torch.compiler.set_stance("force_eager" if cpu else "default"):
                return super().step(closure)

    return EightBit(groups, block_size=BLOCK, **common)


def bytes_of(numbers: int) -> int:
    """What a moment of a tensor of so many numbers takes."""
    return numbers + 4 * (numbers // BLOCK) if quantised(numbers) else 4 * numbers


def quantised(numbers: int) -> bool:
    return numbers >= LEAST and numbers % BLOCK == 0


def taken_apart(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """An optimiser's state of one parameter as plain tensors: of a moment in eight bits its codes and scales."""
    plain: dict[str, Tensor] = {}
    for key, value in state.items():
        if all(hasattr(value, part) for part in _PARTS):
            plain |= {f"{key}.{part}": getattr(value, part) for part in _PARTS}
        elif value is not None:
            plain[key] = torch.as_tensor(value)
    return plain


def put_together(plain: Mapping[str, Tensor], parameter: nn.Parameter) -> dict[str, Tensor]:
    """Undo `taken_apart`. LookupError: a moment without its scales, or of another size."""
    state = {key: value for key, value in plain.items() if "." not in key}
    for key in dict.fromkeys(name.partition(".")[0] for name in plain if "." in name):
        from torchao.optim.subclass_8bit import OptimState8bit

        moment = OptimState8bit.zeros(parameter.shape, key == "exp_avg", BLOCK, parameter.device, dtype=parameter.dtype)
        for part in _PARTS:
            if (found := plain[f"{key}.{part}"]).shape != (place := getattr(moment, part)).shape:
                raise LookupError(f"{key}.{part} has the shape {list(found.shape)}, not {list(place.shape)}")
            place.copy_(found)
        state[key] = moment
    return state
