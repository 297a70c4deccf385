"""The commands that are killed: tiny versions of everything that d2o writes, a second or so each."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.torture import forks

LOOP = {
    "batch": 8,
    "images": 96,
    "log_every": 2,
    "threads": 1,
    "eval.every": 32,
    "eval.n": 16,
    "eval.reference": "stats.npz",
    "preview.every": 32,
    "preview.n": 4,
    "checkpoint.every": 24,
    "checkpoint.keep": 2,
}
PAIRS = {
    "teacher": "teacher.safetensors",
    "pairs.path": "pairs",
    "pairs.n": 64,
    "pairs.steps": 4,
    "pairs.shard_size": 16,
}
STYLE = {
    "network.h_dim": 16,
    "network.synthesis.base": 64,
    "network.synthesis.max_channels": 8,
    "spi_gan.critic.base": 64,
    "spi_gan.critic.max_channels": 8,
    "spi_gan.critic.mbstd_group": 4,
    "data.limit": 64,
}


def _set(*tables: dict[str, object]) -> list[str]:
    return [word for table in tables for key, value in table.items() for word in ("--set", f"{key}={value}")]


@dataclass(frozen=True)
class Command:
    """`marker`: the end of the path of what is renamed once for each checkpoint or part; the events after the last but
    one are all tried.
    `again`: what is added to the command to continue it. `inputs`: what it reads, of the prepared folder."""

    name: str
    arguments: list[str]
    inputs: tuple[str, ...]
    marker: str
    again: tuple[str, ...] = ()
    quick: bool = False  # in the short form, too


MADE = ["--teacher", "teacher.safetensors", "--steps", "4", "--shard-size", "16", "--n", "64"]
SAMPLES = ["sample", "run", "--n", "64", "--chunk", "16", "--batch", "16"]

COMMANDS = [
    Command("pairs", ["pairs", *MADE, "--out", "made"], ("teacher.safetensors",), ".safetensors", quick=True),
    Command(
        "pairs --merge",
        ["pairs", "--merge", "pairs", "--merge", "pairs2", "--out", "made"],
        ("pairs", "pairs2"),
        ".safetensors",
    ),
    Command(
        "train ode",
        ["train", "quickstart", *_set(LOOP, PAIRS), "--out", "made"],
        ("teacher.safetensors", "stats.npz"),
        "state.safetensors",
        ("--resume",),
        quick=True,
    ),
    Command(
        "train spi-gan",
        ["train", "spi_gan_digits", *_set(LOOP, STYLE), "--out", "made"],
        ("stats.npz",),
        "state.safetensors",
        ("--resume",),
        quick=True,
    ),
    Command(
        "train sid",
        ["train", "sid_digits", *_set(LOOP, {"teacher": "teacher.safetensors"}), "--out", "made"],
        ("teacher.safetensors", "stats.npz"),
        "state.safetensors",
        ("--resume",),
    ),
    Command(
        "finetune",
        ["finetune", "finetune_digits", "--from", "run", *_set(LOOP, PAIRS), "--out", "made"],
        ("teacher.safetensors", "stats.npz", "pairs", "run"),
        "state.safetensors",
        ("--resume",),
    ),
    Command(
        "train --sweep",
        [
            "train",
            "quickstart",
            "--sweep",
            "optim.lr=0.001,0.002",
            *_set({**LOOP, "images": 32}, PAIRS),
            "--out",
            "made",
        ],
        ("teacher.safetensors", "stats.npz", "pairs"),
        "state.safetensors",
    ),
    *(
        Command(
            f"sample {name}",
            [*SAMPLES, "--out", f"made{suffix}", "--grid", "grid.png"],
            ("run",),
            ".safetensors",
            quick=name == "zip",
        )
        for name, suffix in (("folder", ""), ("zip", ".zip"), ("tar", ".tar"), ("npz", ".npz"))
    ),
    Command(
        "eval",
        [
            "eval",
            "run",
            "pairs",
            "--against",
            "stats.npz",
            "--n",
            "64",
            "--distance-n",
            "16",
            "--batch",
            "16",
            "--json",
            "made.json",
            "--csv",
            "made.csv",
            "--markdown",
            "made.md",
            "--report",
            "made.html",
            "--run",
            "run",
        ],
        ("teacher.safetensors", "stats.npz", "pairs", "run"),
        ".safetensors",
        quick=True,
    ),
    Command(
        "export safetensors",
        ["export", "run", "--format", "safetensors", "--out", "made.safetensors"],
        ("run",),
        ".safetensors",
    ),
    Command("export onnx", ["export", "run", "--out", "made.onnx"], ("run",), ".onnx"),
]
"""Kept apart from each other: every trial has a folder of its own, with copies of what it reads."""


def prepare(base: Path) -> Path:
    """Make what the commands read."""
    inputs = base / "inputs"
    inputs.mkdir(parents=True)

    def teacher() -> None:
        from tests.helpers import tiny_teacher

        tiny_teacher(inputs / "teacher.safetensors")

    made = ["pairs", *MADE]
    for function in (
        teacher,
        forks.d2o([*made, "--out", "pairs"]),
        forks.d2o([*made, "--seed", "64", "--out", "pairs2"]),
        forks.d2o(["eval", "real:digits", "--extractor", "digits", "--save-stats", "stats.npz"]),
        forks.d2o(["train", "quickstart", *_set(LOOP, PAIRS), "--out", "run"]),
    ):
        if (outcome := forks.run(function, cwd=inputs, log=base / "log", seconds=120)).code != 0:
            raise RuntimeError(f"the harness could not make its inputs ({outcome.brief}):\n{outcome.text}")
    return inputs


def copy(inputs: Path, names: tuple[str, ...], folder: Path) -> None:
    """A trial's own folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in names:
        source = inputs / name
        if source.is_dir():
            shutil.copytree(source, folder / name)
        else:
            shutil.copyfile(source, folder / name)
