import copy
from collections import Counter

import pytest
import torch

from d2o.condition import Condition
from d2o.diffusion.schedules import DiscreteSchedule
from d2o.spaces.base import LatentSpace
from d2o.teachers.base import Spec, Teacher
from d2o.teachers.cross_attention import Prepared, shared_layers, text_attentions
from d2o.teachers.stable_diffusion import StableDiffusionTeacher
from d2o.teachers.text import clip_text
from tests.teachers import pipelines

PROMPTS = ["a seven", "", "nine of hearts"]
ASKED = Condition.of_prompts(PROMPTS)


def teacher_of(pipe, unet=None):
    second = getattr(pipe, "text_encoder_2", None)
    encoders, tokenizers = [pipe.text_encoder, *([second] if second else [])], [pipe.tokenizer] * (2 if second else 1)
    spec = Spec("tiny", (4, 8, 8), condition="text", solver="ddim", steps=4)
    space, text = LatentSpace.of("tiny", pipe.vae), clip_text("tiny", encoders, tokenizers)
    return StableDiffusionTeacher(unet or pipe.unet, space, text, DiscreteSchedule.scaled_linear(), spec)


@pytest.fixture(scope="module")
def pipes(tmp_path_factory):
    path = tmp_path_factory.mktemp("words")
    return {"sd": pipelines.stable_diffusion(path), "xl": pipelines.stable_diffusion_xl(path)}


@pytest.fixture(scope="module")
def noise():
    return torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))


class Plain(StableDiffusionTeacher):
    prepare = Teacher.prepare  # every call does all of its work


def plain(teacher):
    other = copy.copy(teacher)
    other.__class__ = Plain
    return other


@pytest.mark.parametrize("kind", ["sd", "xl"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_what_is_spared_changes_nothing(pipes, noise, kind, dtype):
    teacher = teacher_of(pipes[kind])
    teacher.dtype = dtype
    for cfg in (1.0, 5.0):
        ours, theirs = (each.sample(noise, ASKED, cfg=cfg) for each in (teacher, plain(teacher)))
        size = float(theirs.abs().max())
        # Rounding (6e-8) of each of the steps is guided five times as far: 7e-6 were seen, depending on the kernels.
        assert torch.allclose(ours, theirs, rtol=0, atol=(1e-4 if dtype is None else 0.02) * size)


def test_keys_and_values_once_a_sample_and_the_first_layers_on_one_half(pipes, noise):
    teacher, calls = teacher_of(pipes["sd"]), Counter()
    first, block = teacher.network.down_blocks[0], teacher.network.down_blocks[0].attentions[0].transformer_blocks[0]
    watched = {
        "key": block.attn2.to_k,
        "resnet": first.resnets[0].conv1,
        "self": block.attn1.to_q,
        "query": block.attn2.to_q,
        "ff": block.ff,
    }
    handles = [
        module.register_forward_hook(
            lambda m, given, out, name=name: calls.update({name: len(given[0]), f"{name} calls": 1})
        )
        for name, module in watched.items()
    ]
    teacher.sample(noise, ASKED, cfg=5.0)
    for handle in handles:
        handle.remove()
    assert calls["key"] == 3 + 1 and calls["key calls"] == 2  # of the prompts, and of the empty one
    assert calls["resnet"] == calls["self"] == 4 * 3 and calls["ff"] == 4 * 6


def test_the_unet_is_as_before_even_after_a_failure(pipes, noise):
    teacher = teacher_of(pipes["sd"])
    before = [attn.processor for attn in teacher._attentions]
    text = teacher.embed(ASKED)
    prepared = teacher.prepare(text)
    assert isinstance(prepared, Prepared)
    with pytest.raises(RuntimeError):
        teacher.guided(noise[:, :3], 500, prepared, 3.0)
    assert [attn.processor for attn in teacher._attentions] == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in teacher.network.modules())
    with torch.no_grad():
        assert torch.allclose(
            teacher.guided(noise, 500, prepared, 3.0), teacher.guided(noise, 500, text, 3.0), atol=1e-4
        )
    again = copy.deepcopy(teacher)
    assert torch.equal(
        again.sample(noise, ASKED, cfg=2.0),
        teacher.sample(noise, ASKED, cfg=2.0),
    )


@pytest.mark.long
@pytest.mark.parametrize("kind", ["sd", "xl"])
def test_a_compiled_network_is_compiled_once_for_all_texts(pipes, noise, kind):
    """The texts' keys and values are inputs of what is compiled, not constants in it."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    teacher, expected = teacher_of(pipes[kind]), teacher_of(pipes[kind])
    teacher.call = torch.compile(teacher.network, backend=backend, dynamic=False)
    teacher.sample(noise, ASKED, cfg=2.0)
    compiled = len(graphs)
    for prompts in (PROMPTS, ["two", "three", "four"]):
        assert torch.allclose(
            teacher.sample(noise, Condition.of_prompts(prompts), cfg=2.0),
            expected.sample(noise, Condition.of_prompts(prompts), cfg=2.0),
            atol=1e-4,
        )
    assert compiled and len(graphs) == compiled
    assert text_attentions(teacher.network)  # the plain processors are back


@pytest.mark.parametrize(
    "options",
    [
        {"only_cross_attention": (True, False)},
        {
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "down_block_types": ("SimpleCrossAttnDownBlock2D", "DownBlock2D"),
        },
        {"attention_type": "gated"},
    ],
)
def test_other_unets_do_all_of_their_work(pipes, noise, options):
    unet = pipelines.unet(**options)
    assert text_attentions(unet) is None
    x = teacher_of(pipes["sd"], unet).sample(noise, ASKED, cfg=2.0)
    assert bool(x.isfinite().all())


def test_text_may_come_later_in_the_network(pipes, noise):
    unet = pipelines.unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    assert shared_layers(unet) == [unet.conv_in]
    teacher = teacher_of(pipes["sd"], unet)
    ours, theirs = (each.sample(noise, ASKED, cfg=5.0) for each in (teacher, plain(teacher)))
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))
