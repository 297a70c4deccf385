import pytest
import torch

from d2o.condition import Condition
from d2o.diffusion.schedules import DiscreteSchedule
from d2o.diffusion.solvers import Solver
from d2o.errors import UserError
from d2o.teachers.base import Spec
from d2o.teachers.unconditional import UNet2DTeacher
from tests.teachers import pipelines

SPEC = Spec("tiny", (3, 8, 8), solver="ddim", steps=50)
NEAR = 2e-5


def far(a, b):
    return float((a - b).abs().max() / b.abs().max())


def drawn(count=1, shape=(2, 3, 8, 8)):
    return [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(count)]


def scheduler_of(**options):
    from diffusers import DDIMScheduler

    return DDIMScheduler(**({"num_train_timesteps": 1000, "clip_sample": False} | options))


@torch.no_grad()
def loop(pipe, noise, steps, eta=0.0, fresh=None, labels=None, **options):
    """diffusers' own sampling loop, with the noise given."""
    scheduler, x = pipe.scheduler, noise
    scheduler.set_timesteps(steps)
    for i, t in enumerate(scheduler.timesteps):
        out = pipe.unet(x, t, class_labels=labels).sample[:, : x.shape[1]]
        x = scheduler.step(out, t, x, eta=eta, variance_noise=fresh[i] if fresh else None, **options).prev_sample
    return x


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_samples_are_those_of_diffusers_scheduler(prediction):
    pipe = pipelines.unconditional("DDIMPipeline", scheduler_of(prediction_type=prediction))
    teacher = UNet2DTeacher(
        pipe.unet, DiscreteSchedule.from_config(dict(pipe.scheduler.config)), SPEC, prediction=prediction
    )
    (noise,) = drawn()
    assert far(teacher.sample(noise, steps=10), loop(pipe, noise, 10)) < (1e-4 if prediction == "sample" else NEAR)
    assert teacher.decode(noise * 3).abs().max() == 1


def test_clipping_the_prediction_is_honoured():
    pipe = pipelines.unconditional("DDIMPipeline", scheduler_of(clip_sample=True))
    schedule = DiscreteSchedule.from_config(dict(pipe.scheduler.config))
    (noise,), plain = drawn(), UNet2DTeacher(pipe.unet, schedule, SPEC)
    clipped = UNet2DTeacher(pipe.unet, schedule, SPEC, clip=1.0)
    assert plain.denoise(noise, 900).abs().max() > 1 >= clipped.denoise(noise, 900).abs().max()
    theirs = loop(pipe, noise, 10, use_clipped_model_output=True)
    assert far(clipped.sample(noise, steps=10), theirs) < NEAR
    assert far(plain.sample(noise, steps=10), theirs) > 0.01


def test_ddpm_is_ancestral_ddim():
    from diffusers import DDPMScheduler

    fresh, (noise,) = drawn(1000)[:4], drawn()
    pipe = pipelines.unconditional(scheduler=DDPMScheduler(clip_sample=True, variance_type="fixed_small"))
    teacher = UNet2DTeacher(pipe.unet, DiscreteSchedule.from_config(dict(pipe.scheduler.config)), SPEC, clip=1.0)
    draws = iter(fresh)
    ours = teacher.sample(noise, solver=Solver("ddim", 4, eta=1.0), randn=lambda: next(draws))
    ddim = pipelines.unconditional("DDIMPipeline", scheduler_of(clip_sample=True))
    assert far(ours, loop(ddim, noise, 4, eta=1.0, fresh=fresh, use_clipped_model_output=True)) < NEAR
    scheduler, x = pipe.scheduler, noise
    scheduler.set_timesteps(4)
    with torch.no_grad():
        for t, more in zip(scheduler.timesteps, fresh, strict=True):
            out = pipe.unet(x, t).sample
            mean = scheduler.step(out, t, x, generator=torch.Generator().manual_seed(0)).prev_sample
            if t > 0:  # their noise out, ours in
                theirs = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
                mean = mean + scheduler._get_variance(t) ** 0.5 * (more - theirs)
            x = mean
    assert far(ours, x) < NEAR


def test_a_predicted_variance_is_left_aside():
    pipe = pipelines.unconditional("DDIMPipeline", scheduler_of(), out_channels=6)
    teacher = UNet2DTeacher(pipe.unet, DiscreteSchedule.from_config(dict(pipe.scheduler.config)), SPEC)
    (noise,) = drawn()
    assert far(teacher.sample(noise, steps=5), loop(pipe, noise, 5)) < NEAR
    with pytest.raises(UserError, match="3 input and 5 output channels"):
        UNet2DTeacher(pipelines.unconditional(out_channels=5).unet, teacher.schedule, SPEC)


def test_a_network_by_class():
    pipe = pipelines.unconditional("DDIMPipeline", scheduler_of(), num_class_embeds=4)
    spec = Spec("by-class", (3, 8, 8), condition="label", classes=4, solver="ddim")
    teacher = UNet2DTeacher(pipe.unet, DiscreteSchedule.from_config(dict(pipe.scheduler.config)), spec)
    (noise,), labels = drawn(), torch.tensor([3, 0])
    theirs = loop(pipe, noise, 5, labels=labels)
    assert far(teacher.sample(noise, labels, steps=5), theirs) < NEAR
    assert far(teacher.sample(noise, labels.flip(0), steps=5), theirs) > 1e-3
    with pytest.raises(UserError, match="cannot be guided"):
        teacher.sample(noise, labels, steps=5, cfg=2.0)
    with pytest.raises(UserError, match="none for 'no class'"):
        teacher.denoise(noise, 5, torch.tensor([-1, 0]))
    with pytest.raises(UserError, match="label 4 is out of range"):
        teacher.denoise(noise, 5, torch.tensor([0, 4]))
    with pytest.raises(UserError, match="class indices, not prompts"):
        teacher.embed(Condition.of_prompts(["a"]))


def test_no_condition_and_no_guidance_without_classes():
    teacher = UNet2DTeacher(pipelines.unconditional().unet, DiscreteSchedule.from_config({}), SPEC)
    (noise,) = drawn()
    with pytest.raises(UserError, match="is unconditional"):
        teacher.sample(noise, torch.tensor([0, 1]), steps=2)
    with pytest.raises(UserError, match="needs a condition"):
        teacher.sample(noise, steps=2, cfg=2.0)


def test_the_fingerprint_covers_prediction_and_clipping():
    unet, schedule = pipelines.unconditional().unet, DiscreteSchedule.from_config({})
    prints = {
        UNet2DTeacher(unet, schedule, SPEC).fingerprint,
        UNet2DTeacher(unet, schedule, SPEC, clip=1.0).fingerprint,
        UNet2DTeacher(unet, schedule, SPEC, prediction="sample").fingerprint,
        UNet2DTeacher(unet, DiscreteSchedule.from_config({"beta_end": 0.01}), SPEC).fingerprint,
    }
    assert len(prints) == 4
