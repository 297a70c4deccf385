"""A small valid file of every kind that d2o reads, and a quick command that reads it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.torture import forks, makers, readers
from tests.torture.events import Events


@dataclass(frozen=True)
class Specimen:
    """`make` fills a folder, in a child; `file` (a pattern) in it is mutated; `read` is the command, or a function,
    that reads it there.

    `format`: the mutations that know its inside. `own`: bytes that are not those that were written can be told (a
    digest of d2o's, a zip's CRC): a result other than the intact file's is a failure. `named`: any of these in the
    message says which file is meant.
    """

    name: str
    make: Callable[[Path], None]
    file: str
    read: list[str] | Callable[[], None]
    format: str = ""
    own: bool = False
    named: tuple[str, ...] = ()
    unlike: tuple[str, ...] = ()  # folders that need not be the same: they hold times
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
    steps: list[Callable[[], None]] = [
        lambda: specimen.make(folder),
        *(forks.d2o(arguments) for arguments in specimen.after),
    ]
    for i, step in enumerate(steps):
        killed = bool(specimen.killed_at) and i == len(steps) - 1
        outcome = forks.run(
            _until(step, folder, specimen.killed_at) if killed else step, cwd=folder, log=base / "log", seconds=120
        )
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


QUICK = (
    "student denoiser",
    "state",
    "recipe of a run",
    "log of a run",
    "recipe",
    "pair shard, train",
    "pair manifest, train",
    "image png",
    "EDM zip",
    "WebDataset tar",
    "npz of images",
    "part of samples",
    "statistics npz",
    "result json",
    "download",
)
"""Those of the short form."""


# The list

SAMPLE = ["sample", "student.safetensors", "--n", "2", "--batch", "2", "--out", "out.npz"]
SAVE = ["--extractor", "digits", "--save-stats", "out.npz"]
STATS = ["eval", "images", "--extractor", "digits", "--save-stats", "stats.npz"]
PAIRS = [
    "pairs",
    "--teacher",
    "teacher.safetensors",
    "--n",
    "16",
    "--steps",
    "2",
    "--shard-size",
    "8",
    "--out",
    "pairs",
]
TRAIN = ["train", "recipe.yaml", "--out", "run"]
SAMPLES = ["sample", "student.safetensors", "--n", "6", "--batch", "6", "--labels", "0,1"]
COMPARE = ["eval", "result.json", "--compare"]
RESULT = ["eval", "images", "--against", "stats.npz", "--json", "result.json"]
MEASURE = ["eval", "student.safetensors", "--n", "8", "--batch", "4", "--distance-n", "4", "--work", "work", *SAVE]
TEXT = ["pairs", "--teacher", "teacher.safetensors", "--n", "2", "--steps", "1", "--out", "out"]
NVIDIA = ["sample", "--teacher", "network.pkl", "--n", "1", "--steps", "1", "--out", "out.npz"]
DIFFUSERS = ["sample", "--teacher", "sd", "--prompt", "a seven", "--n", "1", "--steps", "1", "--out", "out.npz"]


def _sets() -> list[Specimen]:
    """Images of every kind, read by `d2o eval`."""

    def images(
        name: str, make: Callable[[Path], None], file: str, kind: str = "", own: bool = False, x: str | None = None
    ) -> Specimen:
        return Specimen(name, make, file, ["eval", x or file, *SAVE], kind, own)

    return [
        images("image png", makers.image_folder("png"), "images/a/2.png", "png", x="images"),
        images("image jpg", makers.image_folder("jpg"), "images/a/2.jpg", x="images"),
        images("EDM zip", makers.edm_zip, "images.zip", "zip", own=True),
        images("WebDataset tar", makers.webdataset, "images.tar", "tar"),
        images("npz of images", makers.npz_of_images, "images.npz", "zip", own=True),
        images("LMDB", makers.lmdb_of_images, "images_lmdb/data.mdb", x="images_lmdb"),
        Specimen("CIFAR-10 tar.gz", makers.cifar_archive, "cifar-10-python.tar.gz", readers.read_cifar),
    ]


def _samples() -> list[Specimen]:
    """What `d2o sample` writes, read by `d2o eval`."""

    def samples(suffix: str, kind: str, own: bool) -> Specimen:
        file = f"samples{suffix}"
        after = [[*SAMPLES, "--out", file]]
        return Specimen(
            f"samples {suffix[1:]}", makers.student("denoiser"), file, ["eval", file, *SAVE], kind, own, after=after
        )

    return [samples(".zip", "zip", True), samples(".tar", "tar", False), samples(".npz", "zip", True)]


SPECIMENS = [
    *(
        Specimen(f"student {kind}", makers.student(kind), "student.safetensors", SAMPLE, "sealed", True)
        for kind in ("denoiser", "consistency", "multistep", "style")
    ),
    Specimen(
        "teacher",
        makers.teacher,
        "teacher.safetensors",
        ["sample", "--teacher", "teacher.safetensors", "--n", "2", "--steps", "2", "--out", "out.npz"],
        "sealed",
        True,
    ),
    Specimen(
        "teacher of text",
        makers.prompts_and_teacher("txt"),
        "teacher.safetensors",
        [*TEXT, "--prompts", "prompts.txt"],
        "sealed",
        True,
    ),
    Specimen(
        "classifier",
        makers.classifier_and_images,
        "classifier.safetensors",
        ["eval", "images", "--extractor", "classifier.safetensors", "--save-stats", "out.npz"],
        "sealed",
        True,
    ),
    Specimen(
        "state",
        makers.recipe,
        "run/checkpoints/state.safetensors",
        [*TRAIN, "--resume"],
        "sealed",
        True,
        after=[PAIRS, TRAIN],
        killed_at="last.safetensors",
    ),
    Specimen(
        "last, by resume",
        makers.recipe,
        "run/checkpoints/last.safetensors",
        [*TRAIN, "--resume"],
        "sealed",
        True,
        after=[PAIRS, TRAIN],
    ),
    Specimen(
        "recipe of a run",
        makers.recipe,
        "run/recipe.yaml",
        [*TRAIN, "--resume"],
        "yaml",
        True,
        named=("run",),
        after=[PAIRS, TRAIN],
        killed_at="last.safetensors",
    ),
    Specimen(
        "log of a run",
        makers.recipe,
        "run/metrics.jsonl",
        [*TRAIN, "--resume"],
        "jsonl",
        named=("run",),
        after=[PAIRS, TRAIN],
        killed_at="last.safetensors",
    ),
    Specimen(
        "recipe",
        makers.recipe,
        "recipe.yaml",
        ["train", "recipe.yaml", "--plan"],
        "yaml",
        named=("tiny",),
        after=[PAIRS],
    ),
    Specimen("pair shard, train", makers.recipe, "pairs/shard-00001.safetensors", TRAIN, "sealed", True, after=[PAIRS]),
    Specimen("pair manifest, train", makers.recipe, "pairs/manifest.json", TRAIN, "json", True, after=[PAIRS]),
    Specimen(
        "pair shard, verify",
        makers.recipe,
        "pairs/shard-00001.safetensors",
        ["pairs", "--verify", "pairs"],
        "sealed",
        True,
        after=[PAIRS],
    ),
    Specimen(
        "pair manifest, verify",
        makers.recipe,
        "pairs/manifest.json",
        ["pairs", "--verify", "pairs"],
        "json",
        True,
        after=[PAIRS],
    ),
    Specimen(
        "pair manifest, stats",
        makers.recipe,
        "pairs/manifest.json",
        ["pairs", "--stats", "pairs"],
        "json",
        True,
        after=[PAIRS],
    ),
    Specimen(
        "pair shard, eval",
        makers.recipe,
        "pairs/shard-00001.safetensors",
        ["eval", "pairs", *SAVE],
        "sealed",
        True,
        after=[PAIRS],
    ),
    Specimen(
        "pair manifest, continued",
        makers.recipe,
        "pairs/manifest.json",
        PAIRS,
        "json",
        True,
        after=[PAIRS],
        killed_at="manifest.json",
    ),
    Specimen(
        "pair shard, merge",
        makers.recipe,
        "pairs/shard-00001.safetensors",
        ["pairs", "--merge", "pairs", "--merge", "more", "--out", "out"],
        "sealed",
        True,
        after=[PAIRS, [*PAIRS[:-1], "more", "--seed", "16"]],
    ),
    *_sets(),
    *_samples(),
    Specimen(
        "part of samples",
        makers.student("denoiser"),
        "out.zip.parts/part-00000.safetensors",
        [*SAMPLES, "--chunk", "2", "--out", "out.zip"],
        "sealed",
        True,
        named=("out.zip",),
        after=[[*SAMPLES[:5], "2", "--labels", "0,1", "--chunk", "2", "--out", "out.zip"]],
        killed_at=".safetensors",
    ),
    Specimen(
        "manifest of samples",
        makers.student("denoiser"),
        "out.zip.parts/manifest.json",
        [*SAMPLES, "--chunk", "2", "--out", "out.zip"],
        "json",
        True,
        named=("out.zip",),
        after=[[*SAMPLES[:5], "2", "--labels", "0,1", "--chunk", "2", "--out", "out.zip"]],
        killed_at=".safetensors",
    ),
    *(
        Specimen(
            f"{what} of an evaluation",
            makers.student("denoiser"),
            f"work/*/{file}",
            MEASURE,
            kind,
            True,
            named=("work",),
            unlike=("work",),
            after=[MEASURE],
        )
        for what, file, kind in (("part", "part-*.safetensors", "sealed"), ("manifest", "manifest.json", "json"))
    ),
    Specimen(
        "statistics npz",
        makers.images_only,
        "stats.npz",
        ["eval", "images", "--against", "stats.npz", "--json", "out.json"],
        "zip",
        True,
        after=[STATS],
    ),
    Specimen(
        "statistics pkl",
        makers.pickled_statistics,
        "stats.pkl",
        ["eval", "images", "--against", "stats.pkl", "--extractor", "digits", "--json", "out.json"],
    ),
    Specimen(
        "result json",
        makers.images_only,
        "result.json",
        [*COMPARE, "--csv", "out.csv", "--report", "out.html"],
        "json",
        after=[STATS, RESULT],
    ),
    Specimen(
        "log, report",
        makers.log_and_images,
        "run/metrics.jsonl",
        [*COMPARE, "--report", "out.html", "--run", "run"],
        "jsonl",
        after=[STATS, RESULT],
    ),
    Specimen(
        "table yaml",
        makers.table_and_images,
        "table.yaml",
        ["eval", "--table", "./table.yaml", "--json", "out.json"],
        "yaml",
        after=[STATS],
    ),
    *(
        Specimen(
            f"prompts {suffix}",
            makers.prompts_and_teacher(suffix),
            f"prompts.{suffix}",
            [*TEXT, "--prompts", f"prompts.{suffix}"],
            kind,
        )
        for suffix, kind in (("txt", "text"), ("jsonl", "jsonl"), ("parquet", ""))
    ),
    Specimen("NVIDIA pickle", makers.nvidia_pickle, "network.pkl", NVIDIA),
    *(
        Specimen(
            f"torch {kind}",
            makers.torch_weights(kind),
            "weights.pt",
            readers.read_weights,
            "" if kind == "legacy" else "zip",
        )
        for kind in ("zip", "legacy", "script")
    ),
    Specimen("download", makers.downloaded, "weights.bin", readers.read_downloaded, "", True),
    Specimen(
        "record of a download",
        makers.downloaded,
        "weights.bin.json",
        readers.read_downloaded,
        "json",
        named=("weights.bin",),
    ),
    *(
        Specimen(f"diffusers {file}", makers.diffusers_folder, f"sd/{file}", DIFFUSERS, kind)
        for file, kind in (
            ("model_index.json", "json"),
            ("unet/config.json", "json"),
            ("scheduler/scheduler_config.json", "json"),
            ("tokenizer/vocab.json", "json"),
            ("text_encoder/config.json", "json"),
            ("unet/diffusion_pytorch_model.safetensors", "safetensors"),
        )
    ),
]
