"""What the processor at hand is fast at: half precision, and the memory order of images. Rules, not timings, so that
they choose the same again."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
AUTO = "auto"
WIDE = 10_000_000
"""Parameters from which a CPU computes a network faster in channels-last order (DDPM++ of 55.7M: up to 1.36 times;
`digits`, 0.7M: 0.9 times)."""

_CPUINFO = Path("/proc/cpuinfo")
_UNITS = {"AMX": "amx_bf16", "AVX512-BF16": "avx512_bf16"}


def bf16_unit(device: torch.device) -> str | None:
    """What computes in bf16 there, in words; None where bf16 would only be imitated, which is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device) if torch.cuda.is_bf16_supported(including_emulation=False) else None
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # on a CPU oneDNN has the kernels
        return None
    known = {"AMX": "_is_amx_tile_supported", "AVX512-BF16": "_is_avx512_bf16_supported"}
    for name, probe in known.items():
        found = getattr(torch.cpu, probe, None)  # not public yet: another torch may lack it
        if found() if found is not None else _UNITS[name] in _flags():
            return name
    return None


def _flags() -> set[str]:
    """The processor's flags as Linux lists them."""
    try:
        lines = _CPUINFO.read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())


def chosen_precision(precision: str, device: torch.device) -> str:
    """`precision`, or what `auto` stands for on that device: bf16 where it has units for that, else fp32."""
    if precision != AUTO:
        return precision
    return "fp32" if bf16_unit(device) is None else "bf16"


def explain_precision(precision: str, device: torch.device) -> str:
    """What is used where `auto` was asked for, and why: the choice of this machine, or what was recorded by another."""
    unit, chosen = bf16_unit(device), chosen_precision(AUTO, device)
    why = f"{unit} computes in bf16" if unit else "nothing here computes in bf16"
    return f"precision {precision} (auto: {why if precision == chosen else f'as it was begun; {why}'})"


def prefers_channels_last(network: object, device: torch.device) -> bool:
    """Whether a network is faster in channels-last order: convolutions on a CPU, and wide enough. (On a GPU it was not
    measured.)"""
    if device.type != "cpu" or not isinstance(network, nn.Module):
        return False
    parameters = list(network.parameters())
    return any(p.ndim == 4 for p in parameters) and sum(p.numel() for p in parameters) >= WIDE


def to_channels_last(network: nn.Module) -> None:
    """Put the 4-dimensional weights in channels-last order; images follow them through the convolutions."""
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def arrange(network: object, device: str | torch.device) -> bool:
    """Put a network in the memory order that it is faster in there; whether that is channels-last."""
    if isinstance(network, nn.Module) and prefers_channels_last(network, torch.device(device)):
        to_channels_last(network)
        return True
    return False
