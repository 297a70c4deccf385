"""Adaptive discriminator augmentation (Karras et al. 2020, "Training generative adversarial networks with limited
data"): the pipeline of appendix B, and the controller of its probability (section 3).

What the critic sees, real and generated, goes through the pipeline; each transform is applied to each image with
probability p, drawn independently. While p is below about 0.8 the generator does not learn the augmentations, because
the unchanged images can be told from the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from d2o.augment import color, corrupt, filters, geometry
from d2o.errors import UserError, unknown

KINDS = ("blit", "geom", "color", "filter", "noise", "cutout")
PIPES = {kind: (kind,) for kind in KINDS} | {"bgcfnc"[: n + 1]: KINDS[: n + 1] for n in range(6)}
"""What `categories` may be: one kind of transform, or the first letters of some ("bgc": blit, geom and color, the
paper's choice)."""

SMALLEST = 4  # pixels a side
POWER = (10, 1, 1, 1)  # of the octave bands in a natural image, over 13

RandomNumbers = Callable[..., Tensor]
"""(*shape) -> random numbers [B, *shape], as `Draws.rand` and `Draws.randn` give them."""


@dataclass(frozen=True)
class Strengths:
    """What is done to each image of a batch, in the order in which it is done; each [B] if not stated otherwise."""

    flip: Tensor  # 1: left and right are exchanged
    turns: Tensor  # quarter turns, counter-clockwise: 0, 1, 2, 3
    shift: Tensor  # [B, 2] right and down, of the image's side; rounded to whole pixels
    scale: Tensor  # factor
    before: Tensor  # rotation in radians, counter-clockwise
    stretch: Tensor  # widened by this factor, and flattened by it
    behind: Tensor  # rotation after the stretching
    move: Tensor  # [B, 2] right and down, of the image's side
    brightness: Tensor  # added
    contrast: Tensor  # factor about 0
    luma_flip: Tensor  # 1: the luma changes its sign
    hue: Tensor  # rotation about the luma axis, in radians
    saturation: Tensor  # factor
    bands: Tensor  # [B, 4] factors of the octave bands, coarse first
    noise: Tensor  # standard deviation
    cut: Tensor  # 1: a square is cut out
    centre: Tensor  # [B, 2] its centre, across and down; 0 and 1 are the image's edges

    @staticmethod
    def neutral(batch: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Strengths:
        """Nothing is done. To choose some transforms: `dataclasses.replace(Strengths.neutral(8), hue=...)`."""
        ones, wide = (
            ("scale", "stretch", "contrast", "saturation", "bands"),
            {"shift": (2,), "move": (2,), "bands": (4,), "centre": (2,)},
        )
        shapes = {f.name: (batch, *wide.get(f.name, ())) for f in fields(Strengths)}
        return Strengths(**{n: torch.full(s, float(n in ones), device=device, dtype=dtype) for n, s in shapes.items()})


def p_rotation(p: Tensor) -> Tensor:
    """The probability 1 - sqrt(1 - p) of each of the two rotations, so that there is at least one with probability
    p."""
    return 1 - (1 - p).sqrt()


def sample(p: Tensor | float, randn: RandomNumbers, rand: RandomNumbers, kinds: tuple[str, ...] = KINDS) -> Strengths:
    """Strengths of one batch (ADA, appendix B), with the probability p of each transform of these kinds; the other
    kinds do nothing.

    The numbers of all kinds are drawn whichever are asked for, so that the blits of "b" and "bgc" are the same with the
    same generator.
    """
    gates = rand(19)
    chance, uniform, normal = iter(gates.unbind(1)), iter(rand(11).unbind(1)), iter(randn(11).unbind(1))
    p = p if isinstance(p, Tensor) else torch.full((), p, device=gates.device)
    p_turn = p_rotation(p)

    def some(kind: str, value: Tensor, neutral: float, probability: Tensor = p) -> Tensor:
        happens = (next(chance) < probability) & (kind in kinds)
        return torch.where(happens if value.ndim == 1 else happens[:, None], value, neutral)

    def pair(numbers: Iterator[Tensor]) -> Tensor:
        return torch.stack([next(numbers), next(numbers)], 1)

    def coin() -> Tensor:
        return (2 * next(uniform)).floor()

    def angle() -> Tensor:
        return (2 * next(uniform) - 1) * math.pi

    flip = some("blit", coin(), 0)  # so an image is mirrored with probability p / 2
    turns = some("blit", (4 * next(uniform)).floor(), 0)
    shift = some("blit", (2 * pair(uniform) - 1) * 0.125, 0)
    scale = some("geom", 2 ** (0.2 * next(normal)), 1)
    before = some("geom", angle(), 0, p_turn)
    stretch = some("geom", 2 ** (0.2 * next(normal)), 1)
    behind = some("geom", angle(), 0, p_turn)
    move = some("geom", 0.125 * pair(normal), 0)
    brightness = some("color", 0.2 * next(normal), 0)
    contrast = some("color", 2 ** (0.5 * next(normal)), 1)
    luma_flip = some("color", coin(), 0)
    hue = some("color", angle(), 0)
    saturation = some("color", 2 ** next(normal), 1)
    # Each band's amplification is normalised to keep the power of an image whose spectrum falls off as 1/f.
    gains = [some("filter", 2 ** next(normal), 1) for _ in POWER]
    bands = torch.stack(gains, 1)
    for w, gain in zip(POWER, gains):
        bands = bands / ((13 - w + w * gain.square()) / 13).sqrt()[:, None]
    noise = some(
        "noise", 0.1 * math.sqrt(2) * next(uniform).erfinv(), 0
    )  # |N(0, 0.1^2)|, so that a percentile of the number is one of it
    cut = some("cutout", torch.ones_like(noise), 0)
    return Strengths(
        flip,
        turns,
        shift,
        scale,
        before,
        stretch,
        behind,
        move,
        brightness,
        contrast,
        luma_flip,
        hue,
        saturation,
        bands,
        noise,
        cut,
        pair(uniform),
    )


class AdaPipeline(nn.Module):
    """ADA's transforms of the given `categories` (see `PIPES`). It has no parameters and no state.

    forward(images [B, C, R, R] in [-1, 1], p, randn, rand) -> images of the same shape and type (not limited to [-1,
    1]). p is a number or a scalar tensor, which is never read by the host. randn and rand are the methods of a `Draws`,
    or what `numbers` makes; always the same count of numbers is drawn, so that results depend on neither processes nor
    micro-batches. An image to which nothing happens comes back to the bit. Differentiable in the images any number of
    times. Computed in float32 or better, under autocast too.

    UserError: unknown categories; images that are not square, or smaller than 4 pixels, or whose channels have no
    colour (not 1 or 3).
    """

    def __init__(self, categories: str = "bgc"):
        super().__init__()
        if categories not in PIPES:
            raise unknown("categories of ADA", categories, PIPES)
        self.categories, self.kinds = categories, PIPES[categories]

    def forward(self, images: Tensor, p: Tensor | float, randn: RandomNumbers, rand: RandomNumbers) -> Tensor:
        strengths = sample(p, randn, rand, self.kinds)
        noise = randn(*images.shape[1:]) if "noise" in self.kinds else None
        return self.transform(images, strengths, noise)

    def transform(self, images: Tensor, strengths: Strengths, noise: Tensor | None = None) -> Tensor:
        """`images` with those strengths, as far as the pipeline's kinds cover them; standard normal `noise` [B, C, R,
        R] for the kind "noise"."""
        self._check(images.shape)
        s, kinds = strengths, self.kinds
        device = images.device.type
        with nullcontext() if device == "meta" else torch.autocast(device, enabled=False):
            x = images if images.dtype == torch.float64 else images.float()
            if "blit" in kinds or "geom" in kinds:
                x = _move(x, s, warped="geom" in kinds)
            if "color" in kinds:
                matrix, offset = color.color_map(s.brightness, s.contrast, s.luma_flip, s.hue, s.saturation)
                done = (s.brightness != 0) | (s.contrast != 1) | (s.luma_flip != 0) | (s.hue != 0) | (s.saturation != 1)
                x = _where(done, color.recolor, x, matrix, offset)
            if "filter" in kinds:
                x = _where((s.bands != 1).any(1), filters.amplify, x, s.bands)
            if "noise" in kinds and noise is not None:
                x = corrupt.add_noise(x, s.noise, noise)
            if "cutout" in kinds:
                x = corrupt.cut_out(x, s.cut, s.centre)
            return x.to(images.dtype)

    def _check(self, shape: torch.Size) -> None:
        if len(shape) != 4 or shape[2] != shape[3] or shape[2] < SMALLEST:
            raise UserError(
                f"ADA augments square images of at least {SMALLEST} pixels a side [B, C, R, R], not {list(shape)}"
            )
        if "color" in self.kinds and shape[1] not in (1, 3):
            raise UserError(
                f"ADA's colour transforms need images of 1 or 3 channels, not {shape[1]}",
                "known without them: blit, geom, b, bg",
            )


def _where(
    done: Tensor, change: Callable[..., Tensor], x: Tensor, *how: Tensor, otherwise: Tensor | None = None
) -> Tensor:
    """change(x, *how) for the images that are `done`, the others as they are in `otherwise` (None: x). On a CPU only
    the former are computed: with a small p that is next to nothing."""
    otherwise = x if otherwise is None else otherwise
    if x.device.type != "cpu":
        return torch.where(done[:, None, None, None], change(x, *how), otherwise)
    rows = done.nonzero().flatten()
    return otherwise.index_copy(0, rows, change(x[rows], *(h[rows] for h in how))) if len(rows) else otherwise


def _move(x: Tensor, s: Strengths, warped: bool) -> Tensor:
    """The blit, exactly, for images without a geometric transform, and for the others both as one warp."""
    size = x.shape[-1]
    whole = geometry.after(
        geometry.scaling(1 - 2 * s.flip, torch.ones_like(s.flip)),
        geometry.quarter_turns(s.turns),
        geometry.translation((s.shift * size).round()),
    )
    mirrored = (s.flip != 0) | (s.turns != 0) | (s.shift * size).round().ne(0).any(1)
    blitted = _where(mirrored, geometry.blit, x, whole)
    if not warped:
        return blitted
    map = geometry.after(
        whole,
        geometry.scaling(s.scale, s.scale),
        geometry.rotation(s.before),
        geometry.scaling(s.stretch, 1 / s.stretch),
        geometry.rotation(s.behind),
        geometry.translation(s.move * size),
    )
    done = (s.scale != 1) | (s.before != 0) | (s.stretch != 1) | (s.behind != 0) | (s.move != 0).any(1)
    return _where(done, geometry.warp, x, map, otherwise=blitted)


def numbers(batch: int, generator: torch.Generator) -> tuple[RandomNumbers, RandomNumbers]:
    """(randn, rand) for a batch, from a generator and on its device."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator, device=generator.device)

    def rand(*shape: int) -> Tensor:
        return torch.rand(batch, *shape, generator=generator, device=generator.device)

    return randn, rand


def at_percentile(q: float, batch: int, device: torch.device | str = "cpu") -> Strengths:
    """Every transform happens, at the quantile q (in (0, 1)) of its random strength: to look at, and for tests."""
    if not 0 < q < 1:
        raise UserError(f"a quantile lies between 0 and 1, not at {q}")
    normal = math.sqrt(2) * float(torch.tensor(2 * q - 1, dtype=torch.float64).erfinv())

    def always(value: float) -> RandomNumbers:
        return lambda *shape: torch.full((batch, *shape), value, device=device)

    return sample(1.0, always(normal), always(q))


class AdaController(nn.Module):
    """The probability p of a pipeline, steered so that r_t, the mean sign of the critic's outputs for real
    images, stays at `target`.

    Every `interval` calls of `update`, p moves by batch * interval / (kimg * 1000) towards more augmentation if r_t >
    target and towards less if it is below, within [0, 1]: from 0 to 1 in `kimg` thousand images (ADA, section 3, eq. 1;
    its values are the defaults). `batch` is the global batch. `fixed` holds p at that value. All state is in buffers,
    on whatever device; p is a scalar tensor, for `AdaPipeline`.
    UserError: values out of range.
    """

    p: Tensor
    r: Tensor
    total: Tensor
    count: Tensor

    def __init__(
        self,
        batch: int,
        target: float = 0.6,
        interval: int = 4,
        kimg: float = 500,
        p0: float = 0.0,
        fixed: float | None = None,
    ):
        super().__init__()
        if batch < 1 or interval < 1 or not kimg > 0:
            raise UserError(f"ADA needs a batch, an interval and kimg above 0, not {batch}, {interval} and {kimg}")
        start = p0 if fixed is None else fixed
        if not 0 <= start <= 1 or not -1 <= target <= 1:
            raise UserError(f"ADA's probability lies in [0, 1] and its target in [-1, 1]; given: {start} and {target}")
        self.target, self.interval, self.fixed, self.rate = target, interval, fixed, batch * interval / (kimg * 1000)
        self.register_buffer("p", torch.tensor(float(start)))
        self.register_buffer("r", torch.tensor(0.0))  # the latest r_t, for the log
        self.register_buffer("total", torch.tensor(0.0))  # sum of the mean signs since then
        self.register_buffer("count", torch.tensor(0))

    @torch.no_grad()
    def update(self, mean_sign: Tensor) -> None:
        """One iteration: the mean of sign(D(real)) over the global batch (of all processes, which must all be given the
        same). Nothing is read by the host."""
        total, count = self.total + mean_sign.to(self.total), self.count + 1
        due, r = count == self.interval, total / self.interval
        # New tensors each time, so that a p kept for the log stays what it was.
        self.r = torch.where(due, r, self.r)
        if self.fixed is None:
            self.p = torch.where(due, (self.p + self.rate * (r - self.target).sign()).clamp(0, 1), self.p)
        self.total, self.count = total.masked_fill(due, 0), count.masked_fill(due, 0)
