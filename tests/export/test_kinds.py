"""Graphs of students of all kinds, those included that draw noise on their way."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch

from d2o.export.exporter import export_checkpoint
from d2o.export.loaded import for_graph, load_exportable
from d2o.students.base import load_student, save_student
from tests.export.snippets import run_snippet

PREVIOUS = Path(__file__).parents[1] / "fixtures" / "previous"


def test_a_student_that_draws_on_its_way_takes_that_as_inputs():
    source = load_exportable(PREVIOUS / "multistep.safetensors")
    student = source.student
    for_graph(source)
    assert source.inputs[0] == "noise" and source.inputs[-2:] == ("latents", "step_noise")
    given = dict(zip(source.inputs, source.example(3)))
    drawn = [given["latents"][:, 0]]
    for step in range(1, student.nfe):
        drawn += [given["step_noise"][:, step - 1], given["latents"][:, step]]
    served = iter(drawn)
    expected = student(given["noise"], given.get("label"), lambda *shape: next(served))
    assert torch.equal(source.call(*given.values()), expected)


@pytest.mark.long
@pytest.mark.parametrize("name", ["multistep", "style", "consistency", "ctm"])
@pytest.mark.parametrize("file_format", ["program", "onnx"])
def test_students_of_all_kinds_are_graphs(name, file_format, tmp_path, monkeypatch, one_graph_a_network):
    done = export_checkpoint(PREVIOUS / f"{name}.safetensors", file_format, tmp_path, check_n=3)
    assert done.parity.difference < 1e-4 * max(1, done.parity.largest) and done.parity.largest > 0.1
    monkeypatch.chdir(tmp_path)
    assert run_snippet(done.card.read_text())["image"].shape[0] == 4
    if name == "multistep":
        assert "`step_noise`" in done.card.read_text() and "is an input here" in done.card.read_text()


@pytest.mark.long
def test_two_steps_of_a_consistency_student_take_the_noise_between(tmp_path, one_graph_a_network):
    student = load_student(PREVIOUS / "consistency.safetensors")
    save_student(tmp_path / "two.safetensors", student.with_steps(2), **{"recipe": {}})
    done = export_checkpoint(tmp_path / "two.safetensors", "onnx", check_n=3)
    shapes = {x.name: len(x.type.tensor_type.shape.dim) for x in onnx.load(done.path).graph.input}
    assert shapes["step_noise"] == 5


@pytest.mark.long
@pytest.mark.parametrize("name", ["denoiser", "style"])
def test_half_precision_onnx(name, tmp_path, one_graph_a_network):
    whole = export_checkpoint(PREVIOUS / f"{name}.safetensors", "onnx", tmp_path, check_n=2)
    done = export_checkpoint(PREVIOUS / f"{name}.safetensors", "onnx", tmp_path, dtype="fp16", check_n=3)
    assert done.path.name == f"{name}-fp16.onnx" and done.size < 0.75 * whole.size
    assert 0 < done.parity.difference < 0.031 * max(1, done.parity.largest)
