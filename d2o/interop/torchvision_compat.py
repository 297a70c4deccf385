"""Makes a torchvision whose compiled part does not fit the installed torch importable. Call `ensure()` before anything
imports torchvision.

A CPU torch beside a CUDA torchvision (or any other mismatched pair) leaves torchvision without its operators, and
`import torchvision` fails with "operator torchvision::nms does not exist": its Python part attaches shape functions to
operators that its compiled part should have brought. d2o and what it uses (lpips, timm, transformers) need only the
Python part, so we declare those operators ourselves.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading

# The operators that torchvision's Python part takes for granted while it is imported, with their schemas.
SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}

_lock = threading.Lock()
_library: object = None  # a torch.library.Library takes its operators away again when it is collected, so we keep it


def ensure() -> bool:
    """Make `import torchvision` work where only its compiled part is unusable; True if that took declaring operators,
    now or before.

    Nothing changes where torchvision is absent, imports as it is, or fails for any other reason (its own import then
    says why). Calling a declared operator raises RuntimeError. Safe to call repeatedly and from several threads; works
    with torch >= 2.6.
    """
    global _library
    with _lock:
        if _library is not None:
            return True
        if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
            return False
        if not _lacks_operators():
            return False
        _library = _declare()
        return True


def _lacks_operators() -> bool:
    """Import torchvision and see. Nothing cheaper is certain, and whoever calls `ensure` is about to import it
    anyway."""
    _forget()
    try:
        importlib.import_module("torchvision")
        return False
    except (
        Exception
    ) as error:  # a broken package may raise anything, and what is not ours to mend is not ours to report
        _forget()
        return isinstance(error, RuntimeError) and any(
            f"torchvision::{name} does not exist" in str(error) for name in SCHEMAS
        )


def _forget() -> None:
    """Python drops only the modules whose import failed; the next import would trip over the submodules that are left
    behind."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]


def _declare() -> object:
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name, schema in SCHEMAS.items():
        library.define(schema)
        library.impl(name, _unavailable(name), "CompositeExplicitAutograd")  # one implementation for all devices
    return library


def _unavailable(name: str) -> object:
    def operator(*_: object) -> None:
        raise RuntimeError(
            f"torchvision::{name} is not available: this torchvision was compiled for another torch; install one that"
            " fits"
        )

    return operator
