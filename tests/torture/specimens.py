"""A small valid file of every kind that d2o reads, and a quick command that reads it."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.torture import forks
from tests.torture.events import Events


@dataclass(frozen=True)
class Specimen:
    """`make` fills a folder, in a child; `file` (a pattern) in it is mutated; `read` is the command, or a function, that reads it there.

    `format`: the mutations that know its inside. `own`: bytes that are not those that were written can be told (a digest of d2o's, a zip's
    CRC): a result other than the intact file's is a failure. `named`: any of these in the message says which file is meant.
    """

    name: str
    make: Callable[[Path], None]
    file: str
    read: list[str] | Callable[[], None]
    format: str = ""
    own: bool = False
    named: tuple[str, ...] = ()
    after: list[list[str]] = field(default_factory=list)  # commands that finish what `make` began
    killed_at: str = ""  # the last of them is killed when a file whose name ends so gets its name for the second time

    @property
    def names(self) -> tuple[str, ...]:
        first = self.file.partition("/")[0]
        return (*self.named, Path(self.file).name, *([first] if first != "images" else []))


def build(specimen: Specimen, base: Path) -> Path:
    """Make the specimen's folder. RuntimeError: the harness could not."""
    folder = base / specimen.name.replace(" ", "_").replace("/", "_")
    folder.mkdir(parents=True)
    steps: list[Callable[[], None]] = [lambda: specimen.make(folder), *(forks.d2o(arguments) for arguments in specimen.after)]
    for i, step in enumerate(steps):
        killed = bool(specimen.killed_at) and i == len(steps) - 1
        outcome = forks.run(_until(step, folder, specimen.killed_at) if killed else step, cwd=folder, log=base / "log", seconds=120)
        if outcome.code != 0 and not (killed and outcome.signal == 9):
            raise RuntimeError(f"the harness could not make {specimen.name} ({outcome.brief}):\n{outcome.text}")
    return folder


def find_file(specimen: Specimen, folder: Path) -> Path:
    """The file that is mutated."""
    found = sorted(folder.glob(specimen.file))
    if not found:
        made = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
        raise RuntimeError(f"the harness made no {specimen.file} for {specimen.name}: {made}")
    return found[0]


def _until(step: Callable[[], None], folder: Path, ending: str) -> Callable[[], None]:
    def watched() -> None:
        times = 0

        def second(kind: str, path: str) -> bool:
            nonlocal times
            times += kind == "os.rename" and path.endswith(ending)
            return times == 2

        Events(folder, where=second).install()
        step()

    return watched


# What the makers use


def _students(kind: str) -> Callable[[Path], None]:
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


def _teacher(folder: Path) -> None:
    from tests.helpers import tiny_teacher

    tiny_teacher(folder / "teacher.safetensors")


def _text_teacher(folder: Path) -> None:
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


def _recipe(folder: Path) -> None:
    _teacher(folder)
    (folder / "recipe.yaml").write_text(RECIPE)


def _png(i: int = 0, size: int = 8) -> bytes:
    import numpy as np
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(np.random.RandomState(i).randint(0, 255, (size, size), dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


COUNT = 6


def _folder(suffix: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        from PIL import Image

        for i in range(COUNT):
            path = folder / "images" / "ab"[i % 2] / f"{i}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.open(io.BytesIO(_png(i))).save(path)

    return make


def _edm_zip(folder: Path) -> None:
    members = [(f"00000/img{i:08d}.png", _png(i)) for i in range(COUNT)]
    members.append(("dataset.json", json.dumps({"labels": [[name, i % 2] for i, (name, _) in enumerate(members)]}).encode()))
    with zipfile.ZipFile(folder / "images.zip", "w") as file:
        for name, content in members:
            file.writestr(zipfile.ZipInfo(name), content)


def _webdataset(folder: Path) -> None:
    with tarfile.open(folder / "images.tar", "w", format=tarfile.USTAR_FORMAT) as file:
        for i in range(COUNT):
            for name, content in ((f"{i:04d}.png", _png(i)), (f"{i:04d}.cls", b"%d" % (i % 2))):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))


def _npz(folder: Path) -> None:
    import numpy as np

    from tests.torture.mutate import pack

    def array(values: np.ndarray) -> bytes:
        out = io.BytesIO()
        np.save(out, values)
        return out.getvalue()

    pixels = np.random.RandomState(0).randint(0, 255, (COUNT, 8, 8, 1), dtype=np.uint8)
    (folder / "images.npz").write_bytes(pack([("images.npy", array(pixels)), ("labels.npy", array(np.arange(COUNT) % 2))]))


def _lmdb(folder: Path) -> None:
    import lmdb

    with lmdb.open(str(folder / "images_lmdb"), map_size=1 << 20) as environment, environment.begin(write=True) as transaction:
        for i in range(COUNT):
            transaction.put(b"%04d" % i, _png(i))
    os.remove(folder / "images_lmdb" / "lock.mdb")


def _cifar(folder: Path) -> None:
    """CIFAR-10's archive as it is published, with a few images."""
    from tests.data.test_downloads import cifar

    with tarfile.open(folder / "cifar-10-python.tar.gz", "w:gz") as file:
        for name, content in cifar().items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))


def read_cifar() -> None:
    from d2o.data.images import open_images
    from d2o.interop.safetensors_io import tensors_sha256

    _say(lambda: tensors_sha256({"images": open_images("cifar-10-python.tar.gz").images(slice(None))}))


def _statistics(folder: Path) -> None:
    _folder("png")(folder)


def _pickled_statistics(folder: Path) -> None:
    import numpy as np

    _folder("png")(folder)
    random = np.random.RandomState(0).randn(100, 64)
    (folder / "stats.pkl").write_bytes(pickle.dumps({"mu": random.mean(0), "sigma": np.cov(random, rowvar=False)}))


def _log(folder: Path) -> None:
    """A run's log, for the curves of a report."""
    _folder("png")(folder)
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


def _table(folder: Path) -> None:
    _folder("png")(folder)
    (folder / "table.yaml").write_text(TABLE)


def _prompts(suffix: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        _text_teacher(folder)
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


def _nvidia(folder: Path) -> None:
    shutil.copyfile(Path(__file__).parents[1] / "golden" / "edm" / "edm-ddpmpp.pkl", folder / "network.pkl")


def _weights(kind: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        import torch

        torch.manual_seed(0)
        tensors = {"layer.weight": torch.randn(8, 8), "layer.bias": torch.randn(8), "steps": torch.arange(3)}
        if kind == "script":
            torch.jit.script(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())).save(str(folder / "weights.pt"))
        else:
            torch.save({"state_dict": tensors}, folder / "weights.pt", _use_new_zipfile_serialization=kind == "zip")

    return make


def read_weights() -> None:
    """Every tensor in weights.pt, as metrics read the networks that are published so."""
    from d2o.interop.safetensors_io import tensors_sha256
    from d2o.interop.torch_files import read_tensors

    _say(lambda: tensors_sha256(read_tensors("weights.pt")))


def _downloaded(folder: Path) -> None:
    """A file that was downloaded before, whose digest nobody had published."""
    import hashlib

    content = _png() * 20
    (folder / "weights.bin").write_bytes(content)
    about = {"url": "https://example.org/weights.bin", "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content), "checked": False,
             "date": "2026-01-01T00:00:00+00:00"}  # fmt: skip
    (folder / "weights.bin.json").write_text(json.dumps(about))


def read_downloaded() -> None:
    from d2o.interop.download import verify

    _say(lambda: verify("weights.bin").read_bytes().hex()[:200])


def _say(read: Callable[[], str]) -> None:
    """The result as a file; a UserError as the command line words it."""
    import sys

    from d2o.cli import console
    from d2o.errors import UserError

    try:
        Path("result.txt").write_text(read())
    except UserError as error:
        console.error(error.message, error.hint)
        sys.exit(2)


def _diffusers(folder: Path) -> None:
    from d2o.teachers.registry import asset

    shutil.copytree(asset("tiny-sd"), folder / "sd")


def _classifier(folder: Path) -> None:
    from d2o.interop.safetensors_io import load_file, save_file
    from d2o.teachers.registry import asset

    _folder("png")(folder)
    save_file(folder / "classifier.safetensors", *load_file(asset("classifier_digits.safetensors")))  # as it is written today: with its seal


QUICK = ("student denoiser", "state", "recipe of a run", "log of a run", "recipe", "pair shard, train", "pair manifest, train", "image png",
         "EDM zip", "WebDataset tar", "npz of images", "part of samples", "statistics npz", "result json", "download")  # fmt: skip
"""Those of the short form."""


# The list

SAMPLE = ["sample", "student.safetensors", "--n", "2", "--batch", "2", "--out", "out.npz"]
SAVE = ["--extractor", "digits", "--save-stats", "out.npz"]
STATS = ["eval", "images", "--extractor", "digits", "--save-stats", "stats.npz"]
PAIRS = ["pairs", "--teacher", "teacher.safetensors", "--n", "16", "--steps", "2", "--shard-size", "8", "--out", "pairs"]
TRAIN = ["train", "recipe.yaml", "--out", "run"]
SAMPLES = ["sample", "student.safetensors", "--n", "6", "--batch", "6", "--labels", "0,1"]
RESULT = ["eval", "images", "--against", "stats.npz", "--json", "result.json"]
MEASURE = ["eval", "student.safetensors", "--n", "8", "--batch", "4", "--distance-n", "4", "--work", "work", *SAVE]
TEXT = ["pairs", "--teacher", "teacher.safetensors", "--n", "2", "--steps", "1", "--out", "out"]
DIFFUSERS = ["sample", "--teacher", "sd", "--prompt", "a seven", "--n", "1", "--steps", "1", "--out", "out.npz"]


def _sets() -> list[Specimen]:
    """Images of every kind, read by `d2o eval`."""
    def images(name: str, make: Callable[[Path], None], file: str, kind: str = "", own: bool = False, x: str | None = None) -> Specimen:
        return Specimen(name, make, file, ["eval", x or file, *SAVE], kind, own)

    return [
        images("image png", _folder("png"), "images/a/2.png", "png", x="images"),
        images("image jpg", _folder("jpg"), "images/a/2.jpg", x="images"),
        images("EDM zip", _edm_zip, "images.zip", "zip", own=True),
        images("WebDataset tar", _webdataset, "images.tar", "tar"),
        images("npz of images", _npz, "images.npz", "zip", own=True),
        images("LMDB", _lmdb, "images_lmdb/data.mdb", x="images_lmdb"),
        Specimen("CIFAR-10 tar.gz", _cifar, "cifar-10-python.tar.gz", read_cifar),
    ]


def _samples() -> list[Specimen]:
    """What `d2o sample` writes, read by `d2o eval`."""
    def samples(suffix: str, kind: str, own: bool) -> Specimen:
        file = f"samples{suffix}"
        return Specimen(f"samples {suffix[1:]}", _students("denoiser"), file, ["eval", file, *SAVE], kind, own, after=[[*SAMPLES, "--out", file]])

    return [samples(".zip", "zip", True), samples(".tar", "tar", False), samples(".npz", "zip", True)]


SPECIMENS = [
    *(Specimen(f"student {kind}", _students(kind), "student.safetensors", SAMPLE, "sealed", True)
      for kind in ("denoiser", "consistency", "multistep", "style")),
    Specimen("teacher", _teacher, "teacher.safetensors",
             ["sample", "--teacher", "teacher.safetensors", "--n", "2", "--steps", "2", "--out", "out.npz"], "sealed", True),
    Specimen("teacher of text", _prompts("txt"), "teacher.safetensors", [*TEXT, "--prompts", "prompts.txt"], "sealed", True),
    Specimen("classifier", _classifier, "classifier.safetensors",
             ["eval", "images", "--extractor", "classifier.safetensors", "--save-stats", "out.npz"], "sealed", True),
    Specimen("state", _recipe, "run/checkpoints/state.safetensors", [*TRAIN, "--resume"], "sealed", True, after=[PAIRS, TRAIN],
             killed_at="last.safetensors"),
    Specimen("last, by resume", _recipe, "run/checkpoints/last.safetensors", [*TRAIN, "--resume"], "sealed", True, after=[PAIRS, TRAIN]),
    Specimen("recipe of a run", _recipe, "run/recipe.yaml", [*TRAIN, "--resume"], "yaml", True, named=("run",), after=[PAIRS, TRAIN],
             killed_at="last.safetensors"),
    Specimen("log of a run", _recipe, "run/metrics.jsonl", [*TRAIN, "--resume"], "jsonl", named=("run",), after=[PAIRS, TRAIN],
             killed_at="last.safetensors"),
    Specimen("recipe", _recipe, "recipe.yaml", ["train", "recipe.yaml", "--plan"], "yaml", named=("tiny",), after=[PAIRS]),
    Specimen("pair shard, train", _recipe, "pairs/shard-00001.safetensors", TRAIN, "sealed", True, after=[PAIRS]),
    Specimen("pair manifest, train", _recipe, "pairs/manifest.json", TRAIN, "json", True, after=[PAIRS]),
    Specimen("pair shard, verify", _recipe, "pairs/shard-00001.safetensors", ["pairs", "--verify", "pairs"], "sealed", True, after=[PAIRS]),
    Specimen("pair manifest, verify", _recipe, "pairs/manifest.json", ["pairs", "--verify", "pairs"], "json", True, after=[PAIRS]),
    Specimen("pair manifest, stats", _recipe, "pairs/manifest.json", ["pairs", "--stats", "pairs"], "json", True, after=[PAIRS]),
    Specimen("pair shard, eval", _recipe, "pairs/shard-00001.safetensors", ["eval", "pairs", *SAVE], "sealed", True, after=[PAIRS]),
    Specimen("pair manifest, continued", _recipe, "pairs/manifest.json", PAIRS, "json", True, after=[PAIRS], killed_at="manifest.json"),
    Specimen("pair shard, merge", _recipe, "pairs/shard-00001.safetensors", ["pairs", "--merge", "pairs", "--merge", "more", "--out", "out"],
             "sealed", True, after=[PAIRS, [*PAIRS[:-1], "more", "--seed", "16"]]),
    *_sets(),
    *_samples(),
    Specimen("part of samples", _students("denoiser"), "out.zip.parts/part-00000.safetensors", [*SAMPLES, "--chunk", "2", "--out", "out.zip"],
             "sealed", True, named=("out.zip",), after=[[*SAMPLES[:5], "2", "--labels", "0,1", "--chunk", "2", "--out", "out.zip"]],
             killed_at=".safetensors"),
    Specimen("manifest of samples", _students("denoiser"), "out.zip.parts/manifest.json", [*SAMPLES, "--chunk", "2", "--out", "out.zip"], "json",
             True, named=("out.zip",), after=[[*SAMPLES[:5], "2", "--labels", "0,1", "--chunk", "2", "--out", "out.zip"]],
             killed_at=".safetensors"),
    *(Specimen(f"{what} of an evaluation", _students("denoiser"), f"work/*/{file}", MEASURE, kind, True, named=("work",), after=[MEASURE])
      for what, file, kind in (("part", "part-*.safetensors", "sealed"), ("manifest", "manifest.json", "json"))),
    Specimen("statistics npz", _statistics, "stats.npz", ["eval", "images", "--against", "stats.npz", "--json", "out.json"], "zip", True,
             after=[STATS]),
    Specimen("statistics pkl", _pickled_statistics, "stats.pkl", ["eval", "images", "--against", "stats.pkl", "--extractor", "digits", "--json",
                                                                 "out.json"]),
    Specimen("result json", _statistics, "result.json", ["eval", "result.json", "--compare", "--csv", "out.csv", "--report", "out.html"], "json",
             after=[STATS, RESULT]),
    Specimen("log, report", _log, "run/metrics.jsonl", ["eval", "result.json", "--compare", "--report", "out.html", "--run", "run"], "jsonl",
             after=[STATS, RESULT]),
    Specimen("table yaml", _table, "table.yaml", ["eval", "--table", "./table.yaml", "--json", "out.json"], "yaml", after=[STATS]),
    *(Specimen(f"prompts {suffix}", _prompts(suffix), f"prompts.{suffix}", [*TEXT, "--prompts", f"prompts.{suffix}"], kind)
      for suffix, kind in (("txt", "text"), ("jsonl", "jsonl"), ("parquet", ""))),
    Specimen("NVIDIA pickle", _nvidia, "network.pkl", ["sample", "--teacher", "network.pkl", "--n", "1", "--steps", "1", "--out", "out.npz"]),
    *(Specimen(f"torch {kind}", _weights(kind), "weights.pt", read_weights, "" if kind == "legacy" else "zip")
      for kind in ("zip", "legacy", "script")),
    Specimen("download", _downloaded, "weights.bin", read_downloaded, "", True),
    Specimen("record of a download", _downloaded, "weights.bin.json", read_downloaded, "json", named=("weights.bin",)),
    *(Specimen(f"diffusers {file}", _diffusers, f"sd/{file}", DIFFUSERS, kind)
      for file, kind in (("model_index.json", "json"), ("unet/config.json", "json"), ("scheduler/scheduler_config.json", "json"),
                         ("tokenizer/vocab.json", "json"), ("text_encoder/config.json", "json"),
                         ("unet/diffusion_pytorch_model.safetensors", "safetensors"))),
]  # fmt: skip
