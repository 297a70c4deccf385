"""Readers of specimens that no quick command reads: each writes what it read to result.txt, or says what is wrong as
the command line does."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path


def read_weights() -> None:
    """Every tensor in weights.pt, as metrics read the networks that are published so."""
    from d2o.interop.safetensors_io import tensors_sha256
    from d2o.interop.torch_files import read_tensors

    _say(lambda: tensors_sha256(read_tensors("weights.pt")))


def read_downloaded() -> None:
    from d2o.interop.download import verify_file

    _say(lambda: verify_file("weights.bin").read_bytes().hex()[:200])


def read_cifar() -> None:
    from d2o.data.images import open_images
    from d2o.interop.safetensors_io import tensors_sha256

    _say(lambda: tensors_sha256({"images": open_images("cifar-10-python.tar.gz").images(slice(None))}))


def _say(read: Callable[[], str]) -> None:
    """The result as a file; a UserError as the command line words it."""
    from d2o.cli import console
    from d2o.errors import UserError

    try:
        Path("result.txt").write_text(read())
    except UserError as error:
        console.error(error.message, error.hint)
        sys.exit(2)
