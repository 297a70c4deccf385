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
from torch import Tensor

from d2o.errors import UserError
from d2o.export.graphs import Graph, GraphRunner
from d2o.export.loaded import Loaded
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


def check_onnx(graphs: Iterable[Graph], opset: int, dtype: str, source: Path, one_file: bool) -> None:
    """Everything that can be refused before the work starts: missing packages, an opset out of range, a network beyond
    the 2 GB of `one_file`."""
    for name in PACKAGES:
        need(name)
    newest = need("onnx").defs.onnx_opset_version()
    if not OPSET <= opset <= newest:
        raise UserError(f"--opset {opset}: expected {OPSET} to {newest}")
    size = max(_size(graph, dtype) for graph in graphs)
    if one_file and size > MAX_BYTES:
        raise UserError(
            f"{source} has {size / 1e9:.1f} GB of weights in {dtype}; an ONNX file ends at 2 GB",
            "--dtype fp16 halves them, --format program has no limit"
            if dtype == "fp32"
            else "--format program has no limit",
        )


def _size(graph: Graph, dtype: str) -> int:
    return graph.size // (2 if dtype == "fp16" else 1)


def write_onnx(graph: Graph, path: Path, facts: dict[str, str], opset: int, dtype: str = "fp32") -> None:
    """Write the checked model with `facts` as metadata. Equal networks give equal bytes. Weights beyond 2 GB go into a
    file `.data` beside it.

    Always torch's exporter over torch.export graphs (`dynamo=True`, torch >= 2.6); the older TorchScript one is
    deprecated. `dtype` fp16: weights and arithmetic, but for what leads to sines and cosines (of times up to 999, whose
    half precision would be whole periods off); inputs and outputs stay float32.
    UserError: this torch cannot export the network, or not to that opset.
    """
    onnx = need("onnx")
    program = trace(graph)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about its own internals
        try:
            exported = torch.onnx.export(
                program,
                (),
                dynamo=True,
                opset_version=opset,
                input_names=list(graph.inputs),
                output_names=list(graph.outputs),
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
    if dtype == "fp16":
        model = _halved(model)
    onnx.helper.set_model_props(model, facts)
    if _size(graph, dtype) > MAX_BYTES:
        onnx.save_model(model, str(path), save_as_external_data=True, location=f"{path.name}.data")
        onnx.checker.check_model(str(path))
    else:
        onnx.checker.check_model(model, full_check=True)
        path.write_bytes(model.SerializeToString(deterministic=True))


def open_onnx(path: Path, graph: Graph) -> GraphRunner:
    """An .onnx file as a function, in onnxruntime on the CPU."""
    runtime = need("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        feeds = {name: x.numpy() for name, x in zip(graph.inputs, inputs)}
        return tuple(torch.from_numpy(found) for found in session.run(list(graph.outputs), feeds))

    return run


def facts_of(source: Loaded, record: JsonObject) -> dict[str, str]:
    """What a model says of itself: where it is from, and `record` as JSON."""
    return {
        "d2o_version": __version__,
        "teacher": source.teacher,
        "licence": source.licence,
        META_KEY: json.dumps(record, sort_keys=True),
    }


def _halved(model: ModelProto) -> ModelProto:
    makers = {name: node for node in model.graph.node for name in node.output}
    exact: set[str] = set()
    behind = [node for node in model.graph.node if node.op_type in ("Sin", "Cos")]
    while behind:
        node = behind.pop()
        if node.name not in exact:
            exact.add(node.name)
            behind += [makers[name] for name in node.input if name in makers]
    convert = need("onnxruntime.transformers.float16").convert_float_to_float16
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of values below the smallest of half precision
        half = convert(model, keep_io_types=True, disable_shape_infer=True, node_block_list=sorted(exact))
    _join_casts(half.graph)
    del half.graph.value_info[:]  # types of before
    # The conversions between the two come last; runtimes take them there, onnx's checker does not.
    need("onnxruntime.transformers.onnx_model").OnnxModel(half).topological_sort(is_deterministic=True)
    return half


def _join_casts(graph: GraphProto) -> None:
    """Between two nodes in float32 the converter goes by way of float16, and to each in a cast of its own, all of one
    name: lead the first one's output to the second, and keep one cast of each."""
    casts = [node for node in graph.node if node.op_type == "Cast"]
    before = {node.output[0]: node.input[0] for node in casts if node.name.endswith("_cast_to_fp16_node")}
    raised = [node for node in casts if node.name.endswith("_cast_to_fp32_node")]
    instead = {node.output[0]: before[node.input[0]] for node in raised if node.input[0] in before}
    seen: set[str] = set()
    for node in raised:
        if node.output[0] in instead or node.output[0] in seen:
            graph.node.remove(node)
        seen.add(node.output[0])
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = instead.get(name, name)


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
