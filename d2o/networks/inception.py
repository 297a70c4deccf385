"""The Inception network of 2015 whose features FID, Inception Score, KID and their kin are defined on.

This is TensorFlow's `inception-2015-12-05` (Szegedy et al., "Rethinking the Inception Architecture for Computer
Vision", arXiv:1512.00567;
its use for FID: Heusel et al., arXiv:1706.08500). It is not torchvision's inception_v3: it has 1008 outputs and no
auxiliary head, its average pools leave the padding out of the mean, and its very last block pools by maximum.
Parameters have the names of pytorch-fid and torch-fidelity; `from_tensorflow_names` translates those of NVIDIA's and
OpenAI's files, which follow TensorFlow's graph.
"""

from __future__ import annotations

import re
from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEATURES, SPATIAL, CLASSES, SIZE = 2048, 7 * 17 * 17, 1008, 299


class ConvBlock(nn.Module):
    """Convolution without bias, batch normalisation, ReLU."""

    def __init__(
        self, cin: int, cout: int, kernel: int | tuple[int, int], stride: int = 1, padding: int | tuple[int, int] = 0
    ):
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(cout, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(self.bn(self.conv(x)))


def average(x: Tensor) -> Tensor:
    """3x3 mean of the pixels that exist: TensorFlow's average pool does not count the padding."""
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class BlockA(nn.Module):
    """35x35 pixels -> 224 + `pool` channels."""

    def __init__(self, cin: int, pool: int):
        super().__init__()
        self.branch1x1 = ConvBlock(cin, 64, 1)
        self.branch5x5_1 = ConvBlock(cin, 48, 1)
        self.branch5x5_2 = ConvBlock(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = ConvBlock(cin, 64, 1)
        self.branch3x3dbl_2 = ConvBlock(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvBlock(96, 96, 3, padding=1)
        self.branch_pool = ConvBlock(cin, pool, 1)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, double, self.branch_pool(average(x))], 1)


class BlockB(nn.Module):
    """35x35 -> 17x17 pixels, 480 channels more."""

    def __init__(self, cin: int):
        super().__init__()
        self.branch3x3 = ConvBlock(cin, 384, 3, stride=2)
        self.branch3x3dbl_1 = ConvBlock(cin, 64, 1)
        self.branch3x3dbl_2 = ConvBlock(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvBlock(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, 2)], 1)


class BlockC(nn.Module):
    """17x17 pixels, 768 channels in and out; 7x7 convolutions as pairs of 1x7 and 7x1 with `inner` channels."""

    def __init__(self, inner: int):
        super().__init__()
        wide, tall = ((1, 7), 1, (0, 3)), ((7, 1), 1, (3, 0))  # kernel, stride, padding
        self.branch1x1 = ConvBlock(768, 192, 1)
        self.branch7x7_1 = ConvBlock(768, inner, 1)
        self.branch7x7_2 = ConvBlock(inner, inner, *wide)
        self.branch7x7_3 = ConvBlock(inner, 192, *tall)
        self.branch7x7dbl_1 = ConvBlock(768, inner, 1)
        self.branch7x7dbl_2 = ConvBlock(inner, inner, *tall)
        self.branch7x7dbl_3 = ConvBlock(inner, inner, *wide)
        self.branch7x7dbl_4 = ConvBlock(inner, inner, *tall)
        self.branch7x7dbl_5 = ConvBlock(inner, 192, *wide)
        self.branch_pool = ConvBlock(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(average(x))], 1)


class BlockD(nn.Module):
    """17x17 -> 8x8 pixels, 768 -> 1280 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1 = ConvBlock(768, 192, 1)
        self.branch3x3_2 = ConvBlock(192, 320, 3, stride=2)
        self.branch7x7x3_1 = ConvBlock(768, 192, 1)
        self.branch7x7x3_2 = ConvBlock(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = ConvBlock(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = ConvBlock(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, F.max_pool2d(x, 3, 2)], 1)


class BlockE(nn.Module):
    """8x8 pixels -> 2048 channels. `maximum`: the last branch pools by maximum, as it does in the network's last block
    only."""

    def __init__(self, cin: int, maximum: bool):
        super().__init__()
        self.maximum = maximum
        self.branch1x1 = ConvBlock(cin, 320, 1)
        self.branch3x3_1 = ConvBlock(cin, 384, 1)
        self.branch3x3_2a = ConvBlock(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = ConvBlock(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = ConvBlock(cin, 448, 1)
        self.branch3x3dbl_2 = ConvBlock(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = ConvBlock(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = ConvBlock(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = ConvBlock(cin, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, 1, 1) if self.maximum else average(x)
        branches = [self.branch1x1(x), self.branch3x3_2a(three), self.branch3x3_2b(three)]
        branches += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double), self.branch_pool(pooled)]
        return torch.cat(branches, 1)


class Inception(nn.Module):
    """Images [n, 3, 299, 299] -> features, spatial features, logits. 23,850,960 parameters. Weights are random until
    loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvBlock(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvBlock(32, 32, 3)
        self.Conv2d_2b_3x3 = ConvBlock(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = ConvBlock(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvBlock(80, 192, 3)
        self.Mixed_5b = BlockA(192, 32)
        self.Mixed_5c = BlockA(256, 64)
        self.Mixed_5d = BlockA(288, 64)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b = BlockC(128)
        self.Mixed_6c = BlockC(160)
        self.Mixed_6d = BlockC(160)
        self.Mixed_6e = BlockC(192)
        self.Mixed_7a = BlockD()
        self.Mixed_7b = BlockE(1280, maximum=False)
        self.Mixed_7c = BlockE(2048, maximum=True)
        self.fc = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor, wanted: Collection[str] = ("features",)) -> dict[str, Tensor]:
        """Images [n, 3, 299, 299] in about [-1, 1] -> each of `wanted`, in one pass that goes no deeper than needed:

        - "features" [n, 2048]: the mean over the last block's 8x8 pixels, TensorFlow's `pool_3`;
        - "spatial" [n, 2023], for sFID (Nash et al., arXiv:2103.03841): the first 7 channels of the first branch (1x1)
          of Mixed_6d, after its batch normalisation and ReLU, on 17x17 pixels. ADM's evaluator takes them from
          `mixed_6/conv:0`: a node of that graph bears the name of its convolution block and gives what the block gives,
          after the ReLU, and `mixed_4`...`mixed_7` are Mixed_6b...Mixed_6e; OpenAI's PyTorch port takes the same, and
          found it equal to the graph's within 3e-5. Ordered as ADM's reference statistics are: by row, column, channel
          (the channel runs fastest);
        - "logits" [n, 1008]: without the bias of the last layer, as the Inception Score has always been computed
          (TensorFlow's code multiplies `pool_3` with the last layer's weights only).
        """
        found: dict[str, Tensor] = {}
        x = self.to_6d(self.second(self.first(x)))
        if "spatial" in wanted:
            found["spatial"] = x[:, :7].permute(0, 2, 3, 1).flatten(1)  # the block puts its first branch first
        if "features" in wanted or "logits" in wanted:
            x = self.last(self.Mixed_6e(x))
            features = F.adaptive_avg_pool2d(x, 1).flatten(1)
            found["features"] = features
            if "logits" in wanted:
                found["logits"] = F.linear(features, self.fc.weight)
        return {name: found[name] for name in wanted}

    def maps(self, x: Tensor) -> list[Tensor]:
        """Images [n, 3, 299, 299] in about [-1, 1] -> the maps 64 x 73 x 73, 192 x 35 x 35, 768 x 17 x 17 (Mixed_6e)
        and 2048 x 8 x 8, where pytorch-fid divides the network."""
        first = self.first(x)
        second = self.second(first)
        third = self.Mixed_6e(self.to_6d(second))
        return [first, second, third, self.last(third)]

    def first(self, x: Tensor) -> Tensor:
        """Up to the first maximum pooling."""
        return F.max_pool2d(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))), 3, 2)

    def second(self, x: Tensor) -> Tensor:
        """From there to the second one."""
        return F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, 2)

    def to_6d(self, x: Tensor) -> Tensor:
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        return self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))

    def last(self, x: Tensor) -> Tensor:
        return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))


_BLOCKS = {
    "conv": "Conv2d_1a_3x3",
    "conv_1": "Conv2d_2a_3x3",
    "conv_2": "Conv2d_2b_3x3",
    "conv_3": "Conv2d_3b_1x1",
    "conv_4": "Conv2d_4a_3x3",
    "mixed": "Mixed_5b",
    "mixed_1": "Mixed_5c",
    "mixed_2": "Mixed_5d",
    "mixed_3": "Mixed_6a",
    "mixed_4": "Mixed_6b",
    "mixed_5": "Mixed_6c",
    "mixed_6": "Mixed_6d",
    "mixed_7": "Mixed_6e",
    "mixed_8": "Mixed_7a",
    "mixed_9": "Mixed_7b",
    "mixed_10": "Mixed_7c",
}
_DOUBLE = {"tower_1_conv": "branch3x3dbl_1", "tower_1_conv_1": "branch3x3dbl_2", "tower_1_conv_2": "branch3x3dbl_3"}
_A = {
    "conv": "branch1x1",
    "tower_conv": "branch5x5_1",
    "tower_conv_1": "branch5x5_2",
    **_DOUBLE,
    "tower_2_conv": "branch_pool",
}
_B = {
    "conv": "branch3x3",
    "tower_conv": "branch3x3dbl_1",
    "tower_conv_1": "branch3x3dbl_2",
    "tower_conv_2": "branch3x3dbl_3",
}
_C = {
    "conv": "branch1x1",
    "tower_conv": "branch7x7_1",
    "tower_conv_1": "branch7x7_2",
    "tower_conv_2": "branch7x7_3",
    "tower_1_conv": "branch7x7dbl_1",
    "tower_1_conv_1": "branch7x7dbl_2",
    "tower_1_conv_2": "branch7x7dbl_3",
    "tower_1_conv_3": "branch7x7dbl_4",
    "tower_1_conv_4": "branch7x7dbl_5",
    "tower_2_conv": "branch_pool",
}
_D = {
    "tower_conv": "branch3x3_1",
    "tower_conv_1": "branch3x3_2",
    "tower_1_conv": "branch7x7x3_1",
    "tower_1_conv_1": "branch7x7x3_2",
    "tower_1_conv_2": "branch7x7x3_3",
    "tower_1_conv_3": "branch7x7x3_4",
}
_E = {
    "conv": "branch1x1",
    "tower_conv": "branch3x3_1",
    "tower_mixed_conv": "branch3x3_2a",
    "tower_mixed_conv_1": "branch3x3_2b",
    "tower_1_conv": "branch3x3dbl_1",
    "tower_1_conv_1": "branch3x3dbl_2",
    "tower_1_mixed_conv": "branch3x3dbl_3a",
    "tower_1_mixed_conv_1": "branch3x3dbl_3b",
    "tower_2_conv": "branch_pool",
}
_BRANCHES = {"Conv2d": {"": ""}, "Mixed_5": _A, "Mixed_6": _C, "Mixed_6a": _B, "Mixed_7": _E, "Mixed_7a": _D}
_FIELDS = {"weight": "conv.weight", "beta": "bn.bias", "mean": "bn.running_mean", "var": "bn.running_var"}
_NAME = re.compile(r"layers\.(conv(?:_\d)?|mixed(?:_\d+)?)\.(?:(.+)\.)?(weight|beta|mean|var)")


def from_tensorflow_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """NVIDIA's and OpenAI's names ("layers.mixed_6.tower_1.conv_2.beta", "output.weight") -> ours; names of other kinds
    stay as they are.

    Those files have no scale in their batch normalisations (`beta`, `mean` and `var` only): ours becomes one.
    """
    ours: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        found = _translated(name)
        ours[found or name] = tensor
        if found and found.endswith("bn.bias"):
            ours[found.removesuffix("bias") + "weight"] = torch.ones_like(tensor)
    return ours


def _translated(name: str) -> str | None:
    if name.startswith("output."):
        return "fc." + name.removeprefix("output.")
    match = _NAME.fullmatch(name)
    block = _BLOCKS.get(match[1]) if match else None
    if match is None or block is None:
        return None
    branches = _BRANCHES.get(block) or _BRANCHES[block[:7] if block.startswith("Mixed") else "Conv2d"]
    branch = branches.get((match[2] or "").replace(".", "_"))
    if branch is None:
        return None
    return ".".join(part for part in (block, branch, _FIELDS[match[3]]) if part)
