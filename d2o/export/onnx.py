"""ONNX: one file with a dynamic batch, checked by onnx and run by onnxruntime."""

from __future__ import annotations

import importlib
import json
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from d2o.errors import UserError
from d2o.export.loaded import Loaded
from d2o.export.parity import Runner
from d2o.export.program import cannot, trace
from d2o.inputs import JsonObject
from d2o.interop.safetensors_io import META_KEY
from d2o.version import __version__

if TYPE_CHECKING:
    from onnx import FunctionProto, GraphProto, ModelProto

OPSET = 18  # the lowest that torch's exporter has native graphs for, so the one that most runtimes read
MAX_BYTES = 2_000_000_000  # a protobuf message ends at 2 GiB
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def need(name: str) -> ModuleType:
    """An optional package. UserError tells how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"ONNX export needs the package {name!r}, which is not there ({error})", "pip install 'd2o[export]'"
        ) from error


def check_onnx(source: Loaded, opset: int) -> None:
    """Everything that can be refused before the work starts: missing packages, an opset out of range, a network beyond
    2 GB."""
    for name in PACKAGES:
        need(name)
    newest = need("onnx").defs.onnx_opset_version()
    if not OPSET <= opset <= newest:
        raise UserError(f"--opset {opset}: expected {OPSET} to {newest}")
    size = sum(t.numel() * t.element_size() for t in source.network.state_dict().values())
    if size > MAX_BYTES:
        raise UserError(
            f"{source.path} has {size / 1e9:.1f} GB of weights; an ONNX file ends at 2 GB",
            "--format program has no limit",
        )


def write_onnx(source: Loaded, path: Path, record: JsonObject, opset: int) -> None:
    """Write the checked model with `record` (JSON) and its main facts as metadata. Equal networks give equal bytes.

    Always torch's exporter over torch.export graphs (`dynamo=True`, torch >= 2.6); the older TorchScript one is
    deprecated.
    UserError: this torch cannot export the network, or not to that opset.
    """
    onnx = need("onnx")
    program = trace(source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about its own internals
        try:
            inputs, outputs = list(source.inputs), [source.output]
            exported = torch.onnx.export(
                program,
                (),
                dynamo=True,
                opset_version=opset,
                input_names=inputs,
                output_names=outputs,
                optimize=True,
                verbose=False,
            )
            assert exported is not None  # it is None with the TorchScript exporter only
            model = exported.model_proto
        except Exception as error:
            raise cannot("torch.onnx", error) from error
    given = {entry.domain: entry.version for entry in model.opset_import}
    if given.get("") != opset:
        raise UserError(
            f"torch {torch.__version__} gives opset {given.get('')}, not {opset}", f"--opset {given.get('')} works"
        )
    _tidy(model)
    facts = {
        "d2o_version": __version__,
        "teacher": source.teacher,
        "licence": source.licence,
        META_KEY: json.dumps(record, sort_keys=True),
    }
    onnx.helper.set_model_props(model, facts)
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString(deterministic=True))


def open_onnx(path: Path, names: Iterable[str]) -> Runner:
    """An .onnx file as a function, in onnxruntime on the CPU."""
    runtime = need("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = list(names)
    return lambda inputs: torch.from_numpy(session.run(None, {name: x.numpy() for name, x in zip(names, inputs)})[0])


def _tidy(model: ModelProto) -> None:
    """Call the batch dimension N, and drop the exporter's notes: they hold stack traces, so paths of this machine."""
    symbol = model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    assert symbol, "the exporter froze the batch size"
    for part in (model.graph, *model.functions):
        _drop_notes(part)
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(rf"\b{re.escape(symbol)}\b", "N", dim.dim_param)


def _drop_notes(part: GraphProto | FunctionProto) -> None:
    part.ClearField("metadata_props")
    for field in ("input", "output", "value_info", "initializer", "node"):
        for item in getattr(part, field, ()):
            if hasattr(item, "metadata_props"):  # a function's inputs are plain names
                item.ClearField("metadata_props")
                item.ClearField("doc_string")
    for node in part.node:
        for attribute in node.attribute:
            for graph in (*attribute.graphs, *((attribute.g,) if attribute.HasField("g") else ())):
                _drop_notes(graph)
