from pathlib import Path

import pytest
import torch

import d2o
from d2o.errors import UserError
from d2o.export import program
from d2o.export.exporter import export_checkpoint
from d2o.export.program import program_record
from d2o.export.program import trace as trace_itself
from tests.export.snippets import run_snippet_of, run_students_snippet


@pytest.mark.long
@pytest.mark.parametrize("n", [1, 2, 7])
def test_conditional_student_agrees_at_batch_sizes_that_were_not_traced(folder, student_program, n):
    noise, label = torch.randn(n, 1, 8, 8), torch.arange(n) % 10
    network = torch.export.load(student_program.path).module()
    assert torch.allclose(
        network(noise, label), d2o.load_student(folder / "student.safetensors")(noise, label), atol=1e-5
    )


def test_labels_out_of_range_act_as_no_class(student_program):
    noise, network = torch.randn(1, 1, 8, 8), torch.export.load(student_program.path).module()
    none = network(noise, torch.tensor([-1]))
    assert torch.equal(network(noise, torch.tensor([99])), none)
    assert not torch.allclose(network(noise, torch.tensor([3])), none, atol=1e-3)


@pytest.mark.long
def test_unconditional_student(folder, plain_program):
    noise = torch.randn(5, 2, 8, 8)
    network = torch.export.load(plain_program.path).module()
    assert torch.allclose(network(noise), d2o.load_student(folder / "plain.safetensors")(noise), atol=1e-5)
    assert plain_program.parity.batch_sizes == (1,)


def test_the_file_says_what_it_is_and_shows_no_path_of_this_machine(student_program):
    record = program_record(student_program.path)
    assert record["teacher"]["licence"] == "CC-BY-NC-4.0"
    assert record["provenance"][-1]["exported"] == "program"
    data = student_program.path.read_bytes()
    assert str(Path(d2o.__file__).parent).encode() not in data
    assert str(Path(torch.__file__).parent).encode() not in data


@pytest.mark.long
def test_the_cards_snippets_run(folder, student_program, plain_program, monkeypatch):
    run_students_snippet(student_program, folder, monkeypatch)
    run_snippet_of(plain_program, (4, 2, 8, 8), monkeypatch)


def test_a_failing_torch_export_is_one_line(folder, tmp_path, monkeypatch):
    def fails(*args, **options):
        raise RuntimeError("data-dependent\n" + "page after page\n" * 50)

    monkeypatch.setattr(torch.export, "export", fails)
    monkeypatch.setattr(program, "trace", trace_itself)
    with pytest.raises(UserError, match=r"cannot export this network: data-dependent\n"):
        export_checkpoint(folder / "student.safetensors", "program", tmp_path / "x.pt2")
    assert not list(tmp_path.iterdir())
