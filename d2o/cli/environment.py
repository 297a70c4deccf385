"""What `d2o env` tells: versions, processor, devices, caches, packages, teachers. Nothing is changed or fetched, and
nothing secret is read."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from d2o.inputs import JsonObject
from d2o.version import __version__

PACKAGES = (
    "torch",
    "numpy",
    "safetensors",
    "diffusers",
    "transformers",
    "huggingface_hub",
    "pydantic",
    "pillow",
    "lpips",
    "torchdiffeq",
    "scikit-learn",
    "fsspec",
    "filelock",
    "requests",
    "tensorboard",
    "typer",
    "rich",
    "PyYAML",
)
SETTINGS = (
    "D2O_HOME",
    "D2O_OFFLINE",
    "HF_HUB_OFFLINE",
    "HF_HOME",
    "HF_HUB_CACHE",
    "TORCH_HOME",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "CUDA_VISIBLE_DEVICES",
    "RANK",
    "WORLD_SIZE",
)
"""Environment variables that change what d2o does; tokens are not among them."""
EXTRAS = {
    "eval": "networks of d2o eval beside Inception (CLIP, DINOv2, DreamSim, LPIPS, EfficientNet-lite0)",
    "pairs": "prompts in .parquet files",
    "lora": "student.lora",
    "export": "d2o export --format onnx",
    "demo": "examples/page.py",
    "wandb": "tracker: wandb",
    "mlflow": "tracker: mlflow",
}
"""What an extra is for, in the words of who misses it."""


def collect() -> JsonObject:
    """All of it, as plain data. What cannot be found out, as where torch is broken, says why in its place."""
    extras = _extras()
    return {
        "versions": {
            "d2o": __version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
        },
        "platform": {
            "system": platform.platform(),
            "d2o at": _tidy(Path(__file__).parents[1]),
            "python at": _tidy(Path(sys.executable)),
        },
        "cpu": _told(_cpu),
        "devices": _told(_devices),
        "settings": {
            name: _tidy(Path(os.environ[name])) if "/" in os.environ[name] else os.environ[name]
            for name in SETTINGS
            if name in os.environ
        },
        "caches": {name: _cache(path) for name, path in _places().items()},
        "disk free": {
            "here": shutil.disk_usage(".").free,
            "caches": shutil.disk_usage(_existing(_places()["d2o"])).free,
        },
        "extras": extras,
        "teachers": _told(_teachers),
        "can run": _told(lambda: _abilities(extras)),
    }


def _told(find: Callable[[], JsonObject]) -> JsonObject:
    try:
        return find()
    except Exception as error:  # this is for reports of whatever is wrong
        return {"cannot be told": f"{type(error).__name__}: {error}"}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _tidy(path: Path) -> str:
    """A path without the user's name."""
    home = str(Path.home())
    return "~" + str(path)[len(home) :] if home != "/" and str(path).startswith(home) else str(path)


def _cpu() -> JsonObject:
    """`bf16`: what makes bfloat16 fast on this processor, None where nothing does."""
    import torch

    words: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            words.setdefault(key.strip(), value.strip())
    except OSError:  # no Linux
        pass
    flags = words.get("flags", words.get("Features", "")).split()
    bf16 = next(
        (
            name
            for flag, name in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX512-BF16"), ("bf16", "BF16"))
            if flag in flags
        ),
        None,
    )
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if "SC_PHYS_PAGES" in os.sysconf_names else None
    return {
        "model": words.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "usable cores": usable,
        "torch threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "bf16": bf16,
        "memory": memory,
    }


def _devices() -> dict[str, str]:
    """Name of each device that --device takes here -> what it is."""
    import torch

    from d2o.training.distributed import devices

    found = {}
    for name in devices():
        found[name] = {"cpu": "the processor above", "mps": "Apple GPU", "xpu": "Intel GPU"}.get(name, "")
        if name.startswith("cuda"):
            about = torch.cuda.get_device_properties(name)
            bf16 = "bf16" if about.major >= 8 else "no bf16"
            versions = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
            found[name] = (
                f"{about.name}, {about.total_memory / 2**30:.0f} GiB, capability {about.major}.{about.minor} ({bf16}),"
                f" {versions}"
            )
    return found


def _places() -> dict[str, Path]:
    from d2o.interop.download import home

    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    hub = Path(os.environ.get("HF_HOME", cache / "huggingface")).expanduser() / "hub"
    torch_home = Path(os.environ.get("TORCH_HOME", cache / "torch")).expanduser()
    return {
        "d2o": home(),
        "hugging face hub": Path(os.environ.get("HF_HUB_CACHE", hub)).expanduser(),
        "torch hub": torch_home / "hub",
    }


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)


def _cache(path: Path, limit: float = 0.4) -> JsonObject:
    """`bytes` of its files; with `more` where counting them took longer than `limit` seconds."""
    total, more, end = 0, False, time.perf_counter() + limit
    for folder, _, files in os.walk(path):
        for name in files:
            try:
                status = os.lstat(os.path.join(folder, name))
            except OSError:
                continue
            total += status.st_size if not os.path.islink(os.path.join(folder, name)) else 0
        if more := time.perf_counter() > end:
            break
    writable = os.access(_existing(path), os.W_OK)
    return {"path": _tidy(path), "there": path.is_dir(), "bytes": total, "more": more, "writable": writable}


def _extras() -> dict[str, JsonObject]:
    """Extra of d2o -> what it is for, and the packages that it brings with their versions (None: not there)."""
    try:
        required = metadata.requires("d2o") or []
    except metadata.PackageNotFoundError:  # run from its source
        required = []
    found: dict[str, JsonObject] = {}
    for text in required:
        extra, package = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", text), re.match(r"[\w.-]+", text)
        if extra and package and extra[1] != "dev":
            entry = found.setdefault(extra[1], {"for": EXTRAS.get(extra[1], ""), "packages": {}})
            entry["packages"][package[0]] = _version(package[0])
    return found


def _teachers() -> dict[str, str]:
    """Teachers that are on this machine -> where."""
    from d2o.interop import catalogue
    from d2o.teachers.registry import BUILTIN

    here = {
        name: catalogue.path_if_here(published)
        for name in catalogue.names()
        if (published := catalogue.find(name)) is not None
    }
    return dict.fromkeys(BUILTIN, "ships with d2o") | {
        name: _tidy(path) for name, path in here.items() if path is not None
    }


def _abilities(extras: dict[str, JsonObject]) -> dict[str, str]:
    """What may or may not work here -> "yes", or why not and what to do."""
    import torch

    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    linked = torch.distributed.is_available()
    able = {
        "train, sample, pairs, eval": "yes",
        "several processes (torchrun)": "yes" if linked else "no: this torch has no distributed part",
        "torch.compile (compile: true)": "yes" if compiler else "no: it needs a C++ compiler (g++)",
    }
    for name, entry in extras.items():
        absent = [package for package, version in entry["packages"].items() if version is None]
        able[entry["for"] or name] = f"no: {', '.join(absent)} missing; pip install 'd2o[{name}]'" if absent else "yes"
    return able
