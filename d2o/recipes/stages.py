"""Network evaluations of a training, of the stage before it and of the pairs of both, as papers count them (Kang et al.
2024, Tables 6 and A1)."""

from __future__ import annotations

from pathlib import Path

from d2o.diffusion.solvers import Solver
from d2o.errors import UserError
from d2o.interop.safetensors_io import read_meta, resolve_checkpoint
from d2o.methods.base import get_method
from d2o.metrics.nfe import Phase, total_nfe, training_nfe
from d2o.recipes.load import load_recipe
from d2o.recipes.schema import Recipe
from d2o.recipes.table_runs import default_recipe

AS_PAPERS = "training, as papers count (NFE)"
BOTH_STAGES = "training and the stage before, as papers count (NFE)"
WITH_PAIRS = "pairs and training, as papers count (NFE)"


def stage_before(start: Path, recipe: Recipe) -> Recipe | None:
    """The recipe of the student that `recipe` starts from: what its checkpoint records; of one that is not there yet
    the shipped recipe whose run is called so, if it has the same teacher and pairs (in full, or by its `mini:`)."""
    try:
        recorded = read_meta(resolve_checkpoint(start)).get("recipe")
        return Recipe.from_dict(recorded) if recorded else None
    except UserError:
        name = None if start.exists() else default_recipe(str(start))
    if name is None:
        return None
    for mini in (False, True):
        try:
            found = load_recipe(name, mini=mini)
        except UserError:  # it has no `mini:`
            return None
        if (found.teacher, found.pairs) == (recipe.teacher, recipe.pairs):
            return found
    return None


def phase_of(recipe: Recipe, calls: int) -> Phase | None:
    """Its training as papers count it, of a student of so many calls; None: of a method that they do not count."""
    kind = get_method(recipe.method).phase(recipe.options)
    return Phase(kind, recipe.batch, -(-recipe.images // recipe.batch), calls) if kind else None


def as_papers_count(recipe: Recipe, calls: int, before: Recipe | None, calls_before: int) -> dict[str, int]:
    """The training, with the stage before (if there is one), and with all pairs that they are of, be they there or not:
    a store that both stages share counts once. `calls`: of the student. {}: of a method that papers do not count."""
    phase, earlier = phase_of(recipe, calls), None if before is None else phase_of(before, calls_before)
    if phase is None:
        return {}
    phases = [phase] if earlier is None else [earlier, phase]
    found = {AS_PAPERS: phase.nfe, **({BOTH_STAGES: training_nfe(phases)} if earlier is not None else {})}
    stages = [recipe, *([before] if before is not None and earlier is not None else [])]
    stores = {(one.teacher, one.pairs.model_dump_json()): one.pairs for one in stages if one.pairs is not None}
    made = [(pairs.n, Solver(pairs.solver, pairs.steps).nfe) for pairs in stores.values()]
    if made and (before is None or earlier is not None):
        found[WITH_PAIRS] = total_nfe(phases, *made[0]) + sum(n * each for n, each in made[1:])
    return found
