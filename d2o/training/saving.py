"""What of a Trainer goes to disk and comes back: its state, and the product's checkpoints that belong to it
(`products`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from d2o.errors import UserError
from d2o.inputs import JsonObject
from d2o.students.base import Student, checkpoint_meta
from d2o.training import distributed, parts
from d2o.training.checkpoint import load_state, save_state, settle, state_file, tensors_of
from d2o.training.divergence import check_weights
from d2o.training.products import snapshot
from d2o.training.run_folder import drop_previews, tidy
from d2o.training.scoring import same_measure
from d2o.training.strategy import whole

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
            parts.drop(t.products.folder, None)
            drop_previews(t.folder, -1)
        return
    record = load_state(path, t.players, t.states)
    for name, found in data_of(t).items():
        if record.get("data", {}).get(name, found) != found:
            what = f"{t.folder} was trained on other {name} than there are now"
            raise UserError(
                what, f"give those that it was started with ({name}: names, sizes and labels), or another --out"
            )
    t.iteration = t.saved = record["iteration"]
    t.best, t.scores, t.parts = record["best"], record["scores"], record.get("parts")
    t.loss_scale.load(record)
    if t.best is not None and not same_measure(record["recipe"]["eval"], t.recipe.eval):
        t.best = None  # numbers of another kind: the next one is the best so far
    for name, count in record["bad_gradients"].items():
        t.players[name].guard.count += count
    t.journal.restore(record)
    here = snapshot(record["images"])
    missing: list[str] = []
    if t.rank == 0:
        missing = settle(record, t.products)
        drop_previews(t.folder, record["images"])
        if gone := [name for name in missing if name not in ("last", here)]:
            what = "removed or changed since the run wrote it, and cannot be made again"
            t.say(f"{t.products.folder}: {', '.join(gone)}: {what}")
        missing = [name for name in missing if name in ("last", here)]
    numbered = distributed.any_process(here in t.products.digests, t.device, t.world)
    if distributed.any_process(bool(missing), t.device, t.world):  # the state's own product, from its weights
        save(t, numbered)


def data_of(t: Trainer) -> dict[str, str]:
    """Fingerprints of the pairs and images that it trains on, by which they are known wherever they lie."""
    sources = {"pairs": t.setup.pairs, "images": t.setup.images}
    return {name: source.fingerprint for name, source in sources.items() if source is not None}


def save(t: Trainer, numbered: bool) -> None:
    """Write the product as `last` (and `numbered`), and the state, in the order that `products` explains; all processes
    call this. UserError: weights that are not finite; nothing is written then."""
    rows = t.journal.scalars.rows()  # on all processes, as whatever may be refused
    bad = {name: player.guard.check(name) for name, player in t.players.items()}
    check_weights({**t.networks, "the average": t.ema.network}, t.iteration, t.saved, t.strategy.agreed)
    names = ["last", *([snapshot(t.images)] if numbered and t.recipe.checkpoint.keep else [])]
    put_product(t, *names)
    t.products.keep(t.recipe.checkpoint.keep)
    record: JsonObject = {
        "iteration": t.iteration,
        "images": t.images,
        "best": t.best,
        "scores": t.scores,
        "bad_gradients": bad,
        "products": t.products.digests,
        "recipe": t.recipe.resolved(),
        "start": t.start,
        "data": data_of(t),
        **t.loss_scale.record(),
        **t.journal.record(rows),
    }
    tensors = tensors_of(t.players, t.states)
    committed, t.parts = t.parts, None
    if t.strategy.shards:
        record["parts"] = t.parts = parts.write(t.products.folder, tensors, committed)
        tensors = {}
    if t.rank == 0:
        save_state(state_file(t.folder), tensors, record)
        t.products.publish()
        parts.drop(t.products.folder, t.parts)
    t.saved = t.iteration
    distributed.barrier(t.world)


def put_product(t: Trainer, *names: str) -> None:
    """The EMA product as a self-describing checkpoint, which is seen once a state is saved. All processes call this;
    the first one writes."""
    network = t.ema.network
    tensors = (network.network if isinstance(network, Student) else network).state_dict()
    if t.strategy.shards:
        gathered = ((name, whole(tensor)) for name, tensor in tensors.items())  # one after the other
        tensors = {name: tensor.cpu() for name, tensor in gathered if t.rank == 0}
    if t.rank != 0:
        return
    described, teacher = t.method.describe(), t.setup.teacher
    made_from = None
    if teacher is not None:
        made_from = {"name": str(t.recipe.teacher), "sha256": teacher.fingerprint, "licence": teacher.spec.licence}
    source = t.setup.pairs or t.setup.images
    data = None if source is None else source.fingerprint
    made = {"method": t.recipe.method, "recipe": t.recipe.name, "images": t.images, "data": data}
    meta = checkpoint_meta(
        described.pop("kind"),
        described.pop("network"),
        described.pop("spec", None),
        **described,
        recipe=t.recipe.resolved(),
        teacher=made_from,
        metrics=t.scores,
        images=t.images,
        provenance=[*t.provenance, made],
    )
    for name in names:
        t.products.put(name, tensors, meta)
