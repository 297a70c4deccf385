"""Export a checkpoint: write in the chosen format, load back, compare with the network, keep it with a model card."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from d2o.errors import UserError, unknown
from d2o.export.card import card
from d2o.export.comfyui import check_comfyui, write_comfyui
from d2o.export.diffusers import write_diffusers
from d2o.export.folder import beside, check_target, keep
from d2o.export.graphs import Graph, GraphRunner, graph_of, text_graphs, whole_student
from d2o.export.loaded import Loaded, find_checkpoint, for_graph, load_exportable, located, stated
from d2o.export.lora_folder import write_lora
from d2o.export.onnx import OPSET, check_onnx, facts_of, need, open_onnx, write_onnx
from d2o.export.parity import Parity, compare
from d2o.export.pipeline import numbered
from d2o.export.program import open_program, write_program
from d2o.export.smaller import DTYPES, TOLERANCE, open_weights, write_weights
from d2o.export.student_folder import write_student
from d2o.inputs import JsonObject
from d2o.interop.outputs import check_output
from d2o.interop.safetensors_io import atomic_path, atomic_write, file_sha256, read_meta
from d2o.teachers.base import UNSTATED
from d2o.version import __version__

SUFFIX = {"onnx": ".onnx", "program": ".pt2", "safetensors": ".safetensors", "comfyui": ".safetensors"}
FORMATS = (*SUFFIX, "diffusers")


@dataclass(frozen=True)
class Exported:
    """What was written. `unchanged`: the same file was there already; `licence`, `teacher`: as the checkpoint states,
    else "not stated"."""

    path: Path
    card: Path
    parity: Parity
    licence: str
    teacher: str
    unchanged: bool

    @property
    def size(self) -> int:
        """Bytes on disk."""
        files = self.path.rglob("*") if self.path.is_dir() else [self.path]
        return sum(file.stat().st_size for file in files if file.is_file())


def export_checkpoint(
    checkpoint: str | Path,
    file_format: str,
    out: str | Path | None = None,
    *,
    opset: int | None = None,
    dtype: str | None = None,
    student_sigma: float | None = None,
    check_n: int = 16,
    tolerance: float | None = None,
    merged: bool = False,
    force: bool = False,
    say: Callable[[str], None] = lambda message: None,
) -> Exported:
    """Write `checkpoint` (a student or teacher .safetensors, a run folder, a builtin teacher's name) as onnx, program
    or safetensors; a student that takes prompts as comfyui, or as onnx or program in a folder of three files; a
    text-to-image teacher, or a student of a teacher in diffusers' format, as a diffusers folder (a LoRA student as a
    LoRA, or `merged` as the whole model).

    `out`: a file with the format's ending, or a folder to put it in; default the checkpoint's name beside it. For
    folders: the folder itself. `opset`: ONNX only, default 18. `dtype`: fp32 (default), fp16 (default of comfyui) or
    bf16. `student_sigma`: the checkpoint is a pickle of NVIDIA's kind that holds a one-step student, called at this
    noise level. The file is compared with the network at batch sizes 1 and `check_n`; `tolerance` (largest absolute
    difference of outputs in -1 to 1, in proportion of larger ones) is that of `TOLERANCE` by default. UserError:
    whatever is wrong with the input, a missing package, a difference above the tolerance, or another file of that name
    (unless `force`); nothing is written then.
    """
    if file_format not in FORMATS:
        raise unknown("format", file_format, FORMATS)
    if opset is not None and file_format != "onnx":
        raise UserError(f"--opset is for --format onnx, not {file_format}")
    if dtype is not None and file_format == "program":
        raise UserError("--dtype is for all formats but program, which keeps the network's float32")
    if dtype is not None and dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    if dtype == "bf16" and file_format == "onnx":
        raise UserError("--dtype bf16 is for weights; few runtimes compute ONNX in it", "--dtype fp16")
    if check_n < 1:
        raise UserError(f"--check-n {check_n}: expected at least 1 sample")
    precision = dtype or ("fp16" if file_format == "comfyui" else "fp32")
    tolerance = TOLERANCE[precision] if tolerance is None else tolerance
    if not (tolerance > 0 and math.isfinite(tolerance)):
        raise UserError(f"--tolerance {tolerance}: expected a positive number")
    if student_sigma is not None and file_format in ("diffusers", "comfyui"):
        raise UserError(
            f"--student-sigma is for --format onnx, program and safetensors; {file_format} has no such networks"
        )
    if merged and file_format != "diffusers":
        raise UserError(f"--merged is for --format diffusers; {file_format} holds a LoRA student as it is called")
    if ((folder := located(checkpoint)) / "model_index.json").is_file():
        text = f"{checkpoint} is a pipeline that diffusers loads already: {folder}"
        raise UserError(text, "copy that folder; other formats are for what d2o trained")
    if file_format == "diffusers":
        return _diffusers(checkpoint, out, precision, check_n, tolerance, merged, force, say)
    source = load_exportable(checkpoint, student_sigma)
    job = _Job(source, file_format, precision, OPSET if opset is None else opset, check_n, tolerance)
    if file_format in ("onnx", "program") and source.spec.condition == "text":
        return _folder(job, checkpoint, out, force, say)
    target = _target(job, checkpoint, out)
    write = job.prepare()
    card_path = target.with_name(target.name + ".md")
    say(f"exporting {source.path.name} ({source.kind}) as {file_format}, {job.detail}")
    with atomic_path(target) as temporary:
        parity = write(temporary)
        text = card(source, target.name, file_format, job.detail, parity, source.path.name)
        unchanged = target.exists() and _same(temporary, target)
        if not force:
            if target.exists() and not unchanged:
                raise UserError(f"{target} exists and is another file", "--force overwrites it; --out names another")
            if card_path.exists() and not unchanged and card_path.read_text(encoding="utf-8", errors="replace") != text:
                raise UserError(f"{card_path} exists and is another file", "--force overwrites it; --out names another")
    if force or not (unchanged and card_path.exists()):  # beside the same file, a card may have been edited: leave it
        atomic_write(card_path, text)
    return Exported(target, card_path, parity, source.licence, source.teacher, unchanged)


@dataclass
class _Job:
    source: Loaded
    file_format: str
    dtype: str
    opset: int
    check_n: int
    tolerance: float

    @property
    def detail(self) -> str:
        """What the card says beside the format."""
        if self.file_format == "onnx":
            return f"opset {self.opset}" + ("" if self.dtype == "fp32" else f", {self.dtype}")
        return f"torch {torch.__version__}" if self.file_format == "program" else self.dtype

    @property
    def record(self) -> JsonObject:
        """The checkpoint's metadata, with this export as the last step of its provenance."""
        source = self.source
        step = {"exported": self.file_format, "detail": self.detail, "from": source.fingerprint, "d2o": __version__}
        before = source.meta.get("provenance")
        return {**source.meta, "provenance": [*(before if isinstance(before, list) else []), step]}

    @property
    def torch(self) -> str:
        return f"torch {torch.__version__} on the CPU"

    def prepare(self) -> Callable[[Path], Parity]:
        """What writes the file, reads it back and compares it. UserError: whatever can be refused before the work."""
        source = self.source
        if self.file_format == "comfyui":
            call = check_comfyui(source)
            return lambda path: write_comfyui(source, call, path, self.record, self.dtype, self.check_n, self.tolerance)
        if self.file_format == "safetensors":
            return self._weights
        for_graph(source)
        graph = graph_of(source)
        if self.file_format == "onnx":
            check_onnx([graph], self.opset, self.dtype, source.path, one_file=True)

        def write(path: Path) -> Parity:
            run = self.write_graph(graph, path)
            return compare(source, lambda inputs: run(inputs)[0], self.check_n, self.tolerance, self.runtime)

        return write

    @property
    def runtime(self) -> str:
        """What a graph's file is run by."""
        if self.file_format == "onnx":
            return f"onnxruntime {need('onnxruntime').__version__} against {self.torch}"
        return f"torch.export.load against the network, {self.torch}"

    def write_graph(self, graph: Graph, path: Path) -> GraphRunner:
        """Write the file and open it again."""
        if self.file_format == "onnx":
            write_onnx(graph, path, facts_of(self.source, self.record), self.opset, self.dtype)
            return open_onnx(path, graph)
        write_program(graph, path, self.record)
        return open_program(path)

    def _weights(self, path: Path) -> Parity:
        source = self.source
        write_weights(source, path, self.record, self.dtype)
        runtime = f"d2o.load_{source.kind} (computes in float32) against the network, {self.torch}"
        return compare(source, open_weights(source, path), self.check_n, self.tolerance, runtime)


def _folder(
    job: _Job, checkpoint: str | Path, out: str | Path | None, force: bool, say: Callable[[str], None]
) -> Exported:
    """A text student's three graphs and its tokenizers."""
    source = job.source
    beside_it = Path(checkpoint) if Path(checkpoint).is_dir() else source.path.parent
    target = Path(out) if out is not None else beside_it / f"{source.path.stem}-{job.file_format}"
    check_output(target, folder=True)
    check_target(target)
    for_graph(source)
    graphs = text_graphs(source)
    if job.file_format == "onnx":
        check_onnx(graphs.values(), job.opset, job.dtype, source.path, one_file=False)
    say(f"exporting {source.path.name} as {job.file_format} of text encoder, student and decoder, {job.detail}")
    with beside(target) as folder:
        suffix = SUFFIX[job.file_format]
        runs = {name: job.write_graph(graph, folder / f"{name}{suffix}") for name, graph in graphs.items()}
        for name, tokenizer in numbered("tokenizer", source.student.text.reader.tokenizers).items():
            tokenizer.save_pretrained(folder / name)
        found, expected = whole_student(source, graphs, runs)
        parity = compare(source, found, job.check_n, job.tolerance, job.runtime, expected)
        text = card(source, target.name, job.file_format, job.detail, parity, source.path.name)
        atomic_write(folder / "README.md", text)
        unchanged = keep(folder, target, force)
    return Exported(target, target / "README.md", parity, source.licence, source.teacher, unchanged)


def _diffusers(
    checkpoint: str | Path,
    out: str | Path | None,
    dtype: str,
    check_n: int,
    tolerance: float,
    merged: bool,
    force: bool,
    say: Callable[[str], None],
) -> Exported:
    given = find_checkpoint(checkpoint)
    meta = read_meta(given) if given.suffix == ".safetensors" else {}
    lora = bool((meta.get("network") or {}).get("lora"))
    if merged and not lora:
        raise UserError(f"--merged is for LoRA students; {given.name} holds all weights", "leave it away")
    as_lora = lora and not merged
    beside = Path(checkpoint) if Path(checkpoint).is_dir() else given.parent
    target = Path(out) if out is not None else beside / f"{given.stem}-{'lora' if as_lora else 'diffusers'}"
    check_output(target, folder=True)
    say(f"exporting {given.name} as a {'LoRA for diffusers' if as_lora else 'diffusers folder'}, {dtype}")
    if meta.get("kind") == "student":
        source = load_exportable(given)
        write = write_lora if as_lora else write_student
        parity, unchanged = write(source, target, dtype, check_n, tolerance, force)
        return Exported(target, target / "README.md", parity, source.licence, source.teacher, unchanged)
    parity, meta, unchanged = write_diffusers(given, target, dtype, check_n, tolerance, force)
    spec = meta.get("spec") or {}
    return Exported(
        target,
        target / "README.md",
        parity,
        stated(spec.get("licence")) or UNSTATED,
        spec.get("name") or UNSTATED,
        unchanged,
    )


def _target(job: _Job, checkpoint: str | Path, out: str | Path | None) -> Path:
    """Where to write. UserError: another ending than the format's, or the checkpoint itself."""
    source, suffix = job.source, SUFFIX[job.file_format]
    marks = {
        "safetensors": f"-{job.dtype}",
        "comfyui": "-comfyui",
        "onnx": "" if job.dtype == "fp32" else f"-{job.dtype}",
    }
    stem = source.path.stem + marks.get(job.file_format, "")
    given = Path(checkpoint)
    if out is None:  # beside the checkpoint, or in the run folder; a builtin teacher's goes where the user is
        target = (given if given.is_dir() else given.parent) / (stem + suffix)
    else:
        target = Path(out) / (stem + suffix) if Path(out).is_dir() else Path(out)
    if target.suffix != suffix:
        raise UserError(f"--out {target}: a file of format {job.file_format} ends in {suffix}")
    if target.exists() and target.resolve() == source.path.resolve():
        raise UserError(f"--out {target} is the checkpoint itself", "choose another --out")
    check_output(target, folder=False)
    return target


def _same(a: Path, b: Path) -> bool:
    """Equal content: equal bytes, or for zips (.pt2; older versions of torch put the time inside) equal members."""
    if not b.is_file():
        return False
    if zipfile.is_zipfile(a) and zipfile.is_zipfile(b):
        return _members(a) == _members(b)
    return file_sha256(a) == file_sha256(b)


def _members(path: Path) -> list[tuple[str, int]]:
    with zipfile.ZipFile(path) as archive:
        return sorted((member.filename, member.CRC) for member in archive.infolist())
