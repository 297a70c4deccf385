"""Pictures of equal noises, a column a method: `python tools/columns.py [digits|cifar16] [--runs FOLDER ...]`. The
README's is of runs of the table mini_methods, docs/cifar16_students.png of those of cifar16, of each method the first
seed that is there. What is not there is left out, and said."""

from __future__ import annotations

import argparse
import io
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

import d2o
from d2o.diffusion.noise import noise_and_labels
from d2o.interop.safetensors_io import atomic_write

ROOT = Path(__file__).resolve().parent.parent
CLASSES, GAP, HEAD = 10, 8, 22
SEED = 1_000_000
"""Of the first noise: that of `d2o eval`."""


@dataclass(frozen=True)
class Page:
    """`runs`: name of a column -> its run, after the teacher's; `many` images of each class, `cell` screen pixels
    wide."""

    file: str
    runs: dict[str, str]
    many: int
    cell: int


PAGES = {
    "digits": Page(
        "columns.png",
        {
            "ODE": "mini_ode",
            "D2GAN": "mini_d2g_gan",
            "PD": "mini_pd",
            "CD": "mini_cd",
            "CD-I": "mini_cd_i",
            "iCT": "mini_ict",
            "CTM": "mini_ctm",
            "DI": "mini_di",
            "DMD": "mini_dmd",
            "DMD2": "mini_dmd2",
            "SiD": "mini_sid_a1.2",
            "SiDA": "mini_sida_a1",
            "SiD2A": "mini_sid2a_a1",
            "GDD": "gdd_digits",
            "GDD-I": "gdd_digits_gdd_i",
            "SPI-GAN": "mini_spi_gan_k2",
            "DD-GAN": "mini_dd_gan_k4",
        },
        1,
        44,
    ),
    "cifar16": Page(
        "cifar16_students.png", {"SiD": "sid_cifar16", "GDD": "gdd_cifar16_gdd", "GDD-I": "gdd_cifar16"}, 6, 32
    ),
}
"""By the teacher that they begin with."""


@torch.no_grad()
def images(teacher: str, run: Path | None, many: int) -> torch.Tensor:
    """[n, C, H, W] in [-1, 1], class after class; without a run the teacher's."""
    model = d2o.load_teacher(teacher)
    noise, _ = noise_and_labels(range(SEED, SEED + CLASSES * many), model.spec.shape, CLASSES)
    labels = torch.arange(CLASSES).repeat_interleave(many)
    if run is None:
        return model.decode(model.sample(noise, labels))
    student = d2o.load_student(run)
    return student.decode(student(noise, labels if student.spec.classes else None))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("teacher", nargs="?", choices=[*PAGES], default="digits")
    arguments.add_argument("--runs", type=Path, nargs="+", default=[ROOT / "runs"])
    given = arguments.parse_args()
    page = PAGES[given.teacher]
    found, missing = {"teacher": images(given.teacher, None, page.many)}, []
    for name, source in page.runs.items():
        last = "checkpoints/last.safetensors"
        runs = sorted(path for folder in given.runs for path in folder.glob(f"{source}_seed[0-9]/{last}"))
        if runs:
            found[name] = images(given.teacher, runs[0], page.many)
        else:
            missing.append(name)
    path, data = ROOT / "docs" / page.file, io.BytesIO()
    drawn(found, page).save(data, "png")
    atomic_write(path, data.getvalue())
    print(f"wrote {path}" + (f"; not here: {', '.join(missing)}" if missing else ""))


def drawn(found: dict[str, torch.Tensor], page: Page) -> Image.Image:
    width, high, cell = page.many * page.cell, page.cell + 3, (page.cell, page.cell)
    mode = "L" if found["teacher"].shape[1] == 1 else "RGB"
    sheet = Image.new(mode, (len(found) * (width + GAP) - GAP, HEAD + CLASSES * high), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for column, (name, made) in enumerate(found.items()):
        left = column * (width + GAP)
        draw.text((left + width // 2, HEAD // 2), name, fill="black", font=font, anchor="mm")
        for i, image in enumerate(made):
            pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).squeeze(2).numpy()
            place = (left + i % page.many * page.cell, HEAD + i // page.many * high)
            sheet.paste(Image.fromarray(pixels).resize(cell, Image.Resampling.NEAREST), place)
    return sheet


if __name__ == "__main__":
    main()
