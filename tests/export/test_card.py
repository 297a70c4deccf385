import re

import pytest
import yaml

from d2o.errors import UserError
from d2o.export.card import card
from d2o.export.exporter import export_checkpoint
from d2o.export.loaded import load_exportable
from d2o.export.parity import Parity
from tests.export.conftest import PROVENANCE, RECIPE, save_conditional
from tests.export.snippets import run_snippet_of, run_students_snippet

PARITY = Parity(1.5e-6, 0.9, (1, 16), 1e-4, "fake runtime")


def front_matter(text):
    return yaml.safe_load(text.split("---\n")[1])


def section(text, title):
    return re.search(rf"^## {title}\n\n(.*?)(?=^## |\Z)", text, re.M | re.S).group(1)


def yaml_block(text):
    return yaml.safe_load(re.search(r"^(`{3,})yaml\n(.*?)\n\1$", text, re.M | re.S).group(2))


def test_a_card_says_what_the_checkpoint_records(folder, student_fp16):
    text = student_fp16.card.read_text()
    assert student_fp16.card.name == "student-fp16.safetensors.md"
    front = front_matter(text)
    assert (front["license"], front["library_name"]) == ("cc-by-nc-4.0", "d2o")
    assert {"d2o", "one-step", "safetensors"} <= set(front["tags"])
    assert "distilled from the diffusion model `big-teacher`" in text
    assert "| condition | class label, 10 classes |" in text
    assert "| images trained on | 1,000 |" in text
    assert "`CC-BY-NC-4.0`" in section(text, "Teacher and licence")
    assert "ab" * 32 in section(text, "Teacher and licence")
    assert yaml_block(section(text, "Recipe")) == RECIPE
    assert "| `fd` | 1.831 |" in section(text, "Metrics")
    assert yaml_block(section(text, "Metrics")) == RECIPE["eval"]
    chain = section(text, "Provenance")
    for line, step in zip(re.findall(r"^\d\. .*", chain, re.M), PROVENANCE, strict=True):
        assert all(f"{key}: `{value}`" in line for key, value in step.items())
    parity = yaml_block(section(text, "Numerical parity"))
    assert parity["max_abs_difference"] == pytest.approx(student_fp16.parity.difference, rel=1e-2)
    assert parity["batch_sizes"] == [1, 16]


def test_what_is_absent_is_stated_as_absent(folder):
    text = card(
        load_exportable(folder / "plain.safetensors"), "x.onnx", "onnx", "opset 18", PARITY, "plain.safetensors"
    )
    assert front_matter(text)["license"] == "unknown"
    assert front_matter(text)["pipeline_tag"] == "unconditional-image-generation"
    for sentence in (
        "a teacher that the checkpoint does not name",
        "The checkpoint does not name its teacher.",
        "The checkpoint states no licence",
        "The checkpoint records no recipe.",
        "The checkpoint records no metrics.",
        "The checkpoint records no provenance.",
        "| images trained on | not recorded |",
    ):
        assert sentence in text
    assert "Labels are" not in text


def test_metrics_without_and_with_their_own_protocol(tmp_path):
    save_conditional(tmp_path / "a.safetensors", recipe={"name": "x"}, metrics={"fd": 2.0})
    save_conditional(
        tmp_path / "b.safetensors",
        recipe={"name": "x"},
        metrics={"fd": 2.0, "protocol": {"n": 50, "extractor": "digits"}},
    )
    a, b = (
        card(load_exportable(tmp_path / f"{x}.safetensors"), "x.onnx", "onnx", "opset 18", PARITY, "x") for x in "ab"
    )
    assert "records no protocol" in section(a, "Metrics")
    assert "records no protocol" not in section(b, "Metrics")
    assert yaml_block(section(b, "Metrics")) == {"protocol": {"n": 50, "extractor": "digits"}}


def test_another_licence_is_named_in_the_front_matter(tmp_path):
    save_conditional(tmp_path / "s.safetensors", teacher={"name": "x", "licence": "NVIDIA Source Code License"})
    text = card(load_exportable(tmp_path / "s.safetensors"), "x.onnx", "onnx", "opset 18", PARITY, "s.safetensors")
    assert front_matter(text)["license"] == "other"
    assert front_matter(text)["license_name"] == "nvidia-source-code-license"
    assert "`NVIDIA Source Code License`" in text
    assert "weights sha256 not recorded" in text


def test_text_in_the_metadata_cannot_break_the_card(tmp_path):
    nasty = "a`b|c\n---\n```\n# heading"
    save_conditional(
        tmp_path / "s.safetensors",
        teacher={"name": nasty, "licence": nasty},
        recipe={"note": nasty},
        provenance=[{"x": nasty}],
    )
    text = card(load_exportable(tmp_path / "s.safetensors"), "x.onnx", "onnx", "opset 18", PARITY, "s.safetensors")
    assert front_matter(text)["license"] == "other"
    assert yaml_block(section(text, "Recipe")) == {"note": nasty}
    assert not re.search(r"^# heading", text.replace(section(text, "Recipe"), ""), re.M)


def test_metadata_of_odd_types_is_refused_and_absent_ones_still_give_a_card(tmp_path):
    save_conditional(tmp_path / "odd.safetensors", teacher="x", recipe=["y"], metrics=3, provenance="z")
    with pytest.raises(UserError, match=r"metadata: teacher: [^\n]*\n.*metadata: recipe: "):
        load_exportable(tmp_path / "odd.safetensors")
    save_conditional(tmp_path / "s.safetensors", teacher=None, recipe=None, metrics=None, provenance=None, images=None)
    text = card(load_exportable(tmp_path / "s.safetensors"), "x.onnx", "onnx", "opset 18", PARITY, "s.safetensors")
    assert "The checkpoint does not name its teacher." in text
    assert "`CC0-1.0`" in text  # from the spec


def test_the_snippets_of_weights_run(folder, student_fp16, teacher_bf16, monkeypatch):
    run_students_snippet(student_fp16, folder, monkeypatch, 1e-2)
    run_snippet_of(teacher_bf16, (4, 1, 8, 8), monkeypatch)


def test_the_snippet_of_a_teachers_program_and_of_plain_weights(folder, tmp_path):
    text = card(load_exportable(folder / "teacher.safetensors"), "x.pt2", "program", "torch", PARITY, "t")
    assert "denoised = network(noisy, sigma, label)" in text
    assert "This file is itself a teacher, `tiny`." in text
    done = export_checkpoint(folder / "plain.safetensors", "safetensors", tmp_path)
    assert "image = student(noise)" in done.card.read_text()
