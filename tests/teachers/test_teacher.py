import pytest
import torch

from d2o.errors import UserError
from d2o.interop.safetensors_io import load_file, save_file
from d2o.students.base import load_student
from d2o.teachers.base import Spec
from d2o.teachers.registry import load_teacher, teacher_names
from tests.helpers import SPEC, tiny_student, tiny_teacher


def test_a_checkpoint_round_trip_gives_the_same_teacher(tmp_path):
    teacher = tiny_teacher(tmp_path / "t.safetensors")
    again = load_teacher(tmp_path / "t.safetensors")
    noise, labels = torch.randn(2, 1, 8, 8), torch.tensor([3, 4])
    assert again.spec == SPEC and again.fingerprint == teacher.fingerprint
    assert torch.equal(again.sample(noise, labels, steps=3), teacher.sample(noise, labels, steps=3))
    assert Spec.from_dict(SPEC.to_dict()) == SPEC


def test_guidance_extrapolates_from_the_unconditional_denoiser():
    teacher = tiny_teacher()
    x, labels = torch.randn(3, 1, 8, 8), torch.tensor([1, 2, 3])
    d_c, d_u = teacher.denoise(x, 2.0, labels), teacher.denoise(x, 2.0, torch.full((3,), -1))
    assert torch.allclose(teacher.guided(x, 2.0, labels, 3.0), d_u + 3 * (d_c - d_u), atol=1e-5)
    assert torch.equal(teacher.guided(x, 2.0, labels), d_c)
    assert not torch.allclose(teacher.sample(x, labels, steps=2, cfg=3.0), teacher.sample(x, labels, steps=2), atol=1e-3)
    with pytest.raises(UserError, match="needs a condition"):
        teacher.guided(x, 2.0, None, 3.0)


def test_labels_are_checked():
    teacher, x = tiny_teacher(), torch.randn(2, 1, 8, 8)
    with pytest.raises(UserError, match="conditioned on 10 classes"):
        teacher.denoise(x, 1.0)
    with pytest.raises(UserError, match="label 10 is out of range"):
        teacher.denoise(x, 1.0, torch.tensor([0, 10]))
    with pytest.raises(UserError, match="1 labels for a batch of 2"):
        teacher.denoise(x, 1.0, torch.tensor([0]))
    student = tiny_student()
    with pytest.raises(UserError, match="conditioned"):
        student(x)


def test_unknown_and_unfit_files_are_refused_in_words(tmp_path):
    with pytest.raises(UserError) as error:
        load_teacher("digit")
    assert "did you mean 'digits'" in str(error.value) and "digits" in teacher_names()
    with pytest.raises(UserError, match="no such file"):
        load_teacher(tmp_path / "absent.safetensors")
    with pytest.raises(UserError, match="folder without a checkpoint"):
        load_teacher(tmp_path)
    tiny_student(tmp_path / "s.safetensors")
    with pytest.raises(UserError, match="holds a student, not a teacher"):
        load_teacher(tmp_path / "s.safetensors")
    tiny_teacher(tmp_path / "t.safetensors")
    with pytest.raises(UserError, match="holds a teacher, not a student"):
        load_student(tmp_path / "t.safetensors")
    whole = (tmp_path / "t.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="truncated or not a safetensors file"):
        load_teacher(tmp_path / "cut.safetensors")
    tensors, meta = load_file(tmp_path / "t.safetensors")
    meta["network"]["model_channels"] = 32
    save_file(tmp_path / "odd.safetensors", tensors, meta)
    with pytest.raises(UserError, match="do not fit the network"):
        load_teacher(tmp_path / "odd.safetensors")


def test_decode_clips_and_bfloat16_is_close():
    teacher = tiny_teacher()
    assert teacher.decode(torch.tensor([-3.0, 0.5, 2.0])).tolist() == [-1.0, 0.5, 1.0]
    from d2o.teachers.base import Teacher

    half = Teacher(teacher.network, SPEC, dtype=torch.bfloat16)
    x, labels = torch.randn(4, 1, 8, 8), torch.arange(4)
    difference = (half.denoise(x, 1.0, labels) - teacher.denoise(x, 1.0, labels)).abs().max()
    assert 0 < difference < 0.05
