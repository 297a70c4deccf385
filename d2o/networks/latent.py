"""Latent diffusion models made of diffusers' and transformers' own modules, from plain configurations that checkpoints
hold.

Stable Diffusion 1.5's parts at any size: an autoencoder, a text encoder with its tokenizer, and a U-Net that predicts
the noise.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from d2o.errors import UserError, nearest
from d2o.inputs import JsonObject, read_json
from d2o.interop import torchvision_compat
from d2o.interop.checkpoint_record import check_checkpoint
from d2o.interop.safetensors_io import load_file, read_meta, resolve_checkpoint
from d2o.networks.bpe import BOS, EOS, Tokens, build_tokens
from d2o.networks.budget import build_within, check_numbers
from d2o.networks.config import Config
from d2o.networks.fill import fill_network

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

N = TypeVar("N", bound=nn.Module)

SD_SCHEDULER: JsonObject = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
"""The scheduler settings of Stable Diffusion 1.5."""
BROKEN = (
    TypeError,
    ValueError,
    RuntimeError,
    ArithmeticError,
    LookupError,
    AttributeError,
    AssertionError,
    MemoryError,
)
"""What bad arguments make networks raise."""


class Autoencoder(nn.Module):
    """diffusers' AutoencoderKL. `config` holds its arguments; the kinds of blocks follow from `block_out_channels`
    where they are not given.

    Images [B, C, H, W] in [-1, 1]; latents [B, c, H / f, W / f] as the encoder gives them, not yet times
    `scaling_factor`.
    UserError: unknown arguments, or values that diffusers refuses.
    """

    def __init__(self, **config: Any):  # noqa: ANN401 (arguments of AutoencoderKL)
        super().__init__()
        blocks = len(config.get("block_out_channels", (64,)))
        config = {
            "down_block_types": ["DownEncoderBlock2D"] * blocks,
            "up_block_types": ["UpDecoderBlock2D"] * blocks,
            **config,
        }
        self.config: Config = {"arch": "autoencoder_kl", **config}
        self.vae: AutoencoderKL = _build(_diffusers("AutoencoderKL"), config, "network")

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents."""
        posterior = self.vae.encode(images).latent_dist
        return posterior.mean, posterior.std

    def decode(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents).sample

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction through latents mean + std * noise, mean, std."""
        mean, std = self.encode(images)
        return self.decode(mean + std * noise), mean, std

    @property
    def factor(self) -> int:
        """How many times smaller than an image its latents are."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)


class TextToImage(nn.Module):
    """A whole Stable-Diffusion-type model: `vae` (frozen), `text_encoder`, `unet`, and `tokens`, the vocabulary.

    `vae`, `unet`, `text_encoder`: arguments of AutoencoderKL, UNet2DConditionModel and CLIPTextConfig; `words`: those
    that are one token each. Latents are in the diffusion space: the encoder's times `scaling_factor`. UserError as
    `Autoencoder`.
    """

    def __init__(self, vae: Config, unet: Config, text_encoder: Config, words: Sequence[str]):
        super().__init__()
        self.tokens: Tokens = build_tokens(words)
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        cross = text_encoder.get("hidden_size", 64)
        unet = {
            "sample_size": vae.get("sample_size", 32) // factor,
            "in_channels": vae.get("latent_channels", 4),
            "out_channels": vae.get("latent_channels", 4),
            "cross_attention_dim": cross,
            **unet,
        }
        text_encoder = {"hidden_size": cross, "projection_dim": cross, "max_position_embeddings": 77, **text_encoder}
        self.config: Config = {
            "arch": "text_to_image",
            "vae": vae,
            "unet": unet,
            "text_encoder": text_encoder,
            "words": sorted(words),
        }
        self.vae: AutoencoderKL = _build(
            _diffusers("AutoencoderKL"), {k: v for k, v in vae.items() if k != "arch"}, "network.vae"
        ).requires_grad_(False)
        self.unet: UNet2DConditionModel = _build(_diffusers("UNet2DConditionModel"), unet, "network.unet")
        self.text_encoder: CLIPTextModel = _text_encoder(text_encoder, self.tokens)
        self.register_load_state_dict_pre_hook(_rename_text_encoder)

    @property
    def scale(self) -> float:
        return float(self.vae.config.scaling_factor)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        size = self.unet.config.sample_size
        return self.unet.config.in_channels, size, size

    def encode_text(self, ids: Tensor) -> Tensor:
        """Token ids [B, 77] -> states [B, 77, D], the last hidden ones after the final layer norm, as SD 1.5 takes
        them."""
        return self.text_encoder(ids)[0]

    def encode_images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images in [-1, 1] -> mean and standard deviation of their latents in the diffusion space."""
        posterior = self.vae.encode(images).latent_dist
        return posterior.mean * self.scale, posterior.std * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Latents in the diffusion space -> images, in [-1, 1] after clipping."""
        return self.vae.decode(latents / self.scale).sample

    def forward(self, x_t: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        """The predicted noise: x_t [B, c, h, w] in the diffusion space, t [B] time steps 0..999, ids [B, 77] token
        ids."""
        return self.unet(x_t, t, self.encode_text(ids)).sample


def _rename_text_encoder(module: nn.Module, tensors: dict[str, Tensor], prefix: str, *_: object) -> None:
    """transformers 5 dropped the `text_model.` from the names inside a CLIPTextModel: read the weights under either
    name."""
    inner = prefix + "text_encoder."
    long = any(name.startswith("text_model.") for name, _ in module.text_encoder.named_parameters())  # type: ignore[union-attr]
    for name in [name for name in tensors if name.startswith(inner)]:
        rest = name.removeprefix(inner).removeprefix("text_model.")
        tensors[inner + ("text_model." if long else "") + rest] = tensors.pop(name)


def load_autoencoder(path: str | Path) -> Autoencoder:
    """From a checkpoint or run folder of method `autoencoder`, or from a diffusers folder (the model's own, or a
    pipeline's with `vae/`).

    On the meta device only the configuration is read. UserError: missing, truncated or foreign file.
    """
    path = Path(path)
    folder = next((f for f in (path, path / "vae") if (f / "config.json").is_file()), None)
    if folder is not None:
        return _from_diffusers(folder)
    path = resolve_checkpoint(path)
    if read_meta(path).get("kind") != "autoencoder":
        raise UserError(
            f"{path} holds a {read_meta(path).get('kind', 'foreign object')}, not an autoencoder",
            "train one: d2o train tiny_sd_vae",
        )
    tensors, meta = load_file(path)
    check_checkpoint(meta, path)
    return _described(Autoencoder, {k: v for k, v in meta["network"].items() if k != "arch"}, tensors, path)


def load_text_to_image(path: str | Path) -> tuple[TextToImage, JsonObject]:
    """The whole model, in eval mode on the CPU, and the metadata of a checkpoint of method `latent-diffusion`.
    UserError: any other file."""
    path = resolve_checkpoint(path)
    meta = check_checkpoint(read_meta(path), path)
    config = dict(meta.get("network") or {})
    if config.pop("arch", None) != "text_to_image":
        what = f"{path} holds a {meta.get('kind', 'foreign object')} that is no text-to-image model of d2o's own"
        raise UserError(what, "d2o train tiny_sd makes one")
    return _described(TextToImage, config, load_file(path)[0], path).eval(), meta


def _described(cls: type[N], config: Config, tensors: dict[str, Tensor], path: Path) -> N:
    """The network that a file describes, with the file's tensors. UserError: it is none, or they do not fit."""

    def make() -> N:
        try:
            return cls(**config)
        except BROKEN as error:
            raise UserError(
                f"{path}: cannot build a {cls.__name__} as it describes it: {error or type(error).__name__}"
            ) from error

    check_numbers(config, f"{path}: network")
    return fill_network(build_within(make, tensors, f"{path}: network"), tensors, path)


def _from_diffusers(folder: Path) -> Autoencoder:
    from safetensors import SafetensorError
    from safetensors.torch import load_file as load_tensors

    try:
        config = read_json(folder / "config.json")
        tensors = load_tensors(folder / "diffusion_pytorch_model.safetensors")
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise UserError(f"{folder} holds no autoencoder that can be read ({error})") from error
    kind = config.get("_class_name", "foreign object") if isinstance(config, dict) else "foreign object"
    if not isinstance(config, dict) or kind != "AutoencoderKL":
        raise UserError(f"{folder} holds a {kind}, not an AutoencoderKL")
    tensors = {f"vae.{name}": tensor.to(torch.float32) for name, tensor in tensors.items()}
    return _described(
        Autoencoder, {key: value for key, value in config.items() if not key.startswith("_")}, tensors, folder
    )


def _text_encoder(config: Config, tokens: Tokens) -> nn.Module:
    torchvision_compat.ensure()
    from transformers import CLIPTextConfig, CLIPTextModel

    own = {
        "vocab_size": len(tokens.vocab),
        "bos_token_id": tokens.vocab[BOS],
        "eos_token_id": tokens.vocab[EOS],
        "pad_token_id": tokens.vocab[EOS],
    }
    try:
        return CLIPTextModel(CLIPTextConfig(**{**config, **own}))
    except UserError:
        raise
    except Exception as error:  # transformers has its own kinds of errors
        raise UserError(f"network.text_encoder: cannot build a CLIPTextModel from {config}: {error}") from error


def _diffusers(name: str) -> type[nn.Module]:
    torchvision_compat.ensure()
    import diffusers

    return getattr(diffusers, name)


def build_diffusers(name: str, config: Config, where: str) -> nn.Module:
    """One of diffusers' networks by its class's name. UserError: arguments that it does not have, or refuses."""
    return _build(_diffusers(name), config, where)


def _build(cls: type[N], config: Config, where: str) -> N:
    known = set(inspect.signature(cls.__init__).parameters) - {"self"}
    for key in config:
        if key not in known:
            near = nearest(key, known)
            raise UserError(
                f"{where}.{key}: unknown key for {cls.__name__}" + (f"; did you mean {near!r}?" if near else "")
            )
    try:
        return cls(**config)
    except BROKEN as error:
        raise UserError(
            f"{where}: cannot build a {cls.__name__} from {config}: {error or type(error).__name__}"
        ) from error
