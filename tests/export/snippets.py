"""The code of model cards, run as it stands there."""

from __future__ import annotations

import re

import numpy as np
import torch

import d2o


def run_snippet(text):
    (code,) = re.findall(r"^```python\n(.*?)\n```$", text, re.M | re.S)
    names: dict = {}
    exec(code, names)
    return names


def run_snippet_of(exported, shape, monkeypatch):
    """It makes pictures of that shape."""
    monkeypatch.chdir(exported.path.parent)
    names = run_snippet(exported.card.read_text())
    assert tuple(names["pixels"].shape) == shape
    return names


def run_students_snippet(exported, folder, monkeypatch, tolerance=1e-5):
    """It gives the images of the student in `folder`."""
    names = run_snippet_of(exported, (4, 1, 8, 8), monkeypatch)
    student = d2o.load_student(folder / "student.safetensors")
    expected = student(torch.as_tensor(names["noise"]), torch.as_tensor(names["label"]))
    assert torch.allclose(torch.as_tensor(names["image"]), expected, atol=tolerance)
    pixels = np.asarray(names["pixels"])
    assert pixels.dtype == np.uint8
    assert np.ptp(pixels) > 20
