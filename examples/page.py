"""A page on this machine: a class or a prompt, and a seed; the teacher's image beside the student's, with times.

    pip install 'd2o[demo]'
    python examples/page.py runs/quickstart                          # http://127.0.0.1:7860
    python examples/page.py runs/d2g_tiny_sd --cfg 3                 # the teacher's guidance scale
    python examples/page.py my-student.safetensors --teacher my-model/

The teacher is the one that the checkpoint names, unless `--teacher` names another.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import d2o
from d2o.condition import Condition
from d2o.data.images import to_uint8
from d2o.diffusion.noise import noise_for_seeds
from d2o.students.base import Student
from d2o.teachers.base import Teacher

SIDE = 384
"""Pixels of an image on the page."""


def timed(call: Callable[[], Tensor]) -> tuple[Image.Image, float]:
    """The one image [1, C, H, W] in [-1, 1] that `call` makes, enlarged without smoothing, and the seconds it took."""
    start = time.perf_counter()
    with torch.inference_mode():
        pixels = to_uint8(call()[0].cpu())
    seconds = time.perf_counter() - start
    array = pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).numpy()
    return Image.fromarray(array).resize((SIDE, SIDE), Image.Resampling.NEAREST), seconds


def both(
    teacher: Teacher, student: Student, asked: str, seed: int, cfg: float
) -> tuple[Image.Image, str, Image.Image, str]:
    """Teacher's and student's image of the same noise, each with a line about it. ValueError: a class that is none."""
    noise, spec = noise_for_seeds([seed], student.spec.shape), student.spec
    condition = None
    if spec.condition == "label":
        if not 0 <= int(asked) < spec.classes:
            raise ValueError(f"classes are 0 to {spec.classes - 1}")
        condition = Condition.of_labels([int(asked)])
    if spec.condition == "text":
        condition = Condition.of_prompts([asked])
    told = condition.guided(cfg) if condition is not None and student.guidance is not None else condition
    slow, slow_s = timed(lambda: teacher.decode(teacher.sample(noise.to(teacher.device), condition, cfg=cfg)))
    fast, fast_s = timed(lambda: student.decode(student(noise.to(student.device), told)))
    steps = teacher.solver(None).steps
    calls = f"{student.nfe} network call{'s' if student.nfe > 1 else ''}"
    return (
        slow,
        f"Teacher: {steps} steps, {slow_s:.3f} s",
        fast,
        f"Student: {calls}, {fast_s:.3f} s: {slow_s / fast_s:.0f} times as fast",
    )


def page(teacher: Teacher, student: Student, cfg: float) -> Any:
    """The page, a gradio Blocks."""
    import gradio as gr

    spec = student.spec
    with gr.Blocks(title="d2o") as blocks:
        gr.Markdown(f"## One step beside many\n{teacher.spec.name}, and a student of it, from the same noise")
        with gr.Row():
            if spec.condition == "text":
                asked = gr.Textbox("a handwritten seven", label="Prompt")
            else:
                classes = [str(i) for i in range(spec.classes)] or ["none"]
                asked = gr.Dropdown(classes, value=classes[0], label="Class", visible=spec.classes > 0)
            seed = gr.Number(0, label="Seed", precision=0, minimum=0)
        button = gr.Button("Make both", variant="primary")
        with gr.Row():
            with gr.Column(min_width=140):
                slow = gr.Image(show_label=False, buttons=[])
                slow_text = gr.Markdown()
            with gr.Column(min_width=140):
                fast = gr.Image(show_label=False, buttons=[])
                fast_text = gr.Markdown()

        def make(asked: str, seed: int) -> tuple[Image.Image, str, Image.Image, str]:
            return both(teacher, student, asked, int(seed), cfg)

        for event in (button.click, asked.change, seed.change, blocks.load):
            event(make, [asked, seed], [slow, slow_text, fast, fast_text])
    return blocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student")
    parser.add_argument("--teacher", help="name, file or folder; default: the one that the student's checkpoint names")
    parser.add_argument("--cfg", type=float, default=1.0, help="guidance scale of the teacher")
    parser.add_argument("--port", type=int, default=7860)
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    student = d2o.load_student(given.student, device)
    teacher = d2o.load_teacher(given.teacher or student.meta["teacher"]["name"], device)
    page(teacher, student, given.cfg).launch(server_name="127.0.0.1", server_port=given.port)


if __name__ == "__main__":
    main()
