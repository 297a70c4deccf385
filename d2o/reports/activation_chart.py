"""The layer activations of a U-Net as one SVG file that stands on its own: the encoder above, the decoder below (GDD,
Fig. 3)."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from d2o.evaluation.activations import min_max
from d2o.inputs import JsonObject
from d2o.reports.charts import HEIGHT, WIDTH, Series, line_chart, short
from d2o.reports.sweep_chart import STYLE, colours_along

RED_BLUE = ((0xB2, 0x18, 0x2B), (0xEF, 0x8A, 0x62), (0x8E, 0x8E, 0x8E), (0x67, 0xA9, 0xCF), (0x21, 0x66, 0xAC))
"""Shallow to deep, as the paper colours them."""
OWN = (
    ".guide{stroke:#b9b5aa;stroke-dasharray:4 4}text.guide{stroke:none;font-size:12px;fill:#8a877f}"
    ".small{font-size:13px}"
)
LEFT, TOP, PANEL, ROW, LEGEND = 16, 62, HEIGHT + 44, 17, 300
GUIDES = (60.0, 40.0)
"""Noise levels at which the paper sees almost all layers active."""
TICKS = 4
WORDS = {"mean_abs": "mean |output|", "rms": "root mean square of outputs", "mean": "mean output"}


def activation_chart(record: JsonObject) -> str:
    """Each layer's activation over the time steps of sampling, from its least (0) to its greatest (1)."""
    parts = [part for part in ("encoder", "decoder") if any(layer["part"] == part for layer in record["layers"])]
    pieces, top = [], TOP
    for part in parts:
        layers = sorted(
            (layer for layer in record["layers"] if layer["part"] == part), key=lambda layer: layer["depth"]
        )
        pieces.append(_panel(part, layers, record, top))
        top += max(PANEL, ROW * len(layers) + 44)
    width, settings = LEFT + WIDTH + 16 + LEGEND, record["settings"]
    about = (
        f"{WORDS[settings['act_stat']]} of each block's last convolution, min-max over {settings['steps']} steps of"
        f" {settings['solver']}, {settings['n']} images; red: shallow, blue: deep"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{top}" viewBox="0 0 {width} {top}">'
        f'<style>{STYLE}{OWN}</style><rect width="100%" height="100%" fill="#fff"/>'
        f'<text class="title" x="{LEFT}" y="28">{escape(record["name"])}: layers over the noise levels of'
        f' sampling</text><text x="{LEFT}" y="50">{escape(about)}</text>{"".join(pieces)}</svg>\n'
    )


def _panel(part: str, layers: Sequence[JsonObject], record: JsonObject, top: int) -> str:
    steps, sigma = record["i"], record["sigma"]
    series = [Series(layer["name"], range(len(steps)), min_max(np.array(layer["values"])).tolist()) for layer in layers]
    places = [round(k * (len(steps) - 1) / (TICKS - 1)) for k in range(TICKS)]
    ticks = [(float(at), f"{steps[at]} (σ {short(sigma[at])})") for at in places]
    guides = [
        (float(min(range(len(sigma)), key=lambda at: abs(sigma[at] - level))), f"σ {level:g}")
        for level in GUIDES
        if sigma[-1] < level < sigma[0]
    ]
    label = "time step i, noise to image"
    chart = line_chart(series, label, part, colours=len(layers), x_ticks=ticks, guides=guides)
    colours = colours_along(RED_BLUE, len(layers))
    own = "".join(f"#{part} .s{i}{{stroke:{c}}}" for i, c in enumerate(colours))
    chart = chart.replace("<svg ", f'<svg id="{part}" x="{LEFT}" y="{top + 24}" width="{WIDTH}" height="{HEIGHT}" ', 1)
    x, rows = LEFT + WIDTH + 16, []
    for i, (layer, colour) in enumerate(zip(layers, colours, strict=True)):
        y = top + 40 + ROW * i
        name = layer["name"].removeprefix("model.")
        rows.append(f'<line x1="{x}" x2="{x + 20}" y1="{y - 5}" y2="{y - 5}" stroke="{colour}" stroke-width="3"/>')
        rows.append(f'<text class="small" x="{x + 28}" y="{y}">{escape(_shortened(name))}</text>')
        at = short(layer["peak"]["sigma"])
        rows.append(f'<text class="small" x="{x + LEGEND - 10}" y="{y}" text-anchor="end">{at}</text>')
    return (
        f'<style>{own}</style><text x="{LEFT}" y="{top + 14}" style="font-weight:600">{part.capitalize()}</text>'
        f'<text class="small" x="{x + LEGEND - 10}" y="{top + 14}" text-anchor="end">greatest at σ</text>'
        f"{chart}{''.join(rows)}"
    )


def _shortened(name: str) -> str:
    return name if len(name) <= 26 else f"…{name[-25:]}"
