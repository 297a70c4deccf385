"""The CLIP score is GigaGAN's: its prompt before the caption, its two resizes, a plain cosine."""

import socket

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from d2o.errors import UserError
from d2o.evaluation import clip_scorer, resizing
from d2o.evaluation.clip_scorer import ClipScore, insert_tokens
from d2o.features import clip
from d2o.interop import torchvision_compat

torchvision_compat.ensure()

from torchvision import transforms  # noqa: E402

START, END = 49406, 49407
PREFIX = [320, 1125, 29340]  # "a", "photo", "depicts"
TINY = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 224, "layers": 2, "width": 64, "head_width": 32, "patch_size": 56},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("clip") / "tiny.bin"
    torch.save(clip.build_clip(TINY).state_dict(), path)
    return path


@pytest.fixture
def scorer(file, monkeypatch):
    monkeypatch.setattr(clip, "configuration", lambda name: TINY)
    return ClipScore("clip-vit-g-14", file)


def row(*ids: int) -> torch.Tensor:
    return torch.tensor([[*ids, *[0] * (77 - len(ids))]])


def test_a_short_caption_gets_the_words_after_its_start():
    found = insert_tokens(row(START, 7, 8, END), torch.tensor(PREFIX))
    assert torch.equal(found, row(START, *PREFIX, 7, 8, END))


@pytest.mark.parametrize("room", [0, 1, 2, 3, 4])
def test_a_caption_that_does_not_fit_any_more_ends_in_the_end_mark(room):
    """`room` places are free behind the end mark: 0, the caption has exactly 77 tokens."""
    words = list(range(1000, 1000 + 75 - room))
    found = insert_tokens(row(START, *words, END), torch.tensor(PREFIX))
    assert found.shape == (1, 77)
    if room >= 3:
        assert torch.equal(found, row(START, *PREFIX, *words, END))
    else:  # the end mark went over the edge: the last word that would stay makes room for a new one
        assert torch.equal(found, row(START, *PREFIX, *words[:72], END))


def test_the_last_place_alone_is_looked_at():
    tokens = torch.cat([row(START, 7, END), row(START, *range(1000, 1075), END)])
    before = tokens.clone()
    found = insert_tokens(tokens, torch.tensor([1, 2]))
    assert found[0, -1] == 0 and found[1, -1] == END and torch.equal(tokens, before)


def test_tokens_of_captions(scorer, file):
    """Short, of exactly 77 tokens with both marks, and longer: with and without the template."""
    long = "cat " * 200
    exact = "cat " * 75
    found = scorer.tokens(["a cat", exact, long])
    cat = 2368
    assert found.dtype == torch.int64 and found.shape == (3, 77)
    assert torch.equal(found[:1], row(START, *PREFIX, 320, cat, END))
    for i in (1, 2):
        assert torch.equal(found[i : i + 1], row(START, *PREFIX, *[cat] * 72, END))
    plain = ClipScore("clip-vit-g-14", file, template="none")
    assert torch.equal(plain.tokens(["a cat"]), row(START, 320, cat, END))
    assert torch.equal(plain.tokens([long]), row(START, *[cat] * 75, END))


def test_the_tokenizer_needs_no_network(scorer, monkeypatch):
    """Nor a cache of one."""

    def refuse(*_):
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("HOME", "/nonexistent")
    assert torch.equal(scorer.tokens(["A cat"]), row(START, *PREFIX, 320, 2368, END))


def gigagan(image: torch.Tensor) -> torch.Tensor:
    """The steps of GigaGAN's evaluation, one after another: what its network sees of a uint8 image [3, H, W]."""
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    first = transforms.Compose(
        [
            transforms.CenterCrop(min(picture.size)),
            transforms.Resize(256, transforms.InterpolationMode.LANCZOS),
            transforms.ToTensor(),
            transforms.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )
    back = ((first(picture) + 1.0) * 127.5).clamp(0.0, 255.0).to(torch.uint8)
    second = transforms.Compose(
        [
            transforms.Resize(224, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        ]
    )
    return second(Image.fromarray(back.permute(1, 2, 0).numpy()))


@pytest.mark.parametrize("size", [(256, 256), (64, 64), (301, 402), (402, 301), (512, 512)])
def test_images_are_prepared_as_in_gigagans_evaluation(size):
    x = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(size[0]))
    found = resizing.clip_input(clip_scorer.scale(x))
    expected = torch.stack([gigagan(image) for image in x])
    assert torch.allclose(found, expected, atol=1e-6)


def test_score(scorer, file):
    x = torch.randint(0, 256, (3, 3, 80, 100), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    prompts = ["a cat on a mat", "two zebras", "A kitchen, seen from above."]
    found = scorer.score(x, prompts)
    with torch.no_grad():
        network = clip.read_clip("clip-vit-g-14", file)
        pictures = network.encode_image(torch.stack([gigagan(image) for image in x]))
        texts = network.encode_text(scorer.tokens(prompts))
    assert torch.allclose(found, F.cosine_similarity(pictures, texts), atol=1e-5)
    assert scorer.image(x).norm(dim=1).sub(1).abs().max() < 1e-5 and scorer.text(prompts).shape == (3, 24)
    assert torch.allclose(scorer.score(x[1:2], prompts[1:2]), found[1:2], atol=1e-6)
    assert (scorer.name, len(scorer.sha256)) == ("clip-vit-g-14", 64)
    assert not torch.allclose(found, ClipScore("clip-vit-g-14", file, template="none").score(x, prompts), atol=1e-4)


def test_bad_input(scorer, file, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="2 images, but 1 prompts"):
        scorer.score(torch.zeros(2, 3, 64, 64, dtype=torch.uint8), ["a cat"])
    with pytest.raises(UserError, match="unknown CLIP template 'gigagann': did you mean 'gigagan'"):
        ClipScore("clip", file, template="gigagann")
    with pytest.raises(UserError, match="unknown CLIP network 'vit-g-14': did you mean 'clip-vit-g-14'"):
        ClipScore("vit-g-14", file)
    monkeypatch.setenv("D2O_HOME", str(tmp_path))
    monkeypatch.setenv("D2O_OFFLINE", "1")
    with pytest.raises(UserError, match="clip-vit-g-14' are not on this machine") as error:
        ClipScore()
    assert "--weights clip-vit-g-14=PATH" in error.value.hint
