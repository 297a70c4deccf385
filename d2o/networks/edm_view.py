"""Networks of other diffusion models seen as denoisers of the EDM family: D(x; sigma, c), with x = x_0 + sigma n.

A model with x_t = alpha_t x_0 + sigma_t eps is the same model in x = x_t / alpha_t at the noise level sigma = sigma_t /
alpha_t (Karras et al. 2022, appendix C). The network is asked at alpha_t x, at the time t whose noise level is sigma.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from d2o.condition import Embedded, Text
from d2o.diffusion.levels import Levels, levels_of
from d2o.errors import UserError, unknown
from d2o.inputs import JsonObject
from d2o.networks.config import Config, as_json
from d2o.networks.latent import build_diffusers
from d2o.networks.lora import add_lora
from d2o.networks.precond import CONSISTENCY_EPSILON, Returned, check_part, map_of

if TYPE_CHECKING:
    from diffusers import ModelMixin
    from diffusers.models.embeddings import TimestepEmbedding

KINDS = ("UNet2DModel", "UNet2DConditionModel", "SD3Transformer2DModel")
PREDICTIONS = ("epsilon", "v_prediction", "sample", "velocity")
FORMS = ("edm", "consistency")


class EDMView(nn.Module):
    """view(x [B, C, H, W], sigma scalar, [1] or [B], condition, augment_labels=None, part="decoder") -> x_0 [B, C, H,
    W] float32. It is trained as any other network.

    `net`: its class (one of `KINDS`, under `class`) and that class's arguments; `module`: the network itself, if there
    is one already. `schedule`: a diffusers scheduler's keys of its betas, or {kind: flow, train_steps}
    (`d2o.diffusion.levels`). `prediction`, what it gives: "epsilon", "v_prediction" or "sample" (Salimans and Ho 2022,
    appendix D), or "velocity", eps - x_0 (Liu et al. 2022). `condition`: class indices, `Text`, or None.
    `time_ids`: the six numbers that SDXL's U-Net is told of an image. `sigma_data`: standard deviation of the data.

    A discrete schedule's times are found by linear interpolation in log sigma; beyond `sigma_min` and `sigma_max` the
    network is told the nearest time that it knows. `precond` "consistency": x + (sigma - sigma_min) / sigma (D - x),
    which is x itself at sigma_min, as consistency models have it built in (Song et al. 2023, eq. 5). `augment_labels`
    [B, augment_dim] go through a linear map into the time embedding (0 at first, if `with_second_time` made it), or
    through that of a UNet2DConditionModel with `time_cond_proj_dim`. `lora`: adapters of the network
    (`d2o.networks.lora`), whose state dict then is theirs alone.
    `part` as in `Denoiser`; maps of transformers are those of their middle. UserError: a network, prediction or
    schedule that d2o does not know; dropout of a network that has none.
    """

    disc_map = "enc_last_mean"

    def __init__(
        self,
        net: Config,
        schedule: JsonObject,
        prediction: str = "epsilon",
        sigma_data: float = 0.5,
        precond: str = "edm",
        augment_dim: int = 0,
        time_ids: list[float] | None = None,
        dropout: float | None = None,
        lora: JsonObject | None = None,
        module: nn.Module | None = None,
    ):
        super().__init__()
        if net.get("class") not in KINDS:
            raise unknown("network.net.class", str(net.get("class"))[:40], KINDS)
        if prediction not in PREDICTIONS:
            raise unknown("network.prediction", str(prediction)[:40], PREDICTIONS)
        if precond not in FORMS:
            raise unknown("preconditioning", str(precond)[:40], FORMS)
        self.kind, self.prediction, self.sigma_data, self.precond = net["class"], prediction, sigma_data, precond
        if (prediction == "velocity") != (schedule.get("kind") == "flow"):
            raise UserError(f"network: prediction {prediction} does not go with that schedule")
        rest = {key: value for key, value in net.items() if key != "class"}
        self.net: ModelMixin = module if module is not None else build_diffusers(self.kind, rest, "network.net")
        self.levels: Levels = levels_of(schedule)
        self.sigma_min, self.sigma_max = self.levels.sigma_min, self.levels.sigma_max
        self.time_ids = time_ids
        self.map_augment = None
        if augment_dim:
            self.map_augment = nn.Linear(augment_dim, self._time_embedding().linear_2.out_features, bias=False)
        options = {"precond": (precond, "edm"), "augment_dim": (augment_dim, 0), "time_ids": (time_ids, None)}
        self.config: Config = {
            "arch": "edm_view",
            "net": net,
            "schedule": schedule,
            "prediction": prediction,
            "sigma_data": sigma_data,
            **{key: value for key, (value, usual) in options.items() if value != usual},
        }
        if dropout is not None:
            self.dropout = self.config["dropout"] = dropout
        if lora is not None:
            add_lora(self, lora)

    @classmethod
    def of(
        cls,
        module: ModelMixin,
        schedule: JsonObject,
        prediction: str,
        sigma_data: float = 0.5,
        time_ids: list[float] | None = None,
    ) -> EDMView:
        """The view of a diffusers network that is there already, whose weights it shares."""
        known = inspect.signature(type(module).__init__).parameters
        given = {key: as_json(value) for key, value in module.config.items() if key in known}
        net = {"class": type(module).__name__, **given}
        return cls(net, schedule, prediction, sigma_data, time_ids=time_ids, module=module)

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        condition: Embedded = None,
        augment_labels: Tensor | None = None,
        part: str = "decoder",
    ) -> Returned:
        check_part(part)
        x = x.to(torch.float32)
        sigma = torch.as_tensor(sigma, device=x.device).reshape(-1).expand(len(x))
        features: list[Tensor] = []
        with ExitStack() as stack:
            if part != "decoder":
                stack.callback(self._catch(features, stop=part == "encoder"))
            more = augment_labels if self.told else None
            if self.map_augment is not None and augment_labels is not None:
                added = self.map_augment(augment_labels)
                hook = self._time_embedding().register_forward_hook(lambda module, args, out: out + added)
                stack.callback(hook.remove)
            try:
                denoised = self._denoise(x, sigma, condition, more)
            except _Enough:
                return self._map(features[0], x)
        return denoised if part == "decoder" else (denoised, self._map(features[0], x))

    def _denoise(self, x: Tensor, sigma: Tensor, condition: Embedded, more: Tensor | None) -> Tensor:
        s = sigma.to(torch.float32)[:, None, None, None]
        alpha = self.levels.alpha(s)
        out = self.call(alpha * x, self.levels.time(sigma), condition, more).to(torch.float32)
        if self.prediction == "epsilon":
            d = x - s * out
        elif self.prediction == "v_prediction":
            d = alpha**2 * x - alpha * s * out
        elif self.prediction == "velocity":
            d = alpha * x - (1 - alpha) * out
        else:
            d = out
        if self.precond == "consistency":
            d = torch.lerp(x, d, ((s - self.sigma_min) / s).clamp(min=0))
        return d

    @property
    def told(self) -> bool:
        """Whether it is a UNet2DConditionModel with an input beside the time, as for a guidance scale."""
        return self.kind == "UNet2DConditionModel" and self.net.time_embedding.cond_proj is not None

    def call(self, x_t: Tensor, t: Tensor, condition: Embedded, more: Tensor | None = None) -> Tensor:
        """The network as its own family calls it: x_t, t [B] float32; `more` [B, time_cond_proj_dim] beside it."""
        if self.kind == "UNet2DModel":
            return self.net(x_t, t, class_labels=condition, return_dict=False)[0][:, : x_t.shape[1]]
        assert isinstance(condition, Text)
        states, pooled = condition.states, condition.pooled
        if self.kind == "UNet2DConditionModel":
            added = None
            if self.time_ids is not None:
                ids = torch.tensor([self.time_ids], dtype=torch.float32, device=x_t.device).expand(len(x_t), -1)
                added = {"text_embeds": pooled, "time_ids": ids}
            return self.net(x_t, t, states, timestep_cond=more, added_cond_kwargs=added, return_dict=False)[0]
        return self.net(x_t, encoder_hidden_states=states, pooled_projections=pooled, timestep=t, return_dict=False)[0]

    def round_sigma(self, sigma: Tensor | float) -> Tensor:
        """The nearest noise levels that the network was trained on, same shape: sigma itself in continuous time."""
        return self.levels.nearest(torch.as_tensor(sigma))

    # Where features and embeddings are ----------------------------------------------------------------------------

    def _time_embedding(self) -> TimestepEmbedding:
        return self.net.time_text_embed.timestep_embedder if self._transformer else self.net.time_embedding

    @property
    def _transformer(self) -> bool:
        return self.kind == "SD3Transformer2DModel"

    def _tap(self) -> nn.Module:
        """The part of the network whose output the map is made of."""
        if self._transformer:
            blocks = self.net.transformer_blocks
            return blocks[(len(blocks) - 1) // 2]
        found = self.net.mid_block if self.disc_map == "mid_mean" else self.net.down_blocks[-1]
        if found is None:
            raise UserError("disc_map: mid_mean needs a U-Net with a middle block, and this one has none")
        return found

    def _catch(self, features: list[Tensor], stop: bool) -> Callable[[], None]:
        def keep(module: nn.Module, args: object, out: Returned) -> None:
            features.append(out[1] if self._transformer else out[0] if isinstance(out, tuple) else out)
            if stop:
                raise _Enough

        return self._tap().register_forward_hook(keep).remove

    def _map(self, features: Tensor, x: Tensor) -> Tensor:
        if self._transformer:  # tokens [B, h w, c]
            side = self.net.config.patch_size
            features = features.transpose(1, 2).unflatten(2, (x.shape[2] // side, x.shape[3] // side))
        return map_of(features, self.disc_map)

    # What `set_dropout` and `set_checkpointing` set ----------------------------------------------------------------

    @property
    def dropout(self) -> float:
        return max((layer.p for layer in self._dropouts()), default=0.0)

    @dropout.setter
    def dropout(self, p: float) -> None:
        layers = self._dropouts()
        if p and not layers:
            raise UserError(f"dropout {p:g}: a {self.kind} has no residual blocks with dropout", "leave it away")
        for layer in layers:
            layer.p = float(p)

    def _dropouts(self) -> list[nn.Dropout]:
        """Those of the residual blocks, as the networks' own argument `dropout` means."""
        from diffusers.models.resnet import ResnetBlock2D

        return [m.dropout for m in self.net.modules() if isinstance(m, ResnetBlock2D)]

    @property
    def checkpointing(self) -> bool:
        return bool(self.net.is_gradient_checkpointing)

    @checkpointing.setter
    def checkpointing(self, on: bool) -> None:
        (self.net.enable_gradient_checkpointing if on else self.net.disable_gradient_checkpointing)()


def called_at(network: nn.Module, sigma: float) -> float:
    """The noise level at which a student of this network is called, for a wish of `sigma`: that itself, or the nearest
    of a discrete schedule, so that every library can call it at a time that it has. UserError: above all that the
    network knows."""
    if not isinstance(network, EDMView):
        return sigma
    if sigma > 1.001 * network.sigma_max:
        top = f"{network.sigma_max:.6g}"
        raise UserError(
            f"a student is called at sigma {sigma:g}, and its network knows noise levels up to {top}",
            f"student.sigma: {top}, the highest, or below (80, EDM's, is the default)",
        )
    with torch.device("cpu"):  # levels are no part of the network, which a plan builds without memory
        return float(network.round_sigma(torch.tensor(sigma, dtype=torch.float64)))


def lowest_level(network: nn.Module) -> float:
    """The noise level at which jumps along the ODE end: EDM's (Karras et al. 2022, Table 1), or the lowest that the
    network knows."""
    return network.sigma_min if isinstance(network, EDMView) else CONSISTENCY_EPSILON


class _Enough(Exception):
    """The features that were asked for are there; what follows them is not needed."""
