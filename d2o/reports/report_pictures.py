"""Pieces of report.html that its sections share, and the sections of pictures: samples from equal noise, nearest
training images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from d2o.data.pictures import from_png
from d2o.inputs import JsonObject
from d2o.reports.cells import Result, number
from d2o.reports.charts import Series, line_chart


def section(title: str, lead: str, body: str) -> str:
    return f'<section><h2>{escape(title)}</h2><p class="lead">{escape(lead)}</p>{body}</section>'


def scroll(label: str, body: str, kind: str = "card ") -> str:
    """A part that is wider than a narrow page; the keyboard can scroll it, too."""
    return f'<div class="{kind}scroll" tabindex="0" role="region" aria-label="{escape(label)}">{body}</div>'


def colour_legend(entries: Iterable[tuple[str, str]]) -> str:
    """(class of the style sheet, name) of each colour."""
    return (
        '<ul class="legend">'
        + "".join(f'<li><i class="{kind}"></i>{escape(name)}</li>' for kind, name in entries)
        + "</ul>"
    )


def samples(records: Sequence[Result]) -> Iterable[str]:
    """One section for each set of noises, its generators side by side; one for sets of images."""
    groups: dict[str, list[Result]] = {}
    for r in records:
        if "grid" in r:
            key = (
                repr((r["grid"].get("seeds"), r["grid"].get("labels"), r["grid"].get("prompts")))
                if r["grid"].get("seeds")
                else ""
            )
            groups.setdefault(key, []).append(r)
    for key, group in sorted(groups.items(), key=lambda item: item[0] == ""):
        grid = group[0]["grid"]
        order = ", in the order of the classes asked for" if grid.get("labels") else ""
        if key:
            first, last = grid["seeds"]
            lead = (
                f"The same {grid['n']} noises in every column, seeds {first} to {last}: the first ones, not"
                f" chosen{order}."
            )
            yield section("Samples from equal noise", lead, f'<div class="grids">{"".join(_columns(group))}</div>')
        else:
            figures = "".join(
                _figure(r["grid"], r["grid"]["png"], r["name"], "evenly spaced, not chosen") for r in group
            )
            yield section("Images", "From the sets of images in the table.", f'<div class="grids">{figures}</div>')


def _columns(group: Sequence[Result]) -> Iterable[str]:
    """Teachers first. The teacher that came with a student's grid stands in where the table has no row for it."""
    teachers = [r for r in group if r["x"]["kind"] == "teacher"]
    shown = {r["grid"]["png"] for r in teachers}
    columns = sorted(teachers, key=lambda r: -r["x"]["nfe"])
    for r in group:
        spare = r["grid"].get("teacher_png")
        if spare and spare not in shown:
            shown.add(spare)
            yield _figure(r["grid"], spare, r["grid"]["teacher"], "teacher")
    for r in [*columns, *(r for r in group if r not in columns)]:
        calls = r["x"]["nfe"]
        yield _figure(
            r["grid"], r["grid"]["png"], r["name"], f"{r['x']['kind']}, {calls} network call{'s' * (calls != 1)}"
        )


def _figure(grid: JsonObject, png: str, name: str, what: str) -> str:
    n, alt = grid["n"], f"{grid['n']} images: {name}"
    captions = grid.get("prompts") or [f"class {label}" for label in grid.get("labels") or []] or [""] * n
    wide = min(range(2, 9), key=lambda c: (-n % c, -c)) if n % grid["columns"] else grid["columns"]
    try:
        parts = from_png(png, n, grid["columns"])
    except ValueError:  # of another d2o: shown as it is
        parts, captions, wide = [png], [""], 1
    items = "".join(
        f'<li title="{escape(caption)}">{_image(part)}{f"<span>{escape(caption)}</span>" if caption else ""}</li>'
        for part, caption in zip(parts, captions, strict=False)
    )
    narrow = -(-wide // 2) if wide > 5 else wide
    sheet = f'<ul class="pictures" aria-label="{escape(alt)}" style="--wide:{wide};--narrow:{narrow}">{items}</ul>'
    caption = f"<figcaption>{escape(name)}<span>{escape(what)}</span></figcaption>"
    return f'<figure class="card"><div class="sheet">{sheet}</div>{caption}</figure>'


def _image(png: str) -> str:
    return f'<img alt="" src="data:image/png;base64,{escape(png)}">'


NEIGHBOURS = (
    "Each row: a generated image, then the training images nearest to it in feature space. The number is its distance"
    " to the nearest one, in units of what is usual among training images themselves (the median distance of one to its"
    " nearest other one). Around 1, a sample is as new as training images are to each other; well below 1, with a pair"
    " that looks the same, it is a copy. Training sets hold near-doubles, too, so a few close pairs prove nothing:"
    " compare the share of close samples with that of training images. Copies that the features overlook, such as"
    " shifted or cropped ones, are not found."
)


def neighbours(records: Sequence[Result]) -> str:
    """Memorisation: d2o.evaluation.neighbours says what is shown."""
    found = [r for r in records if "neighbours" in r]
    if not found:
        return ""
    return section("Nearest training images", NEIGHBOURS, "".join(_neighbours(r) for r in found))


def _neighbours(record: Result) -> str:
    near = record["neighbours"]
    closer = (
        f"{_share(near['closer'])} of {near['n']:,} samples are nearer to a training image than {near['near']:g} times"
        f" the usual distance; of training images {_share(near['closer_real'])}. The median distance of samples is"
        f" {_ratio(near['median'], near['median_real'])} times the usual one. Features {near['extractor']},"
        f" {near['n_ref']:,} training images."
    )
    sheets = "".join(
        _pairs(record["name"], near, near[which], title)
        for which, title in (
            ("closest", "The samples nearest to the training set"),
            ("spaced", "Evenly spaced samples, not chosen"),
        )
    )
    shares = [i / (len(near["curve"]["real"]) - 1) for i in range(len(near["curve"]["real"]))]
    series = [
        Series("samples", near["curve"]["sample"], shares),
        Series("training images", near["curve"]["real"], shares),
    ]
    chart = line_chart(series, "distance to the nearest training image, 1 = usual", "share that is nearer")
    curve = ""
    if chart:
        lines = colour_legend([("s0", "samples"), ("s1", "training images")])
        what = (
            "Share of images (upwards) with a training image nearer than the distance below. Samples far to the left of"
            " training images: copying. To the right: images unlike those of the training."
        )
        title = f"How near, over {near['n']:,} samples"
        curve = (
            f'<div class="card chart"><h3>{title}</h3><p>{what}</p>{lines}{scroll("Distances", chart, "plot ")}</div>'
        )
    return (
        f'<h3>{escape(record["name"])}</h3><p class="lead">{escape(closer)}</p><div class="grids'
        f' near">{sheets}{curve}</div>'
    )


def _pairs(name: str, near: JsonObject, sheet: JsonObject, title: str) -> str:
    """A line for each sample: it, its neighbours (wrapped, where there are many), and how near the nearest is."""
    usual, rows, columns = near["median_real"], len(sheet["samples"]), near["columns"]
    try:
        parts = from_png(sheet["png"], rows * columns, columns)
    except ValueError:
        return ""
    items = "".join(
        f'<li title="sample {int(i)}, training image {int(j[0])}">{_image(parts[row * columns])}'
        f"<div>{''.join(_image(part) for part in parts[row * columns + 1 : (row + 1) * columns])}</div>"
        f"<b{' class=close' if d[0] < near['near'] * usual else ''}>{_ratio(d[0], usual)}</b></li>"
        for row, (i, j, d) in enumerate(zip(sheet["samples"], sheet["neighbours"], sheet["distances"], strict=True))
    )
    alt = f"{name}: {rows} rows of a sample and its {near['k']} nearest training images"
    return (
        '<figure class="card"><div class="heads"><span>sample</span><span>nearest training images</span></div>'
        f'<ol class="paired" aria-label="{escape(alt)}">{items}</ol><figcaption>{escape(title)}</figcaption></figure>'
    )


def _ratio(distance: float, usual: float) -> str:
    return f"{distance / usual:.2f}" if usual else number(distance)


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"
