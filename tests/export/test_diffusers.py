"""A text-to-image teacher as a diffusers folder."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

from d2o.condition import Condition
from d2o.diffusion.noise import noise_for_seeds
from d2o.errors import UserError
from d2o.export.exporter import export_checkpoint
from d2o.export.folder import open_pipeline
from d2o.interop.safetensors_io import read_meta
from d2o.networks.latent import load_autoencoder, load_text_to_image
from d2o.teachers.base import Spec
from d2o.teachers.latent import text_to_image_teacher
from tests.helpers import tiny_teacher
from tests.latent import tiny_text_to_image

RECIPE = {
    "name": "tiny",
    "data": {"path": "real:digits"},
    "latent_diffusion": {"templates": ["a handwritten {name}"], "steps": 20, "cfg": 3.0},
}
PROMPTS = ["a handwritten seven", "eight", ""]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    tiny_text_to_image(folder / "tiny.safetensors", recipe=RECIPE, metrics={"accuracy": 0.975}, images=1234)
    return folder, export_checkpoint(
        folder / "tiny.safetensors", "diffusers", folder / "out" / "tiny-model", dtype="fp16"
    )


@pytest.mark.long
def test_diffusers_samples_what_the_checkpoint_samples(exported):
    folder, done = exported
    pipeline = open_pipeline(done.path)
    pipeline.set_progress_bar_config(disable=True)
    noise = noise_for_seeds(range(3), (4, 16, 16))
    theirs = (
        pipeline(PROMPTS, num_inference_steps=7, guidance_scale=3.0, latents=noise, output_type="pt").images * 2 - 1
    )
    model, meta = load_text_to_image(folder / "tiny.safetensors")
    teacher = text_to_image_teacher(model, Spec.from_dict(meta["spec"]))
    ours = teacher.decode(teacher.sample(noise, Condition.of_prompts(PROMPTS), "ddim", 7, cfg=3.0))
    assert (theirs - ours).abs().max() < 0.02  # weights rounded to fp16
    assert ours.std() > 0.05 and done.parity.difference < 0.02


def test_the_folder_is_stable_diffusion_1_5_s_layout_and_scheduler(exported):
    _, done = exported
    names = {path.relative_to(done.path).as_posix() for path in done.path.rglob("*") if path.is_file()}
    assert names == {
        "README.md",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/merges.txt",
        "tokenizer/special_tokens_map.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer/vocab.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    }
    scheduler = json.loads((done.path / "scheduler" / "scheduler_config.json").read_text())
    expected = {
        "_class_name": "DDIMScheduler",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "prediction_type": "epsilon",
        "timestep_spacing": "leading",
    }
    assert expected.items() <= scheduler.items()
    index = json.loads((done.path / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline" and index["safety_checker"] == [None, None]
    assert load_autoencoder(done.path).vae.config.scaling_factor == 0.5
    parameters = sum(p.numel() for p in tiny_text_to_image().parameters())
    assert 2 * parameters < done.size < 2 * parameters + 150_000
    assert all(
        path.stat().st_mode & 0o044 == 0o044 or path.stat().st_mode & 0o077 == 0 for path in done.path.rglob("*")
    )


@pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated")  # diffusers < 0.40 knows no other name
def test_weights_load_in_the_precision_that_is_asked_for(exported):
    from diffusers import StableDiffusionPipeline

    _, done = exported
    plain = open_pipeline(done.path)
    half = StableDiffusionPipeline.from_pretrained(str(done.path), torch_dtype=torch.float16)
    for pipeline, dtype in ((plain, torch.float32), (half, torch.float16)):
        assert {part.dtype for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder)} == {dtype}


def test_the_card_says_what_one_must_know(exported):
    _, done = exported
    text = done.card.read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert (
        front["license"] == "cc-by-4.0"
        and front["library_name"] == "diffusers"
        and front["pipeline_tag"] == "text-to-image"
    )
    for part in ("UCI", "1,234 images", "accuracy: 0.975", 'pipeline("a handwritten seven"', "name: tiny", "d2o 0."):
        assert part in text
    assert done.licence == "CC-BY-4.0" and done.teacher == "tiny"


@pytest.mark.long
def test_the_same_export_again_changes_nothing_and_another_needs_force(tmp_path):
    target = tmp_path / "model"
    tiny_text_to_image(tmp_path / "a.safetensors")
    tiny_text_to_image(tmp_path / "b.safetensors", seed=1)
    assert not export_checkpoint(tmp_path / "a.safetensors", "diffusers", target).unchanged
    before = (target / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    (target / "README.md").write_text("edited")
    assert (
        export_checkpoint(tmp_path / "a.safetensors", "diffusers", target).unchanged
        and (target / "README.md").read_text() == "edited"
    )
    with pytest.raises(UserError, match="holds another model"):
        export_checkpoint(tmp_path / "b.safetensors", "diffusers", target)
    assert (target / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == before
    export_checkpoint(tmp_path / "b.safetensors", "diffusers", target, force=True)
    assert (target / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() != before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    precious = tmp_path / "thesis"
    precious.mkdir()
    (precious / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="not a folder of an export"):
        export_checkpoint(tmp_path / "a.safetensors", "diffusers", precious, force=True)
    assert (precious / "thesis.tex").read_text() == "precious"


def test_what_diffusers_loads_already_is_said_to_be_that(tmp_path):
    with pytest.raises(UserError, match="tiny-sd is a pipeline that diffusers loads already"):
        export_checkpoint("tiny-sd", "diffusers", tmp_path / "out")
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(UserError, match=f"{tmp_path} is a pipeline"):
        export_checkpoint(tmp_path, "onnx")


def test_what_is_no_text_to_image_model_is_refused(tmp_path):
    tiny_teacher(tmp_path / "pixels.safetensors")
    with pytest.raises(UserError, match="no text-to-image model"):
        export_checkpoint(tmp_path / "pixels.safetensors", "diffusers", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert read_meta(tmp_path / "pixels.safetensors")["kind"] == "teacher"


@pytest.mark.long
def test_too_large_a_difference_and_overflow_leave_nothing_behind(tmp_path):
    tiny_text_to_image(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="above the tolerance"):
        export_checkpoint(tmp_path / "a.safetensors", "diffusers", tmp_path / "out", tolerance=1e-9)
    model = tiny_text_to_image()
    from d2o.interop.safetensors_io import load_file, save_file

    with torch.no_grad():
        model.unet.conv_in.weight[0, 0, 0, 0] = 1e6
    save_file(tmp_path / "big.safetensors", model.state_dict(), load_file(tmp_path / "a.safetensors")[1])
    with pytest.raises(UserError, match="fp16 cannot"):
        export_checkpoint(tmp_path / "big.safetensors", "diffusers", tmp_path / "out", dtype="fp16")
    assert (
        export_checkpoint(tmp_path / "big.safetensors", "diffusers", tmp_path / "out", dtype="fp32").parity.difference
        < 1e-3
    )
