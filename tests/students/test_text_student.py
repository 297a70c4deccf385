"""A text student in miniature, from pairs to images: `tiny-sd` pairs, method `ode` with `mse` in latent space, then
`sample` and `eval` by prompt."""

import json
import shutil

import pytest
import torch

from d2o.cli.app import main
from d2o.condition import Condition
from d2o.data.images import open_images
from d2o.data.pairs import PairStore
from d2o.errors import UserError
from d2o.interop.safetensors_io import load_file, read_meta, save_file
from d2o.networks.classifier import Classifier
from d2o.spaces.load import load_space
from d2o.students.base import checkpoint_meta, load_student
from d2o.teachers.registry import load_teacher

PROMPTS = ["a photo of a seven", "three", "a photo of a zero"]
RECIPE = """
name: text
method: ode
teacher: tiny-sd
student: {{sigma: 14.6}}
pairs: {{n: 8, steps: 2, cfg: 3.0, shard_size: 8, prompts: {folder}/prompts.txt, path: {folder}/pairs}}
ode: {{loss: mse}}
optim: {{lr: 1.0e-4}}
ema: {{half_life: 20}}
batch: 4
images: 24
threads: 2
eval: {{every: 24, metric: fd, extractor: {folder}/eyes.safetensors, reference: {folder}/real.zip, n: 8, batch: 8}}
preview: {{every: 24, n: 4}}
"""


def run(*words):
    with pytest.raises(SystemExit) as done:
        main([str(word) for word in words])
    return done.value.code


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds prompts.txt, and what the recipe above makes: pairs/, run/."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    torch.manual_seed(0)
    eyes = Classifier(32, 3, 10, width=8, feature_dim=4)
    save_file(folder / "eyes.safetensors", eyes.state_dict(), checkpoint_meta("extractor", eyes.config, None))
    sampled = ("sample", "--teacher", "tiny-sd", "--prompts", folder / "prompts.txt", "--steps", 1, "--n", 8)
    assert run(*sampled, "--device", "cpu", "--out", folder / "real.zip") == 0
    (folder / "text.yaml").write_text(RECIPE.format(folder=folder))
    assert run("train", folder / "text.yaml", "--out", folder / "run", "--device", "cpu") == 0
    return folder


@pytest.fixture(scope="module")
def student(folder):
    return load_student(folder / "run")


def noise(n, seed=0):
    return torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.long
def test_batches_of_a_text_store_carry_their_prompts(folder):
    store = PairStore(folder / "pairs")
    _, condition, target = store.batch([4, 0])
    assert condition.prompts == (PROMPTS[1], PROMPTS[0]) and target.shape == (2, 4, 8, 8)


def test_training_measures_and_shows_it_by_prompt(folder):
    last = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["images"] == 24 and last["eval"]["fd"] > 0
    assert (folder / "run" / "previews" / "000000024.png").exists()


def test_the_checkpoint_names_its_text_encoder_and_space_and_stores_neither(folder, student):
    teacher = load_teacher("tiny-sd")
    tensors, meta = load_file(folder / "run" / "checkpoints" / "last.safetensors")
    assert {name.split(".")[0] for name in tensors} == {"net"}
    assert meta["needs"]["text"] == {"name": "tiny-sd", "revision": None, "sha256": teacher.text.record["sha256"]}
    assert meta["needs"]["space"] == {"name": "tiny-sd", "revision": None, "sha256": teacher.space.sha256}
    assert (student.spec.space, student.spec.text, student.spec.condition) == ("tiny-sd", "tiny-sd", "text")
    assert student.text is teacher.text and student.space is teacher.space is load_space("tiny-sd")


def test_it_is_the_teacher_s_network_called_once_with_its_text(student):
    """After a few steps at a small rate it is still close to the teacher's denoiser at the highest level."""
    teacher, asked = load_teacher("tiny-sd"), Condition.of_prompts(PROMPTS)
    with torch.no_grad():
        found = student(noise(3), asked)
        view = teacher.edm_view()
        sigma = torch.full((1,), student.sigma)
        expected = view(student.sigma * noise(3), sigma, teacher.embed(asked))
    alike = torch.cosine_similarity(found.flatten(), expected.flatten(), dim=0)
    assert alike > 0.5 and not torch.equal(found, expected), float(alike)
    assert torch.equal(student(noise(3), student.embed(asked)), found)  # what is embedded already
    assert not torch.allclose(student(noise(3), Condition.of_prompts(PROMPTS[::-1])), found, atol=1e-3)
    images = student.decode(found)
    assert images.shape == (3, 3, 32, 32) and torch.equal(images, teacher.decode(found))


def test_conditions_that_do_not_fit_are_refused(student):
    for wrong, words in (
        (Condition.of_labels([1, 2]), "it takes prompts, not class labels"),
        (Condition.none(2), "it takes prompts, '' for none"),
        (torch.tensor([1, 2]), "it takes prompts, '' for none"),
        (Condition.of_prompts(["a"]), "1 prompts for a batch of 2"),
    ):
        with pytest.raises(UserError, match=words):
            student(noise(2), wrong)


@pytest.mark.long
def test_sampling_by_prompt(folder, student, capsys):
    many, one = folder / "many.zip", folder / "one.zip"
    assert run("sample", folder / "run", "--prompts", folder / "prompts.txt", "--n", 4, "--out", many) == 0
    grid = folder / "grid.png"
    words = ("--prompt", PROMPTS[0], "--n", 1, "--out", one, "--grid", grid)
    assert run("sample", folder / "run" / "checkpoints" / "best.safetensors", *words) == 0 and grid.exists()
    found = open_images(many)
    assert found.shape == (3, 32, 32) and found.labels.tolist() == [0, 1, 2, 0]
    assert (open_images(one).images([0]).int() - found.images([0]).int()).abs().max() <= 1
    assert run("sample", folder / "run", "--n", 4, "--out", folder / "x.zip") == 2
    assert "--prompt (or --prompts FILE) is missing" in " ".join(capsys.readouterr().err.split())
    assert run("sample", folder / "run", "--prompt", "a", "--cfg", 2, "--n", 4) == 2
    for asked, hint in ((("--prompt", "a"), "leave --labels away"), (("--prompts", folder / "prompts.txt"), "0 to 2")):
        assert run("sample", folder / "run", *asked, "--labels", 3, "--n", 4, "--out", folder / "x.zip") == 2
        said = " ".join(capsys.readouterr().err.split())
        assert "takes prompts, and no class labels" in said and hint in said
    for who in (("sample", "--out", folder / "x.zip", "--teacher"), ("eval", "--against", "real:digits")):
        assert run(*who, "digits", "--prompt", "a", "--n", 4) == 2
        assert "takes no prompts" in " ".join(capsys.readouterr().err.split())


@pytest.mark.long
def test_evaluation_by_prompt(folder, capsys):
    given = ("--against", folder / "pairs", "--extractor", folder / "eyes.safetensors", "--n", 8, "--distance-n", 2)
    out = folder / "result.json"
    by_file = ("eval", folder / "run", *given, "--prompts", folder / "prompts.txt")
    assert run(*by_file, "--json", out, "--device", "cpu") == 0
    record = json.loads(out.read_text())
    assert record["protocol"]["prompts"] == 3 and record["metrics"]["fd"]["value"] > 0
    assert "distance" in record["metrics"] and not record["notes"]
    given = (*given, "--no-teacher-distance")
    by_words = ("eval", folder / "run", *given, *(word for p in PROMPTS for word in ("--prompt", p)))
    assert run(*by_words, "--json", folder / "b.json", "--device", "cpu") == 0
    again = json.loads((folder / "b.json").read_text())
    assert again["metrics"]["fd"]["value"] == record["metrics"]["fd"]["value"]
    capsys.readouterr()
    assert run("eval", folder / "run", *given) == 2 and "conditioned on text" in capsys.readouterr().err
    assert run(*by_file, "--prompt", "a") == 2


def test_another_text_encoder_than_the_student_s_is_refused(folder, tmp_path):
    path = tmp_path / "s.safetensors"
    tensors, meta = load_file(folder / "run" / "checkpoints" / "last.safetensors")
    meta["needs"]["text"]["sha256"] = "0" * 64
    save_file(path, tensors, meta)
    with pytest.raises(UserError, match="takes the text encoders of tiny-sd with sha256 000000000000"):
        load_student(path)(noise(1), Condition.of_prompts(["a"]))
    meta["needs"]["text"] = {"name": 7}
    save_file(path, tensors, meta)
    with pytest.raises(UserError, match="needs.text"):
        load_student(path)


def test_a_student_of_a_folder_finds_its_parts_there(folder, tmp_path, student, capsys):
    """Of a teacher in a folder the student names the folder."""
    from d2o.interop.assets import asset

    shutil.copytree(asset("tiny-sd"), tmp_path / "sd")
    where, path = str((tmp_path / "sd").resolve()), tmp_path / "s.safetensors"
    tensors, meta = load_file(folder / "run" / "checkpoints" / "last.safetensors")
    meta["spec"] |= {"latents": where, "text": where}
    for need in meta["needs"].values():
        need["name"] = where
    save_file(path, tensors, meta)
    again = load_student(path)
    asked = Condition.of_prompts(PROMPTS[:2])
    x = again(noise(2), asked)
    assert torch.equal(x, student(noise(2), asked)) and torch.equal(again.decode(x), student.decode(x))
    assert read_meta(path)["needs"]["space"]["name"] == where
    (tmp_path / "sd").rename(tmp_path / "gone")
    for changed, words in (({}, "takes its text encoders from"), ({"text": "tiny-sd"}, "takes its autoencoder from")):
        meta["spec"] |= changed
        save_file(path, tensors, meta)
        assert run("sample", path, "--prompt", "a", "--n", 1, "--out", tmp_path / "x.zip") == 2
        said = " ".join(capsys.readouterr().err.split())
        assert words in said and "nothing is there" in said and not list(tmp_path.glob("x.zip*"))


@pytest.mark.long
def test_export_makes_a_folder_that_needs_nothing_else(folder, student):
    """What diffusers makes of it in one step is the student's image."""
    from d2o.export.folder import open_pipeline

    out = folder / "diffusers"
    assert run("export", folder / "run", "--format", "diffusers", "--dtype", "fp32", "--out", out) == 0
    assert "| condition | prompt |" in (out / "README.md").read_text()
    pipeline = open_pipeline(out)
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(PROMPTS[:2], latents=noise(2), num_inference_steps=1, guidance_scale=1.0, output_type="pt").images
    expected = student.decode(student(noise(2), Condition.of_prompts(PROMPTS[:2])))
    assert torch.allclose(made * 2 - 1, expected, atol=1e-3)
