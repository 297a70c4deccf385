"""The README's picture: equal noises, a column a method, from runs of the table mini_methods, of each method the first
seed that is there: `python tools/columns.py [--runs FOLDER ...]`. What is not there is left out, and said."""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

import d2o
from d2o.diffusion.noise import noise_and_labels
from d2o.interop.safetensors_io import atomic_write

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = {
    "teacher": "digits",
    "ODE": "mini_ode",
    "D2GAN": "mini_d2g_gan",
    "PD": "mini_pd",
    "CD": "mini_cd",
    "CTM": "mini_ctm",
    "DMD": "mini_dmd",
    "DMD2": "mini_dmd2",
    "SiD": "mini_sid_a1.2",
    "SiDA": "mini_sida_a1",
    "GDD-I": "gdd_digits_gdd_i",
    "SPI-GAN": "mini_spi_gan_k2",
}
ROWS, CELL, GAP, HEAD = 10, 48, 8, 22
"""Digits 0 to 9, six screen pixels for each of their own."""


def images(run: Path | None, noise: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[n, 1, 8, 8] in [-1, 1]; None: the teacher's."""
    if run is None:
        teacher = d2o.load_teacher("digits")
        return teacher.decode(teacher.sample(noise, labels))
    student = d2o.load_student(run)
    return student.decode(student(noise, labels if student.spec.classes else None))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--runs", type=Path, nargs="+", default=[ROOT / "runs"])
    given = arguments.parse_args()
    first = 1_000_000
    noise, _ = noise_and_labels(range(first, first + ROWS), (1, 8, 8), 10)
    labels = torch.arange(ROWS)
    found, missing = {}, []
    for name, source in COLUMNS.items():
        last = "checkpoints/last.safetensors"
        runs = sorted(path for folder in given.runs for path in folder.glob(f"{source}_seed[0-9]/{last}"))
        if source != "digits" and not runs:
            missing.append(name)
            continue
        with torch.no_grad():
            found[name] = images(runs[0] if runs else None, noise, labels)
    page = Image.new("L", (len(found) * (CELL + GAP) - GAP, HEAD + ROWS * (CELL + 3)), 255)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(12)
    for column, (name, digits) in enumerate(found.items()):
        left = column * (CELL + GAP)
        draw.text((left + CELL // 2, HEAD // 2), name, fill=0, font=font, anchor="mm")
        for row, digit in enumerate(digits):
            pixels = ((digit[0].clamp(-1, 1) + 1) * 127.5).round().byte().numpy()
            page.paste(
                Image.fromarray(pixels).resize((CELL, CELL), Image.Resampling.NEAREST), (left, HEAD + row * (CELL + 3))
            )
    path, data = ROOT / "docs" / "columns.png", io.BytesIO()
    page.save(data, "png")
    atomic_write(path, data.getvalue())
    print(f"wrote {path}" + (f"; not here: {', '.join(missing)}" if missing else ""))


if __name__ == "__main__":
    main()
