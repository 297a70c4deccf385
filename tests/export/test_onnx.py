import json
import sys
from pathlib import Path
from types import SimpleNamespace

import onnx
import onnxruntime
import pytest
import torch

import d2o
from d2o.errors import UserError
from d2o.export import onnx as onnx_export
from d2o.export.exporter import export_checkpoint
from d2o.export.graphs import graph_of
from d2o.export.loaded import load_exportable
from d2o.export.onnx import write_onnx
from tests.export.snippets import run_snippet_of, run_students_snippet

pytestmark = pytest.mark.long


def run(path, **inputs):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {name: x.numpy() for name, x in inputs.items()})[0])


@pytest.mark.parametrize("n", [1, 2, 7])
def test_conditional_student_agrees_at_batch_sizes_that_were_not_traced(folder, student_onnx, n):
    noise, label = torch.randn(n, 1, 8, 8), torch.arange(n) % 10
    expected = d2o.load_student(folder / "student.safetensors")(noise, label)
    assert expected.abs().max() > 0.1  # or the comparison says nothing
    assert torch.allclose(run(student_onnx.path, noise=noise, label=label), expected, atol=1e-5)


def test_labels_matter_and_those_out_of_range_act_as_no_class(folder, student_onnx):
    noise, student = torch.randn(1, 1, 8, 8).repeat(4, 1, 1, 1), d2o.load_student(folder / "student.safetensors")
    a, b, none, wrong = run(student_onnx.path, noise=noise, label=torch.tensor([0, 1, -1, 99]))
    assert not torch.allclose(a, b, atol=1e-3)
    assert torch.equal(none, wrong)
    assert torch.allclose(none, student(noise[:1], torch.tensor([-1]))[0], atol=1e-5)


def test_unconditional_student_has_no_label_input(folder, plain_onnx):
    noise = torch.randn(5, 2, 8, 8)
    assert torch.allclose(
        run(plain_onnx.path, noise=noise), d2o.load_student(folder / "plain.safetensors")(noise), atol=1e-5
    )
    assert [entry.version for entry in onnx.load(plain_onnx.path).opset_import if not entry.domain] == [20]


def test_a_teacher_exports_as_its_denoiser(folder, teacher_onnx):
    teacher = d2o.load_teacher(folder / "teacher.safetensors")
    sigma, label = torch.tensor([0.01, 1.0, 80.0]), torch.tensor([3, 1, 4])
    noisy = torch.randn(3, 1, 8, 8) * sigma[:, None, None, None]
    found = run(teacher_onnx.path, noisy=noisy, sigma=sigma, label=label)
    assert torch.allclose(found, teacher.denoise(noisy, sigma, label), atol=1e-5)


def test_the_file_is_single_and_says_what_it_is(folder, student_onnx):
    model = onnx.load(student_onnx.path, load_external_data=False)
    assert not any(t.external_data for t in model.graph.initializer)
    shapes = {
        x.name: [d.dim_param or d.dim_value for d in x.type.tensor_type.shape.dim]
        for x in (*model.graph.input, *model.graph.output)
    }
    assert shapes == {"noise": ["N", 1, 8, 8], "label": ["N"], "image": ["N", 1, 8, 8]}
    assert [x.type.tensor_type.elem_type for x in model.graph.input] == [onnx.TensorProto.FLOAT, onnx.TensorProto.INT64]
    facts = {entry.key: entry.value for entry in model.metadata_props}
    assert (facts["d2o_version"], facts["teacher"], facts["licence"]) == (
        d2o.__version__,
        "big-teacher",
        "CC-BY-NC-4.0",
    )
    record = json.loads(facts["d2o"])
    assert record["recipe"]["name"] == "tiny-ode"
    assert record["provenance"][-1]["exported"] == "onnx"
    assert record["provenance"][-1]["from"] == d2o.load_student(folder / "student.safetensors").fingerprint
    assert student_onnx.parity.batch_sizes == (1, 3)
    assert 0 <= student_onnx.parity.difference < 1e-5


def test_no_path_of_this_machine_is_in_the_file(student_onnx):
    data = student_onnx.path.read_bytes()
    assert str(Path(d2o.__file__).parent).encode() not in data
    assert str(Path(torch.__file__).parent).encode() not in data


def test_the_cards_snippets_run(folder, student_onnx, plain_onnx, teacher_onnx, monkeypatch):
    run_students_snippet(student_onnx, folder, monkeypatch)
    run_snippet_of(plain_onnx, (4, 2, 8, 8), monkeypatch)
    run_snippet_of(teacher_onnx, (4, 1, 8, 8), monkeypatch)


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_says_how_to_install_it(folder, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=package) as caught:
        export_checkpoint(folder / "student.safetensors", "onnx", tmp_path / "x.onnx")
    assert caught.value.hint == "pip install 'd2o[export]'"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("opset", [7, 17, 1000])
def test_an_opset_out_of_range_is_refused_with_the_range(folder, tmp_path, opset):
    with pytest.raises(UserError, match=f"opset {opset}: expected 18 to "):
        export_checkpoint(folder / "student.safetensors", "onnx", tmp_path / "x.onnx", opset=opset)


def test_a_network_beyond_two_gigabytes_is_refused_before_any_work(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "MAX_BYTES", 1000)
    with pytest.raises(UserError, match="ends at 2 GB") as caught:
        export_checkpoint(folder / "student.safetensors", "onnx", tmp_path / "x.onnx")
    assert "program" in caught.value.hint


def test_an_exporter_that_fails_or_gives_another_opset_is_one_line(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "trace", lambda graph: None)
    graph = graph_of(load_exportable(folder / "student.safetensors"))

    def fails(*args, **options):
        raise RuntimeError("no such operator\n" + "page after page\n" * 50)

    monkeypatch.setattr(torch.onnx, "export", fails)
    with pytest.raises(UserError, match=r"cannot export this network: no such operator\n"):
        write_onnx(graph, tmp_path / "x.onnx", {}, 18)
    other = SimpleNamespace(model_proto=SimpleNamespace(opset_import=[onnx.helper.make_opsetid("", 19)]))
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **options: other)
    with pytest.raises(UserError, match="gives opset 19, not 18"):
        write_onnx(graph, tmp_path / "x.onnx", {}, 18)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["edm-adm", "edm2-tiny"])  # DDPM++ is above
def test_every_family_of_denoisers_exports(name, tmp_path):
    pickle = Path(__file__).parents[1] / "golden" / "edm" / f"{name}.pkl"
    done = export_checkpoint(pickle, "onnx", tmp_path / "x.onnx", student_sigma=2.5, check_n=3)
    assert done.parity.difference < 1e-5 * max(1, done.parity.largest)
