"""Published teachers: where they are, under which licence, and how their papers sample from them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from d2o.errors import UserError
from d2o.inputs import JsonObject
from d2o.interop.download import Received, download, home, verify_file
from d2o.interop.hub import cached_snapshot, hub_snapshot, missing_files
from d2o.interop.safetensors_io import atomic_write

NVIDIA_LICENCE = "CC BY-NC-SA 4.0 (NVIDIA)"
NVIDIA_LICENCE_URL = "https://creativecommons.org/licenses/by-nc-sa/4.0/"
EDM_URL = "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/"
DINO = "FD over DINOv2"
EDM2_URL = "https://nvlabs-fi-cdn.nvidia.com/edm2/posthoc-reconstructions/"


@dataclass(frozen=True)
class Published:
    """A network that somebody else published.

    `kind`: "nvidia" (`source` is the URL of a pickle that `interop.nvidia_pickle` reads) or "diffusers" (`source` is a
    repository of the hub, at `revision`). `solver`, `steps`, `cfg`: deterministic sampling as published. `parameters`
    of the denoiser; `resolution` of the images in pixels; `space` that of its samples (`d2o.spaces`). `network` is
    what `build_network` makes the denoiser of, for plans without the file; None where only the file says it. `part` of
    a repository: the folder of the one component that is meant. `sha256`
    and `bytes` of the file (of the hub: of its one weights file) are None where no trustworthy source states them.
    """

    name: str
    kind: str
    source: str
    licence: str
    licence_url: str
    about: str
    solver: str = "heun"
    steps: int = 18
    cfg: float = 1.0
    resolution: int = 32
    parameters: int = 0
    sha256: str | None = None
    bytes: int | None = None
    revision: str | None = None
    space: str = "pixels"
    network: JsonObject | None = None
    part: str = ""

    @property
    def place(self) -> Path:
        """Where its file or folder is kept, or may be put by hand."""
        return home() / "teachers" / (self.source.rpartition("/")[2] if self.kind == "nvidia" else self.name)


def _edm(name: str, file: str, about: str, steps: int, resolution: int, parameters: int) -> Published:
    arch = {"adm": "adm", "-vp": "ddpmpp", "-ve": "ncsnpp"}[name[-3:]]
    network: JsonObject = {"arch": arch, "img_resolution": resolution, "img_channels": 3}
    network["label_dim"] = 1000 if arch == "adm" else 10 if "-cond" in name else 0
    if arch != "adm":
        network |= {"channel_mult": [2, 2, 2] if resolution == 32 else [1, 2, 2, 2], "augment_dim": 9}
        network["dropout"] = {"cifar10": 0.13, "ffhq": 0.05, "afhqv2": 0.25}[name.split("-")[1]]
    about_it = (NVIDIA_LICENCE, NVIDIA_LICENCE_URL, about)
    return Published(
        name, "nvidia", EDM_URL + file, *about_it, "heun", steps, 1.0, resolution, parameters, network=network
    )


def _edm2(size: str, snapshot: str, parameters: int, guided: float | None = None, of: str = "FID") -> Published:
    """`guided`: best with guidance by XS without classes at that scale, its EMA as long; `of`: by which distance."""
    ema = snapshot.rpartition("-")[2]
    best = "without guidance" if guided is None else f"when guided by {_guide_name(ema)} at {guided:g}"
    name = f"edm2-img512-{size}" + (f"-{ema}" if guided is not None else "" if of == "FID" else "-dino")
    return _edm2_network(name, size, f"{size}-{snapshot}", parameters, 1000, f"the EMA of the best {of} {best}")


def _guide_name(ema: str) -> str:
    return "edm2-img512-xs-uncond" + ("" if ema == "0.045" else f"-{ema}")


def _edm2_guide(ema: str) -> Published:
    """XS without classes, which guides EDM2 of all sizes (Karras et al. 2024, Table 2)."""
    about = f"without classes, to guide others by (--guide), EMA {ema}"
    return _edm2_network(_guide_name(ema), "xs", f"xs-uncond-2147483-{ema}", 124_201_253, 0, about)


def _edm2_network(name: str, size: str, file: str, parameters: int, classes: int, about: str) -> Published:
    about = f"EDM2-{size.upper()}, ImageNet 512x512 in the latents of sd-vae-ft-mse, {about}"
    url = f"{EDM2_URL}edm2-img512-{file}.pkl"
    licence = (NVIDIA_LICENCE, NVIDIA_LICENCE_URL)
    network: JsonObject = {
        "arch": "edm2",
        "preset": size,
        "img_resolution": 64,
        "img_channels": 4,
        "label_dim": classes,
    }
    return Published(
        name,
        "nvidia",
        url,
        *licence,
        about,
        "heun",
        32,
        1.0,
        512,
        parameters,
        space="edm2",
        network=network,
    )


TEACHERS = {
    entry.name: entry
    for entry in (
        # EDM (Karras et al. 2022). Parameter counts are those of the released files, with the augmentation input of the
        # first six.
        _edm(
            "edm-cifar10-uncond-vp",
            "edm-cifar10-32x32-uncond-vp.pkl",
            "EDM DDPM++, CIFAR-10 unconditional",
            18,
            32,
            55_733_891,
        ),
        _edm(
            "edm-cifar10-cond-vp", "edm-cifar10-32x32-cond-vp.pkl", "EDM DDPM++, CIFAR-10 by class", 18, 32, 55_735_299
        ),
        _edm(
            "edm-cifar10-uncond-ve",
            "edm-cifar10-32x32-uncond-ve.pkl",
            "EDM NCSN++, CIFAR-10 unconditional",
            18,
            32,
            56_397_827,
        ),
        _edm(
            "edm-cifar10-cond-ve", "edm-cifar10-32x32-cond-ve.pkl", "EDM NCSN++, CIFAR-10 by class", 18, 32, 56_400_643
        ),
        _edm("edm-ffhq-vp", "edm-ffhq-64x64-uncond-vp.pkl", "EDM DDPM++, FFHQ faces 64x64", 40, 64, 61_805_571),
        _edm("edm-ffhq-ve", "edm-ffhq-64x64-uncond-ve.pkl", "EDM NCSN++, FFHQ faces 64x64", 40, 64, 62_761_091),
        _edm("edm-afhqv2-vp", "edm-afhqv2-64x64-uncond-vp.pkl", "EDM DDPM++, AFHQv2 animals 64x64", 40, 64, 61_805_571),
        _edm("edm-afhqv2-ve", "edm-afhqv2-64x64-uncond-ve.pkl", "EDM NCSN++, AFHQv2 animals 64x64", 40, 64, 62_761_091),
        _edm(
            "edm-imagenet64-adm",
            "edm-imagenet-64x64-cond-adm.pkl",
            "EDM ADM, ImageNet 64x64 by class (FID 2.64 as here; 1.36 with --solver sde --steps 256)",
            40,
            64,
            295_899_267,
        ),
        # EDM2 (Karras et al. 2024). Counts include the 128 weights of the uncertainty head.
        _edm2("xs", "2147483-0.135", 124_713_253),
        _edm2("s", "2147483-0.130", 280_212_837),
        _edm2("m", "2147483-0.100", 497_807_781),
        _edm2("l", "1879048-0.085", 777_498_085),
        _edm2("xl", "1342177-0.085", 1_119_283_749),
        _edm2("xxl", "0939524-0.070", 1_523_164_773),
        # Their averages that are best when guided, and what they are guided by (the presets of the authors' code).
        _edm2("xs", "2147483-0.045", 124_713_253, 1.4),
        _edm2("s", "2147483-0.025", 280_212_837, 1.4),
        _edm2("m", "2147483-0.030", 497_807_781, 1.2),
        _edm2("l", "1879048-0.015", 777_498_085, 1.2),
        _edm2("xl", "1342177-0.020", 1_119_283_749, 1.2),
        _edm2("xxl", "0939524-0.015", 1_523_164_773, 1.2),
        # The same by the distance over DINOv2. XXL is guided best with the average that is best by FID, at 1.7.
        _edm2("xs", "2147483-0.200", 124_713_253, of=DINO),
        _edm2("s", "2147483-0.190", 280_212_837, of=DINO),
        _edm2("m", "2147483-0.155", 497_807_781, of=DINO),
        _edm2("l", "1879048-0.155", 777_498_085, of=DINO),
        _edm2("xl", "1342177-0.155", 1_119_283_749, of=DINO),
        _edm2("xxl", "0939524-0.150", 1_523_164_773, of=DINO),
        _edm2("xs", "2147483-0.150", 124_713_253, 1.7, of=DINO),
        _edm2("s", "2147483-0.085", 280_212_837, 1.9, of=DINO),
        _edm2("m", "2147483-0.015", 497_807_781, 2.0, of=DINO),
        _edm2("l", "1879048-0.035", 777_498_085, 1.7, of=DINO),
        _edm2("xl", "1342177-0.030", 1_119_283_749, 1.7, of=DINO),
        *(_edm2_guide(f"0.{ema}") for ema in ("015", "020", "025", "030", "035", "045", "085", "150")),
        Published(
            "sd15",
            "diffusers",
            "stable-diffusion-v1-5/stable-diffusion-v1-5",
            "CreativeML OpenRAIL-M",
            "https://huggingface.co/spaces/CompVis/stable-diffusion-license",
            "Stable Diffusion 1.5, text to image, latents 4x64x64; Diffusion2GAN distils it at cfg 3 and 8",
            "ddim",
            50,
            3.0,
            512,
            859_520_964,
            revision="451f4fe16113bff5a5d2269ed5ad43b0592e9a14",
            space="sd15",
        ),
        Published(
            "sdxl",
            "diffusers",
            "stabilityai/stable-diffusion-xl-base-1.0",
            "CreativeML Open RAIL++-M",
            "https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0/blob/main/LICENSE.md",
            "Stable Diffusion XL base 1.0, text to image, latents 4x128x128; Diffusion2GAN distils it at cfg 7",
            "ddim",
            50,
            7.0,
            1024,
            2_567_463_684,
            revision="462165984030d82259a11f4367a4eed129e94a7b",
            space="sdxl",
        ),
        Published(
            "sd3-medium",
            "diffusers",
            "stabilityai/stable-diffusion-3-medium-diffusers",
            "Stability AI Community License",
            "https://huggingface.co/stabilityai/stable-diffusion-3-medium/blob/main/LICENSE.md",
            "Stable Diffusion 3 medium, text to image by flow matching, latents 16x128x128; the hub asks for a login",
            "euler",
            28,
            7.0,
            1024,
            2_028_328_000,
            revision="ea42f8cef0f178587cf766dc8129abd379c90671",
            space="sd3",
        ),
    )
}

AUTOENCODERS = {
    "sd-vae-ft-mse": Published(
        "sd-vae-ft-mse",
        "diffusers",
        "stabilityai/sd-vae-ft-mse",
        "MIT",
        "https://huggingface.co/stabilityai/sd-vae-ft-mse",
        "the autoencoder of EDM2's latents",
        resolution=512,
        parameters=83_653_863,
        revision="31f26fdeee1355a5c34592e401dd41e45d25a493",
        sha256="a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815",
        bytes=334_643_276,
    ),
    "flux-vae": Published(
        "flux-vae",
        "diffusers",
        "black-forest-labs/FLUX.1-schnell",
        "Apache-2.0",
        "https://huggingface.co/black-forest-labs/FLUX.1-schnell",
        "the autoencoder of FLUX.1's latents, 16 channels; the hub asks for a login",
        resolution=1024,
        parameters=83_819_683,
        revision="741f7c3ce8b383c54771c7003378a50191e9efe9",
        part="vae",
    ),
}


def names() -> list[str]:
    """The names that `find` knows."""
    return sorted(TEACHERS)


def find(name: str) -> Published | None:
    """The published teacher of that name, or None."""
    return TEACHERS.get(name)


def path_if_here(published: Published) -> Path | None:
    """Its file or folder if it is on this machine (put there by hand, downloaded, or in the hub's cache) and all there,
    else None."""
    place = published.place
    if published.kind == "nvidia":
        return place if place.is_file() else None
    if place.is_dir() and not missing_files(place):
        return place
    folder = cached_snapshot(published.source, published.revision, published.part)
    return folder if folder is not None and not missing_files(folder) else None


def fetch(published: Published, progress: Received | None = None, say: Callable[[str], None] | None = None) -> Path:
    """Its file or folder: found, or downloaded. The licence is shown through `say` once per machine.

    UserError: no network, refused, damaged; the message says which file to put where.
    """
    stamp = home() / "licences" / published.name
    show = say is not None and not stamp.is_file()
    if show and say is not None:
        say(licence_line(published))
    if published.kind == "nvidia":
        path = download(published.source, published.place, published.sha256, published.bytes, progress)
    else:
        path = path_if_here(published) or _from_hub(published)
        if published.sha256:
            verify_file(path / "diffusion_pytorch_model.safetensors", published.sha256, published.bytes)
    if show:
        # A machine whose $D2O_HOME cannot be written (a shared, read-only one) shows the line again: no reason to fail.
        with contextlib.suppress(UserError):
            date = datetime.now(timezone.utc).isoformat(timespec="seconds")
            atomic_write(stamp, f"{published.licence}\n{published.licence_url}\nshown {date}\n")
    return path


def licence_line(published: Published) -> str:
    """What is said about the licence: one line."""
    terms = "non-commercial use only; " if published.licence == NVIDIA_LICENCE else ""
    return (
        f"{published.name}: licence {published.licence}, {published.licence_url}; {terms}it is recorded in everything"
        " made from this teacher"
    )


def _from_hub(published: Published) -> Path:
    if published.place.is_dir() and (missing := missing_files(published.place)) and any(published.place.iterdir()):
        raise UserError(
            f"{published.place} lacks {', '.join(missing)}",
            f"complete it, or remove it to take {published.source} from the hub",
        )
    return hub_snapshot(published.source, revision=published.revision, place=published.place, part=published.part)
