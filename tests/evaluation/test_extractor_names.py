"""Extractors: found by name or path, hashed, differentiable where losses need it, and never silently replaced."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from d2o.errors import UserError
from d2o.evaluation.named_extractors import default_extractor, extractor_names, load_extractor
from d2o.features import classifier, load_features
from d2o.interop.safetensors_io import file_sha256
from tests.helpers import tiny_student


def images(n: int = 5) -> torch.Tensor:
    return torch.randint(256, (n, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_features_of_uint8_images(extractor_file: Path) -> None:
    extractor = load_extractor(str(extractor_file))
    assert (extractor.dim, extractor.classes, extractor.shape) == (16, 10, (1, 8, 8))
    assert extractor.sha256 == file_sha256(extractor_file)
    assert extractor.name == f"tiny@{extractor.sha256[:6]}"
    both = extractor.outputs(images(), ("features", "logits"))
    found, logits = both["features"], both["logits"]
    assert found.shape == (5, 16) and found.dtype == torch.float32
    torch.testing.assert_close(found, extractor.features(images()))
    torch.testing.assert_close(logits, extractor.logits(images()))
    torch.testing.assert_close(found, extractor.network.vector(images().float() / 127.5 - 1))


def test_eval_mode_makes_features_repeatable(extractor_file: Path) -> None:
    extractor = load_extractor(str(extractor_file))
    assert torch.equal(extractor.features(images()), extractor.features(images()))  # dropout would differ


def test_maps_are_differentiable_and_the_network_is_frozen(extractor_file: Path) -> None:
    features = load_features(str(extractor_file))
    x = torch.zeros(2, 1, 8, 8, requires_grad=True)
    maps = features.maps(x)
    assert [tuple(m.shape) for m in maps] == [(2, 8, 8, 8), (2, 8, 8, 8), (2, 16, 4, 4), (2, 16, 4, 4)]
    sum(m.square().sum() for m in maps).backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    assert not list(features.parameters()) and not features.state_dict()


def test_refuses_images_it_does_not_take(extractor_file: Path) -> None:
    extractor = load_extractor(str(extractor_file))
    with pytest.raises(UserError, match=r"9x9 pixels of 3 channels.*takes 8x8 pixels of 1 channel"):
        extractor.features(torch.zeros(1, 3, 9, 9, dtype=torch.uint8))
    with pytest.raises(TypeError, match="uint8"):
        extractor.features(torch.zeros(1, 1, 8, 8))


def test_unknown_names_list_the_known() -> None:
    assert "digits" in extractor_names()
    with pytest.raises(UserError, match="did you mean 'digits'") as caught:
        load_extractor("digit")
    assert "digits" in caught.value.hint
    with pytest.raises(UserError, match="no such file"):
        load_extractor("absent.safetensors")
    assert default_extractor((1, 8, 8)) == "digits" and default_extractor((3, 64, 64)) == "lite0"
    assert default_extractor((3, 16, 16)) == "lite0" and default_extractor((3, 16, 16), "cifar16") == "cifar16"
    with pytest.raises(UserError, match="name one with --extractor"):
        default_extractor((4, 64, 64))


def test_another_kind_of_checkpoint_is_refused(tmp_path: Path) -> None:
    tiny_student(tmp_path / "student.safetensors")
    with pytest.raises(UserError, match="holds a student, not a feature extractor"):
        load_extractor(str(tmp_path / "student.safetensors"))


def test_an_absent_asset_is_an_error_not_a_substitute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(classifier, "asset", lambda name: tmp_path / name)
    with pytest.raises(UserError, match="weights of the extractor 'digits' are missing") as caught:
        load_extractor("digits")
    assert "d2o train recipes/classifier_digits.yaml" in caught.value.hint
