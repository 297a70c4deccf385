"""DMD2's critic: a score network that also says of a noisy image, by a small head on its bottleneck, how real it is
(Yin et al. 2024b, section 4.3 and their code for ImageNet)."""

from __future__ import annotations

from torch import Tensor, nn

from d2o.condition import Embedded
from d2o.errors import UserError
from d2o.networks.precond import Returned, set_disc_map

GROUPS = 32


class BottleneckCritic(nn.Module):
    """critic(x [B, C, H, W], sigma [B], condition, part="decoder", ...): as the score network that it holds; with
    `part` "encoder" the logits [B] float32, high for what is taken for real.

    `score`: a `Denoiser` or `EDMView`; `shape` (c, h, w) of its encoder's last features, h = w of at least 2. The
    head: a convolution of 4 x 4 that halves them, one over all that is left, each followed by group norm and SiLU, and
    one to a number; c channels throughout (768 in the paper's ADM, at 8 x 8).

    UserError: features of a shape that the head does not take.
    """

    def __init__(self, score: nn.Module, shape: tuple[int, int, int]):
        super().__init__()
        c, h, w = shape
        if h != w or h < 2:
            raise UserError(
                f"dmd.adversarial: the score network's bottleneck is of {h} x {w}, and the head needs a square of 2 x"
                " 2 at least",
                "leave dmd.adversarial away, or take a network of fewer levels",
            )
        self.score = score
        set_disc_map(score, "enc_last")
        self.head = nn.Sequential(
            nn.Conv2d(c, c, 4, stride=2, padding=1),
            group_norm(c),
            nn.SiLU(),
            nn.Conv2d(c, c, h // 2),
            group_norm(c),
            nn.SiLU(),
            nn.Conv2d(c, 1, 1),
        )

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        condition: Embedded = None,
        part: str = "decoder",
        **more: Tensor | bool | None,
    ) -> Returned:
        if part == "decoder":
            return self.score(x, sigma, condition, **more)
        return self.head(self.score(x, sigma, condition, part="encoder")).mean((1, 2, 3))


def group_norm(channels: int) -> nn.GroupNorm:
    """32 groups, or fewer, of 4 channels at least."""
    groups = max(1, min(GROUPS, channels // 4))
    while channels % groups:
        groups -= 1
    return nn.GroupNorm(groups, channels)
