"""What a network predicts -> the data that it stands for."""

from __future__ import annotations

from torch import Tensor

from d2o.diffusion.schedules import Schedule
from d2o.errors import unknown

PREDICTIONS = ("epsilon", "v_prediction", "sample")


def check_prediction(prediction: str) -> str:
    """UserError: an unknown one."""
    if prediction not in PREDICTIONS:
        raise unknown("prediction", prediction, PREDICTIONS)
    return prediction


def to_data(prediction: str, out: Tensor, x_t: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """The network's output at x_t [B, C, H, W], t [B] -> x_0, float32: x_t = alpha x_0 + sigma eps, v = alpha eps -
    sigma x_0 (Salimans and Ho 2022, appendix D; v for alpha^2 + sigma^2 = 1)."""
    out, x_t = out.float(), x_t.float()
    if prediction == "sample":
        return out
    alpha, sigma = schedule.alpha(t).view(-1, 1, 1, 1), schedule.sigma(t).view(-1, 1, 1, 1)
    if prediction == "v_prediction":
        return alpha * x_t - sigma * out
    return (x_t - sigma * out) / alpha
