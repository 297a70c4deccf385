"""Every method on every family of teachers that it takes: five iterations on tiny random teachers, and a student."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from d2o.condition import Condition
from d2o.data.images import open_images
from d2o.data.pair_settings import PairSettings
from d2o.data.prompts import Prompts
from d2o.errors import UserError
from d2o.methods.base import Setup, get_method
from d2o.methods.score_networks import look, true_score
from d2o.methods.teachers import check_kind, why_not
from d2o.recipes.schema import Recipe
from d2o.runtime import StopFlag
from d2o.students.base import load_student
from d2o.teachers.compute import Compute
from d2o.teachers.generate import make_pairs
from d2o.teachers.in_edm import in_edm
from d2o.teachers.kinds import kind_of
from d2o.training.loop import Trainer
from tests.helpers import but_for
from tests.teachers.families import TEACHERS, tiny
from tools.matrix import PAGE, page

ROWS = {
    "ode": ("ode", {"loss": "mse"}),
    "diffusion2gan": ("diffusion2gan", {"distance": {"kind": "mse"}}),
    "sid": ("sid", {}),
    "sida": ("sid", {"adversarial": True, "start_g_nimg": 0, "start_adv_nimg": 2}),
    "dmd": ("dmd", {}),
    "dmd with pairs": ("dmd", {"lambda_reg": 0.25, "regression": "mse"}),
    "diff-instruct": ("dmd", {"kind": "diff_instruct"}),
    "gdd": ("gdd", {"critic": {"kind": "style", "style": {"base": 64, "max_channels": 8}}, "r1": {"interval": 2}}),
    "cd": ("cd", {"N": 4}),
    "pd": ("pd", {"N": 4, "stage_images": 4}),
    "ctm": ("ctm", {"N": 4}),
}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    return {name: tiny(name, tmp_path_factory.mktemp(name)) for name in TEACHERS}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    made = {}

    def of(teacher):
        shape = (3, 16, 16) if teacher.spec.latent else teacher.spec.shape
        if shape not in made:
            path = tmp_path_factory.mktemp("data") / "images.npz"
            pixels = np.random.default_rng(0).integers(0, 256, (12, *shape), np.uint8)
            np.savez(path, images=pixels, labels=np.arange(12) % 3)
            made[shape] = open_images(path)
        return made[shape]

    return of


@pytest.fixture(scope="module")
def pairs(teachers, tmp_path_factory):
    made = {}

    def of(teacher):
        name, spec = teacher.spec.name, teacher.spec
        if name not in made:
            steps = 2 if spec.solver != "heun" else 3
            folder = tmp_path_factory.mktemp(name)
            (folder / "p.txt").write_text("a\nb c\n")
            text = str(folder / "p.txt") if spec.condition == "text" else None
            settings = PairSettings(name, n=4, shard_size=4, solver=spec.solver, steps=steps, prompts=text)
            made[name] = make_pairs(settings, folder / "pairs", compute=Compute(4), teacher=teacher)
        return made[name]

    return of


TEXTS = Prompts.from_list(["a", "b c", ""] * 4)


def train(folder, method, options, teacher, images, pairs):
    """Five iterations; the student of the last checkpoint."""
    section = method.replace("-", "_")
    recipe = Recipe.from_dict(
        {
            "name": "t",
            "method": method,
            "teacher": "tiny",
            "student": {"sigma": 2.5},
            "optim": {"lr": 1e-3},
            "batch": 2,
            "images": 10,
            "threads": 1,
            "ema": {"decay": 0.5},
            section: options,
        }
    )
    needs = get_method(method).needs(recipe.options)
    setup = Setup(
        recipe.options,
        teacher=teacher,
        student=recipe.student,
        batch=recipe.batch,
        images=images(teacher) if needs == "images" else None,
        pairs=pairs(teacher) if needs == "pairs" else None,
        prompts=TEXTS if teacher.spec.condition == "text" else None,
    )
    folder.mkdir(exist_ok=True)
    Trainer(recipe, setup, folder).run(lambda *_: None, StopFlag())
    return load_student(folder)


VARIANTS = {"sd-v": ("ode", "sid", "ctm"), "sdxl": ("sida", "dmd", "cd")}  # of "sd", which is tried with all
CELLS = [(row, name) for row in ROWS for name in TEACHERS if row in VARIANTS.get(name, ROWS)]


@pytest.mark.parametrize(
    ("row", "name"),
    but_for(lambda row, name: row == "ode" or name == "edm", CELLS),
    ids=[f"{row}-{name}".replace(" ", "-") for row, name in CELLS],
)
def test_a_cell(row, name, teachers, images, pairs, tmp_path):
    method, options = ROWS[row]
    teacher = teachers[name]
    if why := why_not(method, kind_of(teacher)):
        with pytest.raises(UserError, match="cannot learn from") as caught:
            check_kind(method, kind_of(teacher))
        assert caught.value.message.endswith(why)
        return
    student = train(tmp_path, method, options, teacher, images, pairs)
    noise = torch.randn(2, *teacher.spec.shape, generator=torch.Generator().manual_seed(0))
    asked = Condition.of_labels([0, 2]) if teacher.spec.classes else Condition.none(2)
    asked = Condition.of_prompts(["b c", "d"]) if teacher.spec.condition == "text" else asked
    x = student(noise, asked)
    assert x.shape == noise.shape and bool(x.isfinite().all())
    if name != "edm2":
        assert bool((student.decode(x).abs() <= 1).all())
    before = dict(teacher.edm_view().named_parameters())
    moved = [key for key, p in student.network.named_parameters() if key in before and not torch.equal(p, before[key])]
    assert len(moved) > 0.5 * len(before)


def test_the_page_of_the_matrix_is_current():
    assert PAGE.read_text(encoding="utf-8") == page(), "python tools/matrix.py writes it"


def test_scores_are_guided(teachers):
    teacher = in_edm(teachers["sd"])
    generator = torch.Generator().manual_seed(0)
    x, sigma = (
        torch.randn(3, *teacher.spec.shape, generator=generator),
        torch.tensor([0.3, 1.0, 5.0])[:, None, None, None],
    )
    embedded = teacher.embed(Condition.of_prompts(["a", "b c", ""]))
    guided = teacher.guided(x, sigma.flatten(), embedded, 3.0)
    torch.testing.assert_close(true_score(teacher, x, sigma, embedded, None, 3.0), guided)
    empty = teacher.unconditional(embedded)
    found = look(teacher.network, x, sigma, embedded, "encoder_decoder", None, 3.0, empty)
    torch.testing.assert_close(found[0], guided)
    torch.testing.assert_close(found[1], teacher.network(x, sigma, embedded, part="encoder"))
    assert not torch.allclose(guided, teacher.denoise(x, sigma.flatten(), embedded))


@pytest.mark.long
@pytest.mark.parametrize(
    ("method", "options"),
    [("sid", {"cfg": 3.0, "score_cfg": 1.5}), ("dmd", {"cfg": 3.0}), ("cd", {"cfg": 3.0, "N": 4})],
)
def test_guided_cells(method, options, teachers, images, pairs, tmp_path):
    train(tmp_path, method, options, teachers["sd"], images, pairs)
    with pytest.raises(UserError, match="takes none"):
        train(tmp_path / "none", method, options, teachers["ddpm"], images, pairs)


def test_distances_of_images_are_not_taken_of_latents(teachers, images, pairs, tmp_path):
    for method, options in (
        ("cd", {"distance": "lpips"}),
        ("dmd", {"lambda_reg": 0.25}),
        ("ode", {"loss": "perceptual", "extractor": "digits"}),
    ):
        with pytest.raises(UserError, match="compares images, and teacher 'sd' makes latents"):
            train(tmp_path, method, options, teachers["sd"], images, pairs)
