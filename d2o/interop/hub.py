"""Repositories of the Hugging Face hub: from the local cache where they are there, and never anything but safetensors
and plain text."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from d2o.errors import UserError
from d2o.interop.download import offline
from d2o.interop.part_file import feed, read_object
from d2o.interop.transfer import check_reachable

INDEX = "model_index.json"
"""In a model in diffusers' format: its components."""
TEXTS = ("*.json", "*.txt", "*.md", "*spiece.model", "*tokenizer.model")
"""Configurations, tokenizers, the licence."""
NEVER = (
    "*.bin",
    "*.ckpt",
    "*.pkl",
    "*.pt",
    "*.pth",
    "*.msgpack",
    "*.h5",
    "*.onnx",
    "*.py",
    "*.xml",
    "safety_checker/*",
    "vae_1_0/*",
)
"""Weights that can run code when they are read, weights for other frameworks, code, and what no teacher uses."""
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
"""Components of a pipeline that no teacher uses."""
WEIGHTLESS = ("Scheduler", "Tokenizer", "TokenizerFast", "Processor", "FeatureExtractor")


def is_repository(name: str) -> bool:
    """Whether a name is of the form owner/name, as repositories of the hub have it."""
    parts = name.split("/")
    return len(parts) == 2 and all(parts) and not name.startswith((".", "~"))


def weight_patterns(variant: str | None = None) -> tuple[str, ...]:
    """The weights in diffusers' layout, whole or in shards; not the single-file checkpoints of several GB that often
    lie beside them.

    `variant` "fp16" picks the half-precision copies where the repository has them.
    """
    part = f".{variant}" if variant else ""
    shards = f"*model{part}-0*.safetensors"
    return (f"*model{part}.safetensors", shards)


def hub_snapshot(
    repo: str,
    allow_patterns: Sequence[str] | None = None,
    revision: str | None = None,
    variant: str | None = None,
    place: Path | None = None,
    part: str = "",
) -> Path:
    """The folder of a hub repository in diffusers' layout, from the cache (`$HF_HOME`) if it is all there, else from
    the hub.

    `revision`: branch, tag or commit. `place`: a folder where the caller also looks, for the messages. `part`: the
    folder of one component, which alone is fetched and returned. UserError: no network, no such repository, a login is
    needed, or the repository has no safetensors weights.
    """
    revision = revision or "main"
    only = f' --include "{part}/*"' if part else ""
    by_hand = f"`hf download {repo} --revision {revision}{only}` on a machine with a network"
    by_hand += " and copy its cache ($HF_HOME)"
    files = f"the files of its folder {part}" if part else "the repository's files"
    by_hand += f", or put {files} into {place}" if place else ""
    folder = cached_snapshot(repo, revision, part)
    if folder is not None and not (missing := missing_files(folder, variant)):
        return folder
    if setting := offline():
        absent = (
            f"only a part of it is in the cache ({folder} lacks {', '.join(missing)})"
            if folder
            else "it is not in the cache"
        )
        raise UserError(
            f"cannot fetch {repo} from the hub: the network is switched off ({setting}), and {absent}", f"run {by_hand}"
        )
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
    from huggingface_hub.utils import validate_repo_id

    patterns = [*(allow_patterns or (*TEXTS, *weight_patterns(variant)))]
    patterns = [f"{part}/{pattern}" for pattern in patterns] if part else patterns
    try:
        validate_repo_id(repo)
        if why := check_reachable(
            constants.ENDPOINT
        ):  # once, where the hub's client would try every file several times
            what = f"cannot fetch {repo} from the hub: {constants.ENDPOINT} cannot be reached ({why})"
            raise UserError(what, f"is there a network here? Else run {by_hand}")
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, ignore_patterns=[*NEVER]))
        folder = folder / part
    except UserError:
        raise
    except GatedRepoError as error:
        hint = f"accept its licence at https://huggingface.co/{repo}, then `hf auth login`"
        raise UserError(f"the hub gives {repo} only to those who accepted its licence", hint) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"the hub has no repository {repo!r}, or it is private", "check the name; `hf auth login` for a private one"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"the hub's repository {repo} has no revision {revision!r}") from error
    except HFValidationError as error:
        raise UserError(
            f"{repo!r} is no name of a hub repository", "expected OWNER/NAME, or the path of a folder"
        ) from error
    except Exception as error:  # the hub's client raises the errors of whichever HTTP library its version uses
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"cannot fetch {repo} from the hub: {reason}", f"run again to continue, or run {by_hand}"
        ) from error
    check_blobs(folder)
    if missing := missing_files(folder, variant):
        hint = "d2o reads no pickled weights; look for a repository that has them as .safetensors" + (
            f" ({variant})" if variant else ""
        )
        raise UserError(f"the hub's repository {repo} has no {', '.join(missing)}", hint)
    return folder


def is_diffusers_folder(path: str | Path) -> bool:
    """Whether a whole model in diffusers' format lies there."""
    return (Path(path) / INDEX).is_file()


def cached_snapshot(repo: str, revision: str | None = None, part: str = "") -> Path | None:
    """The folder of a repository, or that of its `part`, in the hub's local cache, complete or not; None when it is not
    there. Never uses the network."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for name in (INDEX, "config.json"):
        try:
            found = try_to_load_from_cache(repo, f"{part}/{name}" if part else name, revision=revision or "main")
        except HFValidationError:
            return None
        if isinstance(found, str):
            return Path(found).parent
    return None


def missing_files(folder: str | Path, variant: str | None = None) -> list[str]:
    """What a folder in diffusers' layout lacks of its components, by file name; a folder of a single model is its own
    component."""
    folder = Path(folder)
    index = read_object(folder / INDEX)
    if index is None:
        return _missing_weights(folder, variant) if (folder / "config.json").is_file() else [INDEX]
    missing: list[str] = []
    for name, kind in index.items():
        if name.startswith("_") or name in UNUSED or not isinstance(kind, list) or len(kind) != 2 or not kind[1]:
            continue
        if str(kind[1]).endswith(WEIGHTLESS):
            missing += [] if any((folder / name).glob("*")) else [f"{name}/"]
        else:
            missing += [f"{name}/{file}" for file in ("config.json",) if not (folder / name / file).is_file()]
            missing += [f"{name}/{file}" for file in _missing_weights(folder / name, variant)]
    return missing


def _missing_weights(folder: Path, variant: str | None) -> list[str]:
    part = f".{variant}" if variant else ""
    for stem in ("diffusion_pytorch_model", "model"):
        if (folder / f"{stem}{part}.safetensors").is_file():
            return []
        index = read_object(folder / f"{stem}.safetensors.index{part}.json")
        if index is not None and isinstance(index.get("weight_map"), dict):
            return sorted(name for name in set(index["weight_map"].values()) if not (folder / str(name)).is_file())
    return [f"*{part}.safetensors"]


def check_blobs(folder: Path) -> None:
    """Hold every weights file against its sha256, which is its name in the cache. UserError, and the damaged file is
    gone."""
    for path in sorted(folder.rglob("*.safetensors")):
        blob = path.resolve()
        if not re.fullmatch(r"[0-9a-f]{64}", blob.name):
            continue
        digest = hashlib.sha256()
        with open(blob, "rb") as file:
            feed(digest, file)
        if digest.hexdigest() != blob.name:
            blob.unlink()
            path.unlink()
            raise UserError(
                f"{path} came damaged: sha256 {digest.hexdigest()}, expected {blob.name}",
                "run again; it is fetched anew",
            )
