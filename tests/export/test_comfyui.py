"""Text students as one file with the names of Stable Diffusion's original ones."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from d2o.diffusion.schedules import DiscreteSchedule
from d2o.errors import UserError
from d2o.export.comfyui import settings_of
from d2o.export.exporter import export_checkpoint
from d2o.export.ldm_names import text_names, unet_names, vae_names
from d2o.export.pipeline import published_names
from d2o.networks.edm_view import EDMView
from d2o.spaces.base import LatentSpace
from d2o.students.base import Student
from d2o.teachers.in_edm import in_edm
from d2o.teachers.registry import load_teacher
from d2o.teachers.stable_diffusion import StableDiffusionTeacher
from d2o.teachers.text import clip_text
from tests.export.test_student_folder import saved, shaken, student_of
from tests.teachers import pipelines
from tests.teachers.families import tiny

SD15 = {"cross_attention_dim": 768}
SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@pytest.mark.parametrize(("config", "keys"), [(SD15, 686), (SDXL, 1680)], ids=["sd15", "sdxl"])
def test_every_tensor_of_the_published_networks_has_its_name(config, keys):
    """By their sizes alone, and there and back: diffusers' converter gives each tensor its name again."""
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    with torch.device("meta"):
        network = UNet2DConditionModel(**config)
    tensors = network.state_dict()
    named = unet_names(tensors, network.config)
    assert len(named) == len(tensors) == keys
    back = convert_ldm_unet_checkpoint(named, network.config)
    assert {name: id(tensor) for name, tensor in back.items()} == {name: id(t) for name, t in tensors.items()}


def test_names_are_those_that_comfyui_looks_for():
    """A few that it recognises models by."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        xl = UNet2DConditionModel(**SDXL)
    named = unet_names(xl.state_dict(), xl.config)
    inside = "model.diffusion_model"
    assert named[f"{inside}.input_blocks.0.0.weight"].shape == (320, 4, 3, 3)
    assert named[f"{inside}.label_emb.0.0.weight"].shape == (1280, 2816)
    assert named[f"{inside}.input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight"].shape == (640, 2048)
    assert named[f"{inside}.output_blocks.2.2.conv.weight"].shape == (1280, 1280, 3, 3)
    decoder = vae_names(pipelines.vae().state_dict(), pipelines.vae().config)
    assert decoder["first_stage_model.decoder.mid.attn_1.q.weight"].ndim == 4
    texts = text_names([published_names(pipelines.clip()), published_names(pipelines.clip(projection=24))])
    assert texts["conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_weight"].shape == (96, 32)
    assert texts["conditioner.embedders.1.model.text_projection"].shape == (32, 24)
    assert "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias" in texts


@pytest.mark.long
def test_a_student_of_tiny_sd_comes_back_bit_for_bit(tmp_path):
    from diffusers.loaders import single_file_utils as single

    base = in_edm(load_teacher("tiny-sd"))
    student = Student(shaken(base.network), base.spec, 14.6, begins="x_T")
    saved(student, tmp_path / "s.safetensors")
    done = export_checkpoint(tmp_path / "s.safetensors", "comfyui", dtype="fp32", check_n=2)
    assert done.path == tmp_path / "s-comfyui.safetensors" and done.parity.difference < 1e-4
    tensors, vae = load_file(done.path), student.space.autoencoder
    encoder = published_names(student.text.encoders[0])
    for found, own in (
        (single.convert_ldm_unet_checkpoint(dict(tensors), base.network.net.config), student.network.net.state_dict()),
        (single.convert_ldm_vae_checkpoint(dict(tensors), vae.config), vae.state_dict()),
        (single.convert_ldm_clip_checkpoint(dict(tensors)), encoder),
    ):
        assert found.keys() == own.keys() and all(torch.equal(found[name], own[name]) for name in own)
    with safe_open(done.path, "pt") as file:
        assert json.loads(file.metadata()["d2o_export"])["provenance"][-1]["exported"] == "comfyui"
    card = done.card.read_text()
    assert "sigmas `14.6146, 0`" in card and "64 x 64" not in card and "it will not load this one" in card
    assert "ComfyUI's first noise" not in card  # x_T is what it begins with
    assert "library_name: diffusers" in card and "pipeline_tag: text-to-image" in card
    assert export_checkpoint(tmp_path / "s.safetensors", "comfyui", dtype="fp32", check_n=1).unchanged


@pytest.mark.long
def test_students_of_two_text_encoders_in_half_precision(tmp_path):
    pipe = pipelines.stable_diffusion_xl(tmp_path, projection=32)
    text = clip_text("xl", [pipe.text_encoder, pipe.text_encoder_2], [pipe.tokenizer, pipe.tokenizer_2])
    spec = tiny("sdxl", tmp_path).spec
    teacher = StableDiffusionTeacher(
        pipe.unet, LatentSpace.of("xl", pipe.vae), text, DiscreteSchedule.scaled_linear(), spec
    )
    saved(student_of(teacher, "denoiser", 5.0), tmp_path / "s.safetensors")
    done = export_checkpoint(tmp_path / "s.safetensors", "comfyui", check_n=2)
    assert done.parity.unrounded < 1e-4 < done.parity.difference < 0.031
    tensors = load_file(done.path)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert "ManualSigmas" in done.card.read_text() and "KSampler does" not in done.card.read_text()


def test_what_comfyui_would_call_otherwise_is_refused(tmp_path):
    saved(student_of(tiny("ddpm", tmp_path), "denoiser"), tmp_path / "pixels.safetensors")
    with pytest.raises(UserError, match="no student that takes prompts"):
        export_checkpoint(tmp_path / "pixels.safetensors", "comfyui")
    flow = tiny("sd3", tmp_path)
    saved(student_of(flow, "denoiser", 80.0), tmp_path / "flow.safetensors")
    with pytest.raises(UserError, match="not of a SD3Transformer2DModel"):
        export_checkpoint(tmp_path / "flow.safetensors", "comfyui")
    teacher = in_edm(tiny("sd", tmp_path))
    told = pipelines.unet(time_cond_proj_dim=256)
    view = EDMView.of(told, teacher.network.config["schedule"], "epsilon")
    saved(Student(view, teacher.spec, 14.6, guidance=(1.0, 8.0)), tmp_path / "told.safetensors")
    with pytest.raises(UserError, match="is told a guidance scale"):
        export_checkpoint(tmp_path / "told.safetensors", "comfyui")
    other = EDMView.of(pipelines.unet(), DiscreteSchedule.from_config({}).record(), "epsilon")
    saved(Student(other, teacher.spec, 14.6), tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="another noise schedule"):
        export_checkpoint(tmp_path / "other.safetensors", "comfyui")
    assert not list(tmp_path.glob("*comfyui*"))


def test_the_card_says_how_to_call_students_of_all_kinds(tmp_path):
    teacher = tiny("sd-v", tmp_path)
    noise = settings_of(student_of(teacher, "denoiser", 14.6))
    assert noise.prediction == "v_prediction" and noise.family == ""
    assert noise.sigmas == pytest.approx([14.6146, 0], rel=1e-4) and noise.noise == pytest.approx(1.00234, abs=1e-5)
    jumps = settings_of(student_of(teacher, "cd", 2.5))
    assert jumps.sigmas[1] == pytest.approx(0.0292, abs=1e-4) and jumps.noise == 1
