"""Line and dot charts as inline SVG: no library, no script, coloured by the page's style sheet (classes s0, s1,
...)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 18, 14, 50
MAX_POINTS = 400
FEW = 30  # points that need no smoothing
COLOURS = 6


@dataclass(frozen=True)
class Series:
    """A line through (x, y). `smooth` draws its local average over the faint raw line; `marks` puts a dot on each
    point."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    smooth: bool = False
    marks: bool = False


def line_chart(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    log_y: bool = False,
    colours: int = COLOURS,
    x_ticks: Sequence[tuple[float, str]] | None = None,
    guides: Sequence[tuple[float, str]] = (),
    levels: Sequence[tuple[float, str, str]] = (),
) -> str:
    """One SVG element; `colours`: of the style sheet, taken in turn; `x_ticks`: places on the axis and what is written
    there; `guides`: vertical lines likewise; `levels`: horizontal ones, with the dashes of each. Points that are not
    finite (or not positive on a log axis) are left out; an empty string when none remain."""
    lines = [_clean(s, log_y) for s in series]
    points = [p for _, p in lines if p]
    if not points:
        return ""
    x_low, x_high = _span([x for p in points for x, _ in p])
    levels = [level for level in levels if math.isfinite(level[0]) and (level[0] > 0 or not log_y)]
    heights = [*(y for p in points for _, y in p), *(value for value, _, _ in levels)]
    y_low, y_high = _span([math.log10(y) if log_y else y for y in heights])
    pad = 0.05 * (y_high - y_low)
    y_low, y_high = y_low - pad, y_high + pad

    def sx(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def sy(y: float) -> float:
        return HEIGHT - BOTTOM - ((math.log10(y) if log_y else y) - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    body = []
    for tick in _log_ticks(y_low, y_high) if log_y else _ticks(y_low, y_high):
        body.append(f'<line class="tick" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{sy(tick):.1f}" y2="{sy(tick):.1f}"/>')
        body.append(f'<text x="{LEFT - 8}" y="{sy(tick) + 5:.1f}" text-anchor="end">{short(tick)}</text>')
    for tick, words in x_ticks if x_ticks is not None else [(t, short(t)) for t in _ticks(x_low, x_high)]:
        anchor = "end" if x_ticks and tick == x_high else "middle"  # long words stay inside
        at = f'x="{sx(tick):.1f}" y="{HEIGHT - BOTTOM + 20}"'
        body.append(f'<text {at} text-anchor="{anchor}">{escape(words)}</text>')
    for place, words in guides:
        body.append(
            f'<line class="guide" x1="{sx(place):.1f}" x2="{sx(place):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        )
        body.append(
            f'<text class="guide" x="{sx(place):.1f}" y="{TOP - 3}" text-anchor="middle">{escape(words)}</text>'
        )
    named: list[float] = []
    for value, words, dashes in levels:
        y, end = sy(value), WIDTH - RIGHT
        body.append(
            f'<line class="level" stroke-dasharray="{dashes}" x1="{LEFT}" x2="{end}" y1="{y:.1f}" y2="{y:.1f}">'
            f"<title>{escape(words)}: {short(value)}</title></line>"
        )
        if all(abs(y - other) >= 13 for other in named):  # names would lie on one another
            named.append(y)
            at = f'x="{end - 4}" y="{y - 3:.1f}" text-anchor="end"'
            body.append(f'<text class="level" {at}>{escape(words)}</text>')
    body.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>')
    body.append(
        f'<text class="label" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}"'
        f' text-anchor="middle">{escape(x_label)}</text>'
    )
    for i, (s, p) in enumerate(lines):
        smooth = s.smooth and len(p) >= FEW
        raw = " ".join(f"{sx(x):.1f},{sy(y):.1f}" for x, y in p)
        body.append(f'<polyline class="s{i % colours}{" faint" if smooth else ""}" points="{raw}"/>')
        if smooth:
            average = " ".join(f"{sx(x):.1f},{sy(y):.1f}" for x, y in _average(p, log_y))
            body.append(f'<polyline class="s{i % colours}" points="{average}"/>')
        if s.marks:
            body += [
                f'<circle class="s{i % colours}" cx="{sx(x):.1f}" cy="{sy(y):.1f}" r="3.5"><title>{short(x)}:'
                f" {short(y)}</title></circle>"
                for x, y in p
            ]
    title = f"{escape(y_label)} against {escape(x_label)}"
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">{"".join(body)}</svg>'


def short(value: float) -> str:
    """A number for a tick: 0.02, 1.5, 300, 20k, 1.5M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _clean(s: Series, log_y: bool) -> tuple[Series, list[tuple[float, float]]]:
    points = [
        (x, y) for x, y in zip(s.x, s.y, strict=True) if math.isfinite(x) and math.isfinite(y) and (y > 0 or not log_y)
    ]
    step = -(-len(points) // MAX_POINTS) or 1
    kept = [points[i : i + step] for i in range(0, len(points), step)]
    return s, [(group[-1][0], sum(y for _, y in group) / len(group)) for group in kept]


def _average(points: list[tuple[float, float]], log_y: bool) -> list[tuple[float, float]]:
    """Gaussian average over about a twentieth of the line (of logarithms on a log axis), centred, so that it doesn't
    lag behind a fall."""
    width = max(len(points) / 50, 1.0)
    weights = [math.exp(-0.5 * (k / width) ** 2) for k in range(math.ceil(3 * width) + 1)]
    values = [math.log(y) if log_y else y for _, y in points]
    out = []
    for i, (x, _) in enumerate(points):
        reach = min(len(weights) - 1, i, len(points) - 1 - i)  # symmetric, also near the ends
        around = [(weights[abs(k)], values[i + k]) for k in range(-reach, reach + 1)]
        mean = sum(w * v for w, v in around) / sum(w for w, _ in around)
        out.append((x, math.exp(mean) if log_y else mean))
    return out


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1))


def _ticks(low: float, high: float, count: int = 6) -> list[float]:
    raw = (high - low) / count
    size = 10 ** math.floor(math.log10(raw))
    step = next(m * size for m in (1, 2, 2.5, 5, 10) if m * size >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, with 2 and 5 (or all) between where there are few. `low` and `high` are logarithms."""
    for between in ((1,), (1, 2, 5), tuple(range(1, 10))):
        ticks = [
            m * 10.0**k
            for k in range(math.floor(low), math.ceil(high) + 1)
            for m in between
            if low <= math.log10(m * 10.0**k) <= high
        ]
        if len(ticks) >= 4:
            break
    if len(ticks) < 3:  # less than a third of a decade: even steps of the value read better
        return _ticks(10**low, 10**high)
    kept: list[float] = []
    for tick in sorted(
        ticks, key=lambda t: (1, 5, 2, 3, 7).index(_digit(t)) if _digit(t) in (1, 5, 2, 3, 7) else 9
    ):  # round ones first
        if all(abs(math.log10(tick / other)) >= 0.09 * (high - low) for other in kept):
            kept.append(tick)
    return sorted(kept)


def _digit(tick: float) -> int:
    return round(tick / 10 ** math.floor(math.log10(tick) + 1e-9))


@dataclass(frozen=True)
class Dot:
    """A row of a dot chart. `colour`: of the style sheet (0: s0, ...); `mark`: another value of the same row, as a
    paper printed it."""

    name: str
    value: float
    text: str
    error: float | None = None
    colour: int = 0
    mark: float | None = None


ROW, DOT_WIDTH = 40, 460  # a name above each line, so that the chart stays readable on a narrow page


def dot_chart(dots: Sequence[Dot], title: str, log_x: bool = False) -> str:
    """One SVG element: values as dots on lines, with error bars and printed values. A dot needs no zero on its axis, as
    a bar does."""
    ends = [
        v for d in dots for v in (d.value - (d.error or 0), d.value, d.value + (d.error or 0), d.mark) if v is not None
    ]
    ends = [v for v in ends if math.isfinite(v) and (v > 0 or not log_x)]
    if not ends:
        return ""
    low, high = _span([math.log10(v) if log_x else v for v in ends])
    pad = 0.04 * (high - low)
    low, high, left, right = low - pad, high + pad, 8, DOT_WIDTH - 8

    def sx(value: float) -> float:
        at = (math.log10(value) if value > 0 else low) if log_x else value
        return left + (min(max(at, low), high) - low) / (high - low) * (right - left)

    height = ROW * len(dots) + 26
    ticks = _spread(_log_ticks(low, high) if log_x else _ticks(low, high, 5), sx)
    body = [
        f'<text class="small" x="{sx(t):.1f}" y="{height - 6}" text-anchor="middle">{s}</text>'
        for t, s in zip(ticks, _labels(ticks), strict=True)
    ]
    for i, d in enumerate(dots):
        y, colour = ROW * i + 28, f"s{d.colour % COLOURS}"
        name = _shortened(d.name, 54 - len(d.text))
        body.append(f'<text class="name" x="{left}" y="{y - 11}">{escape(name)}<title>{escape(d.name)}</title></text>')
        body.append(f'<text class="name" x="{right}" y="{y - 11}" text-anchor="end">{escape(d.text)}</text>')
        body.append(f'<line class="rail" x1="{left}" x2="{right}" y1="{y}" y2="{y}"/>')
        body += [f'<line class="rail" x1="{sx(t):.1f}" x2="{sx(t):.1f}" y1="{y - 3}" y2="{y + 3}"/>' for t in ticks]
        if d.error and math.isfinite(d.error):
            body.append(
                f'<line class="{colour} error" x1="{sx(d.value - d.error):.1f}" x2="{sx(d.value + d.error):.1f}"'
                f' y1="{y}" y2="{y}"/>'
            )
        if math.isfinite(d.value):
            body.append(f'<circle class="{colour}" cx="{sx(d.value):.1f}" cy="{y}" r="5"/>')
        if d.mark is not None and math.isfinite(d.mark):
            body.append(
                f'<path class="mark" d="M{sx(d.mark):.1f} {y - 8}l8 8l-8 8l-8 -8z"><title>paper:'
                f" {short(d.mark)}</title></path>"
            )
    return (
        f'<svg class="dots" viewBox="0 0 {DOT_WIDTH} {height}" role="img"'
        f' aria-label="{escape(title)}">{"".join(body)}</svg>'
    )


def _spread(ticks: list[float], place: Callable[[float], float]) -> list[float]:
    """Without those whose labels would touch the one before."""
    kept: list[float] = []
    for tick in ticks:
        if not kept or place(tick) - place(kept[-1]) >= 44:
            kept.append(tick)
    return kept


def _labels(ticks: list[float]) -> list[str]:
    """`short`, or as many digits as tell them apart."""
    labels = [short(t) for t in ticks]
    for digits in range(4, 9):
        if len(set(labels)) == len(labels):
            break
        labels = [f"{t:.{digits}g}" for t in ticks]
    return labels


def _shortened(name: str, length: int) -> str:
    length = max(length, 12)
    return name if len(name) <= length else f"{name[: length - 1]}…"
