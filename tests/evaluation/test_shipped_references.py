"""The files that ship for the offline metric fit each other."""

from __future__ import annotations

import torch

import d2o
from d2o.data.images import open_images, to_uint8
from d2o.evaluation.named_extractors import load_extractor
from d2o.evaluation.named_references import load_reference_statistics
from d2o.evaluation.protocol import Settings
from d2o.evaluation.reference import SHIPPED, load_reference
from d2o.evaluation.statistics_files import load_statistics
from d2o.interop.assets import asset
from d2o.metrics.frechet import Moments

FILES = [asset("classifier_digits.safetensors"), asset(SHIPPED["real:digits"])]


def test_reference_is_of_the_shipped_classifier_and_all_digits() -> None:
    extractor, shipped = load_extractor("digits"), load_statistics(FILES[1])
    assert (shipped.n, shipped.feature, shipped.resize, shipped.weights_sha256) == (
        1797,
        "digits",
        "none",
        extractor.sha256,
    )
    stream = Moments(extractor.dim)
    stream.update(extractor.features(open_images("real:digits").images(slice(None))))
    torch.testing.assert_close(shipped.mu, stream.mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(shipped.sigma, stream.cov, rtol=1e-3, atol=1e-3)
    found = load_reference("real:digits", {"digits": (extractor, {"features"})}, False, Settings())
    assert torch.equal(found.side.statistics(extractor).mu, shipped.mu)  # it is read, not computed


def test_classifier_knows_the_digits() -> None:
    extractor, real = load_extractor("digits"), open_images("real:digits")
    guess = extractor.logits(real.images(slice(None))).argmax(1)
    assert (guess == real.labels).float().mean() > 0.97


def test_cifar16_is_judged_by_what_ships_alone() -> None:
    """The teacher's images against statistics of CIFAR-10, over a classifier that reads the classes asked for."""
    extractor = load_extractor("cifar16")
    shipped = load_reference_statistics("d2o-cifar10-16", "cifar16")
    assert (shipped.n, shipped.feature, shipped.weights_sha256) == (50_000, "cifar16", extractor.sha256)
    teacher = d2o.load_teacher("cifar16")
    labels = torch.arange(40) % 10
    noise = torch.randn(40, *teacher.spec.shape, generator=torch.Generator().manual_seed(0))
    images = to_uint8(teacher.decode(teacher.sample(noise, labels, steps=8)))
    assert (extractor.logits(images).argmax(1) == labels).float().mean() > 0.25  # by chance 0.1
