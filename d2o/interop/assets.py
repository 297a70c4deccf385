"""The files that ship with the package."""

from __future__ import annotations

from functools import lru_cache
from importlib import resources
from pathlib import Path

from d2o.interop.safetensors_io import file_sha256
from d2o.interop.seal import damaged
from d2o.runtime import trusting


@lru_cache
def asset(name: str) -> Path:
    """Path of a file or folder that ships with the package. UserError: its bytes are not those that were shipped."""
    folder = Path(str(resources.files("d2o") / "assets"))
    for line in (folder / "sha256sums.txt").read_text().splitlines():
        digest, file = line.split(maxsplit=1)
        if (file == name or file.startswith(f"{name}/")) and not trusting() and file_sha256(folder / file) != digest:
            raise damaged(folder / file, "it is not as it came with d2o (install d2o again)")
    return folder / name
