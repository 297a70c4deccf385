"""What a record says of how its numbers came about: the protocol, and what makes them worth less than they look."""

from __future__ import annotations

from d2o.data.draws import label_mode
from d2o.evaluation.extractor import Extractor
from d2o.evaluation.protocol import Settings
from d2o.evaluation.reference import Reference
from d2o.evaluation.sides import Measured, Side
from d2o.evaluation.subjects import Generator, Numbers, Pictures, Subject
from d2o.evaluation.task import Task
from d2o.inputs import JsonObject


def has(side: Side, extractor: Extractor) -> bool:
    return isinstance(side, Measured) and f"{extractor.name}/features" in side.columns.names()


def doubts(x: Subject, run: Side, reference: Reference | None, plan: Task) -> list[str]:
    """What makes a Fréchet distance of these two sides worth less than it looks."""
    notes: list[str] = []
    wants = [
        want
        for want in plan.wants
        if want.metric.compute.__name__ == "frechet" and want.metric.reference == "statistics"
    ]
    if reference is None or not wants:
        return notes
    for want in wants:
        extractor = plan.extractor(want)
        if extractor is None:
            continue
        ours, theirs = (
            run.statistics(extractor, want.metric.output),
            reference.side.statistics(extractor, want.metric.output),
        )
        for who, s in ((x.source, ours), (f"the reference {reference.name}", theirs)):
            if s.rank_deficient:
                notes.append(
                    f"{who} has {s.n:,} images for {s.dim} features: too few, the distance comes out far too large"
                )
        if ours.resize and theirs.resize and ours.resize != theirs.resize and reference.kind != "statistics":
            notes.append(f"{x.source}: resize {ours.resize}; the reference {reference.name}: resize {theirs.resize}")
        if not isinstance(x, Numbers) and not theirs.weights_sha256:
            notes.append(f"{reference.name} doesn't say which weights made it; taken to be of the same extractor")
    if x.source.startswith("real:") and x.source.startswith(reference.name):
        notes.append(f"{x.source} is part of its own reference")
    return notes


def protocol_of(x: Subject, run: Side, reference: Reference | None, plan: Task, settings: Settings) -> JsonObject:
    """Everything that a number depends on, besides x's weights."""
    extractors = {e.name: e for want in plan.wants if (e := plan.extractor(want)) is not None}
    main = next(iter(extractors.values()), plan.main)
    features = ", ".join(f"{e.name}/{e.dim}" for e in extractors.values()) or (
        f"{main.name}/{main.dim}" if main else "not stated"
    )
    resize = (
        run.statistics(main).resize
        if main is not None and (isinstance(x, Numbers) or has(run, main))
        else settings.preparation.describe()
    )
    protocol: JsonObject = {
        "n_gen": run.n,
        "seeds": None,
        "repeats": 1,
        "labels": None,
        "features": features,
        "weights_sha256": main.sha256 if main else None,
        "resize": resize or None,
        "quantize": None,
        "ref": None,
        "n_ref": None,
    }
    if len(extractors) > 1:
        protocol["weights"] = {name: e.sha256 for name, e in extractors.items()}
        protocol["resizes"] = {name: e.resize for name, e in extractors.items()}
    if isinstance(x, Generator):
        labels = label_mode(settings.labels, x.spec.classes, x.spec.name) if x.spec.classes else None
        protocol["seeds"] = [settings.seed, settings.seed + settings.n * settings.repeats - 1]
        protocol |= {"repeats": settings.repeats, "labels": labels, "quantize": settings.quantize}
        if x.prompts is not None:
            protocol |= {"prompts": len(x.prompts), "prompts_sha256": x.prompts.sha256}
    elif isinstance(x, Pictures):
        protocol |= {
            "labels": "own" if x.labelled else None,
            "quantize": settings.quantize if x.kind == "pairs" else "as stored",
        }
    if reference is not None:
        ref_resize = (
            reference.side.statistics(main).resize if main is not None and plan.outputs("statistics", "rows") else None
        )
        protocol |= {
            "ref": reference.name,
            "ref_kind": reference.kind,
            "n_ref": reference.n,
            "ref_seeds": reference.seeds,
            "ref_resize": ref_resize or None,
        }
    return protocol
