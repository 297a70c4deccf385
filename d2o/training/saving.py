"""What of a Trainer goes to disk and comes back: its state, and the product's checkpoints that belong to it
(`products`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from d2o.students.base import Student, checkpoint_meta
from d2o.training import distributed
from d2o.training.checkpoint import load_state, save_state, settle, state_file
from d2o.training.divergence import Divergence, check_finite
from d2o.training.folder import drop_previews, tidy
from d2o.training.products import snapshot
from d2o.training.scoring import same_measure
from d2o.training.watch import Watch

if TYPE_CHECKING:
    from d2o.training.loop import Trainer


def resume(t: Trainer) -> None:
    """Continue from the run folder's state, if it has one, and bring the folder to it: what killed processes left goes.
    UserError: a state that is damaged or does not fit."""
    if t.rank == 0:
        tidy(t.folder)
    path = state_file(t.folder)
    if not path.exists():
        if t.rank == 0:
            t.products.settle()
            drop_previews(t.folder, -1)
        return
    record = load_state(path, {**t.networks, **t.states}, t.ema.network, t.optimizers)
    t.iteration = t.saved = record["iteration"]
    t.best, t.scores = record["best"], record["scores"]
    t.loss_scale.load(record)
    if t.best is not None and not same_measure(record["recipe"]["eval"], t.recipe.eval):
        t.best = None  # numbers of another kind: the next one is the best so far
    for name, count in record["bad_gradients"].items():
        t.guards[name].count += count
    t.divergence = Divergence(record.get("divergence"))
    watched = record.get("watch") or {}
    t.watch = Watch(watched.get("state"))
    t.scalars.restore(record.get("since", watched.get("since", [])))  # an older d2o kept them beside the watch
    here = snapshot(record["images"])
    missing: list[str] = []
    if t.rank == 0:
        missing = settle(t.folder, record, t.products)
        drop_previews(t.folder, record["images"])
        if gone := [name for name in missing if name not in ("last", here)]:
            what = "removed or changed since the run wrote it, and cannot be made again"
            t.say(f"{t.products.folder}: {', '.join(gone)}: {what}")
        missing = [name for name in missing if name in ("last", here)]
    if distributed.any_process(bool(missing), t.device, t.world):  # the state's own product, from its weights
        save(t, record["images"], numbered=here in t.products.digests)


def save(t: Trainer, images: int, numbered: bool) -> None:
    """Write the product as `last` (and `numbered`), and the state, in the order that `products` explains. UserError:
    weights that are not finite; nothing is written then."""
    rows = t.scalars.rows()  # on all processes, as whatever may be refused
    bad = {name: guard.check(name) for name, guard in t.guards.items()}
    check_finite({**t.networks, "the average": t.ema.network}, t.iteration, t.saved)
    if t.rank == 0:
        put_product(t, "last", images)
        if numbered and t.recipe.checkpoint.keep:
            put_product(t, snapshot(images), images)
        t.products.keep(t.recipe.checkpoint.keep)
        record: dict[str, Any] = {
            "iteration": t.iteration,
            "images": images,
            "best": t.best,
            "scores": t.scores,
            "bad_gradients": bad,
            "products": t.products.digests,
            "recipe": t.recipe.resolved(),
            "start": t.start,
            **t.loss_scale.record(),
        }
        if rows:
            record["since"] = [list(row.items()) for row in rows]  # pairs: the record sorts names, the log does not
        if t.watch.started:
            record["watch"] = {"state": t.watch.state}
        if t.divergence.state["bad"]:
            record["divergence"] = t.divergence.state
        save_state(state_file(t.folder), {**t.networks, **t.states}, t.ema.network, t.optimizers, record)
        t.products.publish()
    t.saved = t.iteration
    distributed.barrier(t.world)


def put_product(t: Trainer, name: str, images: int) -> None:
    """The EMA product as a self-describing checkpoint, which is seen once a state is saved."""
    described, teacher = t.method.describe(), t.setup.teacher
    made_from = None
    if teacher is not None:
        made_from = {"name": str(t.recipe.teacher), "sha256": teacher.fingerprint, "licence": teacher.spec.licence}
    source = t.setup.pairs or t.setup.images
    data = None if source is None else source.fingerprint
    made = {"method": t.recipe.method, "recipe": t.recipe.name, "images": images, "data": data}
    meta = checkpoint_meta(
        described.pop("kind"),
        described.pop("network"),
        described.pop("spec", None),
        **described,
        recipe=t.recipe.resolved(),
        teacher=made_from,
        metrics=t.scores,
        images=images,
        provenance=[*t.provenance, made],
    )
    network = t.ema.network
    t.products.put(name, (network.network if isinstance(network, Student) else network).state_dict(), meta)
