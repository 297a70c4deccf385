"""A model card in Hugging Face format beside an exported file. It says what the checkpoint's metadata says, and what
that does not say."""

from __future__ import annotations

import re

import yaml

from d2o.export import comfyui, snippets
from d2o.export.loaded import Loaded, stated
from d2o.export.parity import Parity, limit
from d2o.inputs import JsonObject
from d2o.teachers.base import UNSTATED
from d2o.version import __version__

# Licence identifiers that the Hugging Face Hub knows, of those that models and image data come with.
HUB_LICENCES = {
    "apache-2.0",
    "mit",
    "bsd-2-clause",
    "bsd-3-clause",
    "gpl-3.0",
    "lgpl-3.0",
    "agpl-3.0",
    "cc0-1.0",
    "cc-by-4.0",
    "cc-by-sa-4.0",
    "cc-by-nc-4.0",
    "cc-by-nd-4.0",
    "cc-by-nc-sa-4.0",
    "cc-by-nc-nd-4.0",
    "openrail",
    "openrail++",
    "creativeml-openrail-m",
}
FORMATS = {
    "onnx": "ONNX",
    "program": "torch.export program",
    "safetensors": "d2o checkpoint (safetensors)",
    "comfyui": "checkpoint for ComfyUI, with the names of Stable Diffusion's original files (safetensors)",
    "diffusers": "diffusers folder",
    "lora": "LoRA for a diffusers pipeline",
}


def card(source: Loaded, file_name: str, file_format: str, detail: str, parity: Parity, source_name: str) -> str:
    """The text of the card. `detail` is the opset or the dtype; `source_name` the checkpoint's file name."""
    meta = source.meta
    sections = [
        _front_matter(source, file_format),
        f"# {_text(file_name)}",
        _what(source, file_format, detail, source_name),
        "## Teacher and licence",
        _teacher(source),
        "## Recipe",
        _block(meta.get("recipe"), "The checkpoint records no recipe."),
        "## Metrics",
        _metrics(meta),
        "## Provenance",
        _provenance(meta),
        "## How to use",
        snippets.usage(source, file_name, file_format),
        "## Numerical parity",
        _parity(parity),
        "## Limitations",
        _limitations(source, file_format),
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(source: Loaded, file_format: str) -> str:
    licence = source.licence
    front: JsonObject = {"license": licence.lower()}
    if licence == UNSTATED:
        front = {"license": "unknown"}
    elif licence.lower() not in HUB_LICENCES:
        front = {"license": "other", "license_name": _slug(licence)}
    front["library_name"] = "diffusers" if file_format in ("diffusers", "lora", "comfyui") else "d2o"
    if file_format == "lora" and (base := snippets.hub_name(source)):
        front["base_model"] = base
    if source.spec.condition == "none" and source.kind == "student":
        front["pipeline_tag"] = "unconditional-image-generation"
    if source.spec.condition == "text":
        front["pipeline_tag"] = "text-to-image"
    one_step = ["one-step", "distillation"] if source.kind == "student" else ["teacher"]
    front["tags"] = [
        "d2o",
        "diffusion",
        "image-generation",
        *one_step,
        {"program": "torch-export"}.get(file_format, file_format),
    ]
    return f"---\n{yaml.safe_dump(front, sort_keys=False).strip()}\n---"


def _what(source: Loaded, file_format: str, detail: str, source_name: str) -> str:
    meta, spec = source.meta, source.spec
    if source.kind == "student":
        known = source.teacher != UNSTATED
        origin = (
            f"distilled from the diffusion model {_code(source.teacher)}"
            if known
            else "from a teacher that the checkpoint does not name"
        )
        steps = "one-step" if source.student.nfe == 1 else f"{source.student.nfe}-step"
        calls = "one network call" if source.student.nfe == 1 else f"{source.student.nfe} network calls"
        what = f"A {steps} generator ({calls} from noise to {'latent' if spec.latent else 'image'}), {origin}."
    else:
        what = (
            f"The denoiser of the diffusion model {_code(spec.name)}, D(x; sigma): one of the many network calls that"
            " make an image."
        )
    labels = {"label": f"class label, {spec.classes} classes", "text": "prompt"}.get(spec.condition, "none")
    space = "latent" if spec.latent else "pixel"
    rows = {
        "format": f"{FORMATS[file_format]}, {detail}",
        "made from": f"{_code(source_name)}, weights sha256 {_code(source.fingerprint)}",
        "output": f"{' x '.join(map(str, spec.shape))} (channels, height, width), {space} space",
        "condition": labels,
        **({} if source.guidance is None else {"guidance scale": "{:g} to {:g}, told to it".format(*source.guidance)}),
        "network": _code((meta.get("network") or {}).get("arch", "not recorded")),
        **_lora(meta),
        "parameters": f"{sum(p.numel() for p in source.network.parameters()):,}",
        "images trained on": f"{meta['images']:,}" if isinstance(meta.get("images"), int) else "not recorded",
        "d2o version": f"{_text(meta.get('d2o', 'not recorded'))} (checkpoint), {__version__} (export)",
    }
    return what + "\n\n| | |\n|---|---|\n" + "\n".join(f"| {key} | {value} |" for key, value in rows.items())


def _lora(meta: JsonObject) -> dict[str, str]:
    """What a LoRA is, and of which weights."""
    lora = (meta.get("network") or {}).get("lora")
    if not lora:
        return {}
    base = lora["base"]
    revision = f", revision {_code(base['revision'])}" if base.get("revision") else ""
    digest = f", weights sha256 {_code(base['sha256'])}" if base.get("sha256") else ""
    change = f"rank {lora['rank']}, alpha {lora['alpha']:g}, of layers {_code(', '.join(lora['targets']))}"
    return {"LoRA": change, "base": f"{_code(base['name'])}{revision}{digest}"}


def _teacher(source: Loaded) -> str:
    licence = (
        "The checkpoint states no licence: find out under which terms its teacher and its images may be used before you"
        " use or share this file."
    )
    if source.licence != UNSTATED:
        licence = (
            f"Licence as the checkpoint states it: {_code(source.licence)}. Read its terms before you use or share this"
            " file."
        )
    licence += _images(source.meta)
    if source.kind == "teacher":
        return f"This file is itself a teacher, {_code(source.spec.name)}.\n\n{licence}"
    record = source.made_from
    if not record.get("name"):
        return f"The checkpoint does not name its teacher.\n\n{licence}"
    digest = f"weights sha256 {_code(record['sha256'])}" if record.get("sha256") else "weights sha256 not recorded"
    return f"Teacher: {_code(record['name'])}, {digest}.\n\n{licence}"


def _images(meta: JsonObject) -> str:
    """What the recipe says of the images it was trained on; nothing where there were none."""
    recipe = meta.get("recipe")
    data = recipe.get("data") if isinstance(recipe, dict) else None
    if not isinstance(data, dict) or not data.get("path"):
        return ""
    terms = stated(data.get("licence"))
    return f"\n\nImages it was trained on: licence {_code(terms) if terms else UNSTATED}."


def _metrics(meta: JsonObject) -> str:
    metrics = meta.get("metrics")
    if not isinstance(metrics, dict) or not metrics:
        return "The checkpoint records no metrics."
    plain = {key: value for key, value in metrics.items() if not isinstance(value, dict | list)}
    rest = {key: value for key, value in metrics.items() if key not in plain}
    parts = ["As the checkpoint records them; measured before export, not on this file."]
    if plain:
        rows = [
            f"| {_code(key)} | {f'{value:.4g}' if isinstance(value, float) else _text(value)} |"
            for key, value in plain.items()
        ]
        parts.append("| metric | value |\n|---|---|\n" + "\n".join(rows))
    if rest:
        parts.append(_block(rest, ""))
    if "protocol" not in metrics:
        recipe = meta.get("recipe")
        protocol = recipe.get("eval") if isinstance(recipe, dict) else None
        absent = "The checkpoint records no protocol with them."
        parts.append(f"Protocol, from the recipe (`eval`):\n\n{_block(protocol, '')}" if protocol else absent)
    return "\n\n".join(parts)


def _provenance(meta: JsonObject) -> str:
    chain = meta.get("provenance")
    if not isinstance(chain, list) or not chain:
        return "The checkpoint records no provenance."
    steps = [
        ", ".join(f"{_text(k)}: {_code(v)}" for k, v in step.items()) if isinstance(step, dict) else _code(step)
        for step in chain
    ]
    return "Oldest first.\n\n" + "\n".join(f"{i}. {step}" for i, step in enumerate(steps, 1))


def _parity(parity: Parity) -> str:
    record = {
        "max_abs_difference": float(f"{parity.difference:.3g}"),
        **({} if parity.unrounded is None else {"before_rounding": float(f"{parity.unrounded:.3g}")}),
        "tolerance": float(f"{limit(parity.tolerance, parity.largest):.3g}"),
        "largest_output": float(f"{parity.largest:.3g}"),
        "batch_sizes": list(parity.batch_sizes),
        "compared_in": parity.runtime,
    }
    return f"This file against the network it was made from, on the same inputs:\n\n{_block(record, '')}"


def _limitations(source: Loaded, file_format: str) -> str:
    spec = source.spec
    graphs = file_format in ("onnx", "program")
    points = [f"The size is fixed: {' x '.join(map(str, spec.shape))}; the batch size is free."]
    if file_format == "comfyui":
        points += comfyui.limitations(source.student)
    if graphs and source.drawn:
        points.append(
            "What the student draws on its way, in d2o by a generator that its start noise seeds, is an input here: any"
            " standard normal numbers do."
        )
    if spec.condition == "label":
        points.append(
            f'Labels are 0 to {spec.classes - 1}; -1 means "no class", of use only to a network trained with dropped'
            " labels."
        )
        silent = "This file does not check labels: any other label acts as -1, without an error."
        points.append(
            "d2o refuses any other label that it is given on the CPU." if file_format == "safetensors" else silent
        )
    if source.kind == "student":
        fixed = "Noise level and guidance are" if source.guidance is None else "The noise levels are"
        points.append(f"{fixed} fixed at those of training; more network calls do not improve an image.")
    if source.meta.get("student", {}).get("kind") == "style" and file_format != "safetensors":
        points.append(
            "The noise inputs of the synthesis network are the checkpoint's constant ones; d2o itself gives every image"
            " its own."
        )
    if file_format in ("diffusers", "lora"):
        steps = "one step" if source.student.nfe == 1 else f"{source.student.nfe} steps"
        points.append(f"The scheduler in the folder has the {steps} that the student was trained for; no other fits.")
    elif file_format == "comfyui" or (graphs and spec.condition == "text"):
        points.append("The decoder is in the file: images are those of -1 to 1.")
    elif not spec.latent:
        points.append(
            f"Outputs are not clipped: values may leave {spec.value_range[0]:g} to {spec.value_range[1]:g} a little."
        )
    else:
        points.append("Outputs are latents: the teacher's decoder, which is not in this file, turns them into images.")
    points.append("Parity was measured on a CPU in float32; GPUs with TF32 or half precision differ more.")
    points.append(
        "It may repeat faults and biases of its teacher and training data; nothing was measured beyond what stands"
        " above."
    )
    return "\n".join(f"- {point}" for point in points)


def _block(data: object, absent: str) -> str:
    """YAML in a fence longer than any run of backticks inside, or the sentence that says it is absent."""
    if data in (None, {}, [], ""):
        return absent
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120).strip()
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}yaml\n{text}\n{fence}"


def _text(value: object) -> str:
    """One line of table-safe text: what stands in a checkpoint cannot break the card."""
    return re.sub(r"\s+", " ", str(value)).replace("|", "\\|").replace("<", "&lt;").strip()


def _code(value: object) -> str:
    return "`" + re.sub(r"\s+", " ", str(value)).replace("`", "'").replace("|", "\\|").strip() + "`"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.+]+", "-", text.lower()).strip("-") or "other"
