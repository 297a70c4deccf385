import copy

import pytest
import torch

from d2o.condition import Condition, Text
from d2o.diffusion.schedules import DiscreteSchedule
from d2o.diffusion.solvers import Solver
from d2o.errors import UserError
from d2o.interop.torchvision_compat import ensure
from d2o.spaces import base as spaces
from d2o.spaces.base import LatentSpace
from d2o.teachers.base import Spec
from d2o.teachers.published_configs import SD15_UNET, SDXL_UNET
from d2o.teachers.stable_diffusion import StableDiffusionTeacher
from d2o.teachers.text import PromptCache, clip_text
from tests.teachers import pipelines

PROMPTS = ["a handwritten seven", "", "nine of hearts"]
ASKED = Condition.of_prompts(PROMPTS)
OTHER = Condition.of_prompts(PROMPTS[::-1])
NEAR = 2e-5  # of the largest value: diffusers computes in float32 throughout, d2o in float64 between the network calls
SPEC = Spec("tiny", (4, 8, 8), condition="text", solver="ddim", steps=50)


def teacher_of(pipe, **options):
    second = getattr(pipe, "text_encoder_2", None)
    encoders, tokenizers = [pipe.text_encoder, *([second] if second else [])], [pipe.tokenizer] * (2 if second else 1)
    schedule = DiscreteSchedule.from_config(dict(pipe.scheduler.config))
    return StableDiffusionTeacher(
        pipe.unet,
        LatentSpace.of("tiny", pipe.vae),
        clip_text("tiny", encoders, tokenizers),
        schedule,
        options.pop("spec", SPEC),
        prediction=pipe.scheduler.config.prediction_type,
        **options,
    )


def latents_of(pipe, noise, **options):
    pipe.set_progress_bar_config(disable=True)
    return pipe(PROMPTS, latents=noise, output_type="latent", height=16, width=16, **options).images


def far(a, b):
    return float((a - b).abs().max() / b.abs().max())


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return pipelines.stable_diffusion(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def pipe_xl(tmp_path_factory):
    return pipelines.stable_diffusion_xl(tmp_path_factory.mktemp("xl"))


@pytest.fixture(scope="module")
def teacher(pipe):
    return teacher_of(pipe)


@pytest.fixture(scope="module")
def noise():
    return torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("cfg", [1.0, 3.0, 7.5])
def test_samples_are_those_of_diffusers_pipeline(pipe, teacher, noise, cfg):
    theirs = latents_of(pipe, noise, guidance_scale=cfg, num_inference_steps=10)
    ours = teacher.sample(noise, ASKED, steps=10, cfg=cfg)
    assert far(ours, theirs) < NEAR
    assert far(teacher.sample(noise, OTHER, steps=10, cfg=cfg), theirs) > 0.01, (
        "the prompts do nothing here: the test is blind"
    )
    if cfg != 1:
        assert far(teacher.sample(noise, ASKED, steps=10), theirs) > 0.01


@pytest.mark.parametrize("uncond", ["zeros", "encode_empty"])
def test_xl_samples_are_those_of_diffusers_pipeline(pipe_xl, noise, uncond):
    pipe_xl.register_to_config(force_zeros_for_empty_prompt=uncond == "zeros")
    teacher = teacher_of(pipe_xl, sdxl_uncond=uncond)
    for cfg in (1.0, 7.5):
        theirs = latents_of(pipe_xl, noise, guidance_scale=cfg, num_inference_steps=6)
        assert far(teacher.sample(noise, ASKED, steps=6, cfg=cfg), theirs) < NEAR
    other = teacher_of(pipe_xl, sdxl_uncond="encode_empty" if uncond == "zeros" else "zeros")
    assert far(other.sample(noise, ASKED, steps=6, cfg=7.5), theirs) > 1e-3
    assert teacher.time_ids.tolist() == [[16, 16, 0, 0, 16, 16]]
    teacher.time_ids = teacher.time_ids * 4
    assert far(teacher.sample(noise, ASKED, steps=6, cfg=7.5), theirs) > 1e-3


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_other_kinds_of_prediction(pipe, noise, prediction):
    from diffusers import DDIMScheduler

    other = copy.copy(pipe)
    other.scheduler = DDIMScheduler(**(pipelines.SD_SCHEDULER | {"prediction_type": prediction}))
    theirs = latents_of(other, noise, guidance_scale=3.0, num_inference_steps=5)
    # Of a predicted sample, diffusers divides by small sigmas in float32.
    assert far(teacher_of(other).sample(noise, ASKED, steps=5, cfg=3.0), theirs) < (
        NEAR if prediction == "v_prediction" else 1e-4
    )


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:__array__")  # numpy 2 about diffusers
def test_dpmpp_is_diffusers_dpm_solver_multistep(pipe, teacher, noise):
    from diffusers import DPMSolverMultistepScheduler

    for steps in (8, 20):  # below 15 steps the last one is of first order
        other = copy.copy(pipe)
        other.scheduler = DPMSolverMultistepScheduler.from_config(
            pipe.scheduler.config, timestep_spacing="trailing", final_sigmas_type="zero"
        )
        theirs = latents_of(other, noise, guidance_scale=3.0, num_inference_steps=steps)
        assert (
            far(
                teacher.sample(noise, ASKED, Solver("dpmpp", steps, "trailing", "x0"), cfg=3.0),
                theirs,
            )
            < NEAR
        ), steps


def test_ancestral_ddim_is_diffusers_with_the_same_noise(pipe, teacher, noise):
    scheduler = pipe.scheduler
    scheduler.set_timesteps(10)
    fresh = [torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(10)]
    text, x = teacher.embed(ASKED), noise
    with torch.no_grad():
        for t, more in zip(scheduler.timesteps, fresh, strict=True):
            x = scheduler.step(pipe.unet(x, t, text.states).sample, t, x, eta=1.0, variance_noise=more).prev_sample
    draws = iter(fresh)
    ours = teacher.sample(noise, ASKED, Solver("ddim", 10, eta=1.0), randn=lambda: next(draws))
    assert far(ours, x) < NEAR
    assert next(draws, None) is None


def test_spacings_are_those_of_diffusers():
    from diffusers import DDIMScheduler

    schedule = DiscreteSchedule.from_config(pipelines.SD_SCHEDULER)
    for spacing in ("leading", "trailing", "linspace"):
        for steps in (1, 4, 7, 50, 333, 999):
            if steps == 1 and spacing == "linspace":  # diffusers takes step 0 there, where there is no noise to remove
                continue
            scheduler = DDIMScheduler(**(pipelines.SD_SCHEDULER | {"timestep_spacing": spacing}))
            scheduler.set_timesteps(steps)
            assert schedule.grid(steps, spacing).t[:-1].tolist() == scheduler.timesteps.tolist(), (spacing, steps)
            assert torch.allclose(schedule.alphas_cumprod.float(), scheduler.alphas_cumprod, rtol=1e-5)
    assert schedule.grid(50).t[:3].tolist() == [981, 961, 941] and schedule.grid(50).alpha[-1] ** 2 == pytest.approx(
        0.99915
    )


def test_a_prompt_is_encoded_once_and_alike_in_any_company(pipe):
    teacher = teacher_of(pipe)
    first = teacher.embed(Condition.of_prompts(["one", "two", "one", ""]))
    assert teacher.prompts.encoded == 3 and torch.equal(first.states[0], first.states[2])
    again = teacher.embed(Condition.of_prompts(["two"]))
    assert teacher.prompts.encoded == 3 and torch.equal(again.states[0], first.states[1])
    other = teacher_of(pipe).embed(Condition.of_prompts(["three", "", "two", "four"]))
    assert torch.equal(other.states[2], first.states[1]), (
        "another worker meets the prompt among others and must get the same bytes"
    )
    with torch.no_grad():
        batch = pipe.tokenizer(["one", "two"], padding="max_length", max_length=77, return_tensors="pt").input_ids
        assert torch.allclose(pipe.text_encoder(batch)[0], first.states[:2], atol=1e-5)
    long = teacher.embed(Condition.of_prompts(["x " * 500]))
    assert long.states.shape == (1, 77, 32)


def test_the_prompts_that_are_kept_are_bounded(pipe):
    one = 77 * 32 * 4  # bytes of an embedding
    cache = PromptCache(teacher_of(pipe).prompts.encode_one, limit=3 * one)
    for prompt in ("a", "b", "c", "a", "d"):  # d takes the place of b, which was not asked for longest
        cache([prompt])
    assert cache.encoded == 4
    cache(["a", "c", "d", "", ""])
    assert cache.encoded == 5
    assert cache(["b"]).states.shape == (1, 77, 32) and cache.encoded == 6
    assert len(PromptCache(cache.encode_one, limit=0)(["a", "b", "a"])) == 3


def test_what_sampling_encoded_serves_training_too(pipe, noise):
    teacher = teacher_of(pipe)
    teacher.sample(noise, ASKED, steps=1, cfg=2.0)
    text = teacher.embed(ASKED)
    student = torch.nn.Linear(32, 1)
    student(text.states).sum().backward()
    student(teacher.unconditional(text).states).sum().backward()
    assert student.weight.grad is not None


def test_time_steps_reach_the_network_exactly(pipe, noise):
    half = teacher_of(pipe)
    half.dtype = torch.bfloat16
    seen = []
    half.call = lambda x, t, *args, **kwargs: (seen.append((t, x.dtype)), half.network(x, t, *args, **kwargs))[1]
    text = half.embed(ASKED)
    x = half.denoise(noise, 999, text)
    assert seen[0][0].tolist() == [999] * 3 and seen[0][0].dtype == torch.int64
    assert x.dtype == torch.float32
    plain = teacher_of(pipe).denoise(noise, 999, text)
    assert 0 < far(x, plain) < 0.02


def test_a_prediction_of_noise_is_read_in_float32(teacher, noise):
    alpha, sigma = 0.0682649142, 0.9976672298  # of t = 999 with SD's betas
    eps = teacher.network(noise, torch.full((3,), 999), teacher.embed(ASKED).states).sample
    assert torch.allclose(teacher.denoise(noise, 999, ASKED), (noise - sigma * eps) / alpha, rtol=1e-5, atol=1e-5)
    assert float(teacher.schedule.sigma(torch.tensor(999.0))) == pytest.approx(sigma, rel=1e-7)


def test_the_network_that_students_copy_is_left_as_it_was(pipe, noise):
    before = {name: type(processor) for name, processor in pipe.unet.attn_processors.items()}
    keys = list(pipe.unet.state_dict())
    teacher = teacher_of(pipe)
    teacher.sample(noise, ASKED, steps=2, cfg=3.0)
    student = copy.deepcopy(teacher.network).requires_grad_(True).train()
    assert list(student.state_dict()) == keys
    assert {name: type(processor) for name, processor in student.attn_processors.items()} == before
    states = teacher.embed(ASKED).states
    student(noise, torch.tensor(999), states).sample.square().mean().backward()
    assert all(weight.grad is not None for weight in student.parameters())


def test_latents_are_decoded_a_few_at_a_time(pipe, teacher, noise, monkeypatch):
    theirs = pipe(
        PROMPTS, latents=noise, output_type="pt", num_inference_steps=2, height=16, width=16, guidance_scale=3.0
    ).images
    x = teacher.sample(noise, ASKED, steps=2, cfg=3.0)
    images = teacher.decode(x)
    assert images.shape == (3, 3, 16, 16) and float(images.abs().max()) <= 1
    assert torch.allclose(images, theirs * 2 - 1, atol=1e-5)
    sizes = []
    monkeypatch.setattr(spaces, "AT_ONCE", 2 * 16 * 16)
    real = pipe.vae.decode
    monkeypatch.setattr(pipe.vae, "decode", lambda z, **options: (sizes.append(len(z)), real(z, **options))[1])
    assert torch.allclose(teacher.decode(x), images, atol=1e-6) and sizes == [2, 1]


def test_conditions_that_do_not_fit_are_refused(teacher, pipe_xl, noise):
    with pytest.raises(UserError, match="prompts, not class labels"):
        teacher.sample(noise, Condition.of_labels([1, 2, 3]))
    with pytest.raises(UserError, match="it takes prompts, '' for none"):
        teacher.sample(noise)
    with pytest.raises(UserError, match="it takes prompts, '' for none"):
        teacher.sample(noise, Condition.none(3))
    with pytest.raises(UserError, match="2 prompts for a batch of 3"):
        teacher.sample(noise, Condition.of_prompts(["a", "b"]))
    with pytest.raises(UserError, match="a list of strings"):
        Condition.of_prompts("a seven")
    with pytest.raises(UserError, match="a list of strings"):
        Condition.of_prompts(["a", 7])
    with pytest.raises(UserError, match="no prompts"):
        teacher.embed(Condition.of_prompts([]))
    with pytest.raises(UserError, match="another teacher's"):
        teacher.sample(noise, Text(torch.zeros(3, 77, 64)))
    with pytest.raises(UserError, match="pooled"):
        teacher_of(pipe_xl).sample(noise, Text(torch.zeros(3, 77, 64)))


def test_components_that_do_not_fit_are_refused(pipe, pipe_xl):
    schedule, space = DiscreteSchedule.scaled_linear(), LatentSpace.of("tiny", pipe.vae)
    text = clip_text("tiny", [pipe.text_encoder], [pipe.tokenizer])
    with pytest.raises(UserError, match="Stable Diffusion XL with 1 text encoders"):
        StableDiffusionTeacher(pipe_xl.unet, space, text, schedule, SPEC)
    with pytest.raises(UserError, match="did you mean 'epsilon'"):
        StableDiffusionTeacher(pipe.unet, space, text, schedule, SPEC, prediction="epsilom")
    with pytest.raises(UserError, match="4 channels with an autoencoder of 8"):
        StableDiffusionTeacher(pipe.unet, LatentSpace.of("wide", pipelines.vae(8)), text, schedule, SPEC)
    with pytest.raises(UserError, match="unknown sdxl_uncond"):
        teacher_of(pipe_xl, sdxl_uncond="nothing")


def test_the_fingerprint_covers_all_that_samples_depend_on(pipe):
    teacher = teacher_of(pipe)
    assert teacher.fingerprint == teacher_of(pipe).fingerprint
    words = copy.copy(pipe)
    words.text_encoder = pipelines.clip()
    assert teacher_of(words).fingerprint != teacher.fingerprint
    other = StableDiffusionTeacher(
        pipe.unet, teacher.space, teacher.text, teacher.schedule, SPEC, prediction="v_prediction"
    )
    assert other.fingerprint != teacher.fingerprint


@pytest.mark.parametrize(("config", "parameters"), [(SD15_UNET, 859_520_964), (SDXL_UNET, 2_567_463_684)])
def test_published_networks_have_their_published_size(config, parameters):
    ensure()
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        network = UNet2DConditionModel.from_config(config)
    assert sum(weight.numel() for weight in network.parameters()) == parameters


def test_only_prompts_that_return_are_kept(pipe):
    teacher = teacher_of(pipe)
    for repeated, calls in ((True, 3), (False, 3 + 6)):
        teacher.expect_prompts(repeated)
        asked = Condition.of_prompts(["a", "b", "c"] if repeated else ["d", "e", "f"])
        first, second = teacher.embed(asked), teacher.embed(asked)
        assert torch.equal(first.states, second.states) and teacher.prompts.encoded == calls
