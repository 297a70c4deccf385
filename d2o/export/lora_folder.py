"""A LoRA student as diffusers' pipelines load one: its adapters, and the scheduler of its one step. The rest is the
teacher, which whoever uses it has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from d2o.condition import Condition
from d2o.errors import UserError
from d2o.export.card import card
from d2o.export.folder import LORA, beside, check_target, keep, open_pipeline, save_part
from d2o.export.loaded import Loaded, prompts
from d2o.export.one_call import one_call, unclamped
from d2o.export.parity import Parity, compare
from d2o.export.smaller import TOLERANCE
from d2o.interop.hub import is_diffusers_folder
from d2o.interop.safetensors_io import atomic_write
from d2o.networks.edm_view import EDMView
from d2o.networks.lora import as_diffusers
from d2o.teachers.diffusers_parts import quiet
from d2o.teachers.registry import locate

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

MERGED = "--merged writes the whole model, with the adapters in its weights"


def write_lora(
    source: Loaded, target: Path, dtype: str, check_n: int, tolerance: float, force: bool
) -> tuple[Parity, bool]:
    """Write the student's adapters as the folder `target`, in `dtype`; they are loaded back into the teacher's own
    pipeline and compared. Returns the comparison, and whether the same folder was there already. UserError: as
    `write_student`; a pipeline that takes no LoRA, or one whose step takes more than that."""
    student, view = source.student, source.network
    assert isinstance(view, EDMView)
    base, call = base_folder(source, view), one_call(student, source.path)
    check_target(target)
    tensors = as_diffusers(view)
    with beside(target) as folder:
        save_part(tensors, folder / LORA, dtype)
        call.scheduler.save_pretrained(folder / "scheduler")
        parity = _compare(source, base, folder, call.scheduler, tensors, dtype, check_n, tolerance)
        atomic_write(folder / "README.md", card(source, target.name, "lora", dtype, parity, source.path.name))
        return parity, keep(folder, target, force)


def base_folder(source: Loaded, view: EDMView) -> Path:
    """Where the teacher's pipeline is. UserError: it has none, or none that a LoRA goes into."""
    if view.kind != "UNet2DConditionModel":
        why = "whose one step changes more than a LoRA holds" if source.spec.condition == "text" else "without text"
        raise UserError(f"{source.path}: diffusers has no LoRAs for pipelines of a {view.kind}, {why}", MERGED)
    base = locate(view.config["lora"]["base"]["name"])
    if not is_diffusers_folder(base):
        what = f"{source.path} is a LoRA of {base}, which is no diffusers folder that could load it"
        raise UserError(what, f"{MERGED}; `d2o export {base} --format diffusers` makes a folder to train from")
    return base


def _compare(
    source: Loaded,
    base: Path,
    folder: Path,
    scheduler: SchedulerMixin,
    tensors: dict[str, Tensor],
    dtype: str,
    n: int,
    tolerance: float,
) -> Parity:
    """Images of the teacher's pipeline with the LoRA against the student's, in [-1, 1]; with rounded adapters, and with
    unrounded ones, which have to be the same."""
    import diffusers

    pipeline: Any = open_pipeline(base)
    pipeline.scheduler = type(scheduler).from_pretrained(folder / "scheduler")
    student = unclamped(source.student)

    def run(inputs: tuple[Tensor, ...]) -> Tensor:
        asked = {"prompt": prompts(len(inputs[0])), "guidance_scale": 0.0, "num_inference_steps": 1}
        return pipeline(latents=inputs[0], output_type="pt", **asked).images * 2 - 1

    def expected(noise: Tensor, *rest: Tensor) -> Tensor:
        return student.decode(student(noise, Condition.of_prompts(prompts(len(noise)))))

    runtime = (
        f"diffusers {diffusers.__version__} in float32, the LoRA in the pipeline of its teacher, against the student,"
        f" torch {torch.__version__}"
    )
    with quiet():
        pipeline.load_lora_weights(str(folder))
    parity = compare(source, run, n, tolerance, runtime, expected)
    if dtype == "fp32":
        return parity
    with quiet():
        pipeline.unload_lora_weights()
        pipeline.load_lora_weights(dict(tensors))
    return replace(parity, unrounded=compare(source, run, n, TOLERANCE["fp32"], runtime, expected).difference)
