"""Classifiers by their top-1, distances by their agreement with which of two copies is nearer."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from d2o.data.images import open_images, to_float
from d2o.data.triplets import open_triplets
from d2o.errors import UserError
from d2o.evaluation import judging
from d2o.evaluation.judges import JUDGES, is_judge
from d2o.evaluation.protocol import Settings, protocol_line
from d2o.evaluation.request import Request
from d2o.evaluation.result_model import mistake
from d2o.evaluation.run import evaluate_all
from d2o.interop.assets import asset
from d2o.interop.safetensors_io import save_file
from d2o.losses.latent_lpips import SHIPPED, load_latent_lpips
from d2o.networks.build import build_network
from d2o.reports.comparison import results_table
from d2o.spaces.load import load_space
from d2o.students.base import checkpoint_meta

FEW = Settings(batch=16)


def evaluate(*xs: object, settings: Settings = FEW, **request) -> list[dict]:
    found = [e.record for e in evaluate_all(Request([str(x) for x in xs], **request), settings)]
    assert [mistake(record) for record in found] == [None] * len(found)
    return found


@pytest.fixture
def bapps(tmp_path: Path) -> Path:
    """Three triplets of each of BAPPS' kinds: the first copy is the reference, so every distance finds it nearer; so do
    all people of "cnn", and a quarter of them elsewhere."""
    random = np.random.default_rng(0)
    for kind in ("traditional", "cnn", "superres", "deblur", "color", "frameinterp"):
        for i in range(3):
            for side in ("ref", "p0", "p1", "judge"):
                (tmp_path / kind / side).mkdir(parents=True, exist_ok=True)
            ref, other = random.integers(0, 256, (2, 32, 32, 3), np.uint8)
            for side, pixels in (("ref", ref), ("p0", ref), ("p1", other)):
                Image.fromarray(pixels).save(tmp_path / kind / side / f"{i}.png")
            np.save(tmp_path / kind / "judge" / f"{i}.npy", np.array([0.0 if kind == "cnn" else 0.75], np.float32))
    return tmp_path


def test_2afc_of_a_folder_by_kind_and_as_the_paper_prints_it(bapps):
    record, latents = evaluate("mse", "latent-lpips-tiny-sd", against=str(bapps))
    found = {key: entry["value"] for key, entry in record["metrics"].items()}
    assert found == pytest.approx({"2afc": 2.25 / 6, "2afc-traditional": 0.25, "2afc-cnn": 1.0, "2afc-real": 0.25})
    assert record["metrics"]["2afc"]["per_class"]["deblur"] == pytest.approx(0.25)
    assert (record["x"]["kind"], record["protocol"]["n_ref"], latents["x"]["space"]) == ("distance", 18, "tiny-sd")
    assert latents["metrics"]["2afc-cnn"]["value"] == 1.0
    assert protocol_line(record["protocol"]) == f"{bapps}, n = 18 · resize none"
    table = results_table([record, latents])
    assert "2AFC, real ↑" in table.headers and "25.0 %" in table.rows[0]
    (small,) = evaluate("mse", against=str(bapps), settings=Settings(resize="64", bootstrap=50))
    assert small["protocol"]["resize"] == "center_crop+lanczos64"
    assert small["metrics"]["2afc"]["error"] == "bootstrap" and small["metrics"]["2afc"]["std"] == 0


@pytest.mark.long
def test_made_triplets_are_drawn_anew_by_seeds(monkeypatch):
    monkeypatch.setattr(judging, "open_triplets", partial(open_triplets, limit=20))
    settings = Settings(batch=256, seed=5, repeats=2)
    path = asset(SHIPPED["tiny-sd"])
    record, named = evaluate(path, "latent-lpips-tiny-sd", against="real:digits-2afc/b", settings=settings)
    entry = record["metrics"]["2afc"]
    assert record["protocol"]["seeds"] == [5, 6] and len(set(entry["runs"])) == 2 and entry["std"] > 0
    assert entry["runs"] == named["metrics"]["2afc"]["runs"]  # what ships, by its name
    triplets, space = open_triplets("real:digits-2afc/b", channels=3, seed=6, limit=20), load_space("tiny-sd")
    distance, scores = load_latent_lpips("tiny-sd"), []
    for rows in triplets.groups.values():
        sides = to_float(triplets.images(rows)).split(3, 1)
        ref, p0, p1 = (space.encode(x, torch.zeros(len(x), 4, 8, 8)) for x in sides)
        nearer = distance(p1, ref) < distance(p0, ref)
        scores.append((nearer == (triplets.judgements[rows] == 1)).float().mean().item())
    assert entry["runs"][1] == pytest.approx(np.mean(scores), abs=0.002)
    assert np.mean([*entry["per_class"].values()]) == pytest.approx(entry["value"])
    assert open_triplets("real:digits-2afc/b", limit=5).fingerprint != (
        open_triplets("real:digits-2afc/b", limit=5, seed=6).fingerprint
    )


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    """Untrained, but for a bias: it always sees a seven."""
    torch.manual_seed(0)
    config = {"arch": "latent_classifier", "channels": 4, "classes": 10, "width": 2, "hidden": 4, "side": 2}
    network = build_network(config)
    with torch.no_grad():
        network.classifier[-1].bias[7] = 100.0
    space, recipe = load_space("tiny-sd").record, {"latent_classifier": {"image_size": 16}}
    meta = checkpoint_meta("latent_classifier", network.config, None, space=space, recipe=recipe)
    save_file(tmp_path / "c.safetensors", network.state_dict(), meta)
    return tmp_path / "c.safetensors"


def test_top1_of_a_classifier(classifier):
    (record,) = evaluate(classifier, against="real:digits/b", settings=Settings(resize="32"))
    images = open_images("real:digits/b")
    assert record["metrics"]["top1"]["value"] == pytest.approx((images.labels == 7).float().mean().item())
    assert record["metrics"]["top1"]["per_class"]["7"] == 1.0 and record["x"]["image_size"] == 16
    assert record["x"]["kind"] == "classifier" and record["metrics"]["top1"]["percent"]


@pytest.mark.long
def test_what_cannot_be_measured_is_told_first(classifier, bapps, tmp_path):
    assert is_judge("lpips-vgg") and is_judge(str(classifier)) and not is_judge("digits")
    assert {"latent-lpips-sd15", "latent-mse-sd15", "mse"} <= set(JUDGES)
    for xs, request, settings, words in (
        (["mse"], {}, FEW, "is a distance: 2afc needs answers"),
        (["mse"], {"against": str(bapps), "metrics": ["fd"]}, FEW, "is measured by 2afc"),
        (["mse"], {"against": str(bapps)}, Settings(repeats=2), "the same every time"),
        ([classifier], {"against": "real:digits/b"}, FEW, "looks at 16 x 16 pixels; the images are 8 x 8"),
        ([classifier], {"against": str(bapps / "cnn" / "ref")}, FEW, "tells 10 classes apart"),
        (["digits"], {"against": "real:digits", "metrics": ["top1"]}, FEW, "top1 is of a network that judges"),
        (["latent-lpips-tiny-sd"], {"against": str(bapps)}, Settings(resize="30"), "multiples of 4 pixels"),
    ):
        with pytest.raises(UserError, match=words):
            evaluate(*xs, settings=settings, **request)
