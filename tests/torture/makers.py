"""Makers of specimens: each fills a folder with a small valid file and what is read beside it. They run in children."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path


def student(kind: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        from d2o.students.base import save_student

        if kind == "denoiser":
            from tests.helpers import tiny_student

            tiny_student(folder / "student.safetensors")
            return
        if kind == "consistency":
            from tests.students.test_consistency import student
        elif kind == "multistep":
            from tests.students.test_multistep import student
        else:
            from tests.students.test_style import style_student as student
        save_student(folder / "student.safetensors", student(), recipe={}, teacher=None, metrics={}, provenance=[])

    return make


def teacher(folder: Path) -> None:
    from tests.helpers import tiny_teacher

    tiny_teacher(folder / "teacher.safetensors")


def text_teacher(folder: Path) -> None:
    from tests.latent import tiny_text_to_image

    tiny_text_to_image(folder / "teacher.safetensors")


RECIPE = """
name: tiny
method: ode
teacher: teacher.safetensors
student: {sigma: 80.0, init: teacher}
pairs: {path: pairs, n: 16, steps: 2, shard_size: 8}
ode: {loss: mse}
optim: {lr: 1.0e-3}
batch: 8
images: 48
log_every: 1
threads: 1
checkpoint: {every: 16, keep: 1}
"""


def recipe(folder: Path) -> None:
    teacher(folder)
    (folder / "recipe.yaml").write_text(RECIPE)


def png(i: int = 0, size: int = 8) -> bytes:
    import numpy as np
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(np.random.RandomState(i).randint(0, 255, (size, size), dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


COUNT = 6


def image_folder(suffix: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        from PIL import Image

        for i in range(COUNT):
            path = folder / "images" / "ab"[i % 2] / f"{i}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.open(io.BytesIO(png(i))).save(path)

    return make


def edm_zip(folder: Path) -> None:
    members = [(f"00000/img{i:08d}.png", png(i)) for i in range(COUNT)]
    members.append(
        ("dataset.json", json.dumps({"labels": [[name, i % 2] for i, (name, _) in enumerate(members)]}).encode())
    )
    with zipfile.ZipFile(folder / "images.zip", "w") as file:
        for name, content in members:
            file.writestr(zipfile.ZipInfo(name), content)


def webdataset(folder: Path) -> None:
    with tarfile.open(folder / "images.tar", "w", format=tarfile.USTAR_FORMAT) as file:
        for i in range(COUNT):
            for name, content in ((f"{i:04d}.png", png(i)), (f"{i:04d}.cls", b"%d" % (i % 2))):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))


def npz_of_images(folder: Path) -> None:
    import numpy as np

    from tests.torture.mutate_containers import pack

    def array(values: np.ndarray) -> bytes:
        out = io.BytesIO()
        np.save(out, values)
        return out.getvalue()

    pixels = np.random.RandomState(0).randint(0, 255, (COUNT, 8, 8, 1), dtype=np.uint8)
    (folder / "images.npz").write_bytes(
        pack([("images.npy", array(pixels)), ("labels.npy", array(np.arange(COUNT) % 2))])
    )


def lmdb_of_images(folder: Path) -> None:
    import lmdb

    with (
        lmdb.open(str(folder / "images_lmdb"), map_size=1 << 20) as environment,
        environment.begin(write=True) as transaction,
    ):
        for i in range(COUNT):
            transaction.put(b"%04d" % i, png(i))
    os.remove(folder / "images_lmdb" / "lock.mdb")


def cifar_archive(folder: Path) -> None:
    """CIFAR-10's archive as it is published, with a few images."""
    from tests.data.test_downloads import cifar

    with tarfile.open(folder / "cifar-10-python.tar.gz", "w:gz") as file:
        for name, content in cifar().items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))


def images_only(folder: Path) -> None:
    image_folder("png")(folder)


def pickled_statistics(folder: Path) -> None:
    import numpy as np

    image_folder("png")(folder)
    random = np.random.RandomState(0).randn(100, 64)
    (folder / "stats.pkl").write_bytes(pickle.dumps({"mu": random.mean(0), "sigma": np.cov(random, rowvar=False)}))


def log_and_images(folder: Path) -> None:
    """A run's log, for the curves of a report."""
    image_folder("png")(folder)
    rows = [{"iteration": i, "images": 8 * i, "loss": 2.0 / i, "lr": 1e-3, "images_per_s": 9.5} for i in range(1, 6)]
    rows.append({"iteration": 5, "images": 40, "eval": {"fd": 3.5, "accuracy": 0.5}})
    (folder / "run").mkdir()
    (folder / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


TABLE = """
title: a table
paper: somebody
options: {n: 6}
against: stats.npz
rows:
  - {name: one, x: images, paper: {fd: 1.5}}
  - {name: two, x: absent, recipe: quickstart, paper: {fd: 2}}
"""


def table_and_images(folder: Path) -> None:
    image_folder("png")(folder)
    (folder / "table.yaml").write_text(TABLE)


def prompts_and_teacher(suffix: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        text_teacher(folder)
        texts = ["a handwritten seven", "a handwritten eight", "seven"]
        path = folder / f"prompts.{suffix}"
        if suffix == "txt":
            path.write_text("\n".join(texts) + "\n")
        elif suffix == "jsonl":
            path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
        else:
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.table({"prompt": texts}), path)

    return make


def nvidia_pickle(folder: Path) -> None:
    shutil.copyfile(Path(__file__).parents[1] / "golden" / "edm" / "edm-ddpmpp.pkl", folder / "network.pkl")


def torch_weights(kind: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        import torch

        torch.manual_seed(0)
        tensors = {"layer.weight": torch.randn(8, 8), "layer.bias": torch.randn(8), "steps": torch.arange(3)}
        if kind == "script":
            torch.jit.script(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())).save(
                str(folder / "weights.pt")
            )
        else:
            torch.save({"state_dict": tensors}, folder / "weights.pt", _use_new_zipfile_serialization=kind == "zip")

    return make


def downloaded(folder: Path) -> None:
    """A file that was downloaded before, whose digest nobody had published."""
    import hashlib

    content = png() * 20
    (folder / "weights.bin").write_bytes(content)
    about = {
        "url": "https://example.org/weights.bin",
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
        "checked": False,
        "date": "2026-01-01T00:00:00+00:00",
    }
    (folder / "weights.bin.json").write_text(json.dumps(about))


def diffusers_folder(folder: Path) -> None:
    from d2o.interop.assets import asset

    shutil.copytree(asset("tiny-sd"), folder / "sd")


def classifier_and_images(folder: Path) -> None:
    from d2o.interop.assets import asset
    from d2o.interop.safetensors_io import load_file, save_file

    image_folder("png")(folder)
    save_file(
        folder / "classifier.safetensors", *load_file(asset("classifier_digits.safetensors"))
    )  # as it is written today: with its seal
