"""Students of diffusers networks as folders that diffusers calls once."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch

from d2o.condition import Condition
from d2o.diffusion.noise import noise_and_labels
from d2o.errors import UserError
from d2o.export import student_folder
from d2o.export.exporter import export_checkpoint
from d2o.export.folder import open_pipeline
from d2o.networks.edm_view import EDMView
from d2o.networks.second_time import with_second_time
from d2o.students.base import Student, save_student
from d2o.students.consistency import ConsistencyStudent
from d2o.teachers.in_edm import in_edm
from d2o.teachers.registry import load_teacher
from tests.helpers import tiny_student
from tests.teachers.families import tiny


def shaken(network, seed=0):
    """Away from the teacher, so that a folder of the teacher's weights would not pass."""
    network = copy.deepcopy(network)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=generator))
    return network


def student_of(teacher, form, sigma=2.5):
    teacher = in_edm(teacher)
    if form == "denoiser":
        return Student(shaken(teacher.network), teacher.spec, sigma)
    network = shaken(with_second_time(teacher.network) if form == "ctm" else teacher.network)
    network.precond = network.config["precond"] = "consistency" if form == "cd" else "edm"
    return ConsistencyStudent(network, teacher.spec, sigma, form)


def saved(student, path):
    made_by = {"name": "tiny", "sha256": "0" * 64, "licence": "MIT"}
    save_student(path, student.eval(), recipe={}, teacher=made_by, metrics={}, provenance=[])
    return path


@pytest.mark.parametrize("name", ["ddpm", "ddpm-labels"])
@pytest.mark.parametrize("form", ["denoiser", "cd", "pd", "ctm"])
def test_pixel_students_are_pipelines_of_one_step(name, form, tmp_path):
    student = student_of(tiny(name, tmp_path), form, 30.0 if form == "denoiser" else 2.5)
    done = export_checkpoint(saved(student, tmp_path / "s.safetensors"), "diffusers", tmp_path / "out", dtype="fp32")
    assert done.parity.difference < 1e-4 and done.licence == "MIT"
    pipeline = open_pipeline(done.path)
    noise, labels = noise_and_labels(range(3), student.spec.shape, student.spec.classes)
    asked = {"class_labels": labels.tolist()} if student.spec.classes else {}
    theirs = pipeline(batch_size=3, latents=noise, output_type="pt", **asked).images * 2 - 1
    ours = student.decode(student(noise, labels if student.spec.classes else None))
    assert (theirs - ours).abs().max() < 0.05 and theirs.std() > 0.05
    with pytest.raises(UserError, match="distilled already"):
        load_teacher(done.path)


@pytest.mark.long
def test_the_card_runs(tmp_path, monkeypatch):
    student = student_of(tiny("ddpm-labels", tmp_path), "denoiser")
    done = export_checkpoint(saved(student, tmp_path / "s.safetensors"), "diffusers", tmp_path / "out", dtype="fp16")
    monkeypatch.chdir(tmp_path)
    card = done.card.read_text()
    assert 0 < done.parity.unrounded < 1e-4 < done.parity.difference < done.parity.tolerance == 32 * 2**-10
    assert "before_rounding" in card and "before its weights are rounded" in str(done.parity)
    assert "EulerDiscreteScheduler" in card and "num_inference_steps=1" in card and "library_name: diffusers" in card
    scope: dict = {}
    exec(card.split("```python\n")[1].split("```")[0], scope)
    assert [image.size for image in scope["images"]] == [(8, 8)] * 4
    again = export_checkpoint(tmp_path / "s.safetensors", "diffusers", tmp_path / "out", dtype="fp16")
    assert again.unchanged
    saved(student_of(tiny("ddpm-labels", tmp_path), "denoiser", 1.0), tmp_path / "s.safetensors")
    with pytest.raises(UserError, match="holds another model"):
        export_checkpoint(tmp_path / "s.safetensors", "diffusers", tmp_path / "out", dtype="fp16")


def test_rounding_hides_no_other_difference(tmp_path, monkeypatch):
    """A folder that differs by less than rounding may, but for another reason, is refused."""
    student = student_of(tiny("ddpm-labels", tmp_path), "denoiser")
    path = saved(student, tmp_path / "s.safetensors")
    other = student_folder.one_call(Student(student.network, student.spec, 2.52), path).scheduler
    asked = {"dtype": "fp16", "tolerance": 0.5}
    assert export_checkpoint(path, "diffusers", tmp_path / "out", **asked).parity.unrounded < 1e-4
    right = student_folder.one_call
    monkeypatch.setattr(student_folder, "one_call", lambda *given: replace(right(*given), scheduler=other))
    with pytest.raises(UserError, match="above the tolerance 0.0001"):
        export_checkpoint(path, "diffusers", tmp_path / "other", **asked)
    assert not (tmp_path / "other").exists()


def test_networks_that_predict_a_variance_export_without_it(tmp_path):
    from tests.teachers import pipelines

    base = tiny("ddpm", tmp_path)
    unet = pipelines.unconditional(out_channels=6).unet
    view = EDMView.of(unet, base.schedule.record(), "epsilon")
    path = saved(Student(view, in_edm(base).spec, 2.5), tmp_path / "s.safetensors")
    done = export_checkpoint(path, "diffusers", tmp_path / "out", dtype="fp32")
    assert json.loads((done.path / "unet/config.json").read_text())["out_channels"] == 3
    assert done.parity.difference < 1e-4


def test_what_diffusers_cannot_call_is_refused(tmp_path):
    tiny_student(tmp_path / "edm.safetensors")
    with pytest.raises(UserError, match="a network that diffusers does not have \\(EDMPrecond\\)"):
        export_checkpoint(tmp_path / "edm.safetensors", "diffusers")
    two = student_of(tiny("ddpm", tmp_path), "cd").with_steps(2)
    with pytest.raises(UserError, match="in 2 network calls"):
        export_checkpoint(saved(two, tmp_path / "two.safetensors"), "diffusers")


@pytest.mark.long
@pytest.mark.parametrize(("name", "form"), [("sd", "denoiser"), ("sd", "cd"), ("sd-v", "ctm"), ("sdxl", "denoiser")])
def test_text_students_are_stable_diffusion_pipelines(name, form, tmp_path):
    teacher = tiny(name, tmp_path)  # who keeps the text encoders in this process
    check_text_student(student_of(teacher, form), tmp_path)


@pytest.mark.parametrize(("form", "sigma"), [("denoiser", 80.0), ("cd", 5.0), ("ctm", 80.0)])
def test_flow_students_are_stable_diffusion_3_pipelines(form, sigma, tmp_path):
    teacher = tiny("sd3", tmp_path, t5_length=256)
    check_text_student(student_of(teacher, form, sigma), tmp_path)


def check_text_student(student, tmp_path):
    saved(student, tmp_path / "s.safetensors")
    done = export_checkpoint(tmp_path / "s.safetensors", "diffusers", tmp_path / "out", dtype="fp32", check_n=2)
    assert done.parity.difference < 1e-4
    pipeline = open_pipeline(done.path)
    noise, _ = noise_and_labels(range(2), student.spec.shape, 0)
    asked = {"num_inference_steps": 1, "guidance_scale": 0.0, "output_type": "pt", "latents": noise}
    theirs = pipeline(["abc", "a longer prompt"], **asked).images * 2 - 1
    ours = student.decode(student(noise, Condition.of_prompts(["abc", "a longer prompt"])))
    assert (theirs - ours).abs().max() < 1e-3 and ours.std() > 0.01
    assert "num_inference_steps=1, guidance_scale=0.0" in done.card.read_text()
