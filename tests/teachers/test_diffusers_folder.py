import json
import shutil

import pytest
import torch

from d2o.condition import Condition
from d2o.errors import UserError
from d2o.interop.hub import is_diffusers_folder
from d2o.teachers.diffusers_folder import discrete_schedule, load_diffusers
from d2o.teachers.diffusers_parts import Components, read_config
from d2o.teachers.text import kept_text
from tests.teachers import pipelines

PROMPTS = ["a seven", ""]
ASKED = Condition.of_prompts(PROMPTS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One folder of each family, as diffusers writes it."""
    root = tmp_path_factory.mktemp("folders")
    for name, pipe in {
        "sd": pipelines.stable_diffusion(root),
        "xl": pipelines.stable_diffusion_xl(root),
        "sd3": pipelines.stable_diffusion_3(root, t5=True),
        "ddpm": pipelines.unconditional(),
    }.items():
        pipe.save_pretrained(root / name)
    return root


@pytest.fixture
def sd(folders, tmp_path):
    """A copy to be damaged."""
    return shutil.copytree(folders / "sd", tmp_path / "sd")


def edit(file, **changes):
    content = json.loads(file.read_text())
    content.update(changes)
    file.write_text(json.dumps({key: value for key, value in content.items() if value != "gone"}))


def refused(folder, words):
    """With its weights, and for a plan, which reads none of them."""
    for device in ("cpu", "meta"):
        with pytest.raises(UserError, match=words):
            load_diffusers(folder, folder.name, device)


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "kind", "solver"),
    [("sd", "StableDiffusion", "ddim"), ("xl", "StableDiffusionXL", "ddim"), ("sd3", "StableDiffusion3", "euler")],
)
def test_a_folder_gives_the_pipelines_samples_and_says_nothing(folders, capfd, name, kind, solver):
    import diffusers

    teacher = load_diffusers(folders / name, "mine", licence="MIT")
    assert capfd.readouterr() == ("", "")
    assert (teacher.spec.name, teacher.spec.licence, teacher.spec.shape, teacher.spec.solver) == (
        "mine",
        "MIT",
        (4, 8, 8),
        solver,
    )
    where = str((folders / name).resolve())
    assert (teacher.spec.space, teacher.spec.text, teacher.spec.condition) == (where, where, "text")
    assert teacher.spec.guidable and teacher.spec.latent
    assert teacher.meta["pipeline"] == f"{kind}Pipeline" and is_diffusers_folder(folders / name)
    pipe = getattr(diffusers, f"{kind}Pipeline").from_pretrained(folders / name)
    pipe.set_progress_bar_config(disable=True)
    z = noise(2, 4, 8, 8)
    theirs = pipe(
        PROMPTS, latents=z, output_type="latent", guidance_scale=4.0, num_inference_steps=3, height=16, width=16
    ).images
    ours = teacher.sample(z, ASKED, steps=3, cfg=4.0)
    assert torch.allclose(ours, theirs, atol=1e-4 * float(theirs.abs().max()))
    assert teacher.decode(ours).shape == (2, 3, 16, 16)
    assert teacher.fingerprint == load_diffusers(folders / name, "again").fingerprint


def test_a_ddpm_folder_old_or_new(folders, tmp_path):
    teacher = load_diffusers(folders / "ddpm", "ddpm")
    assert (teacher.spec.shape, teacher.spec.space, teacher.spec.condition, teacher.clip) == (
        (3, 8, 8),
        "pixels",
        "none",
        1.0,
    )
    old = shutil.copytree(folders / "ddpm", tmp_path / "old")  # the first repositories keep all files at the top
    for file in [*old.glob("unet/*"), *old.glob("scheduler/*")]:
        file.rename(old / file.name)
    (old / "unet").rmdir(), (old / "scheduler").rmdir()
    assert load_diffusers(old, "old").fingerprint == teacher.fingerprint
    x = teacher.sample(noise(1, 3, 8, 8), steps=2)
    assert x.shape == (1, 3, 8, 8) and bool(x.isfinite().all())


def test_a_ddpm_folder_by_class(tmp_path):
    pipelines.unconditional(num_class_embeds=4).save_pretrained(tmp_path / "classes")
    teacher = load_diffusers(tmp_path / "classes", "classes")
    assert (teacher.spec.condition, teacher.spec.classes) == ("label", 4)
    edit(tmp_path / "classes" / "unet" / "config.json", class_embed_type="timestep", num_class_embeds=None)
    with pytest.raises(UserError, match="continuous labels"):
        load_diffusers(tmp_path / "classes", "classes")


@pytest.mark.parametrize(
    "name", ["PNDMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "DDPMScheduler", "DDIMScheduler"]
)
def test_whichever_scheduler_a_folder_has_its_numbers_are_used(sd, name):
    import diffusers

    own = getattr(diffusers, name)(
        beta_start=0.00085, beta_end=0.0134, beta_schedule="scaled_linear", timestep_spacing="leading"
    )
    (sd / "scheduler" / "scheduler_config.json").unlink()
    own.save_pretrained(sd / "scheduler")
    edit(sd / "scheduler" / "scheduler_config.json", clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    ddim = diffusers.DDIMScheduler.from_config(read_config(sd / "scheduler" / "scheduler_config.json"))
    schedule, prediction, clip = discrete_schedule(Components(sd, read_config(sd / "model_index.json")))
    assert torch.allclose(schedule.alphas_cumprod.float(), ddim.alphas_cumprod, rtol=1e-5) and (prediction, clip) == (
        "epsilon",
        None,
    )
    ddim.set_timesteps(50)
    grid = schedule.grid(50)
    assert grid.t[:-1].tolist() == ddim.timesteps.tolist()
    assert float(grid.alpha[-1] ** 2) == pytest.approx(float(ddim.final_alpha_cumprod), rel=1e-6)
    assert torch.equal(load_diffusers(sd, "sd").schedule.alphas_cumprod, schedule.alphas_cumprod)


def test_what_the_scheduler_says_is_obeyed_or_refused(sd):
    file = sd / "scheduler" / "scheduler_config.json"
    edit(file, prediction_type="v_prediction", timestep_spacing="trailing")
    teacher = load_diffusers(sd, "sd")
    assert teacher.prediction == "v_prediction" and teacher.schedule.grid(4).t[0] == 999
    whole = file.read_text()
    for changes, words in (
        ({"_class_name": "EDMEulerScheduler"}, "EDMEulerScheduler is not supported"),
        ({"_class_name": "LCMScheduler"}, "not supported"),
        ({"_class_name": "gone"}, "which scheduler"),
        ({"thresholding": True}, "thresholding"),
        ({"beta_schedule": "sigmoid"}, "unknown beta_schedule"),
        ({"beta_start": "low"}, "make no schedule"),
        ({"rescale_betas_zero_snr": True}, "zero terminal SNR"),
        ({"clip_sample": True}, "makes no sense for latents"),
        ({"prediction_type": "flow"}, "unknown prediction"),
        ({"timestep_spacing": "odd"}, "timestep_spacing 'odd'"),
    ):
        edit(file, **changes)
        refused(sd, words)
        file.write_text(whole)


def test_half_precision_files_are_read_where_there_are_no_others(folders, tmp_path):
    import diffusers

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folders / "sd").to(torch.float16)
    pipe.save_pretrained(tmp_path / "half", variant="fp16")
    assert (tmp_path / "half" / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    half, full = load_diffusers(tmp_path / "half", "half"), load_diffusers(folders / "sd", "full")
    weight, exact = half.network.conv_in.weight, full.network.conv_in.weight
    assert (
        weight.dtype == torch.float32 and torch.equal(weight, exact.half().float()) and not torch.equal(weight, exact)
    )


def test_weights_in_parts(folders, tmp_path):
    import diffusers

    shutil.copytree(folders / "sd", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "unet")
    unet = diffusers.UNet2DConditionModel.from_pretrained(folders / "sd" / "unet")
    unet.save_pretrained(tmp_path / "parts" / "unet", max_shard_size="100KB")
    index = tmp_path / "parts" / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    assert index.is_file()
    assert load_diffusers(tmp_path / "parts", "parts").fingerprint == load_diffusers(folders / "sd", "sd").fingerprint
    content = json.loads(index.read_text())
    content["weight_map"]["conv_in.weight"] = "../../elsewhere.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match="names weights outside of the folder"):
        load_diffusers(tmp_path / "parts", "parts")


@pytest.mark.parametrize("name", ["sd", "xl", "sd3", "ddpm"])
def test_a_plans_folder_is_the_same_without_its_weights(folders, monkeypatch, name):
    import diffusers
    import transformers

    whole = load_diffusers(folders / name, name)
    for library in (diffusers.ModelMixin, transformers.PreTrainedModel):
        monkeypatch.setattr(library, "from_pretrained", None)
    bare = load_diffusers(folders / name, name, "meta")
    assert bare.spec == whole.spec and bare.meta == whole.meta
    sizes = {key: value.shape for key, value in whole.network.state_dict().items()}
    assert {key: value.shape for key, value in bare.network.state_dict().items()} == sizes
    assert all(value.is_meta for value in bare.network.state_dict().values())
    if name != "ddpm":
        text, planned = whole.embed(ASKED), bare.embed(ASKED)
        assert planned.states.shape == text.states.shape and planned.states.is_meta
        assert kept_text(whole.spec.text) is whole.text  # not the one without weights


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"_class_name": "StableDiffusionInpaintPipeline"}, "fills in images"),
        ({"_class_name": "StableDiffusionXLImg2ImgPipeline"}, "starts from images"),
        ({"_class_name": "StableDiffusionControlNetPipeline"}, "control images"),
        ({"_class_name": "LDMPipeline"}, "VQ autoencoder"),
        ({"_class_name": "FluxPipeline"}, "holds a FluxPipeline"),
        ({"_class_name": ["mine", "Pipeline"]}, "code of its own"),
        ({"_class_name": "gone"}, "code of its own"),
        ({"unet": ["my_unet", "MyUNet"]}, "my_unet.MyUNet, which d2o does not load"),
        ({"unet": ["diffusers", "UNet2DModel"]}, "UNet2DModel, which d2o does not load"),
        ({"text_encoder": ["transformers", "CLIPTextModelWithProjection"]}, "WithProjection, which d2o does not load"),
        ({"text_encoder": ["os", "system"]}, "os.system, which d2o does not load"),
        ({"text_encoder": ["diffusers", "CLIPTextModel"]}, "diffusers.CLIPTextModel, which d2o does not load"),
        ({"../../unet": ["diffusers", "UNet2DConditionModel"]}, "leads out of the folder"),
        ({"vae": "gone"}, "has no vae"),
        ({"vae": [None, None]}, "has no vae"),
        ({"tokenizer": "CLIPTokenizer"}, "has no tokenizer"),
    ],
)
def test_an_index_that_is_not_a_teachers_is_refused(sd, changes, words):
    edit(sd / "model_index.json", **changes)
    refused(sd, words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"in_channels": 9}, "9 input channels; inpainting"),
        ({"num_class_embeds": 10}, "takes classes as an input"),
        ({"time_cond_proj_dim": 32}, "guidance scale"),
        ({"encoder_hid_dim_type": "text_proj", "encoder_hid_dim": 8}, "projected text"),
        ({"sample_size": None}, "no sample_size"),
        ({"block_out_channels": [16, 48]}, "do not fit config.json|cannot be loaded.*mismatch"),
        ({"layers_per_block": 2}, "do not fit config.json|cannot be loaded.*mismatch"),
        ({"down_block_types": ["NoSuchBlock", "DownBlock2D"]}, "cannot be loaded as a UNet2DConditionModel"),
        ({"block_out_channels": "wide"}, "cannot be loaded as a UNet2DConditionModel"),
    ],
)
def test_a_network_that_is_not_a_teachers_is_refused(sd, changes, words):
    edit(sd / "unet" / "config.json", **changes)
    refused(sd, words)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("tokenizer/tokenizer_config.json", {"model_max_length": "many"}),
        ("scheduler/scheduler_config.json", {"steps_offset": None}),
        ("text_encoder/config.json", {"num_attention_heads": -1}),
        ("unet/config.json", {"norm_eps": "small"}),
    ],
)
def test_wrong_numbers_show_when_a_folder_is_opened(sd, name, changes):
    edit(sd / name, **changes)
    refused(sd, "do not work together|cannot be loaded")


def test_weights_that_are_not_finite_are_refused(sd):
    from safetensors.torch import load_file, save_file

    file = sd / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_out.bias"].fill_(float("nan"))
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match="not finite"):
        load_diffusers(sd, "sd")
    assert load_diffusers(sd, "sd", "meta").spec.shape == (4, 8, 8)


def test_the_refiner_is_refused(folders, tmp_path):
    folder = shutil.copytree(folders / "xl", tmp_path / "refiner")
    edit(folder / "unet" / "config.json", projection_class_embeddings_input_dim=2560)
    refused(folder, "refiner")


def test_missing_and_damaged_files_are_named(sd):
    def swap(name, content):
        file = sd / name
        whole = file.read_bytes()
        file.unlink()
        if content is not None:
            file.write_bytes(content(whole))
        return file, whole

    for name, content, words in (
        ("unet/config.json", lambda whole: whole[:50], "unet/config.json is damaged: not JSON"),
        ("unet/config.json", lambda whole: b"[1]", "not a JSON object"),
        ("unet/config.json", lambda whole: b"[" * 100_000, "damaged: not JSON"),
        ("unet/config.json", lambda whole: b"\xff\xfe", "damaged: not JSON"),
        ("unet/config.json", None, "has no unet"),
        ("scheduler/scheduler_config.json", None, "has no scheduler"),
        ("text_encoder/config.json", lambda whole: whole[:30], "text_encoder/config.json is damaged"),
        ("unet/diffusion_pytorch_model.safetensors", lambda whole: whole[: len(whole) // 2], "unet cannot be loaded"),
        ("unet/diffusion_pytorch_model.safetensors", lambda whole: b"not safetensors", "unet cannot be loaded"),
        ("text_encoder/model.safetensors", lambda whole: whole[: len(whole) // 2], "text_encoder cannot be loaded"),
        ("vae/diffusion_pytorch_model.safetensors", None, "vae has no weights"),
        ("model_index.json", lambda whole: b"{", "model_index.json is damaged"),
        ("model_index.json", None, "no such file"),
    ):
        file, whole = swap(name, content)
        refused(sd, words)
        file.write_bytes(whole)
    pickle = sd / "unet" / "diffusion_pytorch_model.bin"
    weights = (sd / "unet" / "diffusion_pytorch_model.safetensors").rename(pickle)
    refused(sd, "only as a pickle")
    weights.rename(sd / "unet" / "diffusion_pytorch_model.safetensors")
    for file in (sd / "tokenizer").iterdir():
        file.unlink()
    refused(sd, "has no tokenizer")
    assert not is_diffusers_folder(sd / "unet")


@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"])
def test_weights_that_are_missing_are_not_made_up(sd, name):
    from safetensors.torch import load_file, save_file

    tensors = load_file(sd / name)
    gone = next(key for key in tensors if key.endswith("weight"))
    save_file({key: value for key, value in tensors.items() if key != gone}, sd / name, {"format": "pt"})
    with pytest.raises(UserError, match=f"do not fit config.json .1 missing.* {gone}"):
        load_diffusers(sd, "sd")
    with pytest.raises(UserError, match="do not fit config.json .*numbers for"):
        load_diffusers(sd, "sd", "meta")


def test_words_that_the_text_encoder_does_not_have(sd):
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(sd / "tokenizer")
    tokenizer.add_tokens([f"more{i}" for i in range(9)])
    tokenizer.save_pretrained(sd / "tokenizer")
    refused(sd, "523 words, but text_encoder knows 514")
