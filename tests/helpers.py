"""Tiny networks and stores that many tests need."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from d2o.condition import Condition, Text
from d2o.errors import UserError
from d2o.interop.safetensors_io import save_file
from d2o.networks.edm_unet import EDMPrecond
from d2o.students.base import Student, checkpoint_meta, save_student
from d2o.teachers.base import Spec, Teacher

SPEC = Spec(name="tiny", shape=(1, 8, 8), condition="label", classes=10, licence="CC0-1.0")


def but_for(quick: Callable[..., bool], cases: Iterable[Any]) -> list[Any]:
    """The cases of a parametrised test, all marked `long` but for the quick ones. A case: a value, or a tuple of
    values."""
    found = []
    for case in cases:
        values = case if isinstance(case, tuple) else (case,)
        found.append(pytest.param(*values, marks=() if quick(*values) else pytest.mark.long))
    return found


def tiny_network(seed: int = 0, **more) -> EDMPrecond:
    """About 20 thousand parameters, with outputs that depend on all inputs."""
    torch.manual_seed(seed)
    config = {
        "model_channels": 16,
        "channel_mult": (1,),
        "num_blocks": 1,
        "attn_resolutions": (),
        "dropout": 0.0,
        **more,
    }
    network = EDMPrecond("ddpmpp", 8, 1, 10, **config)
    with torch.no_grad():  # the last convolutions start at 1e-5: give the untrained network something to say
        for name, p in network.named_parameters():
            if "conv1" in name or "aux_conv" in name or "proj" in name:
                p.normal_(0, 0.05)
    return network


def tiny_teacher(path: Path | None = None, seed: int = 0) -> Teacher:
    network = tiny_network(seed)
    if path is not None:
        save_file(path, network.state_dict(), checkpoint_meta("teacher", network.config, SPEC))
    return Teacher(network, SPEC)


def tiny_student(path: Path | None = None, seed: int = 1) -> Student:
    student = Student(tiny_network(seed), SPEC)
    if path is not None:
        save_student(
            path,
            student,
            recipe={},
            teacher={"name": "tiny", "sha256": "0" * 64, "licence": "CC0-1.0"},
            metrics={},
            provenance=[],
        )
    return student.eval().requires_grad_(False)


def tiny_recipe(folder: Path, text: str) -> Path:
    """`text`, with {teacher} and {pairs}, as a recipe file in `folder`, beside the tiny teacher that it names."""
    tiny_teacher(folder / "teacher.safetensors")
    path = folder / "recipe.yaml"
    path.write_text(text.format(teacher=folder / "teacher.safetensors", pairs=folder / "pairs"))
    return path


class TinyText(Teacher):
    """A text teacher without a text encoder: a prompt's "embedding" is made from its bytes, and the labels 0..9 from
    its length."""

    def __init__(self, seed: int = 0):
        super().__init__(tiny_network(seed), replace(SPEC, name="tiny-text", condition="text", classes=0))
        self.encoded: list[str] = []

    def embed(self, condition):
        if isinstance(condition, Text):
            return condition
        if not isinstance(condition, Condition) or condition.prompts is None:
            raise UserError("'tiny-text' is conditioned on text")
        self.encoded += condition.prompts
        return Text(torch.tensor([[[float(len(prompt) % 10)]] for prompt in condition.prompts]))

    def check_condition(self, embedded, batch):
        assert len(embedded) == batch
        return embedded

    def unconditional(self, embedded):
        return Text(torch.full_like(embedded.states, -1.0))

    def predict(self, x_t, t, embedded):
        return self.network(x_t, t, embedded.states[:, 0, 0].long())


def tensors(pairs):
    """Noise, labels and target of what `PairStore.batch` gives."""
    noise, condition, target = pairs
    return noise, condition.labels, target


def check_same_bytes(*runs: Path) -> None:
    """The last checkpoint and the training state of these runs are the same files."""
    for name in ("last", "state"):
        first, *others = ((run / "checkpoints" / f"{name}.safetensors").read_bytes() for run in runs)
        assert others and all(other == first for other in others), name
