"""The autoencoder, latent diffusion with text, and what they made: the shipped `tiny-sd`."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch

from d2o.condition import Condition
from d2o.data.images import open_images
from d2o.diffusion.noise import noise_for_seeds
from d2o.diffusion.schedules import DiscreteSchedule
from d2o.errors import UserError
from d2o.features import load_features
from d2o.interop.assets import asset
from d2o.interop.safetensors_io import load_file, read_meta
from d2o.methods.autoencoder import AutoencoderOptions
from d2o.methods.base import Batch, Draws, Setup, get_method
from d2o.methods.latent_diffusion import LatentDiffusionOptions, classify, latent_scale
from d2o.networks.latent import load_autoencoder, load_text_to_image
from d2o.recipes.load import load_recipe
from d2o.runtime import StopFlag, Stopped
from d2o.teachers.latent import text_to_image_teacher
from d2o.training.loop import Trainer
from d2o.training.setup import prepare
from tests.latent import TEXT, UNET, VAE, tiny_autoencoder, tiny_text_to_image
from tests.methods.test_methods import OneStep

CPU = torch.device("cpu")


def train(recipe, folder, stop_after: int | None = None) -> None:
    """The recipe through the loop; `stop_after` iterations as if a signal came."""
    stop = StopFlag()
    folder.mkdir(exist_ok=True)
    setup = prepare(recipe, CPU, None, lambda text: None, lambda *_: None, stop)
    trainer = Trainer(recipe, setup, folder)
    trainer.resume()

    def progress(images: int, text: str) -> None:
        if stop_after and trainer.iteration >= stop_after:
            stop.received = 2

    if stop_after:
        with pytest.raises(Stopped):
            trainer.run(progress, stop)
    else:
        trainer.run(progress, stop)


@pytest.mark.long
@pytest.mark.parametrize("name", ["tiny_sd_vae", "tiny_sd"])
def test_a_stopped_and_resumed_run_ends_with_the_same_bytes(name, tmp_path):
    tiny_autoencoder(tmp_path / "vae.safetensors")
    changes = ["batch=8", "images=32", "log_every=1", "ema.half_life=50"]
    if name == "tiny_sd":
        changes += [
            f"latent_diffusion.vae={tmp_path / 'vae.safetensors'}",
            "latent_diffusion.steps=2",
            "latent_diffusion.check_n=10",
        ]
        changes += ["eval.every=16", "preview={every: 32, n: 4}"]
    recipe = load_recipe(name, changes, mini=True)
    train(recipe, tmp_path / "whole")
    train(recipe, tmp_path / "parts", stop_after=2)
    assert read_meta(tmp_path / "parts" / "checkpoints" / "state.safetensors")["images"] == 24
    train(recipe, tmp_path / "parts")
    whole, parts = (tmp_path / folder / "checkpoints" / "last.safetensors" for folder in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()
    meta = read_meta(whole)
    assert meta["kind"] == ("teacher" if name == "tiny_sd" else "autoencoder") and meta["recipe"]["name"] == name
    if name == "tiny_sd":
        assert meta["spec"]["condition"] == "text" and "accuracy" in meta["metrics"]
        assert (tmp_path / "whole" / "checkpoints" / "best.safetensors").exists()
        assert (tmp_path / "whole" / "previews" / "000000032.png").exists()
        model, _ = load_text_to_image(tmp_path / "whole")
        given = tiny_autoencoder()  # the frozen part is what it was
        assert all(torch.equal(a, b) for a, b in zip(model.vae.parameters(), given.vae.parameters(), strict=True))
    else:
        assert load_autoencoder(tmp_path / "whole").factor == 4


@functools.cache
def digits():
    return open_images("real:digits", resolution=32, channels=3)


class Few:
    """The first 100 digits, for tests in which their number does not matter."""

    name, classes, shape, class_names = "few", 10, (3, 32, 32), [str(c) for c in range(10)]

    def __init__(self):
        self.labels = digits().labels[:100]

    def __len__(self):
        return 100

    def images(self, indices):
        return digits().images(indices)


def test_the_autoencoder_s_loss_is_its_equation():
    network = {key: VAE[key] for key in ("block_out_channels", "norm_num_groups")}
    method = get_method("autoencoder")(Setup(AutoencoderOptions(kl_weight=0.3), network=network, images=digits()))
    x = torch.rand(4, 3, 32, 32) * 2 - 1
    loop = OneStep(method, Batch(images=x, condition=Condition.of_labels(torch.arange(4))))
    scalars = method.step(loop, loop.batch, 0)
    posterior = method.autoencoder.vae.encode(x).latent_dist
    y = method.autoencoder.vae.decode(posterior.mean + posterior.std * Draws(3, 0, 4, 4, CPU).randn(4, 16, 16)).sample
    expected = (y - x).abs().mean() + 0.3 * posterior.kl().mean() / (3 * 32 * 32)
    assert scalars["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert scalars["psnr"].item() == pytest.approx(-10 * ((y - x).square().mean() / 4).log10().item(), rel=1e-5)
    assert loop.updated == ["autoencoder"]


@pytest.fixture
def vae(tmp_path):
    tiny_autoencoder(tmp_path / "vae.safetensors")
    return str(tmp_path / "vae.safetensors")


def latent_diffusion(vae, images=None, **options):
    network = {"unet": UNET, "text_encoder": TEXT}
    torch.manual_seed(0)
    return get_method("latent-diffusion")(
        Setup(LatentDiffusionOptions(vae=vae, **options), network=network, images=images or Few(), name="t")
    )


def test_latent_diffusion_predicts_the_noise_in_stable_diffusion_s_schedule(vae):
    method = latent_diffusion(vae, templates=["a handwritten {name}", "{name}"], main=0.5, caption_dropout=0.25)
    x, labels = torch.rand(6, 3, 32, 32) * 2 - 1, torch.arange(6)
    loop = OneStep(method, Batch(images=x, condition=Condition.of_labels(labels)))
    scalars = method.step(loop, loop.batch, 0)
    draw, model = Draws(3, 0, 6, 6, CPU), method.model
    posterior = model.vae.encode(x).latent_dist
    z = (posterior.mean + posterior.std * draw.randn(4, 16, 16)) * model.vae.config.scaling_factor
    t, noise = draw.randint(0, 1000), draw.randn(4, 16, 16)
    bar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)[t].float()[
        :, None, None, None
    ]
    choice, dropped = method.captions.choose(draw.rand(), 0.5), draw.rand() < 0.25
    prompts = ["" if dropped[i] else method.captions.table[i][choice[i]] for i in range(6)]
    states = model.text_encoder(model.tokens.encode(prompts))[0]
    found = model.unet(bar.sqrt() * z + (1 - bar).sqrt() * noise, t, states).sample
    assert scalars["loss"].item() == pytest.approx((found - noise).square().mean().item(), rel=1e-4)
    assert all(p.grad is None for p in model.vae.parameters()) and all(
        p.grad is not None for p in model.unet.parameters()
    )
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.text_encoder.parameters())


def test_latents_are_scaled_to_unit_deviation(vae):
    method = latent_diffusion(vae)
    mean, std = method.model.encode_images(digits().images(range(100)).float() / 127.5 - 1)
    z = mean + std * torch.randn_like(mean)
    assert z.std().item() == pytest.approx(1.0, abs=0.02)
    assert latent_scale(load_autoencoder(vae), Few(), CPU) == pytest.approx(method.model.scale)


@pytest.mark.long
def test_generation_is_the_sd_teacher_s_and_prompts_are_the_classes_in_turn(vae):
    method = latent_diffusion(vae, steps=3, cfg=2.0)
    noise = noise_for_seeds(range(10), method.spec().shape)
    images = method.generate(method.model, noise, Condition.none(10))
    assert images.shape == (10, 3, 32, 32) and images.abs().max() <= 1
    assert torch.equal(images, method.generate(method.model, noise, method.asked(torch.arange(10))))
    teacher = text_to_image_teacher(method.model, method.spec())
    assert torch.equal(
        images, teacher.decode(teacher.sample(noise, method.asked(torch.arange(10)), "ddim", 3, cfg=2.0))
    )
    assert method.nfe() == 6 and isinstance(teacher.schedule, DiscreteSchedule)


@pytest.mark.long
def test_mistakes_are_named(vae, tmp_path):
    unlabelled = SimpleNamespace(name="photos", classes=0, labels=None, shape=(3, 32, 32))
    with pytest.raises(UserError, match="photos has no labels"):
        latent_diffusion(vae, unlabelled)
    with pytest.raises(UserError, match="not for images of 1 x 8 x 8"):
        latent_diffusion(vae, open_images("real:digits"))
    with pytest.raises(UserError, match="holds a teacher, not an autoencoder"):
        tiny_text_to_image(tmp_path / "sd.safetensors")
        latent_diffusion(str(tmp_path / "sd.safetensors"))
    with pytest.raises(
        UserError, match=r"network\.unet\.block_outchannels: unknown key .* did you mean 'block_out_channels'"
    ):
        get_method("latent-diffusion")(
            Setup(LatentDiffusionOptions(vae=vae), network={"unet": {"block_outchannels": [8]}}, images=digits())
        )
    with pytest.raises(UserError, match="shrink by the 8"):
        network = {"block_out_channels": [4, 4, 4, 4], "norm_num_groups": 2}
        get_method("autoencoder")(
            Setup(AutoencoderOptions(), network=network, images=open_images("real:digits", resolution=20))
        )
    with pytest.raises(UserError, match="no checkpoint|without a checkpoint"):
        load_autoencoder(tmp_path)
    with pytest.raises(UserError, match="not an autoencoder"):
        load_autoencoder(asset("teacher_digits.safetensors"))


def test_a_checkpoint_of_either_transformers_generation_can_be_read(tmp_path):
    network = tiny_text_to_image(tmp_path / "new.safetensors")
    tensors, meta = load_file(tmp_path / "new.safetensors")
    from d2o.interop.safetensors_io import save_file

    long = any(".text_model." in name for name in tensors)
    swapped = {
        n.replace("text_model.", "") if long else n.replace("text_encoder.", "text_encoder.text_model."): t
        for n, t in tensors.items()
    }
    save_file(tmp_path / "other.safetensors", swapped, meta)
    ids = network.tokens.encode(["a handwritten seven"])
    for name in ("new", "other"):
        assert torch.equal(
            load_text_to_image(tmp_path / f"{name}.safetensors")[0].encode_text(ids), network.encode_text(ids)
        )


WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.mark.long
def test_the_shipped_tiny_sd_draws_what_it_is_asked_for():
    from d2o.export.folder import open_pipeline

    pipeline, extractor, n = open_pipeline(asset("tiny-sd")), load_features("digits"), 60
    pipeline.set_progress_bar_config(disable=True)
    labels = torch.arange(n) % 10

    def draw(prompts: list[str], cfg: float) -> torch.Tensor:
        latents = noise_for_seeds(range(n), (4, 8, 8))
        images = pipeline(prompts, num_inference_steps=12, guidance_scale=cfg, latents=latents, output_type="pt").images
        return classify(extractor, images * 2 - 1)

    assert (draw([f"a handwritten {WORDS[c]}" for c in labels], 3.0) == labels).float().mean() >= 0.85
    assert (
        draw([f"the digit {c}" for c in labels], 3.0) == labels
    ).float().mean() >= 0.8  # other captions that it knows
    assert len(set(draw([""] * n, 1.0).tolist())) >= 6  # without a prompt: some of everything
    folder = asset("tiny-sd")
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 6_000_000
    card = (folder / "README.md").read_text()
    assert "license: cc-by-4.0" in card and "name: tiny_sd" in card and "UCI" in card


@pytest.mark.long
def test_the_shipped_autoencoder_can_be_trained_in_and_reconstructs_digits():
    network, images = load_autoencoder(asset("tiny-sd")).eval(), digits()
    x = images.images(range(100)).float() / 127.5 - 1
    with torch.inference_mode():
        y = network.decode(network.encode(x)[0])
    assert (y - x).square().mean() < 4 * 10**-3.8  # PSNR above 38 dB
    assert latent_scale(network, images, CPU) == pytest.approx(network.vae.config.scaling_factor, rel=0.02)
