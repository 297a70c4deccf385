"""From the class and the arguments that NVIDIA's pickles name to the configuration that
`d2o.networks.build.build_network` takes.

Families: EDM (Karras et al. 2022) with its four preconditionings, EDM2 (Karras et al. 2024), and the snapshots of SiD
and SiDA (Zhou et al. 2024) and GDD (Zheng & Yang 2024), whose classes are those of EDM or EDM2 under other names.
"""

from __future__ import annotations

import math
from collections.abc import Set

from d2o.inputs import JsonObject
from d2o.interop.inert_pickle import Malformed

EDM_CLASSES = {
    "EDMPrecond": ("edm", "DhariwalUNet"),
    "EDMPrecond_EncoderDecoder": ("edm", "DhariwalUNet"),  # SiDA
    "GDDPrecond": ("consistency", "DhariwalUNet"),
    "D2OPrecond": ("consistency", "DhariwalUNet"),  # the same, as GDD's repository calls it now
    "VPPrecond": ("vp", "SongUNet"),
    "VEPrecond": ("ve", "SongUNet"),
    "iDDPMPrecond": ("iddpm", "DhariwalUNet"),
}
"""Class -> preconditioning, and the U-Net that it has unless `model_type` says otherwise."""
EDM2_CLASSES = {
    "Precond",
    "EDM_2_Precond_EncoderDecoder",
    "EDM_2_Precond_Generator",
}  # the last two are SiDA's; a generator has no uncertainty head
UNETS = {
    "SongUNet": "song",
    "SongUNet_EncoderDecoder": "song",
    "DhariwalUNet": "adm",
    "DhariwalUNet_EncoderDecoder": "adm",
}

# NVIDIA's argument -> ours ("" if it has only one value that we run), and the values it may take: (type, lowest,
# highest), or the choices. The bounds keep a damaged file from asking for a network that takes hours to build.
KnownOptions = dict[str, tuple[str, tuple]]
COMMON: KnownOptions = {
    "img_resolution": ("img_resolution", (int, 1, 4096)),
    "img_channels": ("img_channels", (int, 1, 1024)),
    "label_dim": ("label_dim", (int, 0, 10**6)),
    "model_channels": ("model_channels", (int, 1, 8192)),
    "channel_mult": ("channel_mult", (list, 1, 64)),
    "channel_mult_emb": ("emb_mult", (int, 1, 64)),
    "num_blocks": ("num_blocks", (int, 1, 32)),
    "attn_resolutions": ("attn_resolutions", (list, 0, 4096)),
    "dropout": ("dropout", (float, 0.0, 1.0)),
}
EDM_OPTIONS: KnownOptions = {**COMMON, "augment_dim": ("augment_dim", (int, 0, 1024))}
SONG_OPTIONS: KnownOptions = {
    "embedding_type": ("embedding", ("positional", "fourier")),
    "channel_mult_noise": ("noise_mult", (int, 1, 64)),
    "encoder_type": ("encoder", ("standard", "residual")),
    "resample_filter": ("fir", (list, 0, 4096)),
    "decoder_type": ("", ("standard",)),
}
SONG_DEFAULTS = {
    "embedding_type": "positional",
    "channel_mult_noise": 1,
    "encoder_type": "standard",
    "resample_filter": [1, 1],
}
RANGE: KnownOptions = {
    "sigma_min": ("sigma_min", (float, 0.0, 1e9)),
    "sigma_max": ("sigma_max", (float, 0.0, math.inf)),
}
SIGMA_DATA: KnownOptions = {"sigma_data": ("sigma_data", (float, 1e-6, 1e6))}
PRECOND_OPTIONS: dict[str, KnownOptions] = {
    "edm": {**RANGE, **SIGMA_DATA},
    "consistency": {**RANGE, **SIGMA_DATA},
    "vp": {"beta_d": ("", (19.9,)), "beta_min": ("", (0.1,)), "M": ("", (1000,)), "epsilon_t": ("", (1e-5,))},
    "ve": RANGE,
    "iddpm": {"C_1": ("", (0.001,)), "C_2": ("", (0.008,)), "M": ("", (1000,))},
}
EDM2_OPTIONS: KnownOptions = {
    **COMMON,
    **SIGMA_DATA,
    "channel_mult_noise": ("noise_mult", (int, 1, 64)),
    "logvar_channels": ("logvar_channels", (int, 1, 65536)),
    "label_balance": ("label_balance", (float, 0.0, 1.0)),
    "concat_balance": ("concat_balance", (float, 0.0, 1.0)),
    "res_balance": ("res_balance", (float, 0.0, 1.0)),
    "attn_balance": ("attn_balance", (float, 0.0, 1.0)),
    "channels_per_head": ("channels_per_head", (int, 1, 8192)),
    "clip_act": ("clip_act", (float, 0.0, 1e9)),
    "resample_filter": ("", ([1, 1],)),
}
MAY_BE_NONE = {"channel_mult_noise", "channel_mult_emb", "clip_act"}
"""EDM2's options for which None has a meaning."""
IGNORED = {"model_type", "use_fp16", "label_dropout", "force_normalization", "use_gan"}
"""How it is trained or run; not part of the network."""


def config_from_pickle(class_name: str, kwargs: JsonObject, has_head: bool) -> JsonObject:
    """`class_name` and arguments of the outermost module; `has_head`: the file holds EDM2's uncertainty head. Raises
    Malformed."""
    if class_name in EDM2_CLASSES:
        config = {"arch": "edm2", **_translate("UNet of EDM2", kwargs, EDM2_OPTIONS, MAY_BE_NONE)}
        return config if has_head else {**config, "logvar_channels": 0}
    if class_name not in EDM_CLASSES:
        raise Malformed(f"holds a network of class {class_name!r:.100}, which d2o cannot run")
    precond, default = EDM_CLASSES[class_name]
    unet = kwargs.get("model_type", default)
    if not isinstance(unet, str) or unet not in UNETS:
        raise Malformed(f"holds a network of class {class_name} around {unet!r:.100}, which d2o cannot run")
    options = {**EDM_OPTIONS, **PRECOND_OPTIONS[precond]}
    config = {"arch": "adm"}
    if UNETS[unet] == "song":
        options, kwargs = {**options, **SONG_OPTIONS}, {**SONG_DEFAULTS, **kwargs}
        config["arch"] = "ncsnpp" if kwargs["encoder_type"] == "residual" else "ddpmpp"
    if precond != "edm":
        config["precond"] = precond
    return {**config, **_translate(unet, kwargs, options)}


def _translate(kind: str, kwargs: JsonObject, options: KnownOptions, may_be_none: Set[str] = frozenset()) -> JsonObject:
    for key in ("img_resolution", "img_channels"):
        if key not in kwargs:
            raise Malformed(f"holds a {kind} without {key!r}")
    config = {}
    for key, value in kwargs.items():
        if key in IGNORED:
            continue
        if key not in options:
            raise Malformed(f"holds a {kind} with option {key!r:.100}, which d2o does not know")
        ours, allowed = options[key]
        if not (_allowed(value, allowed) or (value is None and key in may_be_none)):
            raise Malformed(f"holds a {kind} with {key} = {value!r:.100}, which d2o does not support")
        if ours and value != math.inf:  # no upper limit is the default
            config[ours] = value
    return config


def _allowed(value: object, allowed: tuple) -> bool:
    kind, *bounds = allowed
    if kind is list:
        return isinstance(value, list) and len(value) <= 8 and all(_allowed(v, (int, *bounds)) for v in value)
    if kind is int:
        return type(value) is int and bounds[0] <= value <= bounds[1]
    if kind is float:
        return type(value) in (int, float) and bounds[0] <= value <= bounds[1]
    return value in allowed
