"""Pictures on the way: teacher and product from the same noises, with what they are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from d2o.training.preview import Preview
from tests.helpers import SPEC, tiny_teacher


def test_a_preview_shows_as_many_of_each_class_and_repeats(tmp_path: Path) -> None:
    teacher = tiny_teacher()
    preview = Preview(tmp_path, SPEC, 64, teacher, None, teacher.solver("euler", 2), torch.device("cpu"))
    assert (
        preview.condition.labels.tolist() == [c for c in range(10) for _ in range(6)]
        and preview.layout.rows[0] == "class 0"
    )
    assert preview.left[0] == "teacher, 2 steps of euler" and preview.left[1].shape == (60, 1, 8, 8)

    def generate(noise: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return noise.clamp(-1, 1)

    path = preview.write(1000, generate)
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.height >= 10 * 64 and picture.width >= 2 * 6 * 64
    first = path.read_bytes()
    assert preview.write(1000, generate).read_bytes() == first and preview.write(2000, generate).read_bytes() != first
    few = Preview(tmp_path, SPEC, 4, None, None, None, torch.device("cpu"))
    assert (
        len(few.noise) == 4 and few.layout.captions == ["class 0", "class 2", "class 5", "class 7"] and few.left is None
    )
    assert few.write(0, generate).name == "000000000.png"


def test_a_preview_of_prompts_names_them(tmp_path: Path) -> None:
    spec = replace(SPEC, condition="text", classes=0)
    prompts = ["a seven", "a two"]
    preview = Preview(tmp_path, spec, 6, None, None, None, torch.device("cpu"), prompts)
    assert preview.condition.prompts == tuple(prompts * 3)
    assert preview.layout.order == [0, 2, 4, 1, 3, 5] and preview.layout.rows == prompts
    one_each = Preview(tmp_path, spec, 2, None, None, None, torch.device("cpu"), prompts)
    assert one_each.layout.captions == prompts
