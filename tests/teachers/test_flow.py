import pytest
import torch

from d2o.condition import Condition, Text
from d2o.diffusion.schedules import FlowSchedule
from d2o.errors import UserError
from d2o.spaces.base import LatentSpace
from d2o.teachers.base import Spec
from d2o.teachers.flow import StableDiffusion3Teacher
from d2o.teachers.text import clip_and_t5_text
from tests.teachers import pipelines

PROMPTS = ["a handwritten seven", "", "nine of hearts"]
ASKED = Condition.of_prompts(PROMPTS)
OTHER = Condition.of_prompts(PROMPTS[::-1])
SPEC = Spec("tiny", (4, 8, 8), condition="text", solver="euler", steps=28)


def teacher_of(pipe, **options):
    encoders = [pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3]
    tokenizers = [pipe.tokenizer, pipe.tokenizer_2, pipe.tokenizer_3]
    text = clip_and_t5_text("tiny", encoders, tokenizers, pipe.transformer.config.joint_attention_dim, **options)
    space = LatentSpace.of("tiny", pipe.vae)
    return StableDiffusion3Teacher(pipe.transformer, space, text, FlowSchedule(pipe.scheduler.config.shift), SPEC)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return pipelines.stable_diffusion_3(tmp_path_factory.mktemp("sd3"))


@pytest.fixture(scope="module")
def noise():
    return torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.long
@pytest.mark.parametrize(("t5", "shift", "cfg"), [(False, 3.0, 1.0), (False, 3.0, 7.0), (True, 1.0, 5.0)])
def test_samples_are_those_of_diffusers_pipeline(tmp_path, noise, t5, shift, cfg):
    pipe = pipelines.stable_diffusion_3(tmp_path, t5=t5, shift=shift)
    pipe.set_progress_bar_config(disable=True)
    options = {"latents": noise, "num_inference_steps": 6, "height": 16, "width": 16, "guidance_scale": cfg}
    theirs, images = (pipe(PROMPTS, output_type=kind, **options).images for kind in ("latent", "pt"))
    # In place of an absent T5 diffusers has 256 rows of zeros; before 0.36 it had 77.
    teacher = teacher_of(pipe, t5_length=pipe._get_t5_prompt_embeds("a", max_sequence_length=256).shape[1])
    ours = teacher.sample(noise, ASKED, steps=6, cfg=cfg)
    assert torch.allclose(ours, theirs, atol=2e-5), float((ours - theirs).abs().max())
    assert torch.allclose(teacher.decode(ours), images * 2 - 1, atol=5e-5)
    assert not torch.allclose(teacher.sample(noise, OTHER, steps=6, cfg=cfg), theirs, atol=0.01), (
        "the prompts do nothing: the test is blind"
    )


def test_the_network_is_told_the_time_in_thousandths(pipe, noise):
    teacher, seen = teacher_of(pipe), []
    teacher.call = lambda x, **options: (seen.append(options["timestep"]), teacher.network(x, **options))[1]
    x = teacher.denoise(noise, 0.7501, ASKED)
    assert torch.allclose(seen[0], torch.full((3,), 750.1)) and seen[0].dtype == torch.float32
    text = teacher.embed(ASKED)
    v = pipe.transformer(
        noise, encoder_hidden_states=text.states, pooled_projections=text.pooled, timestep=seen[0]
    ).sample
    assert torch.allclose(x, noise - 0.7501 * v, atol=1e-6)
    assert text.states.shape == (3, 77 + 256, 80) and text.pooled.shape == (3, 40)
    assert text.states[:, 77:].abs().max() == 0 == text.states[:, :, 64:].abs().max()


def test_conditions_and_components_that_do_not_fit_are_refused(pipe, noise):
    teacher = teacher_of(pipe)
    with pytest.raises(UserError, match="prompts, not class labels"):
        teacher.sample(noise, Condition.of_labels([0, 1, 2]))
    with pytest.raises(UserError, match="pooled"):
        teacher.sample(noise, Text(torch.zeros(3, 333, 80)))
    with pytest.raises(UserError, match="spacing"):
        teacher.schedule.grid(5, "leading")
    with pytest.raises(UserError, match="two CLIP text encoders"):
        clip_and_t5_text("tiny", [pipe.text_encoder], [pipe.tokenizer], 80)
