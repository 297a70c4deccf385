"""Layer activations over the noise levels of sampling (GDD, section 4.1 and Fig. 3)."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from d2o.data.draws import draw
from d2o.data.prompts import Prompts
from d2o.errors import UserError
from d2o.evaluation.activations import (
    ActivationSettings,
    activations,
    measure_activations,
    min_max,
    time_grid,
)
from d2o.evaluation.workplace import Workplace
from d2o.networks.edm_unet import EDMPrecond
from d2o.networks.unet_layers import last_convolutions
from d2o.teachers.base import Teacher
from tests.helpers import SPEC, tiny_network, tiny_teacher
from tests.teachers.families import tiny

SMALL = ActivationSettings(steps=8, n=4, seed=3, batch=2)


def test_the_paper_s_time_steps():
    """GDD, section 4.1: time step 225 of 256 is sigma 40, 243 is 60; 256 sigma_max and 0 sigma_min."""
    sigma = time_grid(Teacher(tiny_network(), SPEC), 256).sigma
    at = {i: float(sigma[256 - i]) for i in (256, 243, 225, 0)}
    assert at == pytest.approx({256: 80, 243: 60.29, 225: 39.95, 0: 0.002}, abs=0.005)
    assert len(sigma) == 257


def by_hand(stat: str, solver: str) -> torch.Tensor:
    """[images, layers, steps], with a sampler written out and conv1's outputs looked at one after another."""
    teacher = tiny_teacher()
    net = teacher.network
    blocks = [net.model.enc["8x8_block0"], *net.model.dec.values()]
    blocks = [block for block in blocks if hasattr(block, "conv1")]
    noise, labels = draw(3, 0, 3, SPEC.shape, 10, "random")
    sigmas = time_grid(teacher, 8).sigma.tolist()
    x, rows = noise.double() * sigmas[0], []
    for i in range(8):
        outs: list[torch.Tensor] = []
        hooks = [block.conv1.register_forward_hook(lambda m, a, out, to=outs: to.append(out)) for block in blocks]
        d = net(x.float(), torch.tensor(sigmas[i]).expand(3), labels).double()
        for hook in hooks:
            hook.remove()
        f = {"mean_abs": lambda y: y.abs(), "rms": lambda y: y**2, "mean": lambda y: y}[stat]
        rows.append(torch.stack([f(out).mean((1, 2, 3)) for out in outs], dim=1))
        s, u = sigmas[i], sigmas[i + 1]
        slope = (x - d) / s
        to = x + (u - s) * slope
        if solver == "heun" and i < 7:
            d = net(to.float(), torch.tensor(u).expand(3), labels).double()
            to = x + (u - s) * (slope + (to - d) / u) / 2
        x = to
    return torch.stack(rows, dim=2)


@torch.no_grad()
@pytest.mark.parametrize(("stat", "solver"), [("mean_abs", "heun"), ("rms", "euler"), ("mean", "heun")])
def test_it_is_the_output_of_every_block_s_last_convolution(stat, solver):
    teacher = tiny_teacher()
    layers = last_convolutions(teacher.network, "tiny")
    assert [(layer.part, layer.depth) for layer in layers] == [
        ("encoder", 0),
        *(("decoder", depth) for depth in (3, 2, 1, 0)),
    ]
    settings = replace(SMALL, stat=stat, solver=solver)
    images, found = activations(teacher, layers, settings, range(3, 6))
    assert images.shape == (3, 1, 8, 8) and torch.allclose(found, by_hand(stat, solver), rtol=1e-4, atol=1e-6)
    assert not any(layer.conv._forward_hooks for layer in layers)


def test_a_record_says_where_each_layer_is_greatest(tmp_path: Path):
    teacher = tiny_teacher()
    record = measure_activations(teacher, "tiny", SMALL)
    assert record is not None and record["i"] == list(range(8, 0, -1)) and record["sigma"][0] == pytest.approx(80)
    for layer in record["layers"]:
        values = np.array(layer["values"])
        assert len(values) == 8 and layer["min"] == pytest.approx(values.min(), rel=1e-4)
        peak = int(values.argmax())
        assert (
            layer["peak"]
            == layer["maxima"][0]
            == {
                "i": 8 - peak,
                "sigma": record["sigma"][peak],
                "height": 1.0,
            }
        )
        scaled = min_max(values)
        for point in layer["maxima"]:
            at = 8 - point["i"]
            assert all(scaled[at] >= scaled[other] for other in (at - 1, at + 1) if 0 <= other < 8)
    assert (min_max(np.array([2.0, 2.0])) == 0).all() and min_max(np.array([1.0, 3.0, 2.0])).tolist() == [0, 1, 0.5]
    other = measure_activations(teacher, "tiny", replace(SMALL, batch=6))  # batches change nothing
    assert other is not None
    for ours, theirs in zip(record["layers"], other["layers"], strict=True):
        assert ours["values"] == pytest.approx(theirs["values"], rel=1e-4)
    moved = measure_activations(teacher, "tiny", replace(SMALL, seed=4))
    assert moved is not None and moved["layers"][0]["values"] != record["layers"][0]["values"]
    rms = measure_activations(teacher, "tiny", replace(SMALL, stat="rms"))
    mean_abs = np.array(record["layers"][0]["values"])
    assert rms is not None and (np.array(rms["layers"][0]["values"]) > mean_abs).all()


def test_images_that_were_measured_are_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from d2o.evaluation import activations as module

    first = measure_activations(tiny_teacher(), "tiny", SMALL, place=Workplace(tmp_path / "work"))
    monkeypatch.setattr(module, "activations", lambda *given: pytest.fail("measured again"))
    again = measure_activations(tiny_teacher(), "tiny", SMALL, place=Workplace(tmp_path / "work"))
    assert first == again


def test_adm():
    adm = EDMPrecond("adm", 8, 1, 0, model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=())
    layers = last_convolutions(adm, "adm")
    assert [layer.depth for layer in layers if layer.part == "encoder"] == [0, 1, 2]


@pytest.mark.parametrize("family", ["edm-other", "edm2", "ddpm", "sd"])
def test_other_families(family: str, tmp_path: Path):
    teacher = tiny(family, tmp_path)
    prompts = Prompts.from_list(["a", "b"]) if family == "sd" else None
    record = measure_activations(teacher, family, replace(SMALL, n=2, steps=3), prompts=prompts)
    assert record is not None and {layer["part"] for layer in record["layers"]} == {"encoder", "decoder"}
    assert all(a > b for a, b in pairwise(record["sigma"])) and record["sigma"][-1] > 0
    assert all(layer["max"] > layer["min"] for layer in record["layers"])
    assert all(sorted(depths) == list(range(len(depths))) for depths in _depths(record).values())


def _depths(record) -> dict[str, list[int]]:
    parts = ("encoder", "decoder")
    return {part: [layer["depth"] for layer in record["layers"] if layer["part"] == part] for part in parts}


def test_what_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="unknown statistic of activations 'median'"):
        replace(SMALL, stat="median")
    with pytest.raises(UserError, match="unknown solver for --activations 'sde'"):
        replace(SMALL, solver="sde")
    with pytest.raises(UserError, match="--steps must be at least 2"):
        replace(SMALL, steps=1)
    with pytest.raises(UserError, match="mine has no U-Net of residual blocks"):
        measure_activations(tiny("sd3", tmp_path), "x", SMALL, name="mine")
    with pytest.raises(UserError, match="10"):
        measure_activations(tiny_teacher(), "tiny", replace(SMALL, labels="10"))
