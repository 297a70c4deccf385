"""A tiny extractor, and a result as `d2o eval` writes it, for tests of what is made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from d2o.interop.safetensors_io import save_file
from d2o.networks.classifier import Classifier
from d2o.students.base import checkpoint_meta

DOT = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
"""A PNG of one pixel."""


def record(name: str = "student", kind: str = "student", nfe: int = 1, fd: float = 1.42, **more: Any) -> dict[str, Any]:
    return {
        "format": "d2o-eval",
        "version": 1,
        "d2o": "0.1.0",
        "name": name,
        "x": {
            "kind": kind,
            "source": f"runs/{name}.safetensors",
            "sha256": "c" * 64,
            "parameters": 700_000,
            "nfe": nfe,
            "forwards": nfe,
            "teacher": "digits",
            "licence": "CC0-1.0",
        },
        "metrics": {
            "fd": {"label": "FD(digits)", "value": fd, "runs": [fd], "std": None, "trace": "eigh", "small_n": False},
            "accuracy": {"value": 0.975, "runs": [0.975], "per_class": {"0": 1.0, "1": 0.95}, "n": 4000},
            "speed": {"samples_per_s": 1640.2, "batch": 250, "batches": 15, "warm_up_excluded": True, "device": "cpu"},
        },
        "protocol": {
            "n_gen": 4000,
            "seeds": [1_000_000, 1_003_999],
            "repeats": 1,
            "labels": "random",
            "features": "digits/64",
            "weights_sha256": "8ac411ee6b9d" + "0" * 52,
            "resize": "none",
            "quantize": "edm_round",
            "ref": "real:digits",
            "ref_kind": "images",
            "n_ref": 1797,
            "ref_seeds": None,
            "ref_resize": "none",
        },
        "env": {
            "device": "cpu",
            "cpu": "Some CPU",
            "cores": 2,
            "threads": 2,
            "torch": "2.6.0",
            "numpy": "2.0",
            "python": "3.12",
            "system": "Linux",
        },
        "timings": {"seconds": 3.2, "generating": 2.5},
        "notes": [],
        "command": f"d2o eval runs/{name}.safetensors",
        "grid": {"png": DOT, "columns": 8, "n": 64, "labels": [0] * 64, "seeds": [1_000_000, 1_000_063]},
        **more,
    }


def make_extractor(path: Path, seed: int = 0, classes: int = 10, dim: int = 16) -> Path:
    torch.manual_seed(seed)
    network = Classifier(8, 1, classes, width=8, feature_dim=dim)
    save_file(path, network.state_dict(), checkpoint_meta("extractor", network.config, None))
    return path
