"""A text-to-image teacher as a diffusers folder: what `StableDiffusionPipeline.from_pretrained` reads, with a model
card."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from torch import nn

from d2o.errors import UserError
from d2o.export.card import HUB_LICENCES
from d2o.export.folder import beside, check_target, keep, open_pipeline
from d2o.export.loaded import stated
from d2o.export.parity import Parity, limit
from d2o.export.pipeline import write_index, write_network, write_text_encoder
from d2o.inputs import JsonObject
from d2o.interop.safetensors_io import atomic_write, resolve_checkpoint
from d2o.networks.latent import SD_SCHEDULER, TextToImage, load_text_to_image
from d2o.teachers.base import UNSTATED
from d2o.version import __version__

DIGITS = "1,797 images of the UCI digits by E. Alpaydin and C. Kaynak, 1998, as scikit-learn ships them, CC-BY-4.0"
PROMPTS = ("", "a photo of a dog")  # any text is a prompt; what the model makes of it must not change


def write_diffusers(
    checkpoint: str | Path, target: Path, dtype: str, check_n: int, tolerance: float, force: bool
) -> tuple[Parity, JsonObject, bool]:
    """Write `checkpoint` (a run folder or .safetensors of method latent-diffusion) as the folder `target`, weights in
    `dtype`.

    The folder is read back by diffusers and compared in float32; it appears whole or not at all. Returns the
    comparison, the checkpoint's metadata, and whether the same folder was there already. UserError: another kind of
    checkpoint, values that `dtype` cannot hold, a difference above `tolerance`, or something else of that name (`force`
    replaces a diffusers folder, never anything else).
    """
    path = resolve_checkpoint(checkpoint)
    model, meta = load_text_to_image(path)
    check_target(target)
    with beside(target) as folder:
        _write(model, folder, dtype)
        parity = _compare(model, folder, check_n, tolerance)
        atomic_write(folder / "README.md", _card(meta, model, target.name, dtype, parity))
        unchanged = keep(folder, target, force)
    return parity, meta, unchanged


def _write(model: TextToImage, folder: Path, dtype: str) -> None:
    import diffusers

    scheduler, tokenizer = diffusers.DDIMScheduler(**SD_SCHEDULER), model.tokens.tokenizer
    parts = {"unet": model.unet, "vae": model.vae, "text_encoder": model.text_encoder, "tokenizer": tokenizer}
    write_index(folder, "StableDiffusionPipeline", {**parts, "scheduler": scheduler})
    scheduler.save_pretrained(folder / "scheduler")
    for name, text in model.tokens.files().items():
        atomic_write(folder / "tokenizer" / name, text)
    write_network(model.unet, folder / "unet", dtype)
    write_network(model.vae, folder / "vae", dtype)
    write_text_encoder(model.text_encoder, folder / "text_encoder", dtype)


@torch.inference_mode()
def _compare(model: TextToImage, folder: Path, n: int, tolerance: float) -> Parity:
    """Noise predictions and decoded images of the folder against the checkpoint's, on the same inputs, prompts as
    text."""
    pipeline = open_pipeline(folder)
    worst = largest = 0.0
    sizes = (1, n) if n > 1 else (1,)
    for size in sizes:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(size, *model.latent_shape, generator=generator)
        t = torch.randint(0, 1000, (size,), generator=generator)
        prompts = [PROMPTS[i % 2] for i in range(size)]
        expected = [model(x, t, model.tokens.encode(prompts)), model.decode(x)]
        ids = pipeline.tokenizer(
            prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        ).input_ids
        states = pipeline.text_encoder(ids)[0]
        found = [pipeline.unet(x, t, states).sample, pipeline.vae.decode(x / pipeline.vae.config.scaling_factor).sample]
        for a, b in zip(found, expected):
            worst, largest = max(worst, float((a - b).abs().max())), max(largest, float(b.abs().max()))
    if not worst <= limit(tolerance, largest):
        text = (
            f"the exported pipeline differs from the checkpoint by {worst:.2e}: above the tolerance"
            f" {limit(tolerance, largest):.3g}; it is not kept"
        )
        raise UserError(text, "--tolerance sets what is accepted, --dtype fp32 rounds nothing")
    import diffusers

    return Parity(
        worst,
        largest,
        sizes,
        tolerance,
        f"diffusers {diffusers.__version__} in float32 against the checkpoint, torch {torch.__version__}",
    )


def _card(meta: JsonObject, model: TextToImage, name: str, dtype: str, parity: Parity) -> str:
    recipe = meta.get("recipe") or {}
    data = str((recipe.get("data") or {}).get("path", "not recorded"))
    licence = stated((meta.get("spec") or {}).get("licence")) or UNSTATED
    front: JsonObject = {"license": licence.lower()}
    if licence == UNSTATED:
        front = {"license": "unknown"}
    elif licence.lower() not in HUB_LICENCES:
        front = {"license": "other", "license_name": licence}
    tags = ["d2o", "diffusion", "stable-diffusion", "text-to-image", "teacher"]
    front |= {"library_name": "diffusers", "pipeline_tag": "text-to-image", "tags": tags}
    options = recipe.get("latent_diffusion") or {}
    prompt = (options.get("templates") or ["{name}"])[0].replace(
        "{name}", "seven" if data.startswith("real:digits") else "..."
    )
    counted: list[tuple[str, nn.Module]] = [
        ("U-Net", model.unet),
        ("text encoder", model.text_encoder),
        ("autoencoder", model.vae),
    ]
    sizes = ", ".join(f"{what} {sum(p.numel() for p in part.parameters()):,}" for what, part in counted)
    size, channels = model.unet.config.sample_size, model.latent_shape[0]
    metrics = (
        "\n".join(f"- {key}: {value:.4g}" for key, value in (meta.get("metrics") or {}).items()) or "- none recorded"
    )
    source = f" ({DIGITS})" if data.startswith("real:digits") else ""
    sampled = f"{options.get('steps')} DDIM steps, guidance {options.get('cfg')}"
    if dtype != "fp32":
        sampled += f", measured before rounding to {dtype}"
    compared = (
        f"Largest difference from the checkpoint {parity.difference:.1e} (largest value {parity.largest:.2f}),"
        f" {parity.runtime}."
    )
    return (
        "\n\n".join(
            [
                f"---\n{yaml.safe_dump(front, sort_keys=False).strip()}\n---",
                f"# {name}",
                (
                    "A text-to-image latent diffusion model in the form of Stable Diffusion 1.5, trained by d2o"
                    f" {meta.get('d2o', '')}: latents {channels} x {size} x {size}, images of"
                    f" {model.vae.config.sample_size} pixels. Parameters: {sizes}. Weights in {dtype}."
                ),
                (
                    f"## Licence\n\n`{licence}`. The U-Net and the text encoder started from random weights, the"
                    f" autoencoder is that of `{options.get('vae')}`."
                ),
                (
                    f"## Data\n\n`{data}`{source}. Captions were made from the class labels; {meta.get('images', 0):,}"
                    " images were seen in training."
                ),
                "## How to use\n\n```python\nfrom diffusers import StableDiffusionPipeline\n\n"
                f'pipeline = StableDiffusionPipeline.from_pretrained("{name}")\n'
                f'image = pipeline("{prompt}", num_inference_steps=50, guidance_scale=3.0).images[0]\n```',
                f"## Metrics\n\n{metrics}\n\nAs the checkpoint records them: {sampled}.",
                f"## Recipe\n\n```yaml\n{yaml.safe_dump(recipe, sort_keys=False, width=130).strip()}\n```",
                f"## Numerical parity\n\n{compared}",
                (
                    "## Limitations\n\nIt knows the words of its captions and nothing else. There is no safety"
                    f" checker: it can only draw what it was trained on. Exported by d2o {__version__}."
                ),
            ]
        )
        + "\n"
    )
