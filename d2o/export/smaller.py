"""Weights alone, in a chosen precision: a d2o checkpoint like the one it came from, smaller."""

from __future__ import annotations

from pathlib import Path

import torch

from d2o.errors import UserError
from d2o.export.loaded import Loaded, again
from d2o.export.parity import Runner
from d2o.inputs import JsonObject
from d2o.interop.safetensors_io import to_bytes
from d2o.students.base import load_student
from d2o.teachers.registry import load_teacher

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 1e-4, **{name: 32 * torch.finfo(DTYPES[name]).eps for name in ("fp16", "bf16")}}
"""What an export may change in an output of -1 to 1, unless the user says otherwise: the order of sums (fp32), or the
rounding of the weights, 32 times the spacing of numbers at 1 (fp16 0.031, bf16 0.25). A student of a network that
predicts noise multiplies it by its noise level: 22 times were seen at sigma 14.6."""


def write_weights(source: Loaded, path: Path, record: JsonObject, dtype: str) -> None:
    """Write the parameters as `dtype` (fp32, fp16, bf16); buffers (filters, fixed frequencies) keep theirs. UserError:
    fp16 overflow."""
    parameters = {name for name, _ in source.network.named_parameters()}
    tensors = {}
    for name, tensor in source.network.state_dict().items():
        tensors[name] = tensor.to(DTYPES[dtype]) if name in parameters and tensor.is_floating_point() else tensor
        if not tensors[name].isfinite().all() and tensor.isfinite().all():
            raise UserError(f"{name} of {source.path} holds values that {dtype} cannot", "use --dtype bf16 or fp32")
    path.write_bytes(to_bytes(tensors, record))  # the caller's temporary file already


def open_weights(source: Loaded, path: Path) -> Runner:
    """The file through d2o's own loader: the weights are rounded, the arithmetic is float32."""
    if source.kind == "student":
        student = again(source, load_student(path))
        return lambda inputs: student(*inputs)
    teacher = load_teacher(path)
    return lambda inputs: teacher.denoise(*inputs)
