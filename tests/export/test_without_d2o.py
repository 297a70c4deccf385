"""An exported folder makes the images of `d2o sample` without d2o: in a process that sees the same packages, linked
into a folder that lacks it."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from d2o.cli.app import main
from d2o.diffusion.noise import noise_and_labels
from d2o.export.exporter import export_checkpoint
from d2o.students.base import Student, save_student
from d2o.teachers.in_edm import in_edm
from d2o.teachers.registry import load_teacher
from tests.export.test_student_folder import shaken

ABSENT = ("d2o", "_d2o", "__editable__", "torchvision", "torchaudio", "distutils")
"""torchvision: its CPU build fails at import beside this torch, which d2o mends; diffusers does not need it."""
SCRIPT = """
import importlib.util, json, sys
import numpy as np, torch
assert importlib.util.find_spec("d2o") is None
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1])
noise, asked = torch.from_numpy(np.load(sys.argv[2])), json.loads(sys.argv[4])
images = pipeline(latents=noise, num_inference_steps=1, output_type="np", **asked).images
np.save(sys.argv[3], images)
"""


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """The packages that are installed here, without d2o."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not path.name.startswith(ABSENT) and path.suffix != ".pth":
            (packages / path.name).symlink_to(path)
    return packages


@pytest.mark.long
def test_a_text_student(bare: Path, tmp_path: Path) -> None:
    teacher = in_edm(load_teacher("tiny-sd"))
    student = Student(shaken(teacher.network), teacher.spec, 14.6146)
    told = {"name": "tiny-sd", "sha256": "0" * 64, "licence": "MIT"}
    save_student(tmp_path / "s.safetensors", student.eval(), recipe={}, teacher=told, metrics={}, provenance=[])
    prompts = ["a handwritten seven", "the digit 3"]
    words = [word for prompt in prompts for word in ("--prompt", prompt)]
    with pytest.raises(SystemExit) as done:
        main(["sample", str(tmp_path / "s.safetensors"), "--n=2", "--seed=5", f"--out={tmp_path / 'png'}", *words])
    assert not done.value.code
    ours = np.stack([np.asarray(Image.open(path)) for path in sorted((tmp_path / "png").rglob("*.png"))]).astype(int)
    folder = export_checkpoint(tmp_path / "s.safetensors", "diffusers", tmp_path / "out").path
    np.save(tmp_path / "noise.npy", noise_and_labels(range(5, 7), student.spec.shape, 0)[0].numpy())
    asked = '{"prompt": ["a handwritten seven", "the digit 3"], "guidance_scale": 1.0}'
    files = [str(folder), str(tmp_path / "noise.npy"), str(tmp_path / "images.npy"), asked]
    python, env = [sys.executable, "-S", "-c", SCRIPT, *files], {**os.environ, "PYTHONPATH": str(bare)}
    told_by = subprocess.run(python, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert told_by.returncode == 0, told_by.stderr[-2000:]
    theirs = np.load(tmp_path / "images.npy") * 255
    assert ours.shape == theirs.shape == (2, 32, 32, 3) and ours.std() > 10
    assert np.abs(ours - theirs).max() <= 1
