"""What the shell offers behind TAB, as it asks for it: by environment variables."""

from __future__ import annotations

import subprocess
import sys

import pytest

from d2o.cli import words
from d2o.cli.app import main


@pytest.fixture
def offered(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("_D2O_COMPLETE", "complete_bash")

    def offered(line: str) -> list[str]:
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(len(line.split(" ")) - 1))
        with pytest.raises(SystemExit):
            main([])
        return capsys.readouterr().out.split()

    return offered


def test_the_words_are_those_that_d2o_knows():
    assert words.load() == words.collect(), "python -m d2o.cli.words writes them again"


@pytest.mark.parametrize(
    ("line", "first"),
    [
        ("d2o fine", ["finetune"]),
        ("d2o train quick", ["quickstart"]),
        ("d2o train dd_gan_dig", ["dd_gan_digits", "dd_gan_digits:k1"]),
        ("d2o train spi_gan_256:c", ["spi_gan_256:celeba", "spi_gan_256:church"]),
        ("d2o train sid2a_edm2_512 --variant x", ["xs", "xl", "xxl"]),
        ("d2o train recipes/sid_ffhq64.yaml --variant a", ["a1.0", "a1.2"]),
        ("d2o train quickstart --variant ", []),
        (
            "d2o finetune quickstart --set od",
            ["ode=", "ode.loss=", "ode.huber_reduce=", "ode.extractor=", "ode.perceptual_mse="],
        ),
        ("d2o train sid2a_ffhq64:a1.0 --set sid.batch_p", ["sid.batch_pool="]),  # by way of the recipe that it extends
        ("d2o train quickstart --set spi_gan.pl_w", []),
        ("d2o train quickstart --set optim.w", ["optim.weight_decay=", "optim.warmup="]),
        ("d2o train quickstart --sweep pairs.st", ["pairs.steps=", "pairs.store_noise="]),
        ("d2o pairs --teacher sd", ["sd15", "sd3-medium", "sdxl"]),
        ("d2o sample --teacher tiny", ["tiny-sd"]),
        ("d2o teachers sd1", ["sd15"]),
        ("d2o export x --format on", ["onnx"]),
        ("d2o eval --protocol sida_ff", ["sida_ffhq64"]),
        ("d2o eval --metrics fd,ki", ["fd,kid"]),
        ("d2o eval --extractor dig", ["digits", "digits-area"]),
        ("d2o eval --against real", ["real:digits"]),
        ("d2o eval --table sida_table9", []),
        ("d2o train quickstart --device cu", ["cuda", "cuda:0"]),
    ],
)
def test_offers(offered, line, first):
    assert offered(line) == first


def test_files_and_folders(offered, tmp_path):
    (tmp_path / "runs" / "a").mkdir(parents=True)
    for name in ("ckpt.safetensors", "ckpt.txt", "my.yaml"):
        (tmp_path / name).touch()
    assert (
        offered("d2o sample ck") == ["ckpt.safetensors"]
        and offered("d2o export run") == ["runs/"]
        and offered("d2o train my") == ["my.yaml"]
    )


def test_neither_help_nor_completion_imports_torch():
    code = (
        "import os, sys; os.environ.update(_D2O_COMPLETE='complete_bash', COMP_WORDS='d2o train q', COMP_CWORD='2')\n"
    )
    code += "from d2o.cli.app import main\ntry: main([])\nexcept SystemExit: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["quickstart", "False"]
