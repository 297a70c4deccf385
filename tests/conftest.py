"""The same surroundings for every test, on any machine."""

from __future__ import annotations

import gc
import os

gc.disable()  # until everything is imported: nothing of it is garbage

# Before anything is imported that reads them. Commands are tested through their output: no colours, one width.
os.environ.update(
    NO_COLOR="1", COLUMNS="160", TERM="dumb", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", MPLBACKEND="Agg"
)
for _name in ("FORCE_COLOR", "CLICOLOR_FORCE", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
    os.environ.pop(_name, None)

if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # as many of these as there are cores: one thread each, in the commands that they start, too
    os.environ["OMP_NUM_THREADS"] = "1"

from d2o.runtime import share_cores  # noqa: E402

# as the command does it: idle threads of tests make way, for each other and for the processes that tests start
share_cores()

import copy  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import TYPE_CHECKING  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

# Tiny networks gain nothing from more threads, and sums come out the same on small and large machines.
torch.set_num_threads(min(2, torch.get_num_threads()))

if TYPE_CHECKING:
    from d2o.export.graphs import Graph

settings.register_profile(
    "d2o", deadline=None, derandomize=True
)  # a slow machine is no failure; the same examples every time
settings.load_profile("d2o")


LONG = (
    "recipes/test_minis_a.py",
    "recipes/test_minis_b.py",
    "recipes/test_shipped.py",
    "export/test_text_graphs.py",
    "export/test_kinds.py",
    "torture/test_short.py",
    "methods/test_matrix.py",
    "training/test_processes.py",
    "export/test_onnx.py",
    "training/test_loop.py",
    "recipes/test_d2g_tiny_sd.py",
    "methods/test_latent.py",
    "methods/test_mixture.py",
    "students/test_told_student.py",
    "training/test_shards.py",
    "students/test_generate.py",
    "methods/test_consistency.py",
    "evaluation/test_evaluate.py",
    "students/test_lora_student.py",
    "methods/test_sid.py",
    "test_packaging.py",
    "training/test_two_networks.py",
    "export/test_program.py",
)
"""Files that take longest, the longest first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """They go first: a worker that began one at the end would keep the others waiting."""
    place = {name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.nodeid.split("::")[0].removeprefix("tests/"), len(LONG)))


def pytest_collection_finish() -> None:
    """What is there now stays: the collector of garbage need not walk through torch and all tests, and that often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    gc.enable()


@pytest.fixture(autouse=True, scope="session")
def _own_home(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing of the user's cache is read or written."""
    os.environ["D2O_HOME"] = str(tmp_path_factory.mktemp("home"))
    os.environ["TORCH_HOME"] = str(tmp_path_factory.mktemp("torch"))


@pytest.fixture
def extractor_file(tmp_path: Path) -> Path:
    """A tiny untrained network of features."""
    from tests.samples import make_extractor

    return make_extractor(tmp_path / "tiny.safetensors")


@pytest.fixture(scope="session")
def one_graph_a_network() -> Iterator[None]:
    """ONNX files and programs of the same network start from (copies of) the same graph: it takes seconds."""
    from d2o.export import onnx, program
    from d2o.interop.safetensors_io import tensors_sha256

    graphs: dict[str, torch.export.ExportedProgram] = {}
    traced = program.trace

    def trace(graph: Graph) -> torch.export.ExportedProgram:
        key = f"{graph.inputs} {tensors_sha256(graph.module.state_dict())}"
        if key not in graphs:
            graphs[key] = traced(graph)
        return copy.deepcopy(graphs[key])

    with pytest.MonkeyPatch.context() as patch:
        for module in (onnx, program):
            patch.setattr(module, "trace", trace)
        yield


_leave, _process = os._exit, os.getpid()


def _refuse_to_leave(code: int) -> None:
    """A test that ended the whole run would end it as a success."""
    if os.getpid() == _process:
        raise AssertionError(f"os._exit({code}) was called in the tests' own process")
    _leave(code)


os._exit = _refuse_to_leave
