"""A tiny random teacher of every family."""

from __future__ import annotations

from pathlib import Path

import torch

from d2o.diffusion.schedules import DiscreteSchedule, FlowSchedule
from d2o.networks.build import build_network
from d2o.teachers.base import Spec, Teacher

FAMILIES = ("ddpm", "ddpm-labels", "sd", "sd-v", "sdxl", "sd3")
"""Those that are not of the EDM family."""
TEACHERS = ("edm", "edm-other", "edm2", *FAMILIES)
DDPM = DiscreteSchedule.from_config({})
SHAPE, LATENTS = (3, 8, 8), (4, 8, 8)


def tiny(name: str, tmp_path: Path) -> Teacher:
    from tests.teachers import pipelines

    if name.startswith("edm"):
        return edm(name)
    if name in ("ddpm", "ddpm-labels"):
        from d2o.teachers.unconditional import UNet2DTeacher

        classes = 3 if name == "ddpm-labels" else 0
        unet = pipelines.unconditional(num_class_embeds=classes or None).unet
        spec = Spec(name, SHAPE, condition="label" if classes else "none", classes=classes, solver="ddim")
        return UNet2DTeacher(unet, DDPM, spec, clip=None if classes else 1.0)
    from d2o.spaces.base import LatentSpace
    from d2o.teachers.text import clip_and_t5_text, clip_text

    spec = Spec(name, LATENTS, condition="text", solver="euler" if name == "sd3" else "ddim")
    if name == "sd3":
        from d2o.teachers.flow import StableDiffusion3Teacher

        pipe = pipelines.stable_diffusion_3(tmp_path)
        encoders = [pipe.text_encoder, pipe.text_encoder_2, None]
        tokenizers = [pipe.tokenizer, pipe.tokenizer_2, None]
        text = clip_and_t5_text(name, encoders, tokenizers, pipe.transformer.config.joint_attention_dim, t5_length=4)
        return StableDiffusion3Teacher(pipe.transformer, LatentSpace.of(name, pipe.vae), text, FlowSchedule(3.0), spec)
    from d2o.teachers.stable_diffusion import StableDiffusionTeacher

    xl = name == "sdxl"
    pipe = (pipelines.stable_diffusion_xl if xl else pipelines.stable_diffusion)(tmp_path)
    encoders = [pipe.text_encoder, pipe.text_encoder_2] if xl else [pipe.text_encoder]
    tokenizers = [pipe.tokenizer, pipe.tokenizer_2] if xl else [pipe.tokenizer]
    return StableDiffusionTeacher(
        pipe.unet,
        LatentSpace.of(name, pipe.vae),
        clip_text(name, encoders, tokenizers),
        DiscreteSchedule.scaled_linear(),
        spec,
        prediction="v_prediction" if name == "sd-v" else "epsilon",
    )


def edm(name: str) -> Teacher:
    torch.manual_seed(0)
    if name == "edm2":
        shape = {"img_resolution": 8, "img_channels": 4, "label_dim": 3, "model_channels": 16, "channel_mult": [1, 2]}
        network = build_network({"arch": "edm2", **shape, "num_blocks": 1, "attn_resolutions": []})
        return Teacher(network, Spec(name, LATENTS, space="latent", condition="label", classes=3))
    shape = {"img_resolution": 8, "img_channels": 3, "label_dim": 3, "model_channels": 16, "channel_mult": [1]}
    more = {"precond": "vp"} if name == "edm-other" else {}
    network = build_network({"arch": "ddpmpp", **shape, "num_blocks": 1, "attn_resolutions": [], **more})
    return Teacher(network, Spec(name, SHAPE, condition="label", classes=3))
