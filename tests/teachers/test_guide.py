"""Guidance by a second network, as EDM2's (Karras et al. 2024, Table 2)."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from d2o.cli.app import main
from d2o.data.pairs import PairStore
from d2o.errors import UserError
from d2o.interop import catalogue
from d2o.methods.base import Setup
from d2o.methods.score_networks import true_score
from d2o.methods.sid import SiD, SiDOptions
from d2o.networks.build import build_network
from d2o.networks.edm_unet import EDMPrecond
from d2o.recipes.load import load_recipe
from d2o.recipes.plan import make_plan
from d2o.teachers.base import Spec, Teacher
from d2o.teachers.registry import load_teacher
from tests.helpers import SPEC, tiny_network, tiny_teacher

SMALL = {"model_channels": 16, "channel_mult": (1,), "num_blocks": 1, "attn_resolutions": (), "dropout": 0.0}


def guides() -> Teacher:
    """Without classes."""
    torch.manual_seed(3)
    network = EDMPrecond("ddpmpp", 8, 1, 0, **SMALL)
    with torch.no_grad():
        for p in network.parameters():
            p += 0.05 * torch.randn(p.shape)
    return Teacher(network, Spec("guide", (1, 8, 8)))


def d2o(*arguments: object) -> int:
    with pytest.raises(SystemExit) as done:
        main([str(a) for a in arguments])
    return done.value.code  # type: ignore[return-value]


def batch():
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(4, 1, 8, 8, generator=generator),
        torch.tensor([0.01, 0.5, 2.0, 80.0]),
        torch.tensor([0, 3, 9, -1]),
    )


@pytest.mark.parametrize("by", ["without classes", "a worse one"])
def test_guidance_is_away_from_the_guide(by):
    guide = guides() if by == "without classes" else Teacher(tiny_network(5), replace(SPEC, name="worse"))
    teacher, plain = tiny_teacher(), tiny_teacher()
    alone = plain.fingerprint
    teacher.guide_by(guide)
    x, t, labels = batch()
    d, d_guide = plain.denoise(x, t, labels), guide.denoise(x, t, None if by == "without classes" else labels)
    assert torch.allclose(teacher.guided(x, t, labels, 1.4), d_guide + 1.4 * (d - d_guide), atol=1e-5)
    assert torch.equal(teacher.guided(x, t, labels, 1.0), d)
    scales = torch.tensor([1.0, 2.0, 3.0, 4.0])
    each = [teacher.guided(x[i : i + 1], t[i : i + 1], labels[i : i + 1], float(w)) for i, w in enumerate(scales)]
    assert torch.allclose(teacher.guided(x, t, labels, scales), torch.cat(each), atol=1e-5)
    assert teacher.fingerprint not in (alone, guide.fingerprint)
    assert teacher.spec.name == f"tiny guided by {guide.spec.name}"
    assert teacher.record["sha256"] == plain.record["sha256"]


def test_the_true_score_of_methods_is_guided_the_same():
    teacher = tiny_teacher()
    teacher.guide_by(guides())
    x, t, labels = batch()
    x.requires_grad_()
    found = true_score(teacher, x, t.view(-1, 1, 1, 1), labels, cfg=1.4)
    assert torch.allclose(found, teacher.guided(x, t, labels, 1.4), atol=1e-5)
    assert float(torch.autograd.grad(found.sum(), x)[0].abs().sum()) > 0
    student = SimpleNamespace(sigma=2.5, init="teacher", dropout=None)
    setup = Setup(SiDOptions(score_cfg=1.4), teacher=teacher, student=student, batch=4)
    with pytest.raises(UserError, match="guided by a second network, and its score network has none"):
        SiD(setup)


def test_a_plan_counts_the_guide(tmp_path):
    tiny_teacher(tmp_path / "a.safetensors")
    name = f"{tmp_path / 'a.safetensors'} guided by {tmp_path / 'a.safetensors'}"
    plan = make_plan(load_recipe("sid_digits", [f"teacher={name}", "sid.cfg=1.4"], mini=True))
    assert plan.networks["its guide (frozen)"] == plan.networks["teacher (frozen)"] and not plan.refused


def test_what_cannot_guide_is_refused():
    large = Teacher(EDMPrecond("ddpmpp", 16, 1, 0, **SMALL), Spec("large", (1, 16, 16)))
    others = Teacher(EDMPrecond("ddpmpp", 8, 1, 4, **SMALL), Spec("four", (1, 8, 8), condition="label", classes=4))
    for guide, words in (
        (large, "makes 1 x 16 x 16 in space pixels, the teacher 1 x 8 x 8"),
        (others, "takes 4 classes, the teacher 10"),
        (load_teacher("tiny-sd"), "makes 4 x 8 x 8"),
    ):
        with pytest.raises(UserError, match=words):
            tiny_teacher().guide_by(guide)
    with pytest.raises(UserError, match="is for denoisers of the EDM family"):
        load_teacher("tiny-sd").guide_by(load_teacher("tiny-sd"))


def test_pairs_samples_and_evaluation_are_guided(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_teacher(tmp_path / "a.safetensors")
    tiny_teacher(tmp_path / "b.safetensors", seed=7)
    same = ["--n", 6, "--steps", 2, "--batch", 4]
    plain = ["--teacher", "a.safetensors", *same]
    guided = [*plain, "--guide", "b.safetensors", "--cfg", 1.5]
    assert d2o("pairs", *plain, "--out", "plain") == 0 and d2o("pairs", *guided, "--out", "guided") == 0
    stores = [PairStore(tmp_path / name) for name in ("plain", "guided")]
    noise, condition, target = stores[1].batch(range(6))
    assert not torch.allclose(stores[0].batch(range(6))[2], target)
    teacher = load_teacher("a.safetensors guided by b.safetensors")
    made = teacher.sample(noise, condition, steps=2, cfg=1.5)
    assert torch.allclose(made, target, rtol=1e-3, atol=1e-3)
    assert stores[1].manifest["teacher"]["sha256"] == teacher.fingerprint
    assert "--teacher 'a.safetensors guided by b.safetensors'" in stores[1].settings.command("guided")
    assert d2o("pairs", *guided, "--out", "guided") == 0  # nothing is left to do
    assert d2o("pairs", *plain, "--cfg", 1.5, "--out", "guided") == 2
    capsys.readouterr()

    sample = ["sample", *guided[:6], "--guide", "b.safetensors", "--cfg", 1.5, "--out", "s.npz"]
    assert d2o(*sample) == 0
    evaluate = ["eval", "a.safetensors", *same, "--against", "real:digits", "--extractor", "digits", "--metrics", "fd"]
    evaluate += ["--no-teacher-distance"]
    found = []
    for more in ([], ["--guide", "b.safetensors", "--cfg", 1.5]):
        assert d2o(*evaluate, *more, "--json", "e.json") == 0
        found.append(json.loads((tmp_path / "e.json").read_text()))
    assert found[0]["metrics"]["fd"]["value"] != pytest.approx(found[1]["metrics"]["fd"]["value"], rel=1e-3)
    assert found[1]["x"]["forwards"] == 2 * found[0]["x"]["forwards"]
    assert found[1]["x"]["guide"]["name"].endswith("b.safetensors")
    capsys.readouterr()
    for command in (["pairs", *plain, "--out", "x"], ["sample", *plain[:6], "--out", "x.npz"]):
        assert d2o(*command, "--guide", "b.safetensors") == 2
        assert "needs --cfg" in capsys.readouterr().err
    assert d2o(*evaluate, "--guide", "b.safetensors") == 2
    assert "guides nothing at a scale of 1" in capsys.readouterr().err
    assert not (tmp_path / "x").exists() and not (tmp_path / "x.npz").exists()


def test_published_guides_have_their_size():
    entry = catalogue.find("edm2-img512-xs-uncond")
    with torch.device("meta"):
        network = build_network(entry.network)
    assert sum(p.numel() for p in network.parameters()) == entry.parameters
    assert entry.source.endswith("/edm2-img512-xs-uncond-2147483-0.045.pkl")
    assert catalogue.find("edm2-img512-xxl-0.015").source.endswith("/edm2-img512-xxl-0939524-0.015.pkl")
