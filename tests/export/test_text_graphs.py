"""Text students as three graphs: text encoder, student, decoder."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from d2o.condition import Condition
from d2o.diffusion.noise import noise_and_labels
from d2o.errors import UserError
from d2o.export import onnx as onnx_export
from d2o.export.exporter import export_checkpoint
from d2o.networks.edm_view import EDMView
from d2o.students.base import Student, load_student
from d2o.teachers.in_edm import in_edm
from tests.export.snippets import run_snippet
from tests.export.test_student_folder import saved, shaken, student_of
from tests.teachers.families import tiny

pytestmark = pytest.mark.long
PROMPTS = ["abc", "a longer prompt", ""]


@pytest.fixture(scope="module")
def plain(tmp_path_factory, one_graph_a_network):
    """A student of a Stable Diffusion 1 (kept, as its checkpoint names text encoders that live in this process)."""
    folder = tmp_path_factory.mktemp("graphs")
    teacher = tiny("sd", folder)
    saved(student_of(teacher, "denoiser", 14.6), folder / "s.safetensors")
    return teacher, folder


@pytest.fixture(scope="module")
def told(tmp_path_factory, one_graph_a_network):
    """One of two text encoders that is told its guidance."""
    folder = tmp_path_factory.mktemp("told")
    teacher = in_edm(tiny("sdxl", folder))
    config = {**teacher.network.net.config, "time_cond_proj_dim": 256}
    net = type(teacher.network.net).from_config(config).eval()
    view = EDMView.of(net, teacher.network.config["schedule"], "epsilon", time_ids=teacher.network.time_ids)
    student = Student(shaken(view), teacher.spec, 14.6, guidance=(1.0, 8.0))
    saved(student, folder / "s.safetensors")
    return teacher, folder


def sessions(folder):
    names = ("text_encoder", "student", "decoder")
    return [onnxruntime.InferenceSession(str(folder / f"{name}.onnx")) for name in names]


@pytest.fixture(scope="module")
def whole(plain):
    return export_checkpoint(plain[1] / "s.safetensors", "onnx", check_n=3)


def test_three_files_make_the_students_images(plain, whole):
    (_, folder), done = plain, whole
    assert done.path == folder / "s-onnx" and done.parity.difference < 1e-4
    found = sorted(path.name for path in done.path.iterdir())
    assert found == ["README.md", "decoder.onnx", "student.onnx", "text_encoder.onnx", "tokenizer"]
    student = load_student(folder / "s.safetensors")
    noise, _ = noise_and_labels(range(3), student.spec.shape, 0)
    tokens = student.text.tokenizers[0](PROMPTS, padding="max_length", max_length=77, return_tensors="np").input_ids
    encode, call, decode = sessions(done.path)
    (states,) = encode.run(None, {"input_ids": tokens.astype(np.int64)})
    (latent,) = call.run(None, {"noise": noise.numpy(), "states": states})
    (image,) = decode.run(None, {"latent": latent})
    expected = student.decode(student(noise, Condition.of_prompts(PROMPTS)))
    assert (torch.from_numpy(image) - expected).abs().max() < 1e-4 and expected.std() > 0.05
    weights = onnx.load(done.path / "decoder.onnx").graph.initializer
    assert len(weights) < len(student.space.autoencoder.state_dict())  # nothing of what encodes


def test_the_card_says_three_files_and_its_lines_run(whole, monkeypatch):
    text = whole.card.read_text()
    assert "Three files" in text and "pipeline_tag: text-to-image" in text and "max_abs_difference" in text
    monkeypatch.chdir(whole.path.parent)
    names = run_snippet(text)
    assert names["pixels"].shape == (4, 3, 16, 16) and np.ptp(names["pixels"]) > 20


def test_half_precision_of_all_three(plain, whole):
    _, folder = plain
    done = export_checkpoint(folder / "s.safetensors", "onnx", folder / "half", dtype="fp16", check_n=3)
    assert 1e-5 < done.parity.difference < 0.031 and done.size < 0.7 * whole.size
    assert "opset 18, fp16" in done.card.read_text()
    for name in ("text_encoder", "student", "decoder"):
        kinds = {t.data_type for t in onnx.load(done.path / f"{name}.onnx").graph.initializer}
        assert onnx.TensorProto.FLOAT16 in kinds


def test_weights_beyond_two_gigabytes_lie_beside_the_graph(plain, monkeypatch):
    _, folder = plain
    monkeypatch.setattr(onnx_export, "MAX_BYTES", 30_000)
    done = export_checkpoint(folder / "s.safetensors", "onnx", folder / "beside", check_n=1)
    assert (done.path / "student.onnx.data").stat().st_size > (done.path / "student.onnx").stat().st_size / 10
    assert done.parity.difference < 1e-4


def test_programs_of_two_text_encoders_and_a_guidance_scale(told, monkeypatch):
    _, folder = told
    done = export_checkpoint(folder / "s.safetensors", "program", check_n=2)
    assert done.path == folder / "s-program" and done.parity.difference < 1e-4
    student = load_student(folder / "s.safetensors")
    noise, _ = noise_and_labels(range(3), student.spec.shape, 0)
    text = student.text(PROMPTS)
    call = torch.export.load(done.path / "student.pt2").module()
    scale = torch.tensor([1.5, 4.0, 8.0])
    expected = student(noise, Condition.of_prompts(PROMPTS).guided(scale))
    assert torch.allclose(call(noise, text.states, text.pooled, scale), expected, atol=1e-4)
    monkeypatch.chdir(folder)
    names = run_snippet(done.card.read_text())
    assert tuple(names["pixels"].shape) == (4, 3, 16, 16)


def test_a_folder_of_something_else_is_left_alone(plain, tmp_path):
    _, folder = plain
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="not a folder of an export"):
        export_checkpoint(folder / "s.safetensors", "onnx", tmp_path, force=True)


def test_weights_of_text_students_in_half_precision(plain, monkeypatch):
    _, folder = plain
    done = export_checkpoint(folder / "s.safetensors", "safetensors", dtype="fp16", check_n=2)
    assert done.parity.difference < done.parity.tolerance * done.parity.largest
    monkeypatch.chdir(folder)
    assert run_snippet(done.card.read_text())["image"].shape == (4, 3, 16, 16)
