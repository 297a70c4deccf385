"""The protocols of papers for networks that judge images (`judges`)."""

from __future__ import annotations

from d2o.evaluation.presets import Preset

JUDGE_PRESETS = (
    Preset(
        "d2g_imagenet",
        "Diffusion2GAN, Table A2",
        "ImageNet, validation",
        ("top1",),
        {"resize": "256", "repeats": 1},
        None,
        50_000,
        "",
        "PyTorch's ImageNet recipe",
        (
            "top-1 of the centre crop of 224 pixels (the classifier's own size) from the centre square at 256; the"
            " paper refers to PyTorch's recipe, which scales with a bilinear filter",
            "latents of the validation are the means of the autoencoder's distribution: the paper does not say",
        ),
        {"against": "ImageNet's 50,000 validation images, one sub-folder per class"},
    ),
    Preset(
        "d2g_bapps",
        "Diffusion2GAN, Table A3",
        "BAPPS, validation",
        ("2afc",),
        {"resize": "64", "repeats": 1},
        None,
        None,
        "",
        "PerceptualSimilarity",
        (
            "patches at 64 pixels, as PerceptualSimilarity reads them, Lanczos for its bilinear filter; whether the"
            " paper enlarged them before they were encoded is not stated",
            "latents are the means of the autoencoder's distribution: the paper does not say",
        ),
        {"against": "the folder of BAPPS' 2AFC validation part"},
    ),
)
