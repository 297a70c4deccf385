"""A diffusers folder that appears whole or not at all, and never in the place of anything else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save
from torch import Tensor

from d2o.errors import UserError
from d2o.interop.safetensors_io import atomic_write, file_sha256, write_error
from d2o.interop.temporary import sweep, temporary_folder
from d2o.teachers.diffusers_parts import quiet, read_config

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

LORA = "pytorch_lora_weights.safetensors"
"""The file that pipelines look for in a folder of a LoRA."""
GRAPHS = ("student.onnx", "student.pt2")
"""The files in folders of text students' graphs by which they are known."""
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def save_part(tensors: dict[str, Tensor], path: Path, dtype: str) -> None:
    atomic_write(path, save(cast_to(tensors, dtype, path.parent.name), {"format": "pt"}))


def cast_to(tensors: dict[str, Tensor], dtype: str, where: str) -> dict[str, Tensor]:
    """UserError: values that `dtype` cannot hold."""
    cast = {name: tensor.to(DTYPES[dtype]).contiguous() for name, tensor in tensors.items()}
    for name, tensor in cast.items():
        if not tensor.isfinite().all():
            raise UserError(f"{where}.{name} holds values that {dtype} cannot", "use --dtype bf16 or fp32")
    return cast


def open_pipeline(folder: Path) -> DiffusionPipeline:
    """The folder as the pipeline that it names, in float32, without a word about progress or missing accelerators."""
    with quiet():
        import diffusers

        # Stable Diffusion 3 without its T5: diffusers wants to be told what the folder says.
        absent = [name for name, part in read_config(folder / "model_index.json").items() if part == [None, None]]
        given = {name: None for name in absent if name.endswith("_3")}
        pipeline = diffusers.DiffusionPipeline.from_pretrained(str(folder), local_files_only=True, **given)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def check_target(target: Path) -> None:
    """UserError: something that no export may replace is there."""
    if target.exists() and not _replaceable(target):
        raise UserError(f"{target} exists and is not a folder of an export", "--out names another")


def keep(folder: Path, target: Path, force: bool) -> bool:
    """Put the finished `folder` at `target`; True if the same was there already. UserError: another model is, and
    not `force`."""
    if _contents(folder) == _contents(target):
        if not (target / "README.md").exists():
            (folder / "README.md").rename(target / "README.md")
        return True
    if _contents(target) and not force:
        raise UserError(f"{target} exists and holds another model", "--force replaces it; --out names another")
    _put(folder, target)
    return False


def _replaceable(target: Path) -> bool:
    known = ("model_index.json", LORA, *GRAPHS)
    return target.is_dir() and (not any(target.iterdir()) or any((target / name).is_file() for name in known))


def _contents(folder: Path) -> dict[str, str]:
    """sha256 of every file by its path, model cards aside: one may have been edited."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "README.md")
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}


@contextmanager
def beside(target: Path) -> Iterator[Path]:
    """A temporary folder on the same disk, removed whatever happens; those of killed exports go too."""
    target = target.absolute()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target.parent, target.name)
        with temporary_folder(target) as folder:
            yield folder
    except OSError as error:
        raise write_error(target, error) from error


def _put(folder: Path, target: Path) -> None:
    """Rename into place; what was there goes away afterwards."""
    new = folder / "new"
    new.mkdir()
    for path in list(folder.iterdir()):
        if path != new:
            path.rename(new / path.name)
    if target.exists():
        target.rename(folder / "old")
    new.rename(target)
    target.chmod(0o755)
