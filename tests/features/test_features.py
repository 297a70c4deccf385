"""Every frozen network by name: maps and vectors of images in [-1, 1], gradients for the images, none of its own."""

import pytest
import torch
from torch import nn

from d2o.errors import UserError
from d2o.evaluation.named_extractors import WAYS, load_extractor
from d2o.features import Features, deit, load_features
from d2o.features import clip as clip_features
from d2o.features.load import MODULES
from d2o.interop.weights import WEIGHTS
from d2o.losses.latent_lpips import RELEASED
from d2o.spaces.load import SPACES

MAPS = {  # channels and sides of the maps of 64 px images
    "digits": [(32, 8), (32, 8), (64, 4), (64, 4)],
    "cifar16": [(64, 16), (64, 16), (128, 8), (128, 8)],
    "inception": [(64, 73), (192, 35), (768, 17), (2048, 8)],
    "vgg16": [(64, 224), (128, 112), (256, 56), (512, 28), (512, 14)],
    "vgg16_bn": [(128, 112), (256, 56), (512, 28), (512, 14)],
    "lite0": [(24, 56), (40, 28), (112, 14), (320, 7)],
    "deit": [(768, 14)] * 4,
    "dinov2_vits14": [(384, 16)] * 4,
    "dinov2_vitb14": [(768, 16)] * 4,
    "dinov2_vitl14": [(1024, 16)] * 4,
    "tf_efficientnet_lite0": [(24, 56), (40, 28), (112, 14), (320, 7)],
    "tf_efficientnet_b0": [(24, 56), (40, 28), (112, 14), (320, 7)],
    "deit_tiny_distilled_patch16_224": [(192, 14)] * 4,
    "deit_small_distilled_patch16_224": [(384, 14)] * 4,
    "deit_base_distilled_patch16_224": [(768, 14)] * 4,
    "vit_base_patch16_224": [(768, 14)] * 4,
    "clip": [(768, 7)] * 4,
    "clip-vit-b-32": [(768, 7)] * 4,
    "clip-vit-g-14": [(1408, 16)] * 4,
    "lpips-alex": [(64, 15), (192, 7), (384, 3), (256, 3), (256, 3)],
    "lpips-vgg": [(64, 64), (128, 32), (256, 16), (512, 8), (512, 4)],
    "lpips-squeeze": [(64, 31), (128, 15), (256, 7), (384, 3), (384, 3), (512, 3), (512, 3)],
    **{f"latent-lpips-{space}": [(64, 64), (128, 64), (256, 64), (512, 32), (512, 16)] for space in RELEASED},
}


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in MAPS
        if name not in ("clip", "clip-vit-g-14", "dinov2_vitb14", "dinov2_vitl14", "deit_base_distilled_patch16_224")
    ],
)
def test_maps_and_vectors_of_each(name):
    """On the meta device, where no weights are looked for."""
    features = load_features(name, "meta")
    channels = SPACES[name.removeprefix("latent-lpips-")].channels if name.startswith("latent") else 3
    images = torch.zeros(2, *(features.shape or (channels, 64, 64)), device="meta")
    assert [(f.shape[1], f.shape[3]) for f in features.maps(images)] == MAPS[name]
    assert features.vector(images).shape == (2, features.dim)
    assert not list(features.parameters()) and not features.state_dict()  # nobody trains or saves it


def test_every_name_is_in_the_table_and_has_weights():
    assert set(MODULES) == {*MAPS, "dreamsim"}
    of = {"digits": "", "cifar16": "", "vgg16": "vgg16-fc2", "clip": "clip-vit-b-32", "tf_efficientnet_lite0": "lite0"}
    of |= {"tf_efficientnet_b0": "efficientnet-b0", **deit.WEIGHTS}
    assert {of.get(name, name) for name in MODULES} - {""} <= set(WEIGHTS)
    assert {way.features for way in WAYS.values()} <= set(MODULES)


def pictures(features: Features, n: int = 2) -> torch.Tensor:
    shape = features.shape or (3, 32, 32)
    return torch.randint(0, 256, (n, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["digits", "cifar16", "lite0"])
def test_the_evaluation_s_extractor_is_the_same_of_8_bits(name):
    features, extractor = load_features(name), load_extractor(name)
    images = pictures(features)
    x = images / 127.5 - 1
    assert torch.allclose(features.vector(x), extractor.features(images), atol=1e-4)
    assert torch.allclose(features.logits(x), extractor.logits(images), atol=1e-3)
    assert (features.sha256, features.dim, features.classes) == (extractor.sha256, extractor.dim, extractor.classes)
    with pytest.raises(TypeError, match="float images"):
        features.maps(images)


@pytest.mark.parametrize("name", ["digits", "cifar16", "lite0"])
def test_gradients_reach_the_images(name):
    features = load_features(name)
    x = (pictures(features, 1) / 127.5 - 1).requires_grad_()
    for value in (*features.maps(x), features.vector(x)):
        (gradient,) = torch.autograd.grad(value.square().mean(), x, retain_graph=True)
        assert gradient.isfinite().all() and float(gradient.abs().sum()) > 0


def test_eval_mode_for_ever():
    features = load_features("digits")
    holder = nn.ModuleList([features]).train()
    assert holder.training and not any(module.training for module in features.modules())
    x = torch.rand(3, 1, 8, 8)
    assert torch.equal(features.vector(x), features.train().vector(x))  # dropout would differ


def test_grey_images_are_repeated_and_others_refused():
    features = load_features("lite0")
    grey = torch.rand(1, 1, 20, 24)
    assert torch.equal(features.vector(grey), features.vector(grey.expand(-1, 3, -1, -1)))
    with pytest.raises(UserError, match="4 channels, but the extractor 'lite0' takes 1 or 3 channels"):
        features.maps(torch.rand(1, 4, 8, 8))
    with pytest.raises(UserError, match="9x9 pixels of 3 channels.*takes 8x8 pixels of 1 channel"):
        load_features("digits").maps(torch.rand(1, 3, 9, 9))
    with pytest.raises(UserError, match="'lpips-alex' takes 31x31 and more"):
        load_features("lpips-alex", "meta").maps(torch.zeros(1, 3, 30, 40, device="meta"))
    with pytest.raises(UserError, match="'latent-lpips-sd15' takes 4 channels"):
        load_features("latent-lpips-sd15", "meta").maps(torch.zeros(1, 3, 30, 40, device="meta"))
    with pytest.raises(UserError, match="'lpips-alex' has no logits"):
        load_features("lpips-alex", "meta").logits(torch.zeros(1, 3, 40, 40, device="meta"))


@pytest.mark.parametrize("name", ["lpips-alex", "lpips-vgg", "lpips-squeeze"])
def test_the_smallest_side_is_the_smallest(name):
    features = load_features(name, "meta")
    x = torch.zeros(1, 3, features.least, features.least, device="meta")
    assert min(min(f.shape[2:]) for f in features.maps(x)) == 1
    with pytest.raises(RuntimeError):
        features.taps(features.prepare(x[:, :, 1:, 1:]))


def test_clip_s_square():
    """Short side to 224, then the middle; close to what Pillow makes of the same picture."""
    from d2o.evaluation.resizing import clip_input

    network = nn.Module()
    network.visual = nn.Module()
    network.visual.output_dim = 4
    features = clip_features.ClipFeatures("clip-vit-b-32", network)
    coarse = torch.rand(1, 3, 6, 9, generator=torch.Generator().manual_seed(0)) * 255
    images = nn.functional.interpolate(coarse, (60, 91), mode="bilinear").round().to(torch.uint8)
    ours, pillows = features.prepare(images / 127.5 - 1), clip_input(images)
    assert ours.shape == pillows.shape == (1, 3, 224, 224)
    assert (ours - pillows).abs().max() < 0.05


def test_draws_of_whoever_asks_stay_what_they_were():
    before = torch.get_rng_state()
    load_features("digits"), load_features("lite0")
    assert torch.equal(before, torch.get_rng_state())
