"""What a number is called where it is printed: its name says how it was made."""

from __future__ import annotations

from d2o.evaluation.extractor import Extractor
from d2o.evaluation.protocol import Settings

WORDS = {
    "is": "IS",
    "kid": "KID",
    "fd-class": "FD by class",
    "clip-score": "CLIP score",
    "lpips": "LPIPS(alex)",
    "lpips-vgg": "LPIPS(vgg)",
    "dreamsim": "DreamSim",
    "dreamdiv": "DreamDiv",
    "prompt-accuracy": "prompt accuracy",
    "top1": "top-1",
    "2afc": "2AFC",
    "2afc-traditional": "2AFC, traditional",
    "2afc-cnn": "2AFC, cnn",
    "2afc-real": "2AFC, real",
}
FRECHET = {
    "inception": "FID",
    "inception-clean": "clean-FID",
    "inception-clean_torch": "clean-FID(torch)",
    "inception-legacy_pytorch": "pytorch-FID",
    "dinov2_vitl14": "FD-DINOv2",
    "clip": "CLIP-FID",
}


def label(key: str, extractor: Extractor | None, settings: Settings, n: int | None) -> str:
    """The name under which a number is printed. "FID" is said of the 2015 Inception network's distance alone, and
    always with its n: FID-50k takes 50,000 generated images."""
    if key.startswith(("fd", "fid", "clip-fid", "rel-f")) and key != "fd-class" and extractor is not None:
        name = FRECHET.get(extractor.name, f"FD({extractor.name})")
        return ("rel-" if key.startswith("rel") else "") + (name + size_words(n) if name in FRECHET.values() else name)
    if key == "sfid":
        return "sFID" + size_words(n)
    if key == "clip-score":
        return f"CLIP score{size_words(n)} ({settings.clip_model.removeprefix('clip-')})"
    name = WORDS.get(key, key)
    if key.startswith("latent-lpips-"):
        return f"LatentLPIPS({key.removeprefix('latent-lpips-')})"
    if key in ("dreamsim", "dreamdiv"):
        return name + size_words(n)
    if extractor is None or (extractor.name == "inception" and key == "is"):
        return name + (size_words(n) if key == "is" else "")
    return f"{name}({extractor.name})"


def size_words(n: int | None) -> str:
    """The n behind a number, as the papers write it: -50k, -5k; spelt out where it is not of whole thousands."""
    if n is None:
        return " (n not stated)"
    return f"-{n // 1000}k" if n >= 1000 and n % 1000 == 0 else f" (n = {n:,})"
