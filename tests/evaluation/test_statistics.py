"""Statistics files: our own read back, other tools' accepted, other extractors' refused."""

from __future__ import annotations

import contextlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from d2o.errors import UserError
from d2o.evaluation.named_extractors import load_extractor
from d2o.evaluation.statistics import Statistics, check_same_features
from d2o.evaluation.statistics_files import is_statistics, load_statistics, save_statistics
from d2o.interop.torchvision_compat import ensure
from d2o.metrics.frechet import Moments
from tests.interop.nvidia_writer import Run


def some(dim: int = 4, **more) -> Statistics:
    return Statistics(torch.arange(dim, dtype=torch.float64), torch.eye(dim, dtype=torch.float64), **more)


def test_round_trip_with_equal_bytes(tmp_path: Path) -> None:
    s = some(n=123, feature="digits", resize="none", weights_sha256="ab" * 32, tool_version="0.1")
    save_statistics(tmp_path / "a.npz", s)
    save_statistics(tmp_path / "b.npz", s)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    read = load_statistics(tmp_path / "a.npz")
    assert (read.n, read.feature, read.resize, read.weights_sha256, read.tool_version) == (
        123,
        "digits",
        "none",
        "ab" * 32,
        "0.1",
    )
    assert (
        torch.equal(read.mu, s.mu)
        and torch.equal(read.sigma, s.sigma)
        and read.distance(s) == pytest.approx(0, abs=1e-9)
    )


def test_files_of_other_tools(tmp_path: Path) -> None:
    np.savez(tmp_path / "edm.npz", mu=np.zeros(4), sigma=np.eye(4))
    np.savez(tmp_path / "adm.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8), mu=np.zeros(4), sigma=np.eye(4))
    assert is_statistics(tmp_path / "edm.npz") and not is_statistics(
        tmp_path / "adm.npz"
    )  # a batch of images that also has statistics
    read = load_statistics(tmp_path / "edm.npz")
    assert read.n is None and read.feature == "" and not read.rank_deficient
    assert read.distance(some()) == pytest.approx(0 + 1 + 4 + 9)


def test_statistics_of_another_extractor_are_refused() -> None:
    one = some(feature="a", weights_sha256="1" * 64)
    with pytest.raises(UserError, match=r"4 features.*5 features"):
        one.distance(some(5))
    with pytest.raises(UserError, match="another extractor: a with weights 111111111111"):
        one.distance(some(feature="a", weights_sha256="2" * 64))
    with pytest.raises(UserError, match="another extractor: a and b"):
        one.distance(some(feature="b"))
    assert one.distance(some()) == pytest.approx(0, abs=1e-9)  # a file that says nothing is taken at its dimension


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a zip", "cannot be read"),
        ({"mu": np.zeros(3)}, "need mu and sigma"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, "shape"),
    ],
)
def test_damaged_files(tmp_path: Path, content: bytes | dict, message: str) -> None:
    path = tmp_path / "x.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.savez(path, **content)
    with pytest.raises(UserError, match=message):
        load_statistics(path)


def test_pickles_are_never_run(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", mu=np.array([{}], dtype=object), sigma=np.eye(1))
    with pytest.raises(UserError, match="cannot be read"):
        load_statistics(tmp_path / "x.npz")
    with pytest.raises(UserError, match="no such file"):
        load_statistics(tmp_path / "absent.npz")


# ---- files of other tools ----

RNG = np.random.default_rng(0)
FEATURES = RNG.normal(size=(50, 6)).astype(np.float32)
MU, SIGMA = FEATURES.astype(np.float64).mean(0), np.cov(FEATURES.astype(np.float64), rowvar=False)
OTHER = RNG.normal(size=(30, 4))
DINO = {"mu": OTHER.mean(0), "sigma": np.cov(OTHER, rowvar=False)}


def close(found: Statistics, mu: np.ndarray = MU, sigma: np.ndarray = SIGMA) -> bool:
    assert found.mu.dtype == found.sigma.dtype == torch.float64
    return np.allclose(found.mu, mu, rtol=1e-12) and np.allclose(found.sigma, sigma, rtol=1e-10, atol=1e-14)


def stylegan(features: np.ndarray) -> dict[str, object]:
    """What StyleGAN's FeatureStats pickles: sums in float64, and all features in batches where a metric needs them."""
    f = features.astype(np.float64)
    return {
        "capture_all": True,
        "capture_mean_cov": True,
        "max_items": None,
        "num_items": len(f),
        "num_features": f.shape[1],
        "all_features": [features[:20], features[20:]],
        "raw_mean": f.sum(0),
        "raw_cov": f.T @ f,
    }


def write_pickle(path: Path, value: object) -> Path:
    path.write_bytes(pickle.dumps(value))
    return path


def test_edm_pytorch_fid_and_clean_fid(tmp_path: Path) -> None:
    np.savez(tmp_path / "edm.npz", mu=MU, sigma=SIGMA)
    np.savez_compressed(tmp_path / "pf.npz", mu=MU, sigma=SIGMA)
    for name in ("edm.npz", "pf.npz"):
        assert is_statistics(tmp_path / name)
        found = load_statistics(tmp_path / name)
        assert close(found) and found.n is None and found.features is None and found.spatial is None


def test_features_of_clean_fids_kid(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "x_kid.npz", feats=FEATURES)
    assert is_statistics(tmp_path / "x_kid.npz")
    found = load_statistics(tmp_path / "x_kid.npz")
    assert found.features is not None and np.array_equal(found.features, FEATURES) and found.n == 50
    assert close(found)  # so that a Fréchet distance can be had of them, too


def test_edm2_holds_two_extractors(tmp_path: Path) -> None:
    path = write_pickle(
        tmp_path / "img512.pkl", {"num_images": 1_281_167, "fid": {"mu": MU, "sigma": SIGMA}, "fd_dinov2": DINO}
    )
    assert is_statistics(path)
    for feature, name in (
        (None, "inception"),
        ("inception", "inception"),
        ("inception-clean", "inception"),
        ("dinov2_vitl14", "dinov2_vitl14"),
    ):
        found = load_statistics(path, feature)
        assert (found.feature, found.n) == (name, 1_281_167)
        assert close(found) if name == "inception" else close(found, DINO["mu"], DINO["sigma"])
    with pytest.raises(UserError, match="statistics of inception and dinov2_vitl14, none of lite0"):
        load_statistics(path, "lite0")
    with pytest.raises(UserError, match="another extractor: inception and inception-clean") as error:
        load_statistics(path, "inception-clean").distance(some(6, feature="inception-clean"))
    assert "--extractor: inception or inception-clean" in error.value.hint
    one = write_pickle(tmp_path / "one.pkl", {"num_images": 9, "fd_dinov2": DINO})
    assert load_statistics(one).feature == "dinov2_vitl14"
    with pytest.raises(UserError, match="none of inception"):
        load_statistics(one, "inception")


def test_adm_reference_batches_are_images_with_statistics(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "adm.npz",
        arr_0=np.zeros((2, 8, 8, 3), np.uint8),
        mu=MU,
        sigma=SIGMA,
        mu_s=DINO["mu"],
        sigma_s=DINO["sigma"],
    )
    assert not is_statistics(tmp_path / "adm.npz")
    found = load_statistics(tmp_path / "adm.npz")
    assert close(found) and found.spatial is not None and close(found.spatial, DINO["mu"], DINO["sigma"])
    assert found.n is None  # behind the statistics stand more images than the file holds


def test_object_npy_of_ddgan(tmp_path: Path) -> None:
    np.save(tmp_path / "celebahq_stat.npy", {"mu": MU, "sigma": SIGMA})  # type: ignore[arg-type]
    assert is_statistics(tmp_path / "celebahq_stat.npy") and close(load_statistics(tmp_path / "celebahq_stat.npy"))


def test_torch_fidelitys_cache(tmp_path: Path) -> None:
    """As its own functions make and save it."""
    ensure()
    from torch_fidelity.metric_fid import fid_features_to_statistics
    from torch_fidelity.utils import cache_lookup_one_recompute_on_miss

    cache_lookup_one_recompute_on_miss(
        "set-stat-fid-6",
        lambda: fid_features_to_statistics(torch.from_numpy(FEATURES)),
        cache=True,
        cache_root=str(tmp_path),
        verbose=False,
    )
    path = tmp_path / "set-stat-fid-6.pt"
    found = load_statistics(path)
    assert is_statistics(path) and np.allclose(found.mu, MU, atol=1e-6) and np.allclose(found.sigma, SIGMA, rtol=1e-6)


def test_stylegans_cache_divides_by_n(tmp_path: Path) -> None:
    path = write_pickle(tmp_path / "stats.pkl", stylegan(FEATURES))
    found = load_statistics(path)
    assert (
        is_statistics(path)
        and found.n == 50
        and close(found, MU, np.cov(FEATURES.astype(np.float64), rowvar=False, bias=True))
    )
    assert found.features is not None and np.array_equal(found.features, FEATURES)
    changes = (
        ({"num_items": 0}, "keys of StyleGAN's statistics"),
        ({"raw_cov": "x"}, "StyleGAN"),
        ({"raw_mean": None}, "real numbers"),
    )
    for change, message in changes:
        with pytest.raises(UserError, match=message):
            load_statistics(write_pickle(tmp_path / "bad.pkl", stylegan(FEATURES) | change))


# ---- our own ----


def test_spatial_statistics_and_features_round_trip(tmp_path: Path) -> None:
    about = {
        "n": 50,
        "feature": "inception",
        "resize": "none",
        "weights_sha256": "a" * 64,
        "tool_version": "1",
        "extractor_resize": "tf_bilinear299",
    }
    spatial = Statistics(torch.from_numpy(DINO["mu"]), torch.from_numpy(DINO["sigma"]), **about)
    whole = Statistics(
        torch.from_numpy(MU), torch.from_numpy(SIGMA), **about, features=torch.from_numpy(FEATURES), spatial=spatial
    )
    save_statistics(tmp_path / "x.npz", whole)
    found = load_statistics(tmp_path / "x.npz")
    assert (
        is_statistics(tmp_path / "x.npz")
        and close(found)
        and found.features is not None
        and np.array_equal(found.features, FEATURES)
    )
    assert (
        found.spatial is not None
        and torch.equal(found.spatial.sigma, spatial.sigma)
        and found.spatial.distance(spatial) < 1e-9
    )
    assert all(getattr(found, key) == getattr(found.spatial, key) == value for key, value in about.items())


def test_statistics_of_a_stream_name_their_extractor(extractor_file: Path) -> None:
    extractor = load_extractor(str(extractor_file))
    features, spatial = Moments(16), Moments(3)
    features.update(torch.randn(20, 16))
    spatial.update(torch.randn(20, 3))
    found = Statistics.of(features, extractor, "lanczos+centre_crop", spatial)
    assert found.spatial is not None and (found.dim, found.spatial.dim) == (16, 3)
    for one in (found, found.spatial):
        assert (one.n, one.feature, one.weights_sha256, one.extractor_resize) == (
            20,
            extractor.name,
            extractor.sha256,
            extractor.resize,
        )
    check_same_features(found, Statistics.none(extractor))


def test_one_network_fed_in_two_ways_is_two_extractors() -> None:
    clean = some(feature="inception-clean", weights_sha256="a" * 64, extractor_resize="clean_pil299")
    plain = some(feature="inception", weights_sha256="a" * 64, extractor_resize="tf_bilinear299")
    with pytest.raises(
        UserError,
        match="resized in another way: inception-clean resizes with clean_pil299, inception with tf_bilinear299",
    ) as error:
        clean.distance(plain)
    assert "--extractor: inception-clean or inception" in error.value.hint
    assert clean.distance(some(weights_sha256="a" * 64)) == pytest.approx(0, abs=1e-9)  # a file that does not say


# ---- bad files ----


def test_numbers_that_are_no_gaussian(tmp_path: Path) -> None:
    eye = np.eye(3)
    skewed, infinite, negative = eye.copy(), eye.copy(), eye.copy()
    skewed[0, 1], infinite[0, 0], negative[1, 1] = 0.1, np.nan, -0.5
    for sigma, message in (
        (skewed, "not symmetric"),
        (infinite, "not finite"),
        (negative, "negative variances"),
        (eye + 1j, "real numbers"),
    ):
        np.savez(tmp_path / "x.npz", mu=np.zeros(3), sigma=sigma)
        with pytest.raises(UserError, match=message):
            load_statistics(tmp_path / "x.npz")
    rounded = (SIGMA + np.tril(np.full((6, 6), 1e-8), -1)).astype(np.float32)
    np.savez(tmp_path / "x.npz", mu=MU, sigma=rounded)  # what rounding does is no mistake
    assert load_statistics(tmp_path / "x.npz").dim == 6
    np.savez(tmp_path / "x.npz", mu=np.zeros(3), sigma=eye, mu_s=np.zeros(2), sigma_s=eye)
    with pytest.raises(UserError, match=r"mu_s has shape \(2,\), sigma_s \(3, 3\)"):
        load_statistics(tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", feats=np.zeros(3))
    with pytest.raises(UserError, match=r"features of shape \(3,\)"):
        load_statistics(tmp_path / "x.npz")


@pytest.mark.parametrize("name", ["x.npz", "x.pkl", "x.npy", "x.pt"])
def test_truncated_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    record = {"mu": MU, "sigma": SIGMA}
    if name == "x.npz":
        np.savez_compressed(path, **record)
    elif name == "x.npy":
        np.save(path, record)  # type: ignore[arg-type]
    elif name == "x.pt":
        torch.save(record, path)
    else:
        write_pickle(path, record)
    whole = path.read_bytes()
    assert close(load_statistics(path))
    for size in (0, 3, 50, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=name):
            load_statistics(path)
        assert not is_statistics(path)
    path.write_bytes(whole[: len(whole) // 2] + bytes(20) + whole[len(whole) // 2 + 20 :])
    with contextlib.suppress(UserError):  # bits that no checksum covers may be wrong
        load_statistics(path)


def test_other_things_are_no_statistics(tmp_path: Path) -> None:
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    with pytest.raises(UserError, match="holds arr_0; statistics need mu and sigma"):
        load_statistics(tmp_path / "images.npz")
    write_pickle(tmp_path / "list.pkl", [1, 2])
    with pytest.raises(UserError, match="holds a list"):
        load_statistics(tmp_path / "list.pkl")
    write_pickle(tmp_path / "network.pkl", {"ema": Run(print, "run")})
    with pytest.raises(UserError, match="refers to 'builtins.print'"):
        load_statistics(tmp_path / "network.pkl")
    with pytest.raises(UserError, match="is a folder"):
        load_statistics(tmp_path)
    assert not any(
        is_statistics(tmp_path / name) for name in ("images.npz", "list.pkl", "network.pkl", "absent.npz", ".")
    )
    np.savez(tmp_path / "dict.npz", stats={"mu": MU, "sigma": SIGMA})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="need mu and sigma"):
        load_statistics(tmp_path / "dict.npz")
