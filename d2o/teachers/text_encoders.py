"""Text encoders by the name of the model that they are part of, for those who have none of its other parts."""

from __future__ import annotations

import torch

from d2o.teachers.registry import locate
from d2o.teachers.text import TextEncoders, clip_text, keep_text, kept_text


def load_text(name: str, device: str | torch.device = "cpu") -> TextEncoders:
    """The text encoders of a model: a teacher by name, the folder or checkpoint of one, or owner/name on the hub. Its
    network and autoencoder are not loaded. The same object for all who ask in this process, as long as one of them
    keeps it. UserError: nothing of that name, or no model that takes prompts."""
    return kept_text(name, device) or keep_text(_read(name, device))


def _read(name: str, device: str | torch.device) -> TextEncoders:
    path = locate(name)
    if path.is_dir() and not (path / "checkpoints").is_dir():
        from d2o.teachers.diffusers_folder import text_of  # brings diffusers and transformers

        return text_of(path, name, device)
    from d2o.networks.latent import load_text_to_image

    model, _ = load_text_to_image(path)
    return clip_text(name, [model.text_encoder], [model.tokens.tokenizer], device)
