"""The curves of several runs in one picture: an SVG file that stands on its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from d2o.reports.charts import HEIGHT, WIDTH, Series, line_chart, short

RAMP = (
    (0x42, 0x20, 0x86),
    (0x3A, 0x5B, 0xD9),
    (0x1F, 0x9A, 0xA8),
    (0x2E, 0x9D, 0x58),
    (0xC2, 0x9A, 0x0B),
    (0xD9, 0x6A, 0x2A),
    (0xB5, 0x2A, 0x5E),
)
"""Neighbours in a sweep have neighbouring colours."""
STYLE = (
    "text{font:15px system-ui,sans-serif;fill:#5f646d}.title{font-size:18px;font-weight:600;fill:#1d1f23}"
    ".bold{font-weight:700;fill:#1d1f23}.tick{stroke:#e2e0da}.axis{stroke:#5f646d}"
    "polyline{fill:none;stroke-width:2;stroke-linejoin:round}.faint{opacity:.35;stroke-width:1}"
    ".level{stroke:#5f646d;stroke-width:1.5}text.level{font-size:12px;stroke:none}"
)
LEFT, TOP, ROW, LEGEND, LETTERS = 16, 62, 24, 290, 26
DASHES = ("7 4", "2 3", "10 3 2 3", "4 2", "1 4", "12 4")
"""Of levels, in turn: the legend tells them apart by these."""


@dataclass(frozen=True)
class Line:
    """A run's curve over the images it has seen. `best`: the best run of all."""

    name: str
    points: Sequence[tuple[float, float]]
    best: bool = False


@dataclass(frozen=True)
class Level:
    """A number that no run here has a curve of: what a paper prints."""

    name: str
    value: float


def sweep_chart(
    title: str, lines: Sequence[Line], y_label: str, lower_is_better: bool = True, levels: Sequence[Level] = ()
) -> str:
    """The picture, or an empty string when there is no point to draw. The axis is logarithmic where values span more
    than a factor of 5. `levels`: horizontal lines, dashed, below the curves in the legend."""
    drawn = [line for line in lines if line.points]
    values = [y for line in drawn for _, y in line.points]
    if not values:
        return ""
    values += [level.value for level in levels]
    log = min(values) > 0 and max(values) > 5 * min(values)
    series = [
        Series(
            line.name,
            [x for x, _ in line.points],
            [y for _, y in line.points],
            smooth=True,
            marks=len(line.points) < 60,
        )
        for line in drawn
    ]
    marks = [(level.value, level.name, DASHES[i % len(DASHES)]) for i, level in enumerate(levels)]
    chart = line_chart(series, "images seen", y_label, log_y=log, colours=len(drawn), levels=marks)
    if not chart:
        return ""
    chart = chart.replace("<svg ", f'<svg x="{LEFT}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" ', 1)
    x = LEFT + WIDTH + 16
    legend = []
    for i, line in enumerate(drawn):
        y, (_, last) = TOP + 20 + ROW * i, line.points[-1]
        bold = ' class="bold"' if line.best else ""
        best = (min if lower_is_better else max)(value for _, value in line.points)
        legend.append(f'<line class="s{i}" x1="{x}" x2="{x + 20}" y1="{y - 5}" y2="{y - 5}" stroke-width="3"/>')
        told = f"{escape(line.name)}, last {short(last)}"
        legend.append(f'<text{bold} x="{x + 28}" y="{y}">{escape(_shortened(line.name))}<title>{told}</title></text>')
        legend.append(f'<text{bold} x="{x + LEGEND - 10}" y="{y}" text-anchor="end">{short(best)}</text>')
    for i, (value, name, dashes) in enumerate(marks, len(drawn)):
        y = TOP + 20 + ROW * i
        legend.append(
            f'<line class="level" stroke-dasharray="{dashes}" x1="{x}" x2="{x + 20}" y1="{y - 5}" y2="{y - 5}"/>'
        )
        legend.append(
            f'<text x="{x + 28}" y="{y}">{escape(_shortened(name))}<title>{escape(name)}, paper</title></text>'
        )
        legend.append(f'<text x="{x + LEGEND - 10}" y="{y}" text-anchor="end">{short(value)}</text>')
    colours = "".join(
        f".s{i}{{stroke:{c}}}circle.s{i}{{fill:{c}}}" for i, c in enumerate(colours_along(RAMP, len(drawn)))
    )
    width, height = x + LEGEND, max(TOP + HEIGHT, TOP + ROW * (len(drawn) + len(marks) + 1)) + 8
    about = (
        f"{y_label}{', logarithmic' if log else ''}; beside each run its {'lowest' if lower_is_better else 'highest'}"
        f" value{'; dashed: what the paper prints' if marks else ''}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
        f'<style>{STYLE}{colours}</style><rect width="100%" height="100%" fill="#fff"/>'
        f'<text class="title" x="{LEFT}" y="28">{escape(title)}</text><text x="{LEFT}" y="50">{escape(about)}</text>'
        f"{chart}{''.join(legend)}</svg>\n"
    )


def _shortened(name: str) -> str:
    return name if len(name) <= LETTERS else f"{name[: LETTERS - 1]}…"


def colours_along(ramp: Sequence[tuple[int, int, int]], n: int) -> list[str]:
    """n colours along a ramp of red, green, blue."""
    found = []
    for i in range(n):
        at = i / max(n - 1, 1) * (len(ramp) - 1)
        low = min(int(at), len(ramp) - 2)
        mixed = (round(a + (at - low) * (b - a)) for a, b in zip(ramp[low], ramp[low + 1], strict=True))
        found.append("#" + "".join(f"{value:02x}" for value in mixed))
    return found
