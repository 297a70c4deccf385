"""Pair stores in which each pair has a guidance scale of its own."""

import itertools

import pytest
import torch

from d2o.data.draws import draw_scales
from d2o.data.pair_settings import PairSettings
from d2o.data.pair_tools import verify_store
from d2o.data.pairs import PairStore
from d2o.data.stream import PairStream
from d2o.diffusion.guidance import parse_cfg
from d2o.errors import UserError
from d2o.interop.safetensors_io import load_file, save_file
from d2o.teachers.compute import Compute
from d2o.teachers.generate import make_pairs
from tests.helpers import tiny_teacher

RANGE = (1.0, 8.0)


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    folder, numbers = tmp_path_factory.mktemp("scales"), itertools.count()

    def run(n=12, out=None, batch=4, **settings):
        settings = {"solver": "euler", "steps": 2, "shard_size": 8, "cfg": RANGE, **settings}
        out = out or folder / str(next(numbers))
        return make_pairs(PairSettings("tiny", n, **settings), out, compute=Compute(batch, 1), teacher=tiny_teacher())

    return run


@pytest.fixture(scope="module")
def store(build):
    return build()


def test_a_scale_is_a_function_of_the_seed(build, store):
    scales = store.batch(range(12))[1].guidance
    assert scales.dtype == torch.float32 and torch.equal(scales, draw_scales(range(12), RANGE))
    assert len(set(scales.tolist())) == 12 and (scales >= 1).all() and (scales <= 8).all()
    later = build(n=4, seed=8, shard_size=3, batch=2)
    assert torch.equal(later.batch(range(4))[1].guidance, scales[8:])
    many = draw_scales(range(4000), RANGE)
    assert abs(many.mean() - 4.5) < 0.1 and abs(many.std() - 7 / 12**0.5) < 0.1


def test_the_teacher_is_guided_by_it(build, store):
    """Pair i is that of a store of its scale alone."""
    _, condition, target = store.batch([3, 9])
    for i, scale, x in zip((3, 9), condition.guidance.tolist(), target, strict=True):
        alone = build(n=1, seed=i, cfg=scale)
        assert torch.allclose(alone.batch([0])[2][0], x, atol=1e-5)
        assert not torch.allclose(build(n=1, seed=i, cfg=1.0).batch([0])[2][0], x, atol=1e-3)


def test_training_reads_them_with_their_pairs(store):
    with PairStream(store, batch=6, seed=3) as stream:
        noise, condition, target = next(stream)
    whole = store.batch(range(12))
    for row in range(6):
        i = next(i for i in range(12) if torch.equal(whole[0][i], noise[row]))
        assert condition.guidance[row] == whole[1].guidance[i] and torch.equal(target[row], whole[2][i])
    assert condition[:2].guidance.shape == (2,)


def test_a_store_grows_and_keeps_its_scales(build, store, tmp_path):
    small = build(n=6, out=tmp_path / "grows")
    before = small.batch(range(6))[1].guidance
    grown = build(n=12, out=tmp_path / "grows")
    assert torch.equal(grown.batch(range(6))[1].guidance, before)
    assert grown.fingerprint == store.fingerprint and not verify_store(grown.path)
    with pytest.raises(UserError, match=r"cfg: \(1.0, 8.0\) -> 3.0"):
        build(out=tmp_path / "grows", cfg=3.0)


def test_other_scales_than_those_of_the_seeds_are_refused(build, tmp_path):
    """A shard of which only they were changed, with a manifest that agrees."""
    store = build(out=tmp_path / "changed")
    path = tmp_path / "changed" / "shard-00001.safetensors"
    tensors, meta = load_file(path)
    tensors["guidance"] = tensors["guidance"].flip(0).clone()
    save_file(path, tensors, meta)
    assert any("shard-00001" in problem for problem in verify_store(store.path))
    entry = store._entries["shard-00001.safetensors"]
    folder = store.folder
    folder.change(
        lambda m: m | {"shards": [_as_it_is(s, path) if s["file"] == entry["file"] else s for s in m["shards"]]}
    )
    with pytest.raises(UserError, match="guidance scales are not those of its pairs' seeds"):
        PairStore(tmp_path / "changed").batch([11])


def _as_it_is(entry, path):
    from d2o.interop.safetensors_io import file_sha256

    return {**entry, "bytes": path.stat().st_size, "sha256": file_sha256(path)}


def test_the_command_line_says_the_range():
    settings = PairSettings("digits", 64, cfg=RANGE, solver="heun", steps=2)
    assert "--cfg 1:8" in settings.command("p") and "cfg1to8" in str(settings.folder())
    assert parse_cfg("1:8") == RANGE and parse_cfg("2.5") == 2.5
    assert settings.forwards == 2 * settings.nfe
    for wrong in ("8:1", "1:2:3", "many", "nan", "-1:4"):
        with pytest.raises(UserError, match="cfg"):
            parse_cfg(wrong)
