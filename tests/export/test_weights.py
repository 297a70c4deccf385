from pathlib import Path

import pytest
import torch

import d2o
from d2o.cli.app import main
from d2o.errors import UserError
from d2o.export.exporter import export_checkpoint
from d2o.interop.safetensors_io import file_sha256, load_file, read_meta, save_file
from d2o.students.base import Student, checkpoint_meta, save_student
from tests.helpers import SPEC, tiny_network


@pytest.mark.parametrize("n", [1, 5])
def test_fp16_student_is_the_student_with_rounded_weights(folder, student_fp16, n):
    student, rounded = d2o.load_student(folder / "student.safetensors"), d2o.load_student(student_fp16.path)
    for p in student.network.parameters():
        p.copy_(p.half())
    noise, label = torch.randn(n, 1, 8, 8), torch.arange(n)
    assert torch.equal(rounded(noise, label), student(noise, label))
    assert all(t.dtype == torch.float16 for t in load_file(student_fp16.path)[0].values())
    assert student_fp16.path.name == "student-fp16.safetensors"
    assert 0 < student_fp16.parity.difference < 0.03


def test_metadata_is_kept_and_the_export_is_the_last_step(folder, student_fp16):
    before, after = (load_file(path)[1] for path in (folder / "student.safetensors", student_fp16.path))
    steps = after.pop("provenance")
    assert steps[:-1] == before.pop("provenance")
    assert steps[-1] == {
        "exported": "safetensors",
        "detail": "fp16",
        "from": d2o.load_student(folder / "student.safetensors").fingerprint,
        "d2o": d2o.__version__,
    }
    assert after == before


def test_a_teacher_stays_a_teacher(folder, teacher_bf16):
    x, label = torch.randn(2, 1, 8, 8), torch.tensor([1, 2])
    a, b = (
        d2o.load_teacher(path).denoise(x, 1.0, label) for path in (folder / "teacher.safetensors", teacher_bf16.path)
    )
    assert 0 < (a - b).abs().max() < 0.1


def test_fp32_is_exact_and_the_default(folder, tmp_path):
    done = export_checkpoint(folder / "plain.safetensors", "safetensors", tmp_path)
    assert done.path == tmp_path / "plain-fp32.safetensors"
    assert done.parity.difference == 0
    noise = torch.randn(3, 2, 8, 8)
    assert torch.equal(d2o.load_student(done.path)(noise), d2o.load_student(folder / "plain.safetensors")(noise))


def test_buffers_keep_their_precision(tmp_path):
    save_student(tmp_path / "s.safetensors", Student(tiny_network(1, embedding="fourier"), SPEC))
    done = export_checkpoint(tmp_path / "s.safetensors", "safetensors", dtype="bf16")
    tensors = load_file(done.path)[0]
    assert tensors["model.map_noise.freqs"].dtype == torch.float32
    assert tensors["model.map_layer0.weight"].dtype == torch.bfloat16


def test_values_that_fp16_cannot_hold_are_refused(tmp_path):
    network = tiny_network()
    weights = network.state_dict()
    weights["model.map_layer0.bias"][0] = 1e6
    save_file(tmp_path / "t.safetensors", weights, checkpoint_meta("teacher", network.config, SPEC))
    with pytest.raises(UserError, match=r"model\.map_layer0\.bias .* holds values that fp16 cannot"):
        export_checkpoint(tmp_path / "t.safetensors", "safetensors", dtype="fp16")
    assert [path.name for path in tmp_path.iterdir()] == ["t.safetensors"]


@pytest.mark.parametrize("name", ["edm-ddpmpp", "edm2-tiny"])
def test_nvidias_pickle_becomes_a_checkpoint(tmp_path, name):
    pickle = Path(__file__).parents[1] / "golden" / "edm" / f"{name}.pkl"
    done = export_checkpoint(pickle, "safetensors", tmp_path / "t.safetensors")
    before, after = d2o.load_teacher(pickle), d2o.load_teacher(done.path)
    x, label = torch.randn(3, *before.spec.shape), torch.tensor([0, 4, 9])
    assert torch.equal(before.denoise(x, 2.0, label), after.denoise(x, 2.0, label)) and after.spec == before.spec
    assert done.licence == after.spec.licence == "CC BY-NC-SA 4.0 (NVIDIA)" and done.parity.difference == 0
    assert read_meta(done.path)["converted_from"] == {"file": pickle.name, "sha256": file_sha256(pickle)}
    with pytest.raises(UserError, match="cannot be guided"):  # what it cannot do travels with it
        after.guided(x, 2.0, label, 3.0)
    half = export_checkpoint(done.path, "safetensors", tmp_path / "h.safetensors", dtype="fp16")
    assert half.path.stat().st_size < 0.6 * done.path.stat().st_size


def test_a_published_student_in_a_pickle_becomes_a_student(tmp_path, capsys):
    """The authors of SiD publish EDM's networks in EDM's pickles; only their readme says that they are called once, at
    2.5."""
    pickle = Path(__file__).parents[1] / "golden" / "edm" / "edm-ddpmpp.pkl"
    before = d2o.load_teacher(pickle)
    with pytest.raises(SystemExit) as done:
        main(
            [
                "export",
                str(pickle),
                "--format",
                "safetensors",
                "--student-sigma",
                "2.5",
                "--out",
                str(tmp_path / "sid.safetensors"),
            ]
        )
    assert done.value.code == 0 and "CC BY-NC-SA 4.0" in capsys.readouterr().out
    student = d2o.load_student(tmp_path / "sid.safetensors")
    z, label = torch.randn(3, *before.spec.shape), torch.tensor([0, 4, 9])
    with torch.no_grad():
        torch.testing.assert_close(student(z, label), before.denoise(2.5 * z, 2.5, label))
    assert student.sigma == 2.5 and student.meta["converted_from"] == {
        "file": pickle.name,
        "sha256": file_sha256(pickle),
    }
    assert "distil" in (tmp_path / "sid.safetensors.md").read_text()


@pytest.mark.parametrize(
    ("given", "sigma", "words"),
    [
        ("edm-ddpmpp.pkl", 0.0, "--student-sigma 0: expected a noise level above 0, at most 80"),
        ("edm-ddpmpp.pkl", 81.0, "at most 80"),
        ("digits", 2.5, "--student-sigma is for pickles of NVIDIA's kind"),
    ],
)
def test_noise_levels_of_published_students_that_cannot_be(given, sigma, words, tmp_path):
    pickle = Path(__file__).parents[1] / "golden" / "edm" / given
    with pytest.raises(UserError, match=words):
        export_checkpoint(
            pickle if pickle.exists() else given, "safetensors", tmp_path / "x.safetensors", student_sigma=sigma
        )
    with pytest.raises(UserError, match="diffusers has no such networks"):
        export_checkpoint("tiny-sd", "diffusers", tmp_path / "d", student_sigma=2.5)
    assert not list(tmp_path.iterdir())
