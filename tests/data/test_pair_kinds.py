"""Pair stores of every kind: prompts, stochastic solvers, rewired pairs, shares of a store, other places, joined and
counted stores."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from d2o.condition import Condition
from d2o.data.pair_settings import PairSettings
from d2o.data.pair_tools import merge_stores, stats, verify_store
from d2o.data.pairs import PairStore
from d2o.diffusion.noise import StepNoise, noise_and_labels, noise_for_seeds
from d2o.diffusion.solvers import Solver
from d2o.errors import UserError
from d2o.interop.safetensors_io import load_file, save_file
from d2o.networks import processor
from d2o.teachers.base import Teacher
from d2o.teachers.compute import Compute
from d2o.teachers.generate import Share, make_pairs
from d2o.work.folder import cut
from tests.helpers import TinyText, tensors, tiny_teacher
from tests.teachers.families import tiny
from tests.workers import files

PROMPTS = ["a seven", "the digit three", "nine", "a handwritten two", "zéro ✓"]


@pytest.fixture(scope="module")
def teacher():
    return tiny_teacher()


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    return str(path)


@pytest.fixture
def build(teacher, tmp_path):
    """build(name, teacher=..., share=..., **settings) -> store of the tiny teacher, 2 Euler steps, one thread."""

    def run(name="store", teacher=teacher, share=Share(), compute=Compute(4, 1), **settings):
        settings = {"n": 20, "solver": "euler", "steps": 2, "shard_size": 8, **settings}
        out = name if "://" in str(name) else tmp_path / name
        return make_pairs(PairSettings("tiny", **settings), out, compute=compute, share=share, teacher=teacher)

    return run


# Prompts --------------------------------------------------------------------------------------------------------------


def test_a_prompt_belongs_to_its_pair(build, prompts):
    text = TinyText()
    store = build(teacher=text, prompts=prompts, cfg=3.0)
    assert store.settings.labels == "text" and store.prompts(range(20)) == (PROMPTS * 4)
    noise, condition, target = store.batch([7, 3])
    labels = condition.labels
    assert (
        labels is None
        and condition.prompts == (PROMPTS[2], PROMPTS[3])
        and torch.equal(noise, noise_for_seeds([7, 3], (1, 8, 8)))
        and store[7][1] == PROMPTS[2]
    )
    expected = text.sample(noise, Condition.of_prompts([PROMPTS[2], PROMPTS[3]]), "euler", 2, cfg=3.0)
    assert torch.allclose(target, expected, atol=1e-4)
    assert not torch.allclose(
        target, text.sample(noise, Condition.of_prompts([PROMPTS[3], PROMPTS[2]]), "euler", 2, cfg=3.0), atol=1e-3
    )


def test_several_pairs_per_prompt(build, prompts):
    store = build(teacher=TinyText(), prompts=prompts, per_prompt=3)
    assert store.prompts(range(20)) == [PROMPTS[i // 3 % 5] for i in range(20)]
    report = stats(store.path)["prompts"]
    assert report == {"used": 5, "of": 5, "least": 3, "most": 6}


def test_the_teacher_is_told_whether_prompts_return(build, prompts, monkeypatch):
    told = []
    monkeypatch.setattr(TinyText, "expect_prompts", lambda self, repeated: told.append(repeated))
    build("once", teacher=TinyText(), prompts=prompts, n=5)
    build("in a row", teacher=TinyText(), prompts=prompts, n=15, per_prompt=3)
    build("again", teacher=TinyText(), prompts=prompts, n=6)
    assert told == [False, False, True]


def test_shards_hold_their_prompts_and_other_prompts_are_refused(build, prompts, tmp_path):
    store = build(teacher=TinyText(), prompts=prompts)
    Path(prompts).rename(tmp_path / "moved.txt")
    assert PairStore(store.path).prompts([4]) == ["zéro ✓"]  # reading needs no prompt file
    assert (
        build(teacher=TinyText(), prompts=str(tmp_path / "moved.txt")).fingerprint == store.fingerprint
    )  # the content counts, not the name
    other = tmp_path / "other.txt"
    other.write_text("a cat\n")
    with pytest.raises(UserError, match=r"prompts: .*prompts.txt .* -> .*other.txt"):
        build(teacher=TinyText(), prompts=str(other))
    with pytest.raises(UserError, match="is conditioned on text"):
        build("x", teacher=TinyText())
    with pytest.raises(UserError, match="takes no prompts"):
        build("x", prompts=str(other))
    with pytest.raises(UserError, match="takes no labels"):
        build("x", teacher=TinyText(), prompts=str(other), labels="balanced")
    with pytest.raises(UserError, match="has no prompts"):
        build("labels").prompts([0])


# Solvers --------------------------------------------------------------------------------------------------------------


def test_the_teachers_usual_solver_is_the_default(build):
    usual = tiny_teacher()
    usual.spec = replace(usual.spec, solver="ddim", steps=2)
    assert build("eta", teacher=usual, solver=None, steps=None, eta=1.0).settings.solver == "ddim"
    usual.spec = replace(usual.spec, solver="dpmpp", steps=3)
    with pytest.raises(UserError, match="only the solver ddim takes it, not dpmpp"):
        build("no_eta", teacher=usual, solver=None, steps=None, eta=1.0)
    store = build(teacher=usual, solver=None, steps=None)
    assert (store.settings.solver, store.settings.steps, store.settings.nfe) == ("dpmpp", 3, 3)
    noise, condition, target = store.batch(range(4))
    labels = condition.labels
    assert torch.allclose(target, usual.sample(noise, labels, "dpmpp", 3), atol=1e-4)


@pytest.mark.long
def test_stochastic_pairs_are_a_function_of_their_seeds(build, teacher):
    one = build("one", solver="sde", steps=3)
    other = build("other", solver="sde", steps=3, shard_size=5, compute=Compute(3, 1))
    ode = build("ode", solver="heun", steps=3)
    noise, condition, target = one.batch(range(20))
    labels = condition.labels
    assert torch.allclose(target, other.batch(range(20))[2], atol=1e-4) and torch.equal(noise, ode.batch(range(20))[0])
    assert (target - ode.batch(range(20))[2]).abs().mean() > 0.01
    expected = teacher.sample(noise[5:7], labels[5:7], Solver("sde", 3), randn=StepNoise([5, 6], (1, 8, 8), 10))
    assert torch.allclose(target[5:7], expected, atol=1e-4) and one.settings.nfe == 5
    calm = build("calm", solver="sde", steps=3, s_churn=0.0)
    assert torch.allclose(calm.batch(range(20))[2], ode.batch(range(20))[2], atol=1e-4)  # without churn it is Heun


def test_solver_options_are_part_of_the_settings(build):
    build(solver="ddim", eta=0.5)
    with pytest.raises(UserError, match=r"eta: 0.5 -> 0.0"):
        build(solver="ddim")
    for wrong, message in (
        ({"spacing": "leading"}, "takes Karras' steps"),
        ({"eta": 0.5}, "only the solver ddim"),
        ({"final": "x"}, "unknown final"),
        ({"rewire": "shuffle"}, "unknown rewire"),
        ({"per_prompt": 0}, "per_prompt must be"),
        ({"decode": True}, "works on pixels"),
        ({"solver": "hun"}, "did you mean 'heun'"),
    ):
        with pytest.raises(UserError, match=message):
            build("wrong", **wrong)


def test_what_xl_s_guidance_takes_for_no_prompt(build, prompts, tmp_path):
    """Asked for, or the teacher's own, which stays as it is; the store says which."""
    xl = tiny("sdxl", tmp_path / "xl")
    asked = {"teacher": xl, "prompts": prompts, "n": 4, "solver": "ddim", "cfg": 7.5}
    plain, named = build("plain", **asked), build("named", **asked, sdxl_uncond="zeros")
    empty = build("empty", **asked, sdxl_uncond="encode_empty")
    assert [store.settings.sdxl_uncond for store in (plain, named, empty)] == ["zeros", "zeros", "encode_empty"]
    assert xl.sdxl_uncond == "zeros" and plain.verify() == empty.verify() == []
    x, same, other = (store.batch(range(4))[2] for store in (plain, named, empty))
    assert torch.equal(x, same) and (other - x).abs().max() > 1e-3
    xl.sdxl_uncond = "encode_empty"
    expected = xl.sample(empty.batch(range(4))[0], Condition.of_prompts(empty.prompts(range(4))), "ddim", 2, cfg=7.5)
    assert torch.allclose(other, expected, atol=1e-4)
    xl.sdxl_uncond = "zeros"
    with pytest.raises(UserError, match="sdxl_uncond: zeros -> encode_empty"):
        build("plain", **asked, sdxl_uncond="encode_empty")
    with pytest.raises(UserError, match="sdxl_uncond: encode_empty -> zeros"):
        build("empty", **asked)
    assert "--sdxl-uncond encode_empty" in empty.settings.command("x")
    assert empty.settings.folder().name != plain.settings.folder().name
    for store in (plain, empty):  # as a plan compares what a recipe leaves open
        assert store.settings.differences(replace(store.settings, sdxl_uncond=None)) == []
    with pytest.raises(UserError, match="is for Stable Diffusion XL, and teacher 'tiny' is another model"):
        build("other", sdxl_uncond="zeros")
    with pytest.raises(UserError, match="did you mean 'encode_empty'"):
        build("wrong", **asked, sdxl_uncond="empty")


def test_stores_of_xl_that_do_not_say_it_have_the_teacher_s_own(build, prompts, tmp_path):
    xl = tiny("sdxl", tmp_path / "xl")
    asked = {"teacher": xl, "prompts": prompts, "solver": "ddim", "cfg": 7.5, "shard_size": 4}
    store = build("older", n=4, **asked)
    path = store.path / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["settings"]["sdxl_uncond"], manifest["sha256"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="sdxl_uncond: zeros -> encode_empty"):
        build("older", n=8, **asked, sdxl_uncond="encode_empty")
    assert len(build("older", n=8, **asked, sdxl_uncond="zeros")) == 8


def test_rewired_pairs_are_the_same_targets_with_other_noises(build):
    plain, wired = build("plain"), build("wired", rewire="permute")
    (noise, labels, target), (noise_w, labels_w, target_w) = (tensors(s.batch(range(20))) for s in (plain, wired))
    assert torch.equal(noise, noise_w)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(target_w, target[order], atol=1e-5) and torch.equal(labels_w, labels[order])
    assert (order != torch.arange(20)).sum() > 10 and wired.verify() == []


def test_a_narrow_network_is_recorded_and_close(build, teacher):
    exact, half = (
        build("exact"),
        build("half", teacher=tiny_teacher(), compute=Compute(4, 1, "bf16", channels_last=True)),
    )
    assert half.manifest["compute"]["precision"] == "bf16" and "precision" not in exact.manifest["compute"]
    difference = (exact.batch(range(20))[2] - half.batch(range(20))[2]).abs().max()
    assert 0 < difference < 0.5
    said = []
    settings = PairSettings("tiny", 20, solver="euler", steps=2, shard_size=8)
    (half.path / "shard-00001.safetensors").unlink()
    again = make_pairs(settings, half.path, compute=Compute(4, 1), teacher=tiny_teacher(), say=said.append)
    assert again.verify() == [] and "was begun with precision bf16, channels_last True" in said[0]
    for wrong in (Compute(precision="fp8"), Compute(compile="always"), Compute(batch=0)):
        with pytest.raises(UserError):
            build("wrong", compute=wrong)


@pytest.mark.long
def test_a_compiled_network_gives_the_same_pairs(build, monkeypatch):
    compiled = []

    def compile(network, mode, dynamic):
        compiled.append(mode)
        return real(network, backend="eager")

    real = torch.compile
    monkeypatch.setattr(torch, "compile", compile)
    plain, fast = build("plain"), build("fast", teacher=tiny_teacher(), compute=Compute(4, 1, compile="graphs"))
    assert compiled == ["reduce-overhead"] and fast.manifest["compute"]["compile"] == "graphs"
    assert torch.allclose(plain.batch(range(20))[2], fast.batch(range(20))[2], atol=1e-5)


# Workers and places ---------------------------------------------------------------------------------------------------


def test_shares_cover_everything_in_another_order():
    units = cut(100, 8, "{}")
    for count in (1, 2, 3, 13, 20):
        owned = []
        for index in range(count):
            share = Share(index, count)
            assert sorted(share.order(units), key=lambda u: u.start) == units
            owned += Share(index, count, only=True).order(units)
        assert sorted(owned, key=lambda u: u.start) == units
    assert Share.parse("2/8") == Share(2, 8) and Share.parse(None) == Share(0, 1)
    for wrong in ("8/8", "2", "a/b", "-1/2", "1/0"):
        with pytest.raises(UserError, match="expected INDEX/COUNT"):
            Share.parse(wrong)


def test_torchruns_rank_is_the_share(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert Share.parse(None) == Share(3, 4) and Share.parse("0/2") == Share(0, 2)


def test_machines_that_share_no_folder_make_parts_of_the_same_bytes(build, tmp_path):
    whole = build("whole")
    for index in range(2):
        assert build(f"part{index}", share=Share(index, 2, only=True)) is None
    assert {p.name for p in (tmp_path / "part1").glob("shard*")} == {"shard-00001.safetensors"}
    with pytest.raises(UserError, match="not finished: 2 of 3 shards"):
        PairStore(tmp_path / "part1")
    assert merge_stores([tmp_path / "part0", tmp_path / "part1"], tmp_path / "joined") == 20
    assert files(tmp_path / "joined") == files(whole.path) and verify_store(tmp_path / "joined") == []
    assert merge_stores([tmp_path / "part0", tmp_path / "part1"], tmp_path / "joined") == 20  # again: nothing to do


def test_a_share_that_is_not_only_takes_over_the_rest(build, tmp_path):
    build("store", share=Share(1, 3, only=True))
    assert len(build("store", share=Share(0, 3))) == 20 and verify_store(tmp_path / "store") == []


def test_a_store_on_another_file_system_has_the_same_bytes(build, teacher, monkeypatch, tmp_path):
    import fsspec

    monkeypatch.setenv("D2O_HOME", str(tmp_path / "home"))
    local, url = build("local"), "memory://bucket/pairs"
    remote = build(url)
    memory = fsspec.filesystem("memory")
    found = {Path(name).name: memory.cat(name) for name in memory.find("/bucket/pairs") if "timing" not in name}
    assert found == files(local.path)
    for a, b in zip(tensors(local.batch([1, 19])), tensors(remote.batch([1, 19]))):
        assert torch.equal(a, b)
    assert verify_store(url) == [] and remote.fingerprint == local.fingerprint and stats(url)["pairs"] == 20
    memory.rm("/bucket/pairs/shard-00001.safetensors")
    assert verify_store(url) == ["shard-00001.safetensors: missing"]
    assert build(url).verify() == []
    memory.rm("/bucket", recursive=True)


# Counting and joining -------------------------------------------------------------------------------------------------


def test_stats_count_what_is_there(build, tmp_path):
    store = build(cfg=2.0, solver="heun", steps=3)
    report = stats(store.path)
    assert (report["pairs"], report["shards"], report["nfe_per_pair"], report["forwards_per_pair"]) == (20, 3, 5, 10)
    assert (
        report["bytes"] == sum(p.stat().st_size for p in store.path.glob("shard*"))
        and report["nfe"] == 100
        and report["forwards"] == 200
    )
    labels = store.batch(range(20))[1].labels.bincount(minlength=10)
    assert report["labels"] == {
        "used": int((labels > 0).sum()),
        "of": 10,
        "least": int(labels.min()),
        "most": int(labels.max()),
    }
    assert report["timed_pairs"] == 20 and report["pairs_per_s"] > 0 and len(report["workers"]) == 1
    build("part", share=Share(0, 3, only=True))
    assert (stats(tmp_path / "part")["pairs"], stats(tmp_path / "part")["of"]) == (8, 20)
    json.dumps(report)


def test_stores_that_follow_each_other_are_joined(build, tmp_path):
    whole = build("whole", n=28)
    build("a", n=16)
    build("b", n=12, seed=16)
    assert merge_stores([tmp_path / "b", tmp_path / "a"], tmp_path / "ab") == 28
    assert files(tmp_path / "ab") == files(whole.path)
    noise, labels = noise_and_labels(range(28), (1, 8, 8), 10)
    assert torch.equal(PairStore(tmp_path / "ab").batch(range(28))[0], noise) and torch.equal(
        PairStore(tmp_path / "ab").batch(range(28))[1].labels, labels
    )


def test_only_like_is_joined_with_like(build, tmp_path):
    build("a", n=16)
    build("gap", n=8, seed=20)
    build("steps", n=8, seed=16, steps=3)
    build("odd", n=9)
    build("after_odd", n=8, seed=9)
    build("batch", n=8, seed=16, compute=Compute(2, 1))
    build("balanced", n=8, seed=16, labels="balanced")
    build("part", n=16, share=Share(0, 2, only=True))
    cases = (
        (["a", "gap"], "ends before 16"),
        (["a", "steps"], "steps: 2 -> 3"),
        (["odd", "after_odd"], "end within a shard"),
        (["a", "batch"], "batch: 4 -> 2"),
        (["a", "balanced"], "labels"),
        (["a"], "at least two"),
        (["part", "part"], "1 of 2 shards are in none"),
        (["a", "nothing"], "not a pair store"),
    )
    for names, message in cases:
        with pytest.raises(UserError, match=message):
            merge_stores([tmp_path / name for name in names], tmp_path / "out")
    tensors, meta = load_file(tmp_path / "a" / "shard-00001.safetensors")
    save_file(tmp_path / "a" / "shard-00001.safetensors", {**tensors, "target": tensors["target"] + 1}, meta)
    build("c", n=8, seed=16)
    with pytest.raises(UserError, match=r"damaged: its checksum \(sha256\) differs"):
        merge_stores([tmp_path / "a", tmp_path / "c"], tmp_path / "out2")


def test_pairs_in_latent_space_keep_images_only_if_asked(build):
    class Latent(Teacher):
        decoded = 0

        def decode(self, x):
            self.decoded += len(x)
            return x.repeat(1, 3, 2, 2).clamp(-1, 1)

    latent = Latent(tiny_teacher().network, replace(tiny_teacher().spec, space="unnamed"))
    plain = build("plain", teacher=latent)
    assert latent.decoded == 0
    with pytest.raises(UserError, match="holds no images"):
        plain.images([0])
    store = build("decoded", teacher=latent, decode=True)
    images = store.images([3, 12])
    assert (
        images.shape == (2, 3, 16, 16)
        and images.dtype == torch.uint8
        and torch.equal(store.batch([3])[2], plain.batch([3])[2])
    )
    assert torch.equal(images[0, 0, :8, :8], ((store[3][2][0].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))


def test_what_auto_takes_is_recorded_and_taken_by_every_worker(build, monkeypatch):
    monkeypatch.setattr(processor, "bf16_unit", lambda device: "AMX")
    monkeypatch.setattr(processor, "WIDE", 1000)
    auto, said = Compute(4, 1, "auto"), []
    store = build("auto", teacher=tiny_teacher(), compute=auto)
    assert (store.manifest["compute"]["precision"], store.manifest["compute"]["channels_last"]) == ("bf16", True)
    whole = {path.name: path.read_bytes() for path in Path(store.path).glob("shard-*")}
    lost = Path(store.path) / "shard-00001.safetensors"
    lost.unlink()
    monkeypatch.setattr(processor, "bf16_unit", lambda device: None)  # a worker on another machine
    monkeypatch.setattr(processor, "WIDE", 10**9)
    make_pairs(store.settings, store.path, compute=auto, teacher=tiny_teacher(), say=said.append)
    assert {path.name: path.read_bytes() for path in Path(store.path).glob("shard-*")} == whole
    assert any("precision bf16 (auto: as it was begun; nothing here computes in bf16)" in line for line in said)
    plain = build("plain", teacher=tiny_teacher(), compute=auto).manifest["compute"]
    assert "precision" not in plain and "channels_last" not in plain
    asked = build("asked", teacher=tiny_teacher(), compute=Compute(4, 1, channels_last=True)).manifest["compute"]
    assert asked["channels_last"] is True
