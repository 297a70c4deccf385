"""`d2o pairs` on the command line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from d2o.cli.app import main
from d2o.data.pairs import PairStore
from d2o.recipes.load import load_recipe
from d2o.training.setup import pair_folder
from tests.helpers import tiny_teacher


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run("--n", 8, ...) -> (exit code, stdout, stderr) of `d2o pairs`, in a folder with a teacher t.safetensors."""
    monkeypatch.chdir(tmp_path)
    tiny_teacher(tmp_path / "t.safetensors")

    def call(*words):
        with pytest.raises(SystemExit) as end:
            main(["pairs", *(str(word) for word in words)])
        captured = capsys.readouterr()
        return end.value.code, captured.out, captured.err

    return call


SMALL = [
    "--teacher",
    "t.safetensors",
    "--n",
    12,
    "--out",
    "p",
    "--steps",
    2,
    "--shard-size",
    4,
    "--device",
    "cpu",
    "--threads",
    1,
]


def test_what_xl_s_guidance_takes_for_no_prompt_is_an_option(run, capsys):
    code, _, err = run(*SMALL, "--sdxl-uncond", "zeros")
    assert code == 2 and "sdxl_uncond: zeros is for Stable Diffusion XL" in err
    code, _, err = run(*SMALL, "--sdxl-uncond", "zeroes")
    assert code == 2 and "did you mean 'zeros'" in err


def test_make_again_verify_damage_and_repair(run, tmp_path):
    code, out, err = run(
        *SMALL, "--labels", "0,1", "--cfg", 2, "--dtype", "fp16", "--seed", 9, "--solver", "euler", "--store-noise"
    )
    assert (
        code == 0
        and out == ""
        and "p: 12 pairs of 2 network evaluations (4 passes) in 3 shards" in err
        and "12/12" in err
    )
    store = PairStore(tmp_path / "p")
    assert store.settings.command("p").endswith(
        "--seed 9 --solver euler --steps 2 --cfg 2 --labels 0,1 --shard-size 4 --dtype fp16 --store-noise"
    )
    code, out, err = run(*store.settings.command("p").split()[2:])
    assert code == 0 and "p holds all 12 pairs already; nothing to do" in err
    code, out, err = run("--verify", "p")
    assert code == 0 and "all 3 shards (12 pairs) are as they were made" in out
    shard = tmp_path / "p" / "shard-00002.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    code, out, err = run("--verify", "p")
    assert code == 2 and "shard-00002.safetensors: its checksum differs" in err
    assert f"delete the files named, if they exist, and run: {store.settings.command('p')}" in err
    shard.unlink()
    assert run(*store.settings.command("p").split()[2:])[0] == 0
    assert run("--verify", "p")[0] == 0 and shard.read_bytes() == data


@pytest.mark.parametrize(
    "words, message",
    [
        (["--n", 3, "--out", "p"], "--teacher is missing"),
        (["--teacher", "digits", "--out", "p"], "--n is missing"),
        ([], "--teacher and --n are missing"),
        (["--teacher", "digit", "--n", 3, "--out", "p"], "did you mean 'digits'"),
        (["--teacher", "missing.safetensors", "--n", 3, "--out", "p"], "no such file"),
        (["--teacher", "t.safetensors", "--n", 3, "--out", "p", "--solver", "eular"], "did you mean 'euler'"),
        (
            ["--teacher", "t.safetensors", "--n", 3, "--out", "p", "--device", "tpu9"],
            "--device tpu9: no device of d2o's; it knows cpu, cuda",
        ),
        (["--teacher", "t.safetensors", "--n", "three", "--out", "p"], "integer"),
        (["--teacher", "t.safetensors", "--n", 3, "--out", "t.safetensors"], "is a file; expected a folder"),
        (["--verify", "nowhere"], "nowhere is not a pair store"),
        (["--teacher", "sd15", "--n", 3, "--out", "p", "--cfg", 3], "'sd15' is conditioned on text"),
        (["--teacher", "tiny-sd", "--n", 3, "--out", "p"], "'tiny-sd' is conditioned on text"),
        (["--teacher", "t.safetensors", "--n", 3, "--out", "p", "--cfg", "8:1"], "the range ends before it begins"),
        (["--stats", "nowhere"], "nowhere is not a pair store"),
        (["--stats", "a", "--verify", "a"], "two different things"),
        (["--merge", "nowhere"], "--out is missing"),
        (["--teacher", "t.safetensors", "--n", 3, "--out", "p", "--worker", "3/3"], "expected INDEX/COUNT"),
        (["--teacher", "t.safetensors", "--out", "p", "--prompts", "none.txt"], "none.txt"),
        (["--teacher", "t.safetensors", "--n", 3, "--out", "nosuch://p"], "nosuch"),
        (["--teacher", "t.safetensors", "--n", 3, "--out", "p", "--precision", "fp8"], "unknown precision 'fp8'"),
        (["--teacher", "t.safetensors", "--n", 3, "--out", "p", "--compile", "all"], "unknown compile 'all'"),
        (["--teacher", "t.safetensors", "--n", 3, "--out", "p", "--spacing", "leading"], "takes Karras' steps"),
    ],
)
def test_mistakes_are_one_line_and_create_nothing(run, tmp_path, words, message):
    code, out, err = run(*words)
    assert code == 2 and message in err and "Traceback" not in err and out == ""
    assert [p.name for p in tmp_path.iterdir()] == ["t.safetensors"]


def test_a_solver_that_does_not_fit_creates_nothing(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("a seven\n")
    code, _, err = run("--teacher", "tiny-sd", "--prompts", "prompts.txt", "--out", "p", "--solver", "sde")
    assert code == 2 and "for this teacher: --solver ddim --eta 1" in err and not (tmp_path / "p").exists()


def test_other_settings_name_the_difference(run):
    assert run(*SMALL)[0] == 0
    code, _, err = run(*SMALL, "--seed", 1, "--labels", "balanced")
    assert code == 2 and "seed: 0 -> 1" in err and "labels: random -> balanced" in err


def test_other_ranks_are_silent(run, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(*SMALL) == (0, "", "")


def test_shares_stats_and_merge(run, tmp_path):
    words = [word if word != "p" else None for word in SMALL]
    for index in range(2):
        part = [f"part{index}" if word is None else word for word in words]
        code, _, err = run(
            *part, "--worker", f"{index}/2", "--share-only", "--steps", 3, "--solver", "dpmpp", "--rewire", "permute"
        )
        assert code == 0 and f"share {index}/2 is finished; {index + 1} of 3 shards are other workers'" in err
    code, out, _ = run("--stats", "part0")
    assert code == 0 and json.loads(out)["pairs"] == 8 and json.loads(out)["nfe_per_pair"] == 3
    assert run("--merge", "part0", "--merge", "part1", "--out", "whole")[0] == 0
    assert run("--verify", "whole")[0] == 0 and len(PairStore(tmp_path / "whole")) == 12


PEAKS = """
import contextlib, resource, sys
from d2o.cli.app import main
for n in sys.argv[2:]:
    with contextlib.suppress(SystemExit):
        main(["pairs", *f"{sys.argv[1]}/p{n} --n {n}".split()])
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.long
def test_memory_does_not_grow_with_the_number_of_pairs(tmp_path):
    tiny_teacher(tmp_path / "t.safetensors")
    words = f"--teacher {tmp_path}/t.safetensors --steps 1 --shard-size 256 --device cpu --out {tmp_path}"
    command = [sys.executable, "-c", PEAKS, words, "1000", "8000"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    few, many = map(int, done.stdout.split())
    assert many < few + 25  # MiB
    assert len(PairStore(tmp_path / "p8000")) == 8_000


def test_teachers_are_listed(run, capsys):
    for name, expected in (
        ([], "edm2-img512-xxl"),
        (["sd15"], "CreativeML OpenRAIL-M"),
        (["tiny-sd"], "ships with d2o"),
    ):
        with pytest.raises(SystemExit) as end:
            main(["teachers", *name])
        assert end.value.code == 0 and expected in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        main(["teachers", "sd14"])
    assert end.value.code == 2 and "did you mean 'sd15'" in capsys.readouterr().err


def test_one_answer_says_all_that_is_missing_with_an_example_for_the_teacher(run, tmp_path):
    before = sorted(tmp_path.iterdir())
    code, _, err = run("--teacher", "sd15", "--cfg", 3)
    assert code == 2 and "--n and --prompts are missing" in err and ".jsonl or .parquet" in err
    assert (
        "for example: d2o pairs --teacher sd15 --prompts prompts.txt --n 8192 --cfg 3" in err
        and sorted(tmp_path.iterdir()) == before
    )
    assert "--n and --prompts are missing" in run("--teacher", "tiny-sd")[2]


def test_without_out_the_store_is_where_training_looks_for_it(run, tmp_path):
    code, _, err = run("--teacher", "digits", "--n", 4, "--steps", 3, "--labels", "1,2")
    assert code == 0 and "the store is runs/pairs/digits-heun3-1_2-n4-seed0" in err
    recipe = load_recipe("quickstart", ["pairs.n=4", "pairs.steps=3", "pairs.labels='1,2'"])
    assert PairStore(pair_folder(recipe.teacher, recipe.pairs)).settings.n == 4
    (tmp_path / "p.txt").write_text("a\nb\n")
    code, _, err = run("--teacher", "tiny-sd", "--prompts", "p.txt", "--steps", 1)
    assert code == 0
    assert "note:" not in err
    assert "runs/pairs/tiny-sd-ddim1-p-n2-seed0" in err
