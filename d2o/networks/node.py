"""SPI-GAN's mapping network: from noise to a style along a time, by a neural ordinary differential equation (Choi et
al. 2022, section 3.3).

h(0) = o(x_T) and dh/dt = r(h, t), so h(t) = h(0) + integral of r from 0 to t (eq. 5). The paper does not say what o's
and r's layers are made of; they are the mapping layers of StyleGAN2 here (equalised learning rate, leaky ReLU), as
Tables 6 and 7 fit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from d2o.errors import UserError, unknown
from d2o.networks.config import Config
from d2o.networks.style_layers import EqualizedLinear

MAPPINGS = ("node", "mlp_t")
SOLVERS = ("rk4", "dopri5")
TIME_INPUTS = ("none", "concat")


def unit_mean_square(x: Tensor) -> Tensor:
    """x [B, D] with mean square 1 per row."""
    return x * (x.square().mean(1, keepdim=True) + 1e-8).rsqrt()


class Layers(nn.Module):
    """`depth` fully connected layers with leaky ReLUs, h [B, D] -> [B, D]; `timed`: the first one also sees t."""

    def __init__(self, width: int, depth: int, lr_mult: float, timed: bool):
        super().__init__()
        self.timed = timed
        widths = [width + timed] + [width] * depth
        self.layers = nn.ModuleList(
            EqualizedLinear(widths[i], width, lr_mult=lr_mult, activate=True) for i in range(depth)
        )

    def forward(self, h: Tensor, t: float | Tensor) -> Tensor:
        if self.timed:
            t = t.to(h).expand(h.shape[0], 1) if isinstance(t, Tensor) else h.new_full((h.shape[0], 1), t)
            h = torch.cat([h, t], dim=1)
        for layer in self.layers:
            h = layer(h)
        return h


class NODEMapping(nn.Module):
    """Noise z [B, *shape] and a time t in [0, 1] -> h(t) [B, h_dim], the style of the image at t.

    o: flatten, mean square 1, one fully connected layer with leaky ReLU. r: `r_layers` such layers of width h_dim
    (Table 8: 1 for CIFAR-10, 7 for 256 px), whose first also sees t with `ode_time_input` "concat" (eq. 5; Table 7 has
    it not: "none").
    `method` "rk4": ceil((t_k - t_(k-1)) / step) equal steps in each segment, the same whatever the batch; "dopri5":
    adaptive steps to `rtol` and `atol` over the whole batch. Gradients go through the steps. The kink of the leaky
    ReLUs costs both some order: solves of the same h(t) with other steps differ by 5e-5 of its norm with r_layers 1 and
    1.6e-4 with 7 (rk4, step 0.1; four times less with half the step), and dopri5 with tolerances of 1e-5 is off by up
    to 8e-4.
    `mapping` "mlp_t" replaces the equation by a plain network, h(t) = mlp([o(z), t]) of `r_layers` layers: StyleGAN2's
    mapping with t appended.
    `w_avg`: the running mean of the styles given to `track`.
    Times are numbers or tensors on the CPU: the number of steps depends on them. UserError: unknown switch, times that
    are unsorted or negative.
    """

    def __init__(
        self,
        shape: Sequence[int],
        h_dim: int = 512,
        r_layers: int = 1,
        lr_mult: float = 0.01,
        ode_time_input: str = "none",
        method: str = "rk4",
        step: float = 0.1,
        rtol: float = 1e-5,
        atol: float = 1e-5,
        mapping: str = "node",
        w_avg_beta: float = 0.995,
    ):
        super().__init__()
        for key, value, known in (
            ("method", method, SOLVERS),
            ("mapping", mapping, MAPPINGS),
            ("ode_time_input", ode_time_input, TIME_INPUTS),
        ):
            if value not in known:
                raise unknown(f"network.{key}", value, known)
        if r_layers < 1 or not step > 0:
            raise UserError(
                f"network: the mapping needs r_layers of at least 1 and a step above 0, not {r_layers} and {step}"
            )
        self.config: Config = {
            "arch": "node_mapping",
            "shape": list(shape),
            "h_dim": h_dim,
            "r_layers": r_layers,
            "lr_mult": lr_mult,
            "ode_time_input": ode_time_input,
            "method": method,
            "step": step,
            "rtol": rtol,
            "atol": atol,
            "mapping": mapping,
            "w_avg_beta": w_avg_beta,
        }
        self.shape, self.h_dim, self.mapping, self.w_avg_beta = tuple(shape), h_dim, mapping, w_avg_beta
        self.method, self.step, self.rtol, self.atol = method, step, rtol, atol
        self.o = EqualizedLinear(math.prod(shape), h_dim, lr_mult=lr_mult, activate=True)
        self.r = Layers(h_dim, r_layers, lr_mult, timed=mapping == "mlp_t" or ode_time_input == "concat")
        self.w_avg: Tensor
        self.register_buffer("w_avg", torch.zeros(h_dim))

    def forward(self, z: Tensor, t: float = 1.0) -> Tensor:
        """h(t) of noise z; the generator's style at t = 1."""
        return self.at(z, t)

    def start(self, z: Tensor) -> Tensor:
        """o(z) = h(0) (for "mlp_t" the input of the network, no style)."""
        if z.shape[1:] != self.shape:
            raise UserError(f"the mapping takes noise [B, {', '.join(map(str, self.shape))}]; this is {[*z.shape]}")
        return self.o(unit_mean_square(z.flatten(1)))

    def at(self, z: Tensor, t: float) -> Tensor:
        return self.path(z, [t])[0]

    def path(self, z: Tensor, times: Sequence[float] | Tensor) -> Tensor:
        """h at sorted times [T] in one solve, each segment from where the last ended -> [T, B, h_dim]."""
        moments = _moments(times)
        h = self.start(z)
        if self.mapping == "mlp_t":
            return torch.stack([self.r(h, t) for t in moments])
        return torch.stack(self._solve(h, 0.0, moments))

    def continue_(self, h: Tensor, t0: float, t1: float) -> Tensor:
        """h(t1) from h(t0) = h, t0 <= t1. UserError for "mlp_t", which has no state to go on from."""
        if self.mapping == "mlp_t":
            raise UserError(
                "the mapping mlp_t has no equation that could be solved on from an earlier time",
                "`ivp: restart`, or `mapping: node`",
            )
        start, end = _moments([t0, t1])
        return self._solve(h, start, [end])[0]

    def _solve(self, h: Tensor, start: float, moments: list[float]) -> list[Tensor]:
        if self.method == "dopri5":
            return self._dopri5(h, start, moments)
        states = []
        for t in moments:
            # A segment of 0.3 has three steps of 0.1, also where 0.3 / 0.1 is a little more than 3.
            steps = math.ceil((t - start) / self.step - 1e-6)
            for i in range(steps):
                h = rk4_step(self.r, start + i * (t - start) / steps, (t - start) / steps, h)
            start = t
            states.append(h)
        return states

    def _dopri5(self, h: Tensor, start: float, moments: list[float]) -> list[Tensor]:
        from torchdiffeq import odeint  # half a second, which only this method has to wait for

        # torchdiffeq wants times that rise strictly, also after they became numbers of h's precision.
        rounded = torch.tensor([start, *moments], dtype=h.dtype)
        grid, places = torch.unique_consecutive(rounded, return_inverse=True)
        if len(grid) == 1:
            return [h] * len(moments)
        solution = odeint(
            lambda t, y: self.r(y, t), h, grid.to(h.device), method="dopri5", rtol=self.rtol, atol=self.atol
        )
        return [solution[i] for i in places.tolist()[1:]]

    @torch.no_grad()
    def track(self, h: Tensor) -> None:
        """One step of the running mean towards the batch mean of styles h [B, h_dim]; to be called with h(1) in
        training.

        It sees what this process sees: with several, give it the gathered styles, or save one process's mean.
        """
        self.w_avg.lerp_(h.detach().mean(0).to(self.w_avg.dtype), 1 - self.w_avg_beta)

    def truncate(self, h: Tensor, psi: float, cutoff: int | None = None) -> Tensor:
        """w_avg + psi (h - w_avg), of styles [B, h_dim] or broadcast ones [B, num_ws, h_dim], of which `cutoff`
        truncates only the first ones.

        Karras et al. 2019, appendix B. UserError: `cutoff` for styles that are not broadcast.
        """
        if cutoff is None:
            return self.w_avg + psi * (h - self.w_avg)
        if h.ndim != 3:
            raise UserError("truncation with a cutoff needs the styles of all inputs, [B, num_ws, h_dim]")
        return torch.cat([self.truncate(h[:, :cutoff], psi), h[:, cutoff:]], dim=1)


def rk4_step(r: nn.Module, t: float, dt: float, h: Tensor) -> Tensor:
    """h(t + dt) by Kutta's 3/8 rule, fourth order. torchdiffeq's "rk4" is the same formula; in numbers instead of
    tensors of time it needs no synchronisation with the device and can be exported.
    """
    k1 = r(h, t)
    k2 = r(h + dt * k1 / 3, t + dt / 3)
    k3 = r(h + dt * (k2 - k1 / 3), t + 2 * dt / 3)
    k4 = r(h + dt * (k1 - k2 + k3), t + dt)
    return h + dt * (k1 + 3 * (k2 + k3) + k4) / 8


def _moments(times: Sequence[float] | Tensor) -> list[float]:
    moments = [float(t) for t in (times.tolist() if isinstance(times, Tensor) else times)]
    if not moments or moments[0] < 0 or moments != sorted(moments) or not math.isfinite(sum(moments)):
        raise UserError(f"the mapping takes times that rise from 0 on; these are {moments}")
    return moments
