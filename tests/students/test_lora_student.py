"""A LoRA student in miniature: adapters of `tiny-sd`, trained on its pairs, resumed, sampled, exported."""

from __future__ import annotations

import shutil

import pytest
import torch

from d2o.cli.app import main
from d2o.condition import Condition
from d2o.data.images import open_images
from d2o.diffusion.noise import noise_and_labels
from d2o.errors import UserError
from d2o.interop.assets import asset
from d2o.interop.safetensors_io import load_file, save_file
from d2o.networks.lora import is_adapter, merged
from d2o.recipes.load import load_recipe
from d2o.students.base import load_student
from d2o.teachers.in_edm import in_edm
from d2o.teachers.registry import load_teacher

PROMPTS = ["a photo of a seven", "three"]
RECIPE = """
name: lora
method: diffusion2gan
teacher: tiny-sd
student: {{sigma: 14.6146, begins: x_T, lora: 4}}
pairs: {{n: 8, steps: 2, cfg: 3.0, shard_size: 8, prompts: {folder}/prompts.txt, path: {folder}/pairs}}
diffusion2gan: {{distance: {{kind: mse}}}}
optim: {{name: adamw, lr: 1.0e-2, weight_decay: 0.01, decays: {{"*attn[12].*": 1.0e-5}}}}
ema: {{half_life: 20}}
batch: 4
images: 24
threads: 1
checkpoint: {{every: 8, keep: 0}}
"""


def run(*words):
    with pytest.raises(SystemExit) as done:
        main([str(word) for word in words])
    return done.value.code


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds lora.yaml, and the run that it makes: run/."""
    folder = tmp_path_factory.mktemp("lora")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    (folder / "lora.yaml").write_text(RECIPE.format(folder=folder))
    assert run("train", folder / "lora.yaml", "--out", folder / "run", "--device", "cpu") == 0
    return folder


def last(run):
    return load_file(run / "checkpoints" / "last.safetensors")


def noise(n, seed=0):
    return torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def asked(n):
    return Condition.of_prompts([PROMPTS[i % 2] for i in range(n)])


def setup_of(folder, *changes, start=None):
    from d2o.methods.base import Setup, get_method

    recipe = load_recipe(str(folder / "lora.yaml"), list(changes))
    torch.manual_seed(0)
    given = Setup(recipe.options, teacher=load_teacher("tiny-sd"), student=recipe.student, start=start)
    return get_method(recipe.method)(given), given.teacher


@pytest.mark.long
def test_it_begins_as_the_teacher_whose_weights_it_shares(folder):
    method, teacher = setup_of(folder)
    view, student = in_edm(teacher).network, method.student
    x = student.factor * noise(2)
    with torch.no_grad():
        expected = view(x, torch.tensor([student.sigma]), teacher.embed(asked(2)))
        assert torch.equal(student(noise(2), teacher.embed(asked(2))), expected)
    trained = {name for name, p in student.named_parameters() if p.requires_grad}
    assert trained and all(map(is_adapter, trained)) and trained == {f"{key}" for key in student.state_dict()}
    assert not any(p.requires_grad for p in teacher.network.parameters())
    own = {id(p) for p in teacher.network.parameters()}
    assert {id(p) for p in student.parameters() if not p.requires_grad} == own


def test_states_averages_and_checkpoints_hold_the_adapters_alone(folder):
    tensors, meta = last(folder / "run")
    state, _ = load_file(folder / "run" / "checkpoints" / "state.safetensors")
    assert all(map(is_adapter, [*tensors, *(key for key in state if not key.startswith("optimizer/"))]))
    base = {"name": "tiny-sd", "revision": None, "sha256": load_teacher("tiny-sd").record["sha256"]}
    lora = meta["network"]["lora"]
    assert lora == {"rank": 4, "alpha": 4, "targets": ["to_q", "to_k", "to_v", "to_out.0"], "base": base}
    assert (folder / "run" / "checkpoints" / "last.safetensors").stat().st_size < 300_000
    student, teacher = load_student(folder / "run"), load_teacher("tiny-sd")
    with torch.no_grad():
        moved = student(noise(2), asked(2)) - in_edm(teacher).network(
            student.factor * noise(2), torch.tensor([student.sigma]), teacher.embed(asked(2))
        )
    assert moved.abs().max() > 0.01


@pytest.mark.long
def test_a_resumed_run_has_the_same_bytes(folder, tmp_path):
    words = ("train", folder / "lora.yaml", "--out", tmp_path / "again", "--device", "cpu")
    assert run(*words, "--set", "images=8") == 0
    assert run(*words, "--resume") == 0
    assert torch.equal(
        *[torch.cat([t.flatten() for t in last(r)[0].values()]) for r in (folder / "run", tmp_path / "again")]
    )


@pytest.mark.long
def test_training_goes_on_from_it(folder, tmp_path):
    """With the same adapters; without, merged, from what it was."""
    start = load_student(folder / "run")
    with torch.no_grad():
        expected = start(noise(2), asked(2))
    for change, exact in (("student.lora=4", True), ("student.lora=null", False)):
        method, teacher = setup_of(folder, change, start=start)
        with torch.no_grad():
            found = method.student(noise(2), teacher.embed(asked(2)))
        assert torch.equal(found, expected) if exact else torch.allclose(found, expected, atol=1e-4)
        assert all(p.requires_grad for p in method.student.parameters()) != exact
    for change, words in (
        ("student.lora=8", "student.lora.rank is 8, that of the student to start from 4"),
        ("student={sigma: 14.6146, begins: x_T, lora: 4, init: scratch}", "adapters of random weights"),
        ("student.lora={rank: 4, targets: [to_x]}", "no layer of a UNet2DConditionModel is called 'to_x'"),
        ("student.lora={rank: 4, targets: [norm1]}", "adapters are for linear layers and convolutions"),
    ):
        with pytest.raises(UserError) as error:
            setup_of(folder, change, start=start if "=8" in change else None)
        assert words in f"{error.value.message} {error.value.hint}"


@pytest.mark.long
def test_other_methods_and_teachers_say_what_they_do_with_it(folder, tmp_path, capsys):
    text = (folder / "lora.yaml").read_text()
    for name, change in (
        ("digits", text.replace("tiny-sd", "digits").replace(", begins: x_T", "")),
        (
            "ctm",
            "{name: t, method: ctm, teacher: tiny-sd, data: {path: 'real:digits', resolution: 32, channels: 3}, "
            f"prompts: {folder}/prompts.txt,"
            f" student: {{sigma: 14.6, lora: 4}}, optim: {{lr: 1.0}}, batch: 4, images: 8}}",
        ),
    ):
        (tmp_path / "r.yaml").write_text(change)
        assert run("train", tmp_path / "r.yaml", "--plan") == 1
        said = " ".join(capsys.readouterr().out.split())
        assert ("changes the network itself" if name == "ctm" else "networks of teachers in diffusers' format") in said


@pytest.mark.long
def test_a_plan_counts_what_is_trained(folder, capsys):
    assert run("train", folder / "lora.yaml", "--plan") == 0
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    student = load_student(folder / "run")
    adapters = sum(t.numel() for t in student.state_dict().values())
    frozen = sum(p.numel() for p in student.parameters()) - adapters
    assert f"student {adapters:,}" in said and f"student (frozen part) {frozen:,}" in said
    assert "frozen weights in them" not in said  # they are the teacher's
    assert run("finetune", folder / "lora.yaml", "--from", folder / "run", "--plan") == 0


@pytest.mark.long
def test_diffusers_loads_it(folder, tmp_path, capsys, monkeypatch):
    """Into the teacher's own pipeline, where one step of it is what `d2o sample` makes."""
    from diffusers import DDIMScheduler

    from d2o.export.folder import open_pipeline

    out, pictures = tmp_path / "out", tmp_path / "s.zip"
    assert run("export", folder / "run", "--format", "diffusers", "--out", out) == 0
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "pytorch_lora_weights.safetensors", "scheduler"]
    sampled = ("sample", folder / "run", "--prompts", folder / "prompts.txt", "--n", 4, "--device", "cpu")
    assert run(*sampled, "--out", pictures) == 0
    pipeline = open_pipeline(asset("tiny-sd"))
    pipeline.load_lora_weights(str(out))
    pipeline.scheduler = DDIMScheduler.from_pretrained(out, subfolder="scheduler")
    given = {"num_inference_steps": 1, "guidance_scale": 0.0, "output_type": "pt"}
    latents, _ = noise_and_labels(range(4), (4, 8, 8), 0)
    theirs = pipeline([PROMPTS[i % 2] for i in range(4)], latents=latents, **given).images
    ours = open_images(pictures).images(range(4))
    assert ((theirs * 255).round() - ours).abs().max() <= 1
    pipeline.unload_lora_weights()
    without = pipeline([PROMPTS[i % 2] for i in range(4)], latents=latents, **given).images
    assert ((without * 255).round() - ours).abs().max() > 10
    card = (out / "README.md").read_text()
    assert "rank 4, alpha 4" in card and "locate" in card
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(card.split("```python\n")[1].split("```")[0], scope)
    assert scope["images"][0].size == (32, 32)
    capsys.readouterr()
    assert (
        run("export", folder / "run", "--format", "diffusers", "--merged", "--dtype", "fp32", "--out", tmp_path / "m")
        == 0
    )
    whole = open_pipeline(tmp_path / "m")([PROMPTS[i % 2] for i in range(4)], latents=latents, **given).images
    assert ((whole * 255).round() - ours).abs().max() <= 1


@pytest.mark.long
def test_alpha_goes_into_the_file(folder, tmp_path):
    tensors, meta = last(folder / "run")
    meta["network"]["lora"]["alpha"] = 1.0
    save_file(tmp_path / "s.safetensors", tensors, meta)
    assert run("export", tmp_path / "s.safetensors", "--format", "diffusers", "--dtype", "fp32") == 0  # it compares
    student = load_student(tmp_path / "s.safetensors")
    with torch.no_grad():
        x = student(noise(1), asked(1))
        student.network = merged(student.network)
        assert torch.allclose(student(noise(1), asked(1)), x, atol=1e-4)


@pytest.mark.long
def test_its_teacher_has_to_be_there(folder, tmp_path):
    shutil.copytree(asset("tiny-sd"), tmp_path / "sd")
    tensors, meta = last(folder / "run")
    base, path = meta["network"]["lora"]["base"], tmp_path / "s.safetensors"

    def refused(words, **changes):
        save_file(path, changes.pop("tensors", tensors), meta)
        with pytest.raises(UserError, match=words):
            load_student(path)

    base["name"] = str(tmp_path / "sd")
    save_file(path, tensors, meta)
    assert load_student(path).state_dict().keys() == load_student(folder / "run").state_dict().keys()
    (tmp_path / "sd").rename(tmp_path / "gone")
    refused("holds a LoRA, changes of the weights of .*, and nothing is there")
    base |= {"name": "tiny-sd", "sha256": "0" * 64}
    refused("of tiny-sd with sha256 000000000000; those here have")
    base |= {"name": "digits", "sha256": None}
    refused("describes another network than that of digits")
    base["name"] = "nobody/nothing"
    refused("changes of the weights of nobody/nothing: ")
    base["name"] = "tiny-sd"
    refused("lora.rank", tensors={})
    refused("do not fit the network", tensors=dict(list(tensors.items())[1:]))
