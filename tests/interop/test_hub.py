"""Repositories of the hub, with a cache folder made here and no network."""

import hashlib
import json
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects

from d2o.errors import UserError
from d2o.interop import hub
from d2o.interop.hub import NEVER, TEXTS, cached_snapshot, hub_snapshot, missing_files, weight_patterns
from d2o.interop.transfer import check_reachable

COMMIT = "0123456789abcdef0123456789abcdef01234567"
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": [None, None],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "requires_safety_checker": True,
}
FILES = {
    "model_index.json": json.dumps(INDEX),
    "scheduler/scheduler_config.json": "{}",
    "text_encoder/config.json": "{}",
    "text_encoder/model.safetensors": "text",
    "tokenizer/vocab.json": "{}",
    "unet/config.json": "{}",
    "unet/diffusion_pytorch_model.safetensors": "unet",
}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("D2O_OFFLINE", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "hub"


def fill(cache: Path, repo: str = "owner/model", leave_out: str = "") -> Path:
    """As the hub's client lays it out: files by their hash, a snapshot of links to them."""
    root = cache / ("models--" + repo.replace("/", "--"))
    for name, text in FILES.items():
        if name == leave_out:
            continue
        blob = root / "blobs" / hashlib.sha256(text.encode()).hexdigest()
        link = root / "snapshots" / COMMIT / name
        for path in (blob, link):
            path.parent.mkdir(parents=True, exist_ok=True)
        blob.write_text(text)
        link.symlink_to(blob)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(COMMIT)
    return root / "snapshots" / COMMIT


def test_a_filled_cache_needs_no_network(cache):
    folder = fill(cache)
    assert hub_snapshot("owner/model") == folder
    assert hub_snapshot("owner/model", revision=COMMIT) == folder
    assert cached_snapshot("owner/other") is None and cached_snapshot("owner/model", "v2") is None


def test_offline_and_absent(cache, tmp_path):
    with pytest.raises(UserError) as error:
        hub_snapshot("owner/model", place=tmp_path / "model")
    assert "network is switched off (HF_HUB_OFFLINE=1), and it is not in the cache" in error.value.message
    assert "hf download owner/model" in error.value.hint and f"into {tmp_path}/model" in error.value.hint
    fill(cache, leave_out="unet/diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match=r"only a part .* lacks unet/\*.safetensors"):
        hub_snapshot("owner/model")


def test_what_is_missing(cache):
    folder = fill(cache)
    assert missing_files(folder) == []
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "tokenizer" / "vocab.json").unlink()
    (folder / "unet" / "diffusion_pytorch_model.bin").write_text("a pickle is no weights")
    assert missing_files(folder) == ["tokenizer/", "unet/*.safetensors"]
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "unet" / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "unet" / "model-00001-of-00002.safetensors").write_text("")
    assert missing_files(folder) == ["tokenizer/", "unet/model-00002-of-00002.safetensors"]
    assert missing_files(folder / "text_encoder") == []  # a folder of one model
    assert missing_files(folder / "text_encoder", "fp16") == ["*.fp16.safetensors"]
    assert missing_files(cache) == ["model_index.json"]


def test_only_safetensors_in_the_layout_of_diffusers_are_asked_for():
    repository = [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "tokenizer/merges.txt",
        "tokenizer/vocab.json",
        "tokenizer_3/spiece.model",
        "tokenizer_3/tokenizer.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "text_encoder_3/model-00001-of-00002.safetensors",
        "text_encoder_3/model.safetensors.index.json",
    ]
    unwanted = [
        "v1-5-pruned.safetensors",
        "v1-5-pruned.ckpt",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "safety_checker/model.safetensors",
        "unet/model.onnx",
        "unet/flax_model.msgpack",
        "vae_1_0/diffusion_pytorch_model.safetensors",
        "text_encoder/pytorch_model.bin",
        "pipeline.py",
        "text_encoder/model.fp16.safetensors",
        "text_encoder_3/model.fp16-00001-of-00002.safetensors",
    ]
    asked = filter_repo_objects(
        repository + unwanted, allow_patterns=[*TEXTS, *weight_patterns()], ignore_patterns=[*NEVER]
    )
    assert list(asked) == repository
    half = list(filter_repo_objects(unwanted, allow_patterns=weight_patterns("fp16"), ignore_patterns=[*NEVER]))
    assert half == [name for name in unwanted if ".fp16" in name]


def online(monkeypatch, answer):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    calls = []

    def snapshot_download(repo, **options):
        calls.append((repo, options))
        return answer()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(hub, "check_reachable", lambda url: None)
    return calls


def test_fetched_from_the_hub(cache, monkeypatch):
    calls = online(monkeypatch, lambda: str(fill(cache)))
    assert hub_snapshot("owner/model", revision="main").name == COMMIT
    ((repo, options),) = calls
    assert repo == "owner/model" and options["revision"] == "main"
    assert "*.bin" in options["ignore_patterns"] and not any(
        p.endswith((".bin", ".ckpt", ".pkl")) for p in options["allow_patterns"]
    )
    hub_snapshot("owner/model")
    assert len(calls) == 1  # from the cache


def test_one_component_alone(cache, monkeypatch):
    """Of a repository whose other parts are large."""
    with pytest.raises(UserError) as error:
        hub_snapshot("owner/model", part="unet")
    assert 'hf download owner/model --revision main --include "unet/*"' in error.value.hint
    calls = online(monkeypatch, lambda: str(fill(cache, leave_out="text_encoder/model.safetensors")))
    folder = hub_snapshot("owner/model", part="unet")
    assert folder.name == "unet" and missing_files(folder) == []
    asked = list(filter_repo_objects(FILES, allow_patterns=calls[0][1]["allow_patterns"]))
    assert asked == ["unet/config.json", "unet/diffusion_pytorch_model.safetensors"]
    assert hub_snapshot("owner/model", part="unet") == cached_snapshot("owner/model", part="unet") == folder
    assert len(calls) == 1 and cached_snapshot("owner/model", part="vae") is None


def test_damaged_on_the_way(cache, monkeypatch):
    def answer():
        folder = fill(cache)
        (folder / "unet" / "diffusion_pytorch_model.safetensors").resolve().write_text("unex")
        return str(folder)

    online(monkeypatch, answer)
    with pytest.raises(UserError, match="diffusion_pytorch_model.safetensors came damaged: sha256"):
        hub_snapshot("owner/model")
    folder = cached_snapshot("owner/model")
    assert missing_files(folder) == ["unet/*.safetensors"]  # so that the next run fetches it anew


def test_a_repository_of_pickles_is_refused(cache, monkeypatch):
    online(monkeypatch, lambda: str(fill(cache, leave_out="unet/diffusion_pytorch_model.safetensors")))
    with pytest.raises(UserError) as error:
        hub_snapshot("owner/model")
    assert "has no unet/*.safetensors" in error.value.message and "no pickled weights" in error.value.hint


def refusal(kind: str) -> Exception:
    """The hub client's own exceptions want an HTTP response of whichever library it uses; their handlers only look at
    the class."""
    cls = getattr(huggingface_hub.errors, kind)
    return cls.__new__(cls)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (lambda: refusal("GatedRepoError"), "accept its licence at https://huggingface.co/owner/model"),
        (lambda: refusal("RepositoryNotFoundError"), "no repository 'owner/model', or it is private"),
        (lambda: refusal("RevisionNotFoundError"), "no revision 'main'"),
        (
            lambda: ConnectionError("Name or service not known\nmore"),
            "cannot fetch owner/model from the hub: Name or service not known\nrun again",
        ),
    ],
)
def test_refusals_of_the_hub(cache, monkeypatch, error, words):
    def answer():
        raise error()

    online(monkeypatch, answer)
    with pytest.raises(UserError) as raised:
        hub_snapshot("owner/model")
    assert words in str(raised.value)


def test_without_a_network_there_is_one_try(cache, monkeypatch, tmp_path):
    calls = online(monkeypatch, lambda: "")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    tries: list[str] = []
    monkeypatch.setattr(hub, "check_reachable", lambda url: tries.append(url) or check_reachable(url))
    with pytest.raises(UserError, match="127.0.0.1:9 cannot be reached .*refused") as error:
        hub_snapshot("owner/model", place=tmp_path / "model")
    assert tries == ["http://127.0.0.1:9"] and not calls and "hf download owner/model" in error.value.hint


def test_no_name_of_a_repository(cache, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with pytest.raises(UserError, match="is no name of a hub repository"):
        hub_snapshot("a/b/c")
