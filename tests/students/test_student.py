import torch

import d2o
from d2o.students.base import build_student
from tests.helpers import SPEC, tiny_student


def test_round_trip_and_provenance(tmp_path):
    student = tiny_student(tmp_path / "s.safetensors")
    again = d2o.load_student(tmp_path / "s.safetensors")
    noise, labels = torch.randn(3, 1, 8, 8), torch.tensor([0, 5, 9])
    assert torch.equal(again(noise, labels), student(noise, labels))
    assert (
        again.meta["teacher"]["name"] == "tiny"
        and again.meta["kind"] == "student"
        and again.meta["d2o"] == d2o.__version__
    )
    assert again.fingerprint == student.fingerprint and not again.training
    rebuilt = build_student(again.config, SPEC)
    rebuilt.network.load_state_dict(again.network.state_dict())
    assert torch.equal(rebuilt.eval()(noise, labels), student(noise, labels))


def test_equal_content_gives_equal_bytes(tmp_path):
    tiny_student(tmp_path / "a.safetensors")
    tiny_student(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_one_call_of_the_network_makes_a_sample():
    student, calls = tiny_student(), []
    student.network.register_forward_hook(lambda *_: calls.append(1))
    student(torch.randn(4, 1, 8, 8), torch.arange(4))
    assert len(calls) == 1
