"""The parts of a folder in diffusers' format: JSON files that may be damaged, and components, of which only known
classes are made."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from d2o.errors import UserError
from d2o.inputs import MAX_JSON_BYTES, JsonObject, parse_json, read_file
from d2o.interop import torchvision_compat
from d2o.interop.hub import INDEX
from d2o.networks.budget import check_numbers, counted, file_holdings

if TYPE_CHECKING:
    from diffusers import ModelMixin
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Model: TypeAlias = ModelMixin | PreTrainedModel

TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
Classes = dict[str, tuple[str, ...]]
SD: Classes = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": TOKENIZERS,
}
XL: Classes = {**SD, "text_encoder_2": ("CLIPTextModelWithProjection",), "tokenizer_2": TOKENIZERS}
SD3: Classes = {
    "transformer": ("SD3Transformer2DModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModelWithProjection",),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "text_encoder_3": ("T5EncoderModel",),
    "tokenizer": TOKENIZERS,
    "tokenizer_2": TOKENIZERS,
    "tokenizer_3": ("T5Tokenizer", "T5TokenizerFast"),
}
DDPM: Classes = {"unet": ("UNet2DModel",)}
CLASSES = {
    "StableDiffusionPipeline": SD,
    "StableDiffusionXLPipeline": XL,
    "StableDiffusion3Pipeline": SD3,
    "DDPMPipeline": DDPM,
    "DDIMPipeline": DDPM,
    "PNDMPipeline": DDPM,
}
"""Pipeline -> component -> the classes that it may have."""
WEIGHTS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}


class Components:
    """The components of a diffusers folder. Only those that a family asks for are looked at, and only known classes are
    made. `bare`: on the meta device, of what the files say of their weights, of which none is read."""

    def __init__(self, path: Path, index: JsonObject, bare: bool = False):
        self.path, self.index, self.bare = path, index, bare
        for key in index:
            if "/" in key or "\\" in key or ".." in key:
                raise UserError(
                    f"{path / INDEX} names a component {key!r}, which leads out of the folder",
                    "get the folder from somewhere else",
                )
        scheduler = self.file("scheduler", "scheduler_config.json")
        self.scheduler = read_config(scheduler)
        if not isinstance(self.scheduler.get("_class_name"), str):
            raise UserError(f"{scheduler} does not say which scheduler it is (_class_name)")

    def has(self, component: str) -> bool:
        entry = self.index.get(component)
        return isinstance(entry, list) and len(entry) == 2 and entry[1] is not None

    def class_name(self, component: str) -> tuple[str, str]:
        """(library, class) of a component. UserError: missing, or not one of those that it may be."""
        if not self.has(component):
            raise UserError(f"{self.path} has no {component} (it is not in {INDEX})", "download the whole repository")
        library, kind = self.index[component]
        known = CLASSES[self.index["_class_name"]][component]
        wanted = "diffusers" if component in ("unet", "transformer", "vae") else "transformers"
        if library != wanted or kind not in known:
            raise UserError(
                f"{self.path}: {component} is a {library}.{kind}, which d2o does not load",
                f"known: {', '.join(known)} of {wanted}",
            )
        return library, kind

    def where(self, component: str) -> Path:
        """Its folder; the oldest repositories keep their only network at the top."""
        return self.path / component if (self.path / component).is_dir() else self.path

    def file(self, component: str, name: str) -> Path:
        file = self.where(component) / name
        if not file.is_file():
            raise UserError(
                f"{self.path} has no {component} ({component}/{name} is missing)", "download the whole repository"
            )
        return file

    def config(self, component: str) -> JsonObject:
        return read_config(self.file(component, "config.json"))

    def model(self, component: str) -> Model:
        """A network with its weights, float32. UserError as `load_diffusers`."""
        import diffusers
        import transformers

        library, kind = self.class_name(component)
        config, where = self.config(component), self.where(component)
        check_numbers(
            {key: value for key, value in config.items() if not key.startswith("_")}, f"{where / 'config.json'}"
        )
        which = variant(where, WEIGHTS[library])
        options = {"use_safetensors": True, "variant": which, "local_files_only": True, "output_loading_info": True}
        cls = getattr(diffusers if library == "diffusers" else transformers, kind)
        bare, held = _fits(cls, config, library, where, which)
        if self.bare:
            if (asked := sum(weight.numel() for weight in bare.parameters())) > held:
                raise UserError(f"{where}: the weights do not fit config.json ({held:,} numbers for {asked:,})")
            return bare.eval().float()
        if library == "diffusers":
            options["low_cpu_mem_usage"] = (
                False  # the other way needs a package that d2o does not, and has no word for missing weights
            )
        try:
            model, info = cls.from_pretrained(where, **options)
        except Exception as error:  # whatever a damaged file makes these libraries raise
            raise UserError(f"{where} cannot be loaded as a {kind}: {words(error)}", "check the download") from error
        wrong = sorted({*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])})
        if wrong:
            raise UserError(
                f"{where}: the weights do not fit config.json ({len(wrong)} missing or of another size, {wrong[0]}"
                " first)"
            )
        return model.float()

    def text(self, suffixes: Sequence[str]) -> tuple[list[PreTrainedModel], list[PreTrainedTokenizerBase]]:
        """Text encoders and their tokenizers. UserError as `model`, and a tokenizer with words that its encoder does
        not know."""
        encoders, tokenizers = (
            [self.model(f"text_encoder{s}") for s in suffixes],
            [self.tokenizer(f"tokenizer{s}") for s in suffixes],
        )
        for suffix, encoder, tokenizer in zip(suffixes, encoders, tokenizers, strict=True):
            words, known = len(tokenizer), encoder.config.vocab_size
            if words > known:
                raise UserError(
                    f"{self.path}: tokenizer{suffix} has {words} words, but text_encoder{suffix} knows {known}",
                    "check the download",
                )
        return encoders, tokenizers

    def tokenizer(self, component: str) -> PreTrainedTokenizerBase:
        import transformers

        _, kind = self.class_name(component)
        where = self.path / component
        # Without its files, transformers makes a tokenizer that knows no words.
        if not any((where / name).is_file() for name in ("tokenizer.json", "vocab.json", "spiece.model")):
            raise UserError(
                f"{self.path} has no {component} ({component}/tokenizer.json or vocab.json is missing)",
                "download the whole repository",
            )
        try:
            return getattr(transformers, kind).from_pretrained(where, local_files_only=True)
        except Exception as error:
            raise UserError(f"{where} cannot be loaded as a {kind}: {words(error)}", "check the download") from error


def _fits(cls: type[Model], config: JsonObject, library: str, where: Path, variant: str | None) -> tuple[Model, int]:
    """The network on the meta device (nothing is allocated), and how many numbers the weights beside it are. UserError:
    config.json describes no such network, or one that is much larger than they."""
    import torch

    ending = ".safetensors" if variant is None else f".{variant}.safetensors"
    files = [
        path
        for path in sorted(where.glob(f"{WEIGHTS[library]}*.safetensors"))
        if path.name.endswith(ending) or "-of-" in path.name
    ]
    try:
        holds = file_holdings(files)
    except UserError as error:
        raise UserError(f"{where} cannot be loaded as a {cls.__name__}: {error.message}", error.hint) from error
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"), counted(holds, f"{where / 'config.json'}"):
            if library == "diffusers":
                network = cls.from_config(config)
            else:
                network = cls(cls.config_class.from_dict(config))
        return network, sum(tensor.numel() for tensor in holds.values())
    except UserError:
        raise
    except Exception as error:  # whatever wrong numbers make these libraries raise
        raise UserError(
            f"{where} cannot be loaded as a {cls.__name__}: {words(error)}", "check the download"
        ) from error


def variant(folder: Path, stem: str) -> str | None:
    """None for weights in full precision, "fp16" where a folder has only those. UserError: only pickles, or no weights
    at all."""
    for choice, files in (
        (None, (f"{stem}.safetensors", f"{stem}.safetensors.index.json")),
        (
            "fp16",
            (f"{stem}.fp16.safetensors", f"{stem}.safetensors.index.fp16.json", f"{stem}.fp16.safetensors.index.json"),
        ),
    ):
        for name in files:
            if not (folder / name).is_file():
                continue
            if name.endswith(".json"):
                parts = read_config(folder / name).get("weight_map", {})
                if not isinstance(parts, dict) or any("/" in str(part) or "\\" in str(part) for part in parts.values()):
                    raise UserError(
                        f"{folder / name} names weights outside of the folder", "get the folder from somewhere else"
                    )
            return choice
    if any(folder.glob("*.bin")):
        raise UserError(
            f"{folder} has its weights only as a pickle (.bin), which can run code; d2o reads safetensors",
            "get the repository's .safetensors files, or convert it with diffusers' save_pretrained",
        )
    raise UserError(f"{folder} has no weights ({stem}.safetensors)", "download the whole repository")


def read_config(path: Path) -> JsonObject:
    """A JSON object. UserError: missing, damaged, or something else."""
    try:
        found = parse_json(read_file(path, MAX_JSON_BYTES, "a JSON file"))
    except ValueError as error:
        raise UserError(f"{path} is damaged: not JSON ({words(error)})", "check the download") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: not a JSON object", "check the download")
    return found


def words(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines()]
    return " ".join(lines[:2])[:250] or type(error).__name__


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """diffusers and transformers say nothing, and draw no bars, while they load."""
    torchvision_compat.ensure()
    import diffusers
    import transformers

    logs = (diffusers.utils.logging, transformers.utils.logging)
    before = [log.get_verbosity() for log in logs]
    bars = [log.is_progress_bar_enabled() if hasattr(log, "is_progress_bar_enabled") else True for log in logs]
    for log in logs:
        log.set_verbosity_error()
        log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level, bar in zip(logs, before, bars, strict=True):
            log.set_verbosity(level)
            if bar:
                log.enable_progress_bar()
