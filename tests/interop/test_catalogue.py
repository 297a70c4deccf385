"""Published teachers: the right files, found where a user may have put them, and the licence said once."""

import hashlib
import json
import pickle
import re

import pytest
import torch

from d2o.condition import Condition
from d2o.errors import UserError
from d2o.interop import catalogue, download
from d2o.interop.catalogue import AUTOENCODERS, fetch, find, licence_line, names, path_if_here
from d2o.teachers.planned import planned_teacher

EDM = [f"edm-cifar10-{c}-{v}" for c in ("cond", "uncond") for v in ("vp", "ve")] + [
    f"edm-{d}-{v}" for d in ("ffhq", "afhqv2") for v in ("vp", "ve")
]
EDM2 = [f"edm2-img512-{size}" for size in ("xs", "s", "m", "l", "xl", "xxl")]
GUIDED = [f"edm2-img512-{x}" for x in ("xs-0.045", "s-0.025", "m-0.030", "l-0.015", "xl-0.020", "xxl-0.015")]
GUIDED += [f"edm2-img512-{x}" for x in ("xs-0.150", "s-0.085", "m-0.015", "l-0.035", "xl-0.030")]  # by DINOv2
GUIDES = [
    f"edm2-img512-xs-uncond{x}" for x in ("", *(f"-0.{n}" for n in ["015", "020", "025", "030", "035", "085", "150"]))
]
EDM2 += [*(f"{name}-dino" for name in EDM2), *GUIDED, *GUIDES]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("D2O_HOME", str(tmp_path / "d2o"))
    monkeypatch.setenv("D2O_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "d2o"


def put(path, data: bytes = b"weights"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def test_every_teacher_of_the_papers_has_its_entry():
    assert names() == sorted([*EDM, *EDM2, "edm-imagenet64-adm", "sd15", "sdxl", "sd3-medium"])
    assert find("edm-cifar10") is None
    for name in names():
        entry = find(name)
        assert (
            entry.name == name
            and entry.licence
            and entry.licence_url.startswith("https://")
            and entry.about
            and entry.parameters > 0
        )
        assert entry.sha256 is None or re.fullmatch("[0-9a-f]{64}", entry.sha256)


def test_the_files_of_nvidia():
    base = "https://nvlabs-fi-cdn.nvidia.com/"
    assert find("edm-cifar10-cond-vp").source == base + "edm/pretrained/edm-cifar10-32x32-cond-vp.pkl"
    assert find("edm-ffhq-ve").source == base + "edm/pretrained/edm-ffhq-64x64-uncond-ve.pkl"
    assert find("edm-imagenet64-adm").source == base + "edm/pretrained/edm-imagenet-64x64-cond-adm.pkl"
    assert find("edm2-img512-xxl").source == base + "edm2/posthoc-reconstructions/edm2-img512-xxl-0939524-0.070.pkl"
    assert find("edm2-img512-s-dino").source == base + "edm2/posthoc-reconstructions/edm2-img512-s-2147483-0.190.pkl"
    assert len({find(name).source for name in names()}) == len(names())
    for name in [*EDM, *EDM2]:
        assert find(name).kind == "nvidia" and find(name).licence.startswith("CC BY-NC-SA 4.0")


def test_sampling_as_published():
    """EDM: 35 evaluations on CIFAR-10, 79 at 64x64 (Heun: 2 steps - 1); EDM2: 63; Diffusion2GAN's teachers: DDIM in 50
    steps, cfg 3 and 7."""
    heun = {name: 2 * find(name).steps - 1 for name in names() if find(name).solver == "heun"}
    assert {heun[n] for n in EDM if "cifar10" in n} == {35}
    assert {heun[n] for n in EDM if "cifar10" not in n} == {79} == {heun["edm-imagenet64-adm"]}
    assert {heun[n] for n in EDM2} == {63}
    for name, cfg, resolution in (("sd15", 3.0, 512), ("sdxl", 7.0, 1024)):
        entry = find(name)
        assert (entry.solver, entry.steps, entry.cfg, entry.resolution) == ("ddim", 50, cfg, resolution)


@pytest.mark.parametrize("name", [*EDM, "edm-imagenet64-adm", *EDM2])
def test_a_plan_knows_the_networks_of_nvidia_without_their_files(name):
    published = find(name)
    teacher = planned_teacher(published)
    assert sum(p.numel() for p in teacher.network.parameters()) == published.parameters
    assert all(p.device.type == "meta" and not p.requires_grad for p in teacher.network.parameters())
    spec = teacher.spec
    assert (spec.space, spec.classes, spec.steps) == (
        "edm2" if name in EDM2 else "pixels",
        {"cond": 10, "uncond": 0}.get(name.split("-")[2], 0 if "hq" in name or name in GUIDES else 1000),
        published.steps,
    )
    assert spec.shape[1] == published.resolution // (8 if name in EDM2 else 1)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "shape", "encoders"),
    [
        ("sd15", (4, 64, 64), [123_060_480]),
        ("sdxl", (4, 128, 128), [123_060_480, 694_659_840]),
        ("sd3-medium", (16, 128, 128), [123_650_304, 694_659_840, 4_762_310_656]),
    ],
)
def test_a_plan_knows_text_teachers_without_their_files(name, shape, encoders):
    published = find(name)
    teacher = planned_teacher(published)
    assert sum(p.numel() for p in teacher.network.parameters()) == published.parameters
    assert [sum(p.numel() for p in e.parameters()) for e in teacher.text.encoders] == encoders
    assert all(p.device.type == "meta" for e in (teacher.network, *teacher.text.encoders) for p in e.parameters())
    spec = teacher.spec
    assert (spec.shape, spec.space, spec.text, spec.steps) == (shape, published.space, name, published.steps)
    x = teacher.denoise(torch.empty(2, *shape, device="meta"), 0.5, Condition.of_prompts(["a", "b"]))
    assert x.shape == (2, *shape)


def test_a_file_put_there_by_hand_is_taken(home):
    entry = find("edm-cifar10-cond-vp")
    path = home / "teachers" / "edm-cifar10-32x32-cond-vp.pkl"
    assert entry.place == path and path_if_here(entry) is None
    put(path)
    assert path_if_here(entry) == path == fetch(entry)


def test_offline_says_which_file_to_put_where(home):
    with pytest.raises(UserError) as error:
        fetch(find("edm2-img512-s"))
    path = home / "teachers" / "edm2-img512-s-2147483-0.130.pkl"
    assert (
        error.value.hint == f"download it by other means and put it at {path}"
        and "D2O_OFFLINE=1" in error.value.message
    )
    with pytest.raises(UserError) as error:
        fetch(find("sd15"))
    assert (
        "hf download stable-diffusion-v1-5/stable-diffusion-v1-5" in error.value.hint
        and str(home / "teachers" / "sd15") in error.value.hint
    )


def test_downloaded_then_checked_at_every_load(home, tmp_path, monkeypatch):
    content = pickle.dumps({"ema": None})
    source = put(tmp_path / "server" / "net.pkl", content)
    entry = catalogue.Published(
        "mine", "nvidia", f"file://{source}", "MIT", "https://example.org", "a test", parameters=1
    )
    path = fetch(entry)
    assert path == home / "teachers" / "net.pkl"
    assert download.download_record(path)["sha256"] == hashlib.sha256(content).hexdigest()
    path.write_bytes(content[:-1] + b"x")
    with pytest.raises(UserError, match="damaged or another file"):
        fetch(entry)


def test_the_licence_is_shown_once_per_machine(home):
    entry = find("edm-ffhq-vp")
    said = []
    with pytest.raises(UserError):  # not here yet: shown, but not done with
        fetch(entry, say=said.append)
    put(entry.place)
    for _ in range(3):
        fetch(entry, say=said.append)
    assert said == [licence_line(entry)] * 2
    assert (
        "CC BY-NC-SA 4.0" in said[0]
        and entry.licence_url in said[0]
        and "non-commercial" in said[0]
        and "recorded in everything" in said[0]
    )
    assert "\n" not in said[0]
    assert entry.licence in (home / "licences" / entry.name).read_text()
    put(find("edm-ffhq-ve").place)
    fetch(find("edm-ffhq-ve"), say=said.append)  # another teacher has its own
    assert len(said) == 3


def test_nobody_to_tell_is_not_told(home):
    entry = find("edm-ffhq-vp")
    put(entry.place)
    fetch(entry)  # nothing to say it through: the licence is still to be shown
    said = []
    fetch(entry, say=said.append)
    assert said == [licence_line(entry)]


def test_a_home_that_cannot_keep_the_stamp_is_no_reason_to_fail(home):
    entry = find("edm-ffhq-vp")
    put(entry.place)
    (home / "licences").write_text("in the way")
    assert fetch(entry, say=lambda line: None) == entry.place


def test_a_pipeline_put_there_by_hand(home):
    entry = find("sd15")
    folder = home / "teachers" / "sd15"
    put(
        folder / "model_index.json",
        json.dumps({"_class_name": "X", "unet": ["diffusers", "UNet2DConditionModel"]}).encode(),
    )
    put(folder / "unet" / "config.json", b"{}")
    assert path_if_here(entry) is None
    with pytest.raises(UserError, match=r"sd15 lacks unet/\*.safetensors"):
        fetch(entry)
    put(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert path_if_here(entry) == folder == fetch(entry)


def test_the_autoencoder_of_edm2(home):
    entry = AUTOENCODERS["sd-vae-ft-mse"]
    assert entry.source == "stabilityai/sd-vae-ft-mse" and entry.licence == "MIT" and entry.name not in names()
    put(entry.place / "config.json", b"{}")
    weights = put(entry.place / "diffusion_pytorch_model.safetensors", b"not these")
    with pytest.raises(UserError, match="damaged or another file"):  # its checksum is known
        fetch(entry)
    assert weights.is_file()  # what a user put there is theirs to remove
