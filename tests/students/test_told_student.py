"""A student that is told the guidance scale, from `pairs.cfg: [1, 8]` to its exports, on the command line."""

import json

import pytest
import torch

from d2o.cli.app import main
from d2o.condition import Condition
from d2o.data.images import open_images
from d2o.export.exporter import export_checkpoint
from d2o.export.graphs import graph_of
from d2o.export.loaded import for_graph, load_exportable
from d2o.export.onnx import open_onnx
from d2o.export.program import open_program
from d2o.interop.safetensors_io import save_file
from d2o.networks.classifier import Classifier
from d2o.networks.scale_input import add_scale_input
from d2o.students.base import Student, checkpoint_meta, load_student, save_student
from tests.helpers import SPEC, tiny_network

RECIPE = """
name: told
method: ode
teacher: tiny-sd
student: {{sigma: 14.6146, begins: x_T}}
pairs: {{n: 8, steps: 2, cfg: [1, 8], shard_size: 8, prompts: {folder}/prompts.txt, path: {folder}/pairs}}
ode: {{loss: mse}}
optim: {{lr: 1.0e-3}}
ema: {{half_life: 2}}
batch: 4
images: 16
threads: 2
eval: {{every: 16, cfg: 3, extractor: {folder}/eyes.safetensors, reference: {folder}/real.zip, n: 8, batch: 8}}
preview: {{every: 16, n: 2}}
"""


def run(*words):
    with pytest.raises(SystemExit) as done:
        main([str(word) for word in words])
    return done.value.code


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds what the recipe above makes: pairs/, run/."""
    folder = tmp_path_factory.mktemp("told")
    (folder / "prompts.txt").write_text("a photo of a seven\nthree\n")
    torch.manual_seed(0)
    eyes = Classifier(32, 3, 10, width=8, feature_dim=4)
    save_file(folder / "eyes.safetensors", eyes.state_dict(), checkpoint_meta("extractor", eyes.config, None))
    sampled = ("sample", "--teacher", "tiny-sd", "--prompts", folder / "prompts.txt", "--steps", 1, "--n", 8)
    assert run(*sampled, "--device", "cpu", "--out", folder / "real.zip") == 0
    (folder / "told.yaml").write_text(RECIPE.format(folder=folder))
    assert run("train", folder / "told.yaml", "--out", folder / "run", "--device", "cpu") == 0
    return folder


def said(capsys):
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.long
def test_training_measures_it_at_its_own_scale(folder, capsys):
    last = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["eval"]["fd"] > 0 and (folder / "run" / "previews" / "000000016.png").exists()
    for change, words in (("eval.cfg=9", "9 is out of range"), ("eval.cfg=null", "eval.cfg is missing")):
        assert run("train", folder / "told.yaml", "--set", change, "--out", folder / "no", "--device", "cpu") == 2
        assert words in said(capsys) and not (folder / "no").exists()
    assert run("train", folder / "told.yaml", "--set", "pairs.cfg=3", "--set", "pairs.path=null", "--plan") == 1


@pytest.mark.long
def test_sampling_says_the_scale(folder, capsys):
    sample = ("sample", folder / "run", "--prompts", folder / "prompts.txt", "--n", 4, "--device", "cpu")
    for cfg in (1, 8):
        assert run(*sample, "--cfg", cfg, "--out", folder / f"{cfg}.zip") == 0
    low, high = (open_images(folder / f"{cfg}.zip").images(range(4)) for cfg in (1, 8))
    assert not torch.equal(low, high)
    assert run(*sample, "--cfg", 8, "--out", folder / "1.zip") == 2 and "cfg: 1.0 -> 8.0" in said(capsys)
    assert run(*sample, "--out", folder / "x.zip") == 2
    assert "is told the guidance scale, and none is given give one from 1 to 8" in said(capsys)
    assert run(*sample, "--cfg", 8.5, "--out", folder / "x.zip") == 2
    assert "was trained for guidance scales from 1 to 8" in said(capsys) and not (folder / "x.zip").exists()


@pytest.mark.long
def test_evaluation_tells_it_to_student_and_teacher(folder, capsys):
    given = ("--against", folder / "pairs", "--extractor", folder / "eyes.safetensors", "--n", 8, "--distance-n", 2)
    asked = ("eval", folder / "run", *given, "--prompts", folder / "prompts.txt", "--device", "cpu")
    found = {}
    for cfg in (1, 8):
        assert run(*asked, "--cfg", cfg, "--json", folder / "e.json") == 0
        found[cfg] = json.loads((folder / "e.json").read_text())
        assert found[cfg]["x"]["cfg"] == cfg == found[cfg]["metrics"]["distance"]["teacher"]["cfg"]
    assert found[1]["metrics"]["fd"]["value"] != found[8]["metrics"]["fd"]["value"]
    assert run(*asked) == 2 and "none is given" in said(capsys)


@pytest.mark.long
def test_diffusers_pipeline_takes_guidance_scale(folder):
    """In one unguided call; a student of two calls likewise is in tests of few steps."""
    from d2o.export.folder import open_pipeline

    out = folder / "diffusers"
    assert run("export", folder / "run", "--format", "diffusers", "--dtype", "fp32", "--out", out) == 0
    assert "guidance_scale=4.5" in (out / "README.md").read_text()
    pipeline, student = open_pipeline(out), load_student(folder / "run")
    pipeline.set_progress_bar_config(disable=True)
    noise, made = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)), []
    for w in (1.5, 7.0):
        found = pipeline("three", latents=noise, num_inference_steps=1, guidance_scale=w, output_type="pt").images
        expected = student.decode(student(noise, Condition.of_prompts(["three"]).guided(w)))
        assert (found * 2 - 1 - expected).abs().max() < 1 / 255
        made.append(expected)
    assert (made[0] - made[1]).abs().max() > 1e-3


@pytest.mark.long
def test_graphs_have_an_input_for_it(one_graph_a_network, tmp_path):
    network = tiny_network(1, num_blocks=0)
    add_scale_input(network)
    with torch.no_grad():
        network.model.map_augment.weight.normal_(0, 0.3)
    student = Student(network, SPEC, guidance=(1.0, 8.0)).eval()
    teacher = {"name": "t", "sha256": "0" * 64, "licence": "MIT"}
    save_student(tmp_path / "s.safetensors", student, recipe={}, teacher=teacher, metrics={}, provenance=[])
    noise, labels, w = torch.randn(2, 1, 8, 8), torch.tensor([3, 4]), torch.tensor([2.0, 7.0])
    with torch.no_grad():
        expected = student(noise, Condition.of_labels(labels).guided(w))
    source = load_exportable(tmp_path / "s.safetensors")
    for_graph(source)
    graph = graph_of(source)
    assert graph.inputs == ("noise", "label", "guidance")
    for kind, open_it in (("onnx", lambda path: open_onnx(path, graph)), ("program", open_program)):
        done = export_checkpoint(tmp_path / "s.safetensors", kind, check_n=3)
        (made_by_graph,) = open_it(done.path)((noise, labels, w))
        assert torch.allclose(made_by_graph, expected, atol=1e-4)
        assert "`guidance`: guidance scales [N] float32, 1 to 8" in done.card.read_text()
    done = export_checkpoint(tmp_path / "s.safetensors", "safetensors", tmp_path / "t.safetensors", dtype="fp32")
    assert "Condition.of_labels(label).guided(4.5)" in done.card.read_text()
    made: dict = {}
    lines = done.card.read_text().split("```python\n")[1].split("```")[0].replace('"t.saf', f'"{tmp_path}/t.saf')
    exec(lines, made)
    assert made["pixels"].dtype == torch.uint8
