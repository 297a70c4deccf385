"""Backbones of projected critics (Sauer et al. 2021, "Projected GANs Converge Faster", section 3): a frozen network in
four parts, and what each of them hands on."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2o.features.base import Features, placed

SIZE, LEVELS = 224, 4
PROBE = 256
"""Side of the zeros that the published critics' backbones see once in training mode."""


class Backbone(Features):
    """Four modules, each fed by the one before.

    Images go to [0, 1], are normalised by `mean` and `std` there, and only then resized to `size` pixels (bilinear,
    not antialiased), as the published critics do (Zheng & Yang 2024, appendix B.4, and their code). `channels`: those
    of the four maps. `taps`: for each level what makes a map of what its module gives, where that is no map
    itself (tokens). `grid`: the maps are grids of tokens, all of one size. Its vector is the mean over places of the
    last map.
    """

    size: int

    def __init__(
        self,
        stages: Sequence[nn.Module],
        channels: Sequence[int],
        mean: Sequence[float],
        std: Sequence[float],
        *,
        taps: Sequence[nn.Module] | None = None,
        grid: bool = False,
        size: int = SIZE,
        name: str = "backbone",
        sha256: str = "",
        takes: tuple[int, ...] = (1, 3),
    ):
        if len(stages) != LEVELS or len(channels) != LEVELS:
            raise ValueError(
                f"a backbone has {LEVELS} stages, not {len(stages)} with {len(channels)} numbers of channels"
            )
        network = nn.ModuleDict(
            {"stages": nn.ModuleList(stages), "taps": nn.ModuleList(taps or [nn.Identity()] * LEVELS)}
        )
        super().__init__(name, network, channels[-1], sha256, resize=f"bilinear{size}", takes=takes)
        self.channels, self.size, self.grid = tuple(channels), size, grid
        self.mean: Tensor
        self.std: Tensor
        for key, values in (("mean", mean), ("std", std)):
            self.register_buffer(key, torch.tensor(values, dtype=torch.float32)[:, None, None], persistent=False)

    def prepare(self, images: Tensor) -> Tensor:
        x = ((images + 1) / 2 - self.mean) / self.std
        if tuple(x.shape[2:]) == (self.size, self.size):
            return x
        return F.interpolate(x, (self.size, self.size), mode="bilinear", align_corners=False)

    def taps(self, x: Tensor) -> list[Tensor]:
        found = []
        for stage, tap in zip(self.network["stages"], self.network["taps"], strict=True):  # type: ignore[index]
            x = stage(x)
            found.append(tap(x))
        return found

    def outputs(self, x: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        return {"features": self.taps(x)[-1].mean((2, 3))}


@torch.no_grad()
def probe(backbone: Backbone) -> None:
    """One pass of zeros [1, 3, 256, 256] in training mode, which moves the batch norms' statistics by a tenth of the
    way to those of it. The published critics do so before they freeze a backbone; for comparisons with them alone.

    Not in channels_last: maps of zeros are all but constant, and the CPU's kernels for that order lose their variance.
    """
    norms = [module for module in backbone.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not norms:  # and a transformer takes no other size than its own
        return
    backbone.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    for module in norms:
        module.training = True
    try:
        backbone.taps(torch.zeros(1, 3, PROBE, PROBE, device=backbone.mean.device))
    finally:
        for module in norms:
            module.training = False
        placed(backbone, backbone.mean.device)
