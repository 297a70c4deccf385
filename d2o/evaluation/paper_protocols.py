"""The protocols of the papers by name, so that a number of d2o can stand beside theirs, or is refused (`d2o eval
--protocol NAME`): one for each row of a paper's evaluation. Where a paper is silent,
`notes` say so, and what was chosen."""

from __future__ import annotations

from d2o.errors import unknown
from d2o.evaluation.judge_protocols import JUDGE_PRESETS
from d2o.evaluation.presets import Preset

# ---- what the protocols share ----------------------------------------------------------------------------------------

_CIFAR, _FFHQ, _AFHQV2, _IMAGENET = 50_000, 70_000, 15_803, 1_281_167  # images of the training sets
_50K = {"n": 50_000, "resize": "none", "quantize": "edm_round", "labels": "random"}
_SIDA = {**_50K, "repeats": 10, "report_as": "mean"}
_GDD = {**_50K, "seed": 0, "repeats": 1}
_EDM = {**_50K, "seed": 0, "repeats": 3, "report_as": "min"}
_COCO = {"n": 30_000, "repeats": 1, "resize": "256:lanczos", "quantize": "dmd_trunc"}

_SIDA_RUNS = (
    "mean and deviation of 10 runs of the snapshot with the lowest FID; which seeds is not stated: any, but not those"
    " it was chosen on"
)
_SIDA_LABELS = (
    "classes drawn uniformly from each image's seed, as SiD's generation script does; its training loop drew them from"
    " the data"
)
_ADM_BATCH = (
    "the reference is OpenAI's batch of ImageNet 64x64 (VIRTUAL_imagenet64_labeled.npz), not that of FID; half"
    " precision, as the tools"
)
_EDM_MIN = "the smallest of three runs, over the seeds from 0, 50,000 and 100,000 on; the label says so"
_SPI = (
    "the paper states neither the number of images nor its tool: 50,000, and the training set as reference, are our"
    " choice"
)
_JPEG = "the authors' script writes JPEG files before it scores them; d2o scores the 8-bit images themselves"
_CROP = (
    "real and generated images are centre-cropped to their short side and brought to 256 pixels with Lanczos, as"
    " GigaGAN's published code does; the paper's text says antialiased bicubic: measure once with --resize 256:bicubic,"
    " without --protocol, and report both"
)
_CAPTIONS = (
    "which of an image's captions is its prompt, and the seeds, are not stated: freeze the list; its sha256 is in the"
    " result"
)
_OPENCLIP = "CLIP model: OpenCLIP ViT-g-14 of laion2b_s12b_b42k"

# ---- the protocols ---------------------------------------------------------------------------------------------------

_ALL = (
    # SiDA (arXiv 2410.14919)
    Preset(
        "sida_cifar10",
        "SiDA, Tables 1 and 2",
        "CIFAR-10, training images",
        ("fid", "is"),
        {**_SIDA, "is_splits": 10, "is_mode": "edm_order"},
        "edm-cifar10",
        _CIFAR,
        "inception",
        "EDM fid.py; SiD's IS",
        (_SIDA_RUNS, _SIDA_LABELS),
    ),
    Preset(
        "sida_imagenet64",
        "SiDA, Table 3 (FID)",
        "ImageNet 64x64, training images",
        ("fid",),
        _SIDA,
        "edm-imagenet64",
        _IMAGENET,
        "inception",
        "EDM fid.py",
        (_SIDA_RUNS, _SIDA_LABELS),
    ),
    Preset(
        "sida_imagenet64_pr",
        "SiDA, Table 3 (precision, recall)",
        "ImageNet 64x64, OpenAI's reference batch",
        ("pr",),
        {**_SIDA, "pr_k": 3, "pr_dtype": "float16"},
        "adm-imagenet64-labeled",
        None,
        "inception",
        "SiD's pr50k3; guided-diffusion evaluator",
        (_SIDA_RUNS, _SIDA_LABELS, _ADM_BATCH),
    ),
    Preset(
        "sida_edm2_512",
        "SiDA, Tables 4 and 7",
        "ImageNet 512x512, training images",
        ("fid", "fd-dinov2"),
        _SIDA,
        "edm2-img512",
        _IMAGENET,
        "inception",
        "EDM2 calculate_metrics.py",
        (_SIDA_RUNS, _SIDA_LABELS),
    ),
    Preset(
        "sida_ffhq64",
        "SiDA, Table 5",
        "FFHQ 64x64",
        ("fid",),
        _SIDA,
        "edm-ffhq64",
        _FFHQ,
        "inception",
        "EDM fid.py",
        (_SIDA_RUNS,),
    ),
    Preset(
        "sida_afhqv2",
        "SiDA, Table 6",
        "AFHQv2 64x64",
        ("fid",),
        _SIDA,
        "edm-afhqv2-64",
        _AFHQV2,
        "inception",
        "EDM fid.py",
        (_SIDA_RUNS,),
    ),
    # GDD (arXiv 2405.20750)
    Preset(
        "gdd_cifar10",
        "GDD, Tables 1 to 3",
        "CIFAR-10, training images",
        ("fid", "is"),
        {**_GDD, "is_mode": "adm"},
        "edm-cifar10",
        _CIFAR,
        "inception",
        "EDM fid.py; guided-diffusion evaluator's IS",
    ),
    Preset("gdd_ffhq64", "GDD, Table 3", "FFHQ 64x64", ("fid",), _GDD, "edm-ffhq64", _FFHQ, "inception", "EDM fid.py"),
    Preset(
        "gdd_afhqv2",
        "GDD, Table 3",
        "AFHQv2 64x64",
        ("fid",),
        _GDD,
        "edm-afhqv2-64",
        _AFHQV2,
        "inception",
        "EDM fid.py",
    ),
    Preset(
        "gdd_imagenet64",
        "GDD, Table 4 (FID)",
        "ImageNet 64x64, training images",
        ("fid",),
        _GDD,
        "edm-imagenet64",
        _IMAGENET,
        "inception",
        "EDM fid.py",
    ),
    Preset(
        "gdd_imagenet64_pr",
        "GDD, Table 4 (precision, recall)",
        "ImageNet 64x64, OpenAI's reference batch",
        ("pr",),
        {**_GDD, "pr_k": 3, "pr_dtype": "float16"},
        "adm-imagenet64-labeled",
        None,
        "inception",
        "guided-diffusion evaluator",
        (_ADM_BATCH,),
    ),
    Preset(
        "gdd_relfid",
        "GDD, Figure 2",
        "CIFAR-10: training images (abs-FID), the teacher's images (rel-FID)",
        ("fid", "rel-fid"),
        _GDD,
        "edm-cifar10",
        _CIFAR,
        "inception",
        "EDM fid.py",
        ("rel-FID is between 50,000 images of the student and 50,000 of its teacher from the same seeds",),
    ),
    # SPI-GAN (arXiv 2206.14464), DD-GAN (arXiv 2112.07804)
    Preset(
        "spi_gan_cifar10",
        "SPI-GAN, Tables 1 and 4",
        "CIFAR-10, training images",
        ("fid", "is", "pr"),
        {**_50K, "repeats": 1, "is_splits": 10, "is_mode": "torch_fidelity", "pr_k": 3, "pr_dtype": "float32"},
        None,
        _CIFAR,
        "inception",
        "not stated; EDM fid.py, torch-fidelity",
        (_SPI, "recall over Inception features, k = 3, against all training images: our choice"),
        {"against": "CIFAR-10's 50,000 training images"},
    ),
    Preset(
        "spi_gan_celeba",
        "SPI-GAN, Table 2",
        "CelebA-HQ 256x256",
        ("fid-pytorch",),
        {**_50K, "repeats": 1},
        None,
        None,
        "inception-legacy_pytorch",
        "pytorch-fid, as DD-GAN",
        (_SPI, "how many images the reference holds is not stated"),
        {"against": "CelebA-HQ at 256x256"},
    ),
    Preset(
        "spi_gan_church",
        "SPI-GAN, Tables 3 and 5",
        "LSUN Church 256x256",
        ("fid-pytorch", "prdc"),
        {**_50K, "repeats": 1, "pr_k": 3, "dc_k": 5, "pr_dtype": "float32"},
        None,
        None,
        "inception-legacy_pytorch",
        "pytorch-fid, as DD-GAN; prdc",
        (
            _SPI,
            (
                "recall (k = 3) and coverage (k = 5) over Inception features are our choice; the table prints these two"
                " of the four"
            ),
            "how many images the reference holds is not stated; DD-GAN trains on the first 120,000, centre-cropped",
        ),
        {"against": "LSUN Church at 256x256"},
    ),
    Preset(
        "ddgan",
        "DD-GAN, as SPI-GAN prints its numbers",
        "CIFAR-10, CelebA-HQ 256x256 or LSUN Church 256x256",
        ("fid-pytorch", "is", "pr@vgg16-fc2"),
        {**_50K, "repeats": 1, "is_splits": 10, "is_mode": "edm_order", "pr_k": 3, "pr_dtype": "float32"},
        None,
        None,
        "inception-legacy_pytorch",
        "pytorch-fid; the official code of precision and recall",
        (
            _JPEG,
            "its Inception Score comes from a script of its own that we have not seen: 10 splits in order, our choice",
        ),
        {"against": "the training images"},
    ),
    # Diffusion2GAN (arXiv 2405.05967)
    Preset(
        "d2g_coco2014",
        "Diffusion2GAN, Tables 1 to 3 and A4 (FID, CLIP)",
        "COCO 2014, validation",
        ("fid-clean", "clip-score"),
        {**_COCO, "clip_model": "clip-vit-g-14"},
        None,
        40_504,
        "inception-clean",
        "GigaGAN's evaluation (clean-fid)",
        (_CROP, _CAPTIONS, f"{_OPENCLIP}, as in Tables 4 and 5; of Tables 1, 2 and A4 it is not stated"),
        {"against": "the 40,504 validation images of COCO 2014", "prompts": "30,000 of their captions, one a line"},
    ),
    Preset(
        "d2g_coco2014_pr",
        "Diffusion2GAN, Tables 1, 2 and A4 (precision, recall)",
        "COCO 2014, validation",
        ("pr",),
        {**_COCO, "n": 10_000, "pr_k": 3, "pr_dtype": "float32"},
        None,
        10_000,
        "inception-clean",
        "not stated; the same path to Inception",
        (
            _CROP,
            _CAPTIONS,
            (
                "k is not stated: 3, the usual; the first author's own library has 5: measure that once with --pr-k 5,"
                " without --protocol, and report both"
            ),
            "10,000 images on either side",
        ),
        {"against": "10,000 validation images of COCO 2014", "prompts": "10,000 of their captions, one a line"},
    ),
    Preset(
        "d2g_coco2017",
        "Diffusion2GAN, Tables 4 and 5",
        "COCO 2017, validation",
        ("fid-clean", "clip-score", "dreamsim", "dreamdiv"),
        {**_COCO, "n": 5_000, "clip_model": "clip-vit-g-14", "distance_n": 5_000, "per_prompt": 8},
        None,
        5_000,
        "inception-clean",
        "GigaGAN's evaluation (clean-fid); dreamsim",
        (
            _CROP,
            _CAPTIONS,
            _OPENCLIP,
            "DreamDiv takes 8 images of each prompt, the other metrics one",
            "the size at which SDXL was scored is not stated: 256 pixels, as for Stable Diffusion",
            "DreamSim is for students that take their teacher's own noise; Table 4 prints neither it nor DreamDiv",
            "no precision and recall: 5,000 real images are too few, says the paper",
        ),
        {"against": "the 5,000 validation images of COCO 2017", "prompts": "5,000 captions, one for each image"},
    ),
    Preset(
        "d2g_cifar10",
        "Diffusion2GAN, Table 6",
        "CIFAR-10, training images",
        ("fid",),
        {**_50K, "repeats": 1},
        "edm-cifar10",
        _CIFAR,
        "inception",
        "not stated; EDM fid.py",
        ("reference, seeds and tool are not stated: those of EDM, which is the teacher",),
    ),
    *JUDGE_PRESETS,
    # the teachers' own numbers
    Preset(
        "edm_cifar10",
        "EDM",
        "CIFAR-10, training images",
        ("fid",),
        _EDM,
        "edm-cifar10",
        _CIFAR,
        "inception",
        "EDM fid.py",
        (_EDM_MIN,),
    ),
    Preset(
        "edm_ffhq64", "EDM", "FFHQ 64x64", ("fid",), _EDM, "edm-ffhq64", _FFHQ, "inception", "EDM fid.py", (_EDM_MIN,)
    ),
    Preset(
        "edm_afhqv2",
        "EDM",
        "AFHQv2 64x64",
        ("fid",),
        _EDM,
        "edm-afhqv2-64",
        _AFHQV2,
        "inception",
        "EDM fid.py",
        (_EDM_MIN,),
    ),
    Preset(
        "edm_imagenet64",
        "EDM",
        "ImageNet 64x64, training images",
        ("fid",),
        _EDM,
        "edm-imagenet64",
        _IMAGENET,
        "inception",
        "EDM fid.py",
        (_EDM_MIN,),
    ),
    Preset(
        "edm2_img512",
        "EDM2",
        "ImageNet 512x512, training images",
        ("fid", "fd-dinov2"),
        _EDM,
        "edm2-img512",
        _IMAGENET,
        "inception",
        "EDM2 calculate_metrics.py",
        (_EDM_MIN, "each metric has its own smallest run"),
    ),
)

PRESETS: dict[str, Preset] = {preset.name: preset for preset in _ALL}


def find_preset(name: str) -> Preset:
    """UserError: unknown, with the nearest and the list."""
    if name not in PRESETS:
        raise unknown("protocol", name, PRESETS)
    return PRESETS[name]


def protocol_table() -> list[list[str]]:
    """Header and one row for each preset, as the documentation prints them."""
    rows = [["protocol", "numbers of", "data", "metrics", "images", "reference", "equals"]]
    for p in _ALL:
        runs, images = p.settings["repeats"], p.settings.get("n")
        many = f" x {runs}, {'smallest' if p.settings['report_as'] == 'min' else 'mean'}" if runs > 1 else ""
        rows.append(
            [
                f"`{p.name}`",
                p.paper,
                p.data,
                ", ".join(p.metrics),
                f"{images:,}{many}" if images else "all",
                p.reference or "yours",
                p.tool,
            ]
        )
    return rows
