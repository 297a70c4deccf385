"""docs/methods-and-teachers.md: which method learns from which family of teachers, as the code accepts it (`python
tools/matrix.py` writes it; a test compares)."""

from __future__ import annotations

from pathlib import Path

from d2o.methods.base import get_method, method_names
from d2o.methods.teachers import why_not
from d2o.teachers.kinds import FAMILIES, TEXT, TeacherKind

PAGE = Path(__file__).resolve().parent.parent / "docs" / "methods-and-teachers.md"
HEAD = """# Which method learns from which teacher

*Written by `python tools/matrix.py` from what the code accepts; a test trains every cell for five iterations.*

Methods work on denoisers D(x; sigma) of x = x_0 + sigma n, which the EDM family are. A teacher with any other schedule,
x_t = alpha_t x_0 + sigma_t eps, is seen as one: x = x_t / alpha_t at sigma = sigma_t / alpha_t, with the time that has
that noise level (between two steps of a discrete schedule by interpolation in log sigma). The student is a copy of that
view, weights of the teacher's own network under it, and exports to diffusers' format (`d2o export --format diffusers`).

What a method cannot learn from is refused by the teacher's name, folder or file, before anything is fetched or made.

## Families

"""
TAIL = """
## What to set for teachers that are not of the EDM family

- `student.sigma`: SD 1.5's schedule reaches from sigma 0.029 to 14.6, DDPM's linear one from 0.01 to 157, SD 3's flow
  has t = sigma / (1 + sigma). `ode` calls its student at the top: `student.sigma: 14.6`; above it is refused. With a
  discrete schedule the nearest of its levels is taken.
- `sid.sigma_min`, `sid.sigma_max`, `sid.p_mean`, `sid.p_std`: noise levels at which scores are compared; latents have
  a standard deviation of 1, not 0.5, so that the published numbers are for twice as small values.
- Networks of diffusers have no input for EDM's augmentations (`augment: 0`), and `student.freeze` knows EDM's blocks.
"""


def page() -> str:
    """The text of docs/methods-and-teachers.md."""
    rows = [name for name in method_names() if get_method(name).takes]
    notes: dict[str, int] = {}
    lines = [f"- **{family}**: {words}" for family, words in FAMILIES.items()]
    lines += ["", "## Methods", "", "| | " + " | ".join(FAMILIES) + " |", "|---|" + ":-:|" * len(FAMILIES)]
    for method in rows:
        whys = [why_not(method, TeacherKind("", family, text=family in TEXT)) for family in FAMILIES]
        cells = [f"no ({notes.setdefault(why, len(notes) + 1)})" if why else "yes" for why in whys]
        lines.append(f"| `{method}` | " + " | ".join(cells) + " |")
    lines += ["", *(f"{number}. {why}" for why, number in notes.items())]
    others = [f"`{name}`" for name in method_names() if not get_method(name).takes]
    lines += ["", f"Without a teacher: {', '.join(others)}."]
    return HEAD + "\n".join(lines) + "\n" + TAIL


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
