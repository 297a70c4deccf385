"""Published references: where they are, what they are, and what is said where they cannot be had."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from d2o.errors import UserError
from d2o.evaluation.named_extractors import EXTRACTORS
from d2o.evaluation.named_references import (
    REFERENCES,
    find_reference,
    is_named,
    load_reference_statistics,
    lookup,
)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("D2O_HOME", str(tmp_path))
    monkeypatch.setenv("D2O_OFFLINE", "1")
    (tmp_path / "references").mkdir()
    return tmp_path / "references"


def test_the_names_of_the_papers() -> None:
    wanted = [
        "adm-imagenet64-labeled",
        "edm-afhqv2-64",
        "edm-cifar10",
        "edm-ffhq64",
        "edm-imagenet64",
        "edm-imagenet64-baseline",
        "edm2-img512",
    ]
    assert set(wanted) <= set(REFERENCES)
    for name in REFERENCES:
        entry = lookup(name)
        assert (
            entry.name == name
            and entry.url.startswith("https://")
            and entry.licence
            and entry.licence_url.startswith("https://")
        )
        assert set(entry.extractors) <= set(EXTRACTORS) and is_named(name)
    assert len({entry.path for entry in REFERENCES.values()}) == len(REFERENCES)
    assert REFERENCES["edm-cifar10"].url == "https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs/cifar10-32x32.npz"
    assert REFERENCES["edm2-img512"].url == "https://nvlabs-fi-cdn.nvidia.com/edm2/dataset-refs/img512.pkl"
    assert REFERENCES["adm-imagenet64-labeled"].images == 10_000


@pytest.mark.parametrize(
    ("name", "file", "extractor"),
    [
        ("clean-fid:cifar10_legacy_tensorflow_train_32", "cifar10_legacy_tensorflow_train_32.npz", "inception"),
        ("clean-fid:FFHQ_clean_trainval70k_1024", "ffhq_clean_trainval70k_1024.npz", "inception-clean"),
        (
            "clean-fid:lsun_church_legacy_pytorch_train_256_kid",
            "lsun_church_legacy_pytorch_train_256_kid.npz",
            "inception-legacy_pytorch",
        ),
        (
            "clean-fid:afhq_cat_clean_clip_vit_b_32_train_512",
            "afhq_cat_clean_clip_vit_b_32_train_512.npz",
            "clip-vit-b-32",
        ),
        ("clean-fid:mine_clean_custom_na", "mine_clean_custom_na.npz", "inception-clean"),
    ],
)
def test_clean_fids_scheme(name: str, file: str, extractor: str) -> None:
    entry = lookup(name)
    assert (
        entry.url == f"https://www.cs.cmu.edu/~clean-fid/stats/{file}"
        and entry.extractors == (extractor,)
        and extractor in EXTRACTORS
    )
    assert is_named(name) and entry.path.name == file


def test_clean_fids_own_function_asks_for_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from d2o.interop.torchvision_compat import ensure

    ensure()
    from cleanfid import features as theirs

    asked = []

    def download(local_folder: str, url: str) -> str:
        asked.append(url.replace("stats//", "stats/"))
        raise FileNotFoundError

    monkeypatch.setattr(theirs, "check_download_url", download)
    for name, res, mode, model, split, metric in (
        ("CIFAR10", 32, "legacy_tensorflow", "inception_v3", "train", "FID"),
        ("afhq_cat", 512, "clean", "clip_vit_b_32", "train", "KID"),
        ("mine", 256, "clean", "inception_v3", "custom", "FID"),
    ):
        with pytest.raises(FileNotFoundError):
            theirs.get_reference_statistics(name, res, mode=mode, model_name=model, split=split, metric=metric)
        parts = [
            name,
            mode,
            *(["clip_vit_b_32"] if model.startswith("clip") else []),
            split,
            "na" if split == "custom" else str(res),
        ]
        assert lookup("clean-fid:" + "_".join(parts) + ("_kid" if metric == "KID" else "")).url == asked[-1]


@pytest.mark.parametrize("name", ["cifar10", "cifar10_dirty_train_32", "x_clean_custom_32", "../../x_clean_train_32"])
def test_names_outside_clean_fids_scheme(name: str) -> None:
    with pytest.raises(UserError, match="clean-fid") as error:
        lookup(f"clean-fid:{name}")
    assert "clean-fid:cifar10_legacy_tensorflow_train_32" in error.value.hint


def test_an_unknown_name_lists_those_there_are() -> None:
    with pytest.raises(UserError, match="unknown reference 'edm-cifar': did you mean 'edm-cifar10'") as error:
        find_reference("edm-cifar")
    assert "edm2-img512" in error.value.hint and "clean-fid:NAME" in error.value.hint
    assert not is_named("cifar10-32x32.npz") and not is_named("real:digits")


def test_without_a_network_the_place_for_the_file_is_named(home: Path) -> None:
    with pytest.raises(
        UserError, match=r"cannot download https://nvlabs.*cifar10-32x32\.npz: the network is switched off"
    ) as error:
        find_reference("edm-cifar10")
    assert str(home / "cifar10-32x32.npz") in error.value.hint


def test_what_the_file_does_not_state_is_filled_in(home: Path) -> None:
    np.savez(home / "cifar10-32x32.npz", mu=np.zeros(4), sigma=np.eye(4))
    assert find_reference("edm-cifar10") == home / "cifar10-32x32.npz"
    found = load_reference_statistics("edm-cifar10")
    assert (found.n, found.feature) == (50_000, "inception")
    spatial = {"mu_s": np.zeros(3), "sigma_s": np.eye(3)}
    np.savez(
        home / "VIRTUAL_imagenet64_labeled.npz", arr_0=np.zeros(1, np.uint8), mu=np.zeros(4), sigma=np.eye(4), **spatial
    )
    adm = load_reference_statistics("adm-imagenet64-labeled")
    assert (
        adm.n == 1_281_167
        and adm.spatial is not None
        and (adm.spatial.n, adm.spatial.feature) == (1_281_167, "inception")
    )
    both = {
        "num_images": 1000,
        "fid": {"mu": np.zeros(4), "sigma": np.eye(4)},
        "fd_dinov2": {"mu": np.zeros(2), "sigma": np.eye(2)},
    }
    (home / "img512.pkl").write_bytes(pickle.dumps(both))
    dino = load_reference_statistics("edm2-img512", "dinov2_vitl14")
    assert (dino.n, dino.feature, dino.dim) == (1000, "dinov2_vitl14", 2)
    with pytest.raises(UserError, match="another extractor: inception and inception-legacy_pytorch"):
        np.savez(home / "cifar10_legacy_pytorch_test_32.npz", mu=np.zeros(4), sigma=np.eye(4))
        found.distance(load_reference_statistics("clean-fid:cifar10_legacy_pytorch_test_32"))
