"""Checkpoints and their exports, made once: a torch.export graph takes seconds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from d2o.export.exporter import export_checkpoint
from d2o.interop.safetensors_io import save_file
from d2o.networks.edm_unet import EDMPrecond
from d2o.students.base import Student, checkpoint_meta, save_student
from tests.helpers import SPEC, tiny_network

RECIPE = {
    "name": "tiny-ode",
    "method": "ode",
    "images": 1000,
    "eval": {"metric": "fd", "extractor": "digits", "n": 500, "seed": 7},
}
TEACHER = {"name": "big-teacher", "sha256": "ab" * 32, "licence": "CC-BY-NC-4.0"}
PROVENANCE = [
    {"method": "ode", "recipe": "first-run", "images": 600},
    {"method": "ode", "recipe": "tiny-ode", "images": 1000},
]


def save_conditional(path: Path, **more) -> None:
    """A label-conditioned student with everything recorded."""
    meta = {
        "recipe": RECIPE,
        "teacher": TEACHER,
        "metrics": {"fd": 1.8312345},
        "provenance": PROVENANCE,
        "images": 1000,
        **more,
    }
    save_student(path, Student(tiny_network(1, num_blocks=0), SPEC), **meta)


def save_unconditional(path: Path) -> None:
    """An unconditional student with nothing recorded."""
    torch.manual_seed(2)
    config = {"model_channels": 16, "channel_mult": (1,), "num_blocks": 0, "attn_resolutions": ()}
    network = EDMPrecond("ddpmpp", 8, 2, 0, **config)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.05 * torch.randn_like(p))
    save_student(
        path, Student(network, replace(SPEC, shape=(2, 8, 8), condition="none", classes=0, licence="unstated"))
    )


@pytest.fixture(scope="session")
def folder(tmp_path_factory, one_graph_a_network):
    folder = tmp_path_factory.mktemp("exports")
    save_conditional(folder / "student.safetensors")
    save_unconditional(folder / "plain.safetensors")
    network = tiny_network(3, num_blocks=0)
    save_file(folder / "teacher.safetensors", network.state_dict(), checkpoint_meta("teacher", network.config, SPEC))
    return folder


@pytest.fixture(scope="session")
def student_onnx(folder):
    return export_checkpoint(folder / "student.safetensors", "onnx", check_n=3)


@pytest.fixture(scope="session")
def plain_onnx(folder):
    return export_checkpoint(folder / "plain.safetensors", "onnx", check_n=3, opset=20)


@pytest.fixture(scope="session")
def teacher_onnx(folder):
    return export_checkpoint(folder / "teacher.safetensors", "onnx", check_n=3)


@pytest.fixture(scope="session")
def student_program(folder):
    return export_checkpoint(folder / "student.safetensors", "program", check_n=3)


@pytest.fixture(scope="session")
def plain_program(folder):
    return export_checkpoint(folder / "plain.safetensors", "program", check_n=1)


@pytest.fixture(scope="session")
def student_fp16(folder):
    return export_checkpoint(folder / "student.safetensors", "safetensors", dtype="fp16")


@pytest.fixture(scope="session")
def teacher_bf16(folder):
    return export_checkpoint(folder / "teacher.safetensors", "safetensors", dtype="bf16")
