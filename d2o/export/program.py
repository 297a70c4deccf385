"""torch.export: a network as one graph with a dynamic batch, in a .pt2 file that needs torch but not d2o."""

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path

import torch
from torch import Tensor

from d2o.errors import UserError
from d2o.export.graphs import Graph, GraphRunner
from d2o.inputs import JsonObject
from d2o.interop.safetensors_io import META_KEY

RECORD = f"{META_KEY}.json"
"""The extra file inside a .pt2 that holds the checkpoint's metadata as JSON."""


def trace(graph: Graph) -> torch.export.ExportedProgram:
    """The graph, batch size free (1 and up). UserError: this torch cannot export the network.

    The range check of labels is data-dependent Python and not part of the graph: a label out of range acts as -1, "no
    class".
    """
    batch = torch.export.Dim("batch", min=1, max=2**31 - 1)  # without a maximum torch 2.6 guards against one
    example = graph.example(4)
    shapes: tuple[object, ...] = tuple({0: batch} for _ in example)
    torch._dynamo.reset()  # torch 2.6 lets an earlier export in the same process fix the batch size of this one
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, about its own internals
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            return torch.export.export(
                graph.module, example, dynamic_shapes=(shapes,) if graph.nested else shapes, strict=graph.strict
            )
        except Exception as error:
            raise cannot("torch.export", error) from error


def cannot(what: str, error: Exception) -> UserError:
    """The one-line form of a failed export: torch's own messages are pages long."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return UserError(
        f"{what} of torch {torch.__version__} cannot export this network: {lines[0]}", "another version of torch may"
    )


def write_program(graph: Graph, path: Path, record: JsonObject) -> None:
    """Write a .pt2 with `record` inside. Equal networks give equal contents, and the file names no folder of this
    machine."""
    program = trace(graph)
    for node in program.graph.nodes:  # the rest (stack traces, object ids) differs from run to run and shows paths
        node.meta = {key: value for key, value in node.meta.items() if key in ("val", "example_value")}
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={RECORD: json.dumps(record, sort_keys=True)})
    path.write_bytes(buffer.getbuffer())


def open_program(path: Path) -> GraphRunner:
    """A .pt2 file as a function."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        module = torch.export.load(io.BytesIO(path.read_bytes())).module()

    def run(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        found = module(*inputs)
        return found if isinstance(found, tuple) else (found,)

    return run


def program_record(path: str | Path) -> JsonObject:
    """The metadata that `write_program` stored."""
    extra: JsonObject = {RECORD: ""}
    torch.export.load(io.BytesIO(Path(path).read_bytes()), extra_files=extra)
    return json.loads(extra[RECORD])
