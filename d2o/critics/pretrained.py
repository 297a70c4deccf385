"""The critic of a run that has been trained, to begin another with."""

from __future__ import annotations

from pathlib import Path

import torch

from d2o.critics.style import StyleCritic
from d2o.errors import UserError
from d2o.interop.safetensors_io import load_file

METHOD, SECTION = "spi-gan", "spi_gan"
STATE = "checkpoints/state.safetensors"
PREFIX = "network/critic/"


def pretrained_critic(run: str, shape: tuple[int, int, int], device: str | torch.device = "cpu") -> StyleCritic:
    """The critic in the training state of a `spi-gan` run on images of that shape (C, H, W): a run's checkpoints hold
    its generator alone. UserError: no such state, another method's, of other images, or sharded."""
    path = Path(run) / STATE
    if not path.is_file():
        raise UserError(f"critic.pretrained: {run} has no {STATE}", "give the folder of a run of spi-gan")
    tensors, record = load_file(path)
    recipe = record.get("recipe") or {}
    if record.get("kind") != "state" or recipe.get("method") != METHOD:
        raise UserError(f"critic.pretrained: {run} is a run of {recipe.get('method', 'something else')}, not {METHOD}")
    if "parts" in record:
        raise UserError(
            f"critic.pretrained: the state of {run} is divided among the files of its processes",
            "go on with it in one process for an iteration (d2o train --resume), which writes it whole",
        )
    options = (recipe.get(SECTION) or {}).get("critic") or {}
    with torch.device("cpu"):  # also of a plan, which has all on the meta device
        critic = StyleCritic(**{"img_resolution": shape[-1], "img_channels": shape[0], **options})
    held = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
    try:
        critic.load_state_dict(held)
    except RuntimeError as error:
        what = f"critic.pretrained: the critic of {run} is not one of {shape[0]} x {shape[1]} x {shape[2]} images"
        raise UserError(what) from error
    return critic.to(device)
