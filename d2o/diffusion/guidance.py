"""Classifier-free guidance (Ho & Salimans 2022)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from d2o.errors import UserError

Range = tuple[float, float]
"""Guidance scales, both ends included."""


def guide(d_c: Tensor, d_u: Tensor, cfg: float | Tensor) -> Tensor:
    """D_u + cfg (D_c - D_u), of predictions with the condition and without, in any one of data, noise or velocity:
    for one x_t they come to the same. 1: D_c; 0: D_u. Shapes as they are; `cfg` of all, or [B] of each."""
    if isinstance(cfg, Tensor):
        cfg = cfg.to(d_c).view(-1, *[1] * (d_c.ndim - 1))
    return torch.lerp(d_u, d_c, cfg)


def no_guidance(cfg: float | Range | Tensor) -> bool:
    """Whether the teacher is called once, with the condition alone."""
    return isinstance(cfg, (int, float)) and cfg == 1


def show_cfg(cfg: float | Range | Tensor) -> str:
    """A guidance scale, or 1:8 for a range, as command lines have it."""
    if isinstance(cfg, Tensor):
        return "of each sample"
    return f"{cfg[0]:g}:{cfg[1]:g}" if isinstance(cfg, tuple) else f"{cfg:g}"


def parse_cfg(text: str) -> float | Range:
    """Undo `show_cfg`. UserError: neither a number nor a range."""
    try:
        numbers = [float(part) for part in text.split(":")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2):
        raise UserError(f"--cfg {text}: expected a number, or a range like 1:8 of which each pair has its own")
    return check_cfg_values(numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1]))


def check_cfg_values(cfg: float | Range) -> float | Range:
    """UserError: not a number from 0 up, or two of them of which the second is no larger."""
    low, high = cfg if isinstance(cfg, tuple) else (cfg, cfg)
    if not (math.isfinite(low) and math.isfinite(high) and low >= 0):
        raise UserError(f"cfg must be a number from 0 up, not {cfg}", "1 is no guidance")
    if isinstance(cfg, tuple) and low >= high:
        raise UserError(f"cfg {show_cfg(cfg)}: the range ends before it begins", "for example 1:8")
    return cfg
