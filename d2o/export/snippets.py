"""The Python lines of a model card. They run as they stand, in the folder of the exported file (tests execute them)."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from d2o.export import comfyui
from d2o.export.graphs import token_names
from d2o.export.loaded import Loaded
from d2o.export.pipeline import numbered
from d2o.interop import catalogue
from d2o.teachers.registry import BUILTIN

BATCH = 4


def usage(source: Loaded, file_name: str, file_format: str) -> str:
    """Text and one code block for this file."""
    if file_format == "comfyui":
        return comfyui.comfy_usage(source.student, file_name)
    text = source.spec.condition == "text"
    lines = {
        "onnx": _text_onnx if text else _onnx,
        "program": _text_program if text else _program,
        "safetensors": _safetensors,
        "diffusers": _diffusers,
        "lora": _lora,
    }[file_format](source, file_name)
    needs = {
        "onnx": f"`pip install onnxruntime {'transformers' if text else 'numpy'}`; d2o and torch are not needed.",
        "program": (
            f"`pip install torch{' transformers' if text else ''}`"
            f" ({torch.__version__.split('+')[0]} wrote the file; a later one reads it); d2o is not needed."
        ),
        "safetensors": "`pip install d2o`.",
        "diffusers": "`pip install diffusers transformers`; d2o is not needed.",
        "lora": "`pip install diffusers transformers peft`.",
    }[file_format]
    return f"{needs} {_about(source, file_format)}\n\n```python\n" + "\n".join(lines) + "\n```"


def _about(source: Loaded, file_format: str) -> str:
    if file_format == "lora":
        return (
            f"The adapters go into the teacher's pipeline; {_discrete(source)}, as the folder has it, makes the"
            " student's one step."
        )
    if file_format == "diffusers":
        flow = (source.meta.get("network") or {}).get("prediction") == "velocity"
        scheduler = "FlowMatchEulerDiscreteScheduler" if flow else _discrete(source)
        warned = " (diffusers may warn that it expects another scheduler; this one has what the pipeline asks for.)"
        return (
            f"The call below is the whole of it: {scheduler}, as the folder has it, makes the student's one step."
            + ("" if source.spec.condition == "text" else warned)
        )
    shape = f"[N, {', '.join(map(str, source.spec.shape))}] float32"
    if source.spec.condition == "text" and file_format != "safetensors":
        told = "; `guidance`: scales [N] float32, {:g} to {:g}".format(*source.guidance) if source.guidance else ""
        return (
            "Three files: `text_encoder` makes states of the tokens of `tokenizer`, once for any number of images;"
            f" `student` makes a latent of `noise` ({shape}, standard normal) and states{told}; `decoder` makes an"
            " image in -1 to 1 of it."
        )
    label = "; `label`: class indices [N] int64" if source.spec.condition == "label" else ""
    if source.guidance is not None:
        label += "; `guidance`: guidance scales [N] float32, {:g} to {:g}".format(*source.guidance)
    if file_format != "safetensors":
        for name, sizes in source.drawn.items():
            label += f"; `{name}`: [N, {', '.join(map(str, sizes))}] float32, standard normal"
    given = f"`noise`: {shape}, standard normal"
    if source.kind == "teacher" and file_format != "safetensors":
        given = (
            f"`noisy`: {shape}, an image plus `sigma` times standard normal noise; `sigma`: noise levels [N] float32"
        )
    return f"{given}{label}; result: {shape}."


def _onnx(source: Loaded, file_name: str) -> list[str]:
    feeds = ", ".join(f'"{name}": {name}' for name in source.inputs)
    lines = [
        "import numpy as np",
        "import onnxruntime",
        "",
        f'session = onnxruntime.InferenceSession({json.dumps(file_name)}, providers=["CPUExecutionProvider"])',
        f"noise = np.random.default_rng(0).standard_normal({_shape(source)}, dtype=np.float32)",
    ]
    if source.kind == "teacher":
        lines += [
            f"sigma = np.full({BATCH}, {source.spec.sigma_max}, dtype=np.float32)",
            "noisy = sigma[:, None, None, None] * noise",
        ]
    if source.spec.condition == "label":
        lines.append(f"label = np.array({_labels(source)}, dtype=np.int64)")
    if source.guidance is not None:
        lines.append(f"guidance = np.full({BATCH}, {_scale(source):g}, dtype=np.float32)")
    for name, sizes in source.drawn.items():
        lines.append(f"{name} = np.random.default_rng(1).standard_normal({(BATCH, *sizes)}, dtype=np.float32)")
    lines.append(f'{source.output} = session.run(["{source.output}"], {{{feeds}}})[0]  # {_shape(source)}')
    if _pixels(source):
        lines.append(f"pixels = np.clip({source.output} * 127.5 + 128, 0, 255).astype(np.uint8)")
    return lines


def _program(source: Loaded, file_name: str) -> list[str]:
    lines = [
        "import torch",
        "",
        f"network = torch.export.load({json.dumps(file_name)}).module()",
        *_torch_inputs(source),
    ]
    if source.kind == "teacher":
        lines += [
            f"sigma = torch.full(({BATCH},), {source.spec.sigma_max})",
            "noisy = sigma[:, None, None, None] * noise",
        ]
    lines += [f"{name} = torch.randn({(BATCH, *sizes)})" for name, sizes in source.drawn.items()]
    return [
        *lines,
        f"{source.output} = network({', '.join(source.inputs)})  # {_shape(source)}",
        *_torch_pixels(source, source.output),
    ]


def _text_onnx(source: Loaded, file_name: str) -> list[str]:
    fed = ", ".join(f'"{name}": {name}' for name in source.inputs)
    lines = [
        "import numpy as np",
        "import onnxruntime",
        *_tokens(source, file_name, "np", "int64"),
        "",
        "",
        "def load(name):",
        f'    return onnxruntime.InferenceSession(f"{file_name}/{{name}}.onnx", providers=["CPUExecutionProvider"])',
        "",
        "",
        'text_encoder, student, decoder = load("text_encoder"), load("student"), load("decoder")',
        f"{_encoded(source)} = text_encoder.run(None, {{{_named_tokens(source)}}})",
        f"noise = np.random.default_rng(0).standard_normal({_shape(source)}, dtype=np.float32)",
    ]
    if source.guidance is not None:
        lines.append(f"guidance = np.full({BATCH}, {_scale(source):g}, dtype=np.float32)")
    return [
        *lines,
        f"latent = student.run(None, {{{fed}}})[0]",
        'image = decoder.run(None, {"latent": latent})[0]',
        "pixels = np.clip(image * 127.5 + 128, 0, 255).astype(np.uint8)",
    ]


def _text_program(source: Loaded, file_name: str) -> list[str]:
    return [
        "import torch",
        *_tokens(source, file_name, "pt", ""),
        "",
        "",
        "def load(name):",
        f'    return torch.export.load(f"{file_name}/{{name}}.pt2").module()',
        "",
        "",
        'text_encoder, student, decoder = load("text_encoder"), load("student"), load("decoder")',
        f"{_encoded(source)} = text_encoder({', '.join(_token_names(source))})",
        *_torch_inputs(source),
        f"image = decoder(student({', '.join(source.inputs)})).detach()",
        "pixels = (image * 127.5 + 128).clamp(0, 255).to(torch.uint8)",
    ]


def _token_names(source: Loaded) -> tuple[str, ...]:
    return token_names(len(source.student.text.reader.tokenizers))


def _named_tokens(source: Loaded) -> str:
    return ", ".join(f'"{name}": {name}' for name in _token_names(source))


def _encoded(source: Loaded) -> str:
    return "states, pooled" if "pooled" in source.inputs else "(states,)"


def _tokens(source: Loaded, file_name: str, kind: str, dtype: str) -> list[str]:
    """Prompts and their tokens, as arrays of numpy ("np") or tensors ("pt")."""
    reader = source.student.text.reader
    classes = sorted({type(tokenizer).__name__ for tokenizer in reader.tokenizers})
    lines = [f"from transformers import {', '.join(classes)}", "", f'prompts = ["a photo of a dog"] * {BATCH}']
    folders = numbered("tokenizer", reader.tokenizers)
    for (folder, tokenizer), length, name in zip(folders.items(), reader.lengths, _token_names(source)):
        how = f'padding="max_length", max_length={length}, truncation=True, return_tensors="{kind}"'
        load = f'{type(tokenizer).__name__}.from_pretrained("{file_name}/{folder}")'
        cast = f".astype(np.{dtype})" if dtype else ""
        lines += [f"{folder} = {load}", f"{name} = {folder}(prompts, {how}).input_ids{cast}"]
    return lines


def _safetensors(source: Loaded, file_name: str) -> list[str]:
    label = ", label" if source.spec.condition == "label" else ""
    lines = ["import torch", "", "import d2o", ""]
    text = source.spec.condition == "text"
    if text or source.guidance is not None:
        lines[-1:] = ["from d2o.condition import Condition", ""]
        told = "" if source.guidance is None else f".guided({_scale(source):g})"
        label = f', Condition.of_prompts(["a photo of a dog"] * {BATCH}){told}'
        label = label if text else f", Condition.of_labels(label){told}"
    if source.kind == "student":
        lines += [
            f"student = d2o.load_student({json.dumps(file_name)})",
            *_torch_inputs(source, guidance=False),
            f"image = student(noise{label})  # {_shape(source)}",
            *(["image = student.decode(image)  # images of these latents"] if text else []),
        ]
    else:
        lines += [
            f"teacher = d2o.load_teacher({json.dumps(file_name)})",
            *_torch_inputs(source),
            f"image = teacher.sample(noise{label}, steps=18)  # {_shape(source)}",
        ]
    return [*lines, *_torch_pixels(source, "image")]


def _diffusers(source: Loaded, file_name: str) -> list[str]:
    labels = f", class_labels={_labels(source)}" if source.spec.condition == "label" else ""
    steps = f"num_inference_steps={source.student.nfe}"
    asked = f"batch_size={BATCH}{labels}, {steps}"
    if source.spec.condition == "text":
        asked = f'"a photo of a dog", {steps}, guidance_scale=0.0'
    if source.spec.condition == "text" and source.guidance is not None:
        asked = f'"a photo of a dog", {steps}, guidance_scale={_scale(source):g}'
    flow = (source.meta.get("network") or {}).get("prediction") == "velocity"
    without = ", text_encoder_3=None, tokenizer_3=None" if flow and len(source.student.text.encoders) == 2 else ""
    return [
        "from diffusers import DiffusionPipeline",
        "",
        f"pipeline = DiffusionPipeline.from_pretrained({json.dumps(file_name)}{without})",
        f"images = pipeline({asked}).images  # PIL",
    ]


def _lora(source: Loaded, file_name: str) -> list[str]:
    name = source.meta["network"]["lora"]["base"]["name"]
    base, first = (
        json.dumps(hub_name(source) or name),
        [f"from diffusers import {_discrete(source)}, DiffusionPipeline"],
    )
    if name in BUILTIN:
        base, first = f"locate({json.dumps(name)})", [*first, "", "from d2o.teachers.registry import locate"]
    return [
        *first,
        "",
        f"pipeline = DiffusionPipeline.from_pretrained({base})",
        f"pipeline.load_lora_weights({json.dumps(file_name)})",
        f'pipeline.scheduler = {_discrete(source)}.from_pretrained({json.dumps(file_name)}, subfolder="scheduler")',
        'images = pipeline("a photo of a dog", num_inference_steps=1, guidance_scale=0.0).images  # PIL',
    ]


def hub_name(source: Loaded) -> str:
    """The hub's name of the teacher that a LoRA changes; "" for one that is not there."""
    name = source.meta["network"]["lora"]["base"]["name"]
    published = catalogue.find(name)
    if published is not None:
        return published.source
    return "" if name in BUILTIN or Path(name).is_absolute() else name


def _discrete(source: Loaded) -> str:
    """The scheduler of a student with a discrete schedule."""
    begins = (source.meta.get("student") or {}).get("begins")
    return "DDIMScheduler" if begins == "x_T" else "EulerDiscreteScheduler"


def _torch_inputs(source: Loaded, guidance: bool = True) -> list[str]:
    lines = [f"noise = torch.randn({_shape(source)}, generator=torch.Generator().manual_seed(0))"]
    lines += [f"label = torch.tensor({_labels(source)})"] if source.spec.condition == "label" else []
    told = guidance and source.guidance is not None
    return [*lines, f"guidance = torch.full(({BATCH},), {_scale(source)})"] if told else lines


def _scale(source: Loaded) -> float:
    """A guidance scale to show the call with."""
    return sum(source.guidance or (0.0, 2.0)) / 2


def _torch_pixels(source: Loaded, name: str) -> list[str]:
    return [f"pixels = ({name} * 127.5 + 128).clamp(0, 255).to(torch.uint8)"] if _pixels(source) else []


def _pixels(source: Loaded) -> bool:
    return not source.spec.latent and tuple(source.spec.value_range) == (-1.0, 1.0)


def _shape(source: Loaded) -> str:
    return str((BATCH, *source.spec.shape))


def _labels(source: Loaded) -> str:
    return str([i % source.spec.classes for i in range(BATCH)])
