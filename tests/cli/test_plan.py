"""`--plan` validates: exit code 0 only if the command would start, else 1 with all that is missing or does not fit."""

from __future__ import annotations

import shutil

import pytest

from d2o.cli.app import main

RECIPE = """
name: mine
method: edm
network: {arch: ddpmpp, model_channels: 16, channel_mult: [1], num_blocks: 1, attn_resolutions: [], dropout: 0.0}
data: {path: real:digits, resolution: 12, limit: 16}
optim: {lr: 1.0e-3}
batch: 8
images: 32
eval: {every: 8, extractor: digits, n: 8, reference: real:digits}
"""


@pytest.fixture
def plan(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("D2O_HOME", str(tmp_path / "home"))

    def plan(*words):
        with pytest.raises(SystemExit) as done:
            main([*map(str, words), "--plan"])
        out = capsys.readouterr().out
        assert not (tmp_path / "runs").exists() and ("would start" in out) == (done.value.code == 0)
        return done.value.code, out

    return plan


def test_a_beginning_that_is_missing_leaves_the_rest_planned(plan):
    code, out = plan("finetune", "d2g_sd_cfg3:gan", "--mini", "--from", "runs/d2g_sd_cfg3_ode")
    said = " ".join(out.replace("│", " ").split())
    assert (
        code == 1 and "missing: no such file: runs/d2g_sd_cfg3_ode" in said and "would not start: one problem" in said
    )
    assert "critic 2,174,922" in said and "it fits" in said
    assert "training and the stage before, as papers count (NFE) 224" in said


def test_the_quickstart_would_start(plan):
    code, out = plan("train", "quickstart")
    assert (
        code == 0
        and "before it begins: the pair store runs/pairs/digits-heun18-n4096-seed0 is made (4,096 pairs)" in out
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("eval.extractor=nothing", "missing: "),
        ("eval.reference=nowhere.npz", "missing: no such file or teacher: 'nowhere.npz'"),
        ("data.path=nowhere", "missing: no such file or folder: nowhere"),
        ("data.resolution=12", "12x12 pixels"),
        (
            "eval={metric: accuracy, extractor: null, reference: null}",
            "does not fit: eval.metric: method edm gives no metric of its own",
        ),
        ("eval=null", ""),
        ("teacher=digits", "does not fit: method edm learns without a teacher"),
    ],
)
def test_what_is_missing_or_does_not_fit(plan, tmp_path, change, words):
    (tmp_path / "mine.yaml").write_text(
        RECIPE.replace("resolution: 12, ", "") if "resolution" not in change else RECIPE
    )
    code, out = plan("train", "mine.yaml", "--set", change)
    assert code == (1 if words else 0) and words in out


@pytest.mark.long
def test_all_in_one_answer(plan, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    changes = ("--set", "teacher=sdxl", "--set", "eval.reference=gone")
    code, out = plan("train", "quickstart", "--data", "x", "--device", "tpu", "--out", "full", *changes)
    assert code == 1 and "would not start: 7 problems" in out
    for words in (
        "--data and --on-bad: method ode",
        "--device tpu: no device",
        "full holds other files and no run",
        "and the network is switched off",
        "student.sigma: 14.61",
        "no such file or teacher: 'gone'",
    ):
        assert words in out


def test_pairs_that_do_not_fit_their_teacher(plan):
    for change, words in (
        ("pairs.labels='11'", "class 11 is out of range"),
        ("pairs.solver=eular", "did you mean 'euler'"),
        ("pairs.spacing=trailing", "leave pairs.spacing away"),
    ):
        code, out = plan("train", "quickstart", "--set", change)
        assert code == 1 and words in out


def test_the_memory_of_several_processes(plan):
    code, out = plan("train", "sid_digits", "--processes", "4")
    assert (
        code == 0 and "of 4, strategy replicate" in out and "of 4, strategy shard" in out and "(micro-batch 32)" in out
    )
    assert "gathered blocks" in out and "gradients on their way" in out
    assert "128 does not divide among 3 processes" in " ".join(
        plan("train", "sid_digits", "--processes", "3")[1].split()
    )
    with pytest.raises(SystemExit) as done:
        main(["train", "sid_digits", "--processes", "4"])
    assert done.value.code == 2


@pytest.mark.long
def test_of_published_text_teachers_that_are_not_here(plan, tmp_path):
    sdxl = ("--set", "teacher=sdxl", "--set", "student.sigma=14.6", "--set", "eval=null", "--set", "batch=8")
    out = " ".join(plan("train", "quickstart", *sdxl, "--processes", "8")[1].split())
    for words in (
        "student │ 2,567,463,684",
        "text encoders (frozen) │ 817,720,320",
        "of 8, strategy shard",
        "it is fetched from stabilityai/stable-diffusion-xl-base-1.0",
    ):
        assert words in out
    assert "prompts: FILE names" in plan("train", "sid_digits", "--set", "teacher=sd15")[1]


def test_of_a_sweep(plan):
    assert plan("train", "quickstart", "--sweep", "loss=l1,mse")[0] == 0
    code, out = plan("train", "quickstart", "--sweep", "loss=l1,perceptual")
    assert code == 1 and "loss=perceptual: ode.extractor: the perceptual loss needs" in out


def test_a_network_that_is_switched_off_fetches_nothing(plan, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    code, out = plan("train", "quickstart", "--set", "eval.reference=edm-cifar10")
    assert (
        code == 0 and "before it begins: reference edm-cifar10 is not on this machine; it is fetched from https" in out
    )
    monkeypatch.setenv("D2O_OFFLINE", "1")
    code, out = plan("train", "quickstart", "--set", "eval.reference=edm-cifar10")
    assert (
        code == 1 and "missing: reference edm-cifar10" in out and "the network is switched off (D2O_OFFLINE=1)" in out
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["mine.yaml"], "12x12 pixels"),
        (
            ["mine.yaml", "--set", "eval={metric: accuracy, extractor: null, reference: null}"],
            "gives no metric of its own",
        ),
        (["quickstart", "--set", "micro_batch=3"], "3 does not divide"),
        (["quickstart", "--set", "ode.loss=perceptual"], "needs a feature extractor"),
        (["quickstart", "--set", "pairs.labels='77'"], "class 77 is out of range"),
        (["spi_gan_digits", "--set", "teacher=sdxl"], "method spi-gan learns without a teacher"),
        (["cd_digits", "--set", "teacher=edm2-img512-xs"], "is an EDM2 network"),
        (["quickstart", "--out", "a/b", "--device", "mps:7"], "usable here"),
    ],
)
def test_what_is_refused_is_refused_before_pairs_are_made_and_leaves_nothing(
    words, said, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("D2O_HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text(RECIPE)
    with pytest.raises(SystemExit) as done:
        main(["train", *words])
    assert done.value.code == 2 and said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


@pytest.mark.long
def test_a_text_student_is_planned_without_its_weights(plan, tmp_path):
    (tmp_path / "p.txt").write_text("a handwritten two\n")
    common = "teacher: tiny-sd\noptim: {lr: 1.0e-3}\nbatch: 2\nimages: 8\nname: text\n"
    ode = "method: ode\node: {loss: mse}\nstudent: {sigma: 14.6}\npairs: {n: 8, prompts: p.txt, cfg: 3, steps: 2}\n"
    (tmp_path / "ode.yaml").write_text(common + ode)
    code, out = plan("train", "ode.yaml", "--processes", "2")
    assert code == 0 and "(8 pairs)" in out and "strategy shard" in out and "activations (micro-batch 1)" in out
    code, out = plan("train", "ode.yaml", "--set", "pairs.prompts=null")
    assert code == 1 and "is conditioned on text" in out
    sid = "method: sid\nprompts: p.txt\nstudent: {sigma: 2.5}\nsid: {cfg: 3, score_cfg: 1.5}\n"
    (tmp_path / "sid.yaml").write_text(common + sid)
    code, out = plan("train", "sid.yaml")
    assert code == 0 and "activations (micro-batch 2)" in out


def test_a_hint_of_memory_names_nothing_that_the_recipe_refuses(plan, monkeypatch):
    monkeypatch.setattr("d2o.networks.budget.physical_memory", lambda: 2**30)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, out = plan("train", "d2g_sdxl_cfg7:ode")
    assert code == 1 and "more processes, student.lora" in out.replace("\n", " ") and "optim.state" not in out
    code, out = plan("train", "d2g_sdxl_cfg7:ode", "--set", "strategy=replicate")
    hint = out.replace("\n", " ")
    assert code == 1 and "strategy: shard on several processes, optim.state: 8bit, student.lora" in hint


def test_guidance_that_a_teacher_cannot_have_is_refused_by_its_key(plan):
    code, out = plan("train", "sid_digits", "--set", "teacher=edm-cifar10-uncond-vp", "--set", "sid.score_cfg=2")
    assert code == 1 and "does not fit: sid.score_cfg: guidance (cfg 2) needs a condition" in out
    assert "leave sid.score_cfg away" in out


def test_a_teacher_in_a_folder_is_planned_without_its_weights(plan, tmp_path, monkeypatch):
    import diffusers
    import transformers

    from d2o.interop import torchvision_compat
    from d2o.interop.assets import asset

    torchvision_compat.ensure()
    shutil.copytree(asset("tiny-sd"), tmp_path / "sd")
    (tmp_path / "p.txt").write_text("a handwritten two\n")
    (tmp_path / "ode.yaml").write_text(
        "teacher: sd\noptim: {lr: 1.0e-3}\nbatch: 2\nimages: 8\nname: text\nmethod: ode\n"
        "student: {sigma: 14.6}\npairs: {n: 8, prompts: p.txt, cfg: 3, steps: 2}\n"
    )
    for library in (diffusers.ModelMixin, transformers.PreTrainedModel):
        monkeypatch.setattr(library, "from_pretrained", None)
    code, out = plan("train", "ode.yaml")
    assert code == 0 and "text encoders (frozen)" in out and "(8 pairs)" in out
    (tmp_path / "sd" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    code, out = plan("train", "ode.yaml")
    assert code == 1 and "unet has no weights" in out
    code, out = plan("train", "ode.yaml", "--set", "teacher=nobody/nothing")
    assert "it fits" not in out  # nobody knows
    assert code == 1 and "missing: teacher nobody/nothing" in out and "hf download nobody/nothing" in out


@pytest.mark.long
def test_what_diffusion2gan_costs_in_stable_diffusion_s_size(plan, monkeypatch):
    """Pixel LPIPS brings a network to fetch, and the decoder that it looks through; adapters are few, their base is the
    teacher itself."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")

    given = ("--set", "micro_batch=1", "--set", "student.lora=4", "--set", "optim.state=8bit")
    said = " ".join(plan("train", "d2g_sd_cfg3:lpips", *given)[1].replace("│", " ").split())
    for words in (
        "student 797,184",
        "student (frozen part) 859,520,964",
        "optimiser (adamw 8bit) ",
        "the weights 'lpips-vgg' are not on this machine; training fetches them from https://download.pytorch.org",
        "autoencoder (frozen) 83,653,863",
        "making pairs, as papers count (NFE) 150,000,000",
        "98.3 GB",
        "on cpu, which has",
    ):
        assert words in said
    assert "frozen weights in them" not in said
    assert "checkpoints 16.6 MB" in said, said[said.index("checkpoints") :][:40]


def test_eight_bit_moments_do_not_go_with_shares(plan):
    given = ("--set", "optim.state=8bit", "--set", "strategy=shard", "--set", "eval=null")
    said = plan("train", "quickstart", *given, "--processes", 2)[1]
    assert "8bit rounds in blocks of a whole tensor" in " ".join(said.split())
