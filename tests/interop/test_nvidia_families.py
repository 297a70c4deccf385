"""Which networks the reader configures: EDM under all its preconditionings, EDM2, and the snapshots of SiD, SiDA and
GDD."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from d2o.errors import UserError
from d2o.interop.nvidia_pickle import read_nvidia_pickle
from d2o.networks.build import build_network
from d2o.teachers.registry import load_teacher
from tests.interop.nvidia_writer import EasyDict, Persistent, Run, damage, dumps, official, outcome

pytestmark = pytest.mark.usefixtures("nvidia_modules")
GOLDEN = Path(__file__).parents[1] / "golden" / "edm"
COMMON = {"img_resolution": 8, "img_channels": 1, "label_dim": 3, "use_fp16": True}
UNET = {"model_channels": 32, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4], "dropout": 0.1}
OURS = {"arch": "ddpmpp", "img_resolution": 8, "img_channels": 1, "label_dim": 3, **UNET}
VE = {"embedding_type": "fourier", "encoder_type": "residual", "channel_mult_noise": 2, "resample_filter": [1, 3, 3, 1]}
EDM2 = {"arch": "edm2", "img_resolution": 8, "img_channels": 4, "label_dim": 3, **UNET, "logvar_channels": 8}


def snapshot(path, ours, class_name, kwargs, **root):
    """Our network of configuration `ours`, with random weights everywhere, in a file that calls it `class_name` made
    with `kwargs`."""
    torch.manual_seed(0)
    network = build_network(ours).eval()
    with torch.no_grad():
        for p in network.parameters():
            p.normal_(0, 0.3)
    path.write_bytes(dumps({"ema": official(network, kwargs, class_name), **root}))
    return network


def agree(found, network):
    """The network that `found` describes, with its weights, computes what `network` does."""
    again = build_network(found.config())
    assert list(found.state_dict) == list(network.state_dict())
    again.load_state_dict(found.state_dict)
    x, sigma = torch.randn(2, network.img_channels, 8, 8), torch.tensor([0.3, 20.0])
    with torch.inference_mode():
        return torch.equal(again.eval()(x, sigma, torch.tensor([0, 2])), network(x, sigma, torch.tensor([0, 2])))


@pytest.mark.parametrize(
    ("class_name", "kwargs", "ours"),
    [
        ("EDMPrecond", {}, {"arch": "adm"}),
        ("EDMPrecond", {"model_type": "SongUNet", "sigma_min": 0, "sigma_max": float("inf")}, {}),
        (
            "EDMPrecond",
            {"model_type": "SongUNet", "sigma_min": 0.01, "sigma_max": 50},
            {"sigma_min": 0.01, "sigma_max": 50},
        ),
        ("VPPrecond", {"beta_d": 19.9, "epsilon_t": 1e-5, "M": 1000}, {"precond": "vp"}),
        ("VEPrecond", {**VE, "sigma_min": 0.02}, {"arch": "ncsnpp", "precond": "ve", "noise_mult": 2}),
        ("iDDPMPrecond", {}, {"arch": "adm", "precond": "iddpm"}),
        ("iDDPMPrecond", {"model_type": "SongUNet", "C_1": 0.001}, {"precond": "iddpm"}),
        ("EDMPrecond_EncoderDecoder", {"model_type": "SongUNet_EncoderDecoder", "augment_dim": 9}, {"augment_dim": 9}),
        ("EDMPrecond_EncoderDecoder", {"model_type": "DhariwalUNet_EncoderDecoder"}, {"arch": "adm"}),
        ("GDDPrecond", {"model_type": "SongUNet", **VE}, {"arch": "ncsnpp", "precond": "consistency"}),
        ("D2OPrecond", {"model_type": "SongUNet", **VE}, {"arch": "ncsnpp", "precond": "consistency"}),
        ("D2OPrecond", {}, {"arch": "adm", "precond": "consistency"}),
    ],
)
def test_edm_in_all_its_forms(tmp_path, class_name, kwargs, ours):
    path = tmp_path / "x.pkl"
    network = snapshot(path, {**OURS, **ours}, class_name, {**COMMON, **UNET, **kwargs})
    found = read_nvidia_pickle(path)
    config = found.config()
    assert found.class_name == class_name and agree(found, network)
    assert config["arch"] == ours.get("arch", "ddpmpp") and config.get("precond", "edm") == ours.get("precond", "edm")
    again = build_network(config)
    assert (again.sigma_min, again.sigma_max) == (network.sigma_min, network.sigma_max)
    assert found.space == "pixel" and found.steps == 18


@pytest.mark.parametrize(
    ("class_name", "kwargs", "head"),
    [
        ("Precond", {}, True),
        (
            "Precond",
            {
                "channel_mult_emb": None,
                "channel_mult_noise": None,
                "clip_act": 256,
                "resample_filter": [1, 1],
                "res_balance": 0.3,
            },
            True,
        ),
        ("EDM_2_Precond_EncoderDecoder", {"force_normalization": True, "use_gan": False}, True),
        ("EDM_2_Precond_Generator", {"force_normalization": True, "use_gan": True}, False),
    ],
)
def test_edm2_with_and_without_the_head(tmp_path, class_name, kwargs, head):
    path = tmp_path / "x.pkl"
    network = snapshot(
        path,
        EDM2 if head else {**EDM2, "logvar_channels": 0},
        class_name,
        {**COMMON, "img_channels": 4, "logvar_channels": 8, **UNET, **kwargs},
    )
    found = read_nvidia_pickle(path)
    assert agree(found, network) and (build_network(found.config()).logvar_linear is not None) == head
    assert found.steps == 32 and found.space == "latent"
    teacher, planned = load_teacher(path), load_teacher(path, "meta")
    assert planned.spec == teacher.spec and planned.meta == teacher.meta
    sizes = {name: value.shape for name, value in teacher.network.state_dict().items()}
    assert {name: value.shape for name, value in planned.network.state_dict().items()} == sizes
    assert all(value.is_meta for value in planned.network.parameters())


def test_the_golden_edm2_file():
    found = read_nvidia_pickle(GOLDEN / "edm2-tiny.pkl")
    assert (found.class_name, found.encoder, found.space) == ("Precond", "StandardRGBEncoder", "pixel")
    assert len(found.state_dict) == 63 and found.root_keys == ("ema", "encoder", "dataset_kwargs")
    assert found.config() == {
        "arch": "edm2",
        "img_resolution": 16,
        "img_channels": 4,
        "label_dim": 10,
        "model_channels": 32,
        "sigma_data": 0.5,
        "logvar_channels": 16,
        "channel_mult": [1, 2],
        "num_blocks": 1,
        "attn_resolutions": [8],
    }


def edm2_file(**root):
    """An EDM2 file as it is published: half precision throughout, EasyDict, the autoencoder with its numpy statistics,
    bound hooks."""
    kwargs = {
        **COMMON,
        "img_channels": 4,
        "model_channels": 2,
        "channel_mult": [1],
        "num_blocks": 1,
        "channels_per_head": 2,
        "logvar_channels": 4,
    }
    torch.manual_seed(0)
    network = build_network({"arch": "edm2", **{k: v for k, v in kwargs.items() if k != "use_fp16"}}).half()
    ema = official(network, kwargs, "Precond")
    ema.meta["state"]["_forward_pre_hooks"] = {0: Run(getattr, 1, "real")}
    encoder = Persistent(
        "StabilityVAEEncoder", {"scale": np.float32([0.5, 1.0]), "_init_args": (), "_init_kwargs": {"batch_size": 8}}
    )
    return network, dumps(
        EasyDict(
            encoder=encoder, dataset_kwargs=EasyDict(path="x.zip"), loss_fn=Persistent("EDM2Loss", {}), ema=ema, **root
        )
    )


def test_half_precision_is_kept_or_converted_while_reading(tmp_path):
    network, content = edm2_file()
    (tmp_path / "edm2.pkl").write_bytes(content)
    found = read_nvidia_pickle(tmp_path / "edm2.pkl")
    assert {t.dtype for t in found.state_dict.values()} == {torch.float16} and found.space == "latent"
    full = read_nvidia_pickle(tmp_path / "edm2.pkl", dtype=torch.float32)
    assert {t.dtype for t in full.state_dict.values()} == {torch.float32}
    for name, tensor in network.state_dict().items():
        assert torch.equal(found.state_dict[name], tensor) and torch.equal(full.state_dict[name], tensor.float())


@pytest.mark.parametrize("name", ["GDD", "D2O"])
def test_snapshots_with_several_networks(tmp_path, name):
    """GDD writes `net` beside `ema`, and its loss; its repository calls its classes D2O... now."""
    path, kwargs = tmp_path / "x.pkl", {**COMMON, **UNET, "model_type": "SongUNet"}
    torch.manual_seed(1)
    net = build_network({**OURS, "precond": "consistency"})
    ema = snapshot(
        path,
        {**OURS, "precond": "consistency"},
        f"{name}Precond",
        kwargs,
        net=official(net, kwargs, f"{name}Precond"),
        augment_pipe=None,
        loss_fn=Persistent(f"{name}Loss", {}),
    )
    assert agree(read_nvidia_pickle(path), ema) and agree(read_nvidia_pickle(path, "net"), net.eval())
    with pytest.raises(UserError, match="no network under 'G'; its objects are 'ema', 'net'"):
        read_nvidia_pickle(path, "G")


@pytest.mark.parametrize(
    ("class_name", "kwargs", "message"),
    [
        ("VPPrecond", {"beta_d": 20}, "beta_d = 20, which d2o does not support"),
        ("VPPrecond", {"sigma_data": 0.5}, "option 'sigma_data'"),
        ("iDDPMPrecond", {"M": 4000}, "M = 4000"),
        ("EDMPrecond", {"model_type": "UNet"}, "around 'UNet'"),
        ("Precond", {"resample_filter": [1, 3, 3, 1]}, r"resample_filter = \[1, 3, 3, 1\]"),
        ("Precond", {"augment_dim": 9}, "UNet of EDM2 with option 'augment_dim'"),
        ("Precond", {"dropout": None}, "dropout = None"),
        ("UNet", {}, "class 'UNet', which d2o cannot run"),
        ("AugmentPipe", {}, "class 'AugmentPipe'"),
    ],
)
def test_what_d2o_cannot_run_is_refused_by_name(tmp_path, class_name, kwargs, message):
    path = tmp_path / "x.pkl"
    path.write_bytes(dumps({"ema": official(nn.Linear(1, 1), {**COMMON, **UNET, **kwargs}, class_name)}))
    found = read_nvidia_pickle(path)
    with pytest.raises(UserError, match=message) as caught:
        found.config()
    assert str(path) in caught.value.message and "EDM2" in caught.value.hint


def test_training_states_are_no_snapshots(tmp_path):
    path = tmp_path / "training-state-000100.pt"
    torch.save({"net": torch.ones(2)}, path)
    with pytest.raises(UserError, match=r"training-state-000100.pt is an archive as torch.save writes"):
        read_nvidia_pickle(path)


@pytest.mark.timeout(120)
def test_truncated_edm2_files(tmp_path):
    content = edm2_file()[1]
    assert outcome(tmp_path / "x.pkl", content) == "read"
    for length in range(0, len(content), len(content) // 80):
        assert outcome(tmp_path / "x.pkl", content[:length]) == "refused"
    golden = (GOLDEN / "edm2-tiny.pkl").read_bytes()
    for length in range(1, len(golden), len(golden) // 12):
        assert outcome(tmp_path / "x.pkl", golden[:length]) == "refused"


@pytest.mark.long
@pytest.mark.timeout(120)
@pytest.mark.parametrize("seed", range(2))
def test_damaged_edm2_files_are_read_or_refused(tmp_path, seed):
    content, rng = edm2_file()[1], random.Random(seed)
    assert {outcome(tmp_path / "x.pkl", damage(content, rng)) for _ in range(120)} == {"read", "refused"}
