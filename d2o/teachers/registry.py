"""Teachers by name or path."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from d2o.errors import UserError, nearest
from d2o.interop import catalogue
from d2o.interop.assets import asset
from d2o.interop.catalogue import NVIDIA_LICENCE, Published
from d2o.interop.checkpoint_record import check_checkpoint
from d2o.interop.download import Received, verify_file
from d2o.interop.hub import cached_snapshot, hub_snapshot, is_diffusers_folder, is_repository
from d2o.interop.nvidia_pickle import read_nvidia_pickle
from d2o.interop.safetensors_io import load_file, read_meta, resolve_checkpoint
from d2o.networks.budget import file_holdings
from d2o.networks.config import Config
from d2o.networks.latent import TextToImage
from d2o.networks.load import load_weights
from d2o.networks.precond import Denoiser
from d2o.runtime import Say
from d2o.spaces.base import PIXELS
from d2o.spaces.load import EDM2
from d2o.teachers.base import GUIDED_BY, UNSTATED, Spec, Teacher, guided_name
from d2o.teachers.latent import text_to_image_teacher

BUILTIN = {
    "digits": "teacher_digits.safetensors",
    "cifar16": "teacher_cifar16.safetensors",
    "tiny-sd": "tiny-sd",
}
"""Name -> file or diffusers folder in d2o/assets."""
TINY_SD_LICENCE = "CC-BY-4.0"


def teacher_names() -> list[str]:
    return sorted([*BUILTIN, *catalogue.names()])


def load_teacher(
    name_or_path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    *,
    say: Say | None = None,
    progress: Received | None = None,
) -> Teacher:
    """A teacher by name (`digits`, `tiny-sd`, `sd15`, `edm-cifar10-cond-vp`, ...: `teacher_names()`), or from where it
    lies: a checkpoint or run folder of `d2o train`, a network as NVIDIA published it (`.pkl`), a folder in diffusers'
    layout, a repository of the hub (owner/name). "A guided by B": A, guided away from B (`Teacher.guide_by`).

    `dtype` bfloat16 runs the network under autocast. `device` "meta": what a plan needs, built of what the files say of
    their weights, of which none is read. `say` is told of licences, `progress(bytes done, total)` of
    downloads. UserError: unknown name (with the nearest), missing, truncated or foreign file, no network to download
    with (which says what to put where).
    """
    name, _, guide = str(name_or_path).partition(GUIDED_BY)
    teacher = _load(name, device, dtype, say, progress)
    teacher.origin, teacher.revision = origin_of(name)
    if guide:
        teacher.guide_by(load_teacher(guide, device, dtype, say=say, progress=progress))
        teacher.origin = guided_name(teacher.origin, teacher.guide.origin if teacher.guide else None)
    return teacher


def origin_of(name: str) -> tuple[str, str | None]:
    """How a teacher that was loaded by `name` is found again from any folder, and in which revision."""
    if name in BUILTIN:
        return name, None
    path, published = Path(name), catalogue.find(name)
    if path.exists():
        return str(path.resolve()), None
    if published is not None:
        return name, published.revision
    snapshot = cached_snapshot(name)
    return name, None if snapshot is None else snapshot.name


def _load(
    name: str, device: str | torch.device, dtype: torch.dtype | None, say: Say | None, progress: Received | None
) -> Teacher:
    if name in BUILTIN:
        path = asset(BUILTIN[name])
        if path.is_dir():
            return _diffusers(path, name, device, dtype, licence=TINY_SD_LICENCE, origin=name, space=name)
        return _checkpoint(path, device, dtype, name=name)
    published = catalogue.find(name)
    if published is not None and not Path(name).exists():
        path = catalogue.fetch(published, progress, say)
        if published.kind == "nvidia":
            if not on_meta(device):
                verify_file(path, published.sha256, published.bytes)
            return _nvidia(path, device, dtype, published)
        teacher = _diffusers(path, name, device, dtype, licence=published.licence, origin=name, space=published.space)
        teacher.spec = replace(teacher.spec, solver=published.solver, steps=published.steps)
        return teacher
    path = Path(name)
    if not path.exists() and path.suffix not in (".safetensors", ".pkl"):
        return _diffusers(_from_hub(name), name, device, dtype, origin=name, space=name)
    if is_diffusers_folder(path):
        return _diffusers(path, path.name, device, dtype)
    path = resolve_checkpoint(path)
    return _nvidia(path, device, dtype) if path.suffix == ".pkl" else _checkpoint(path, device, dtype)


def on_meta(device: str | torch.device) -> bool:
    """Whether it is the meta device, which computes and holds nothing."""
    return torch.device(device).type == "meta"


def locate(name: str) -> Path:
    """Where a teacher lies that `load_teacher` takes, fetched if it has to be. UserError as there."""
    if name in BUILTIN:
        return asset(BUILTIN[name])
    path, published = Path(name), catalogue.find(name)
    if published is not None and not path.exists():
        return catalogue.fetch(published)
    if path.exists() or path.suffix in (".safetensors", ".pkl"):
        return path if is_diffusers_folder(path) else resolve_checkpoint(path)
    return _from_hub(name)


def _diffusers(
    path: Path,
    name: str,
    device: str | torch.device,
    dtype: torch.dtype | None,
    licence: str = UNSTATED,
    origin: str | None = None,
    space: str | None = None,
) -> Teacher:
    from d2o.teachers.diffusers_folder import load_diffusers  # brings diffusers and transformers: slow to import

    stated = stated_licence(path) if licence == UNSTATED else licence
    return load_diffusers(path, name, device, dtype, licence=stated, origin=origin, space=space)


def stated_licence(folder: Path) -> str:
    """The `license` in the head of a folder's README.md, as the hub's model cards have it, else "not stated"."""
    try:
        head = (folder / "README.md").read_text(encoding="utf-8", errors="replace")[:10_000]
    except OSError:
        return UNSTATED
    parts = head.split("---", 2)
    lines = parts[1].splitlines() if len(parts) == 3 and not parts[0].strip() else []
    stated = {key.strip(): value.strip().strip("'\"") for key, _, value in (line.partition(":") for line in lines)}
    return stated.get("license_name") or stated.get("license") or UNSTATED


def _from_hub(name: str) -> Path:
    """The snapshot of a repository owner/name. UserError: not the form of one, or not to be had."""
    if is_repository(name):
        return hub_snapshot(name)
    near = nearest(name, teacher_names())
    raise UserError(
        f"unknown teacher {name!r}" + (f": did you mean {near!r}?" if near else ""),
        f"known: {', '.join(teacher_names())}; or a path (.safetensors, run folder, NVIDIA's .pkl, diffusers folder),"
        " or owner/name on the hub",
    )


def _checkpoint(path: Path, device: str | torch.device, dtype: torch.dtype | None, name: str | None = None) -> Teacher:
    if on_meta(device):
        meta = read_meta(path)
        tensors = file_holdings([path])
    else:
        tensors, meta = load_file(path)
    if meta.get("kind") != "teacher":
        raise UserError(
            f"{path} holds a {meta.get('kind', 'foreign object')}, not a teacher",
            "students are loaded with d2o.load_student",
        )
    check_checkpoint(meta, path)
    spec = Spec.from_dict(meta["spec"], path)
    if name is not None:
        spec = replace(spec, name=name)
    network = load_weights(meta["network"], tensors, path, assign=on_meta(device))
    if isinstance(network, TextToImage):
        origin = str(path.resolve())
        spec = replace(spec, space=origin, text=origin)
        teacher: Teacher = text_to_image_teacher(network, spec, device, dtype)
    else:
        teacher = Teacher(network, spec, device, dtype)
    teacher.meta = meta
    return teacher


def _nvidia(
    path: Path, device: str | torch.device, dtype: torch.dtype | None, published: Published | None = None
) -> Teacher:
    """A network of the EDM family, pixel space or (EDM2 with four channels) the latents of sd-vae-ft-mse."""
    found = read_nvidia_pickle(path, dtype=torch.float32, device="meta" if on_meta(device) else "cpu")
    config = found.config()
    network = load_weights(config, found.state_dict, path, assign=True)
    assert isinstance(network, Denoiser)
    name, steps = (published.name, published.steps) if published else (path.stem, found.steps)
    space = PIXELS if found.space == "pixel" else EDM2
    return edm_family(network, config, name, steps, space, device, dtype)


def edm_family(
    network: Denoiser,
    config: Config,
    name: str,
    steps: int,
    space: str,
    device: str | torch.device,
    dtype: torch.dtype | None,
) -> Teacher:
    """One of EDM's or EDM2's published networks, built of `config`, as its paper samples from it."""
    size, classes = config["img_resolution"], config.get("label_dim", 0)
    spec = Spec(
        name,
        (config["img_channels"], size, size),
        space,
        "label" if classes else "none",
        classes,
        sigma_min=max(0.002, network.sigma_min),
        sigma_max=min(80.0, network.sigma_max),
        licence=NVIDIA_LICENCE,
        steps=steps,
        guidable=False,  # EDM and EDM2 dropped no classes; EDM2 is guided by another network
    )
    teacher = Teacher(network, spec, device, dtype)
    teacher.meta = {"format": "nvidia", "kind": "teacher", "network": config, "spec": spec.to_dict()}
    return teacher
