"""The licence of what is trained on images is that of those images: the user's own where the user brings them."""

from __future__ import annotations

import pytest

from d2o.cli.app import main
from d2o.export.exporter import export_checkpoint
from d2o.interop.safetensors_io import read_meta
from d2o.methods.base import Setup
from d2o.methods.spi_gan import SPIGAN
from d2o.recipes.load import load_recipe
from tests.helpers import tiny_student

RECIPE = """
name: mine
method: edm
network: {arch: ddpmpp, model_channels: 16, channel_mult: [1], num_blocks: 1, attn_resolutions: [], dropout: 0.0}
data: {path: "real:digits", licence: CC-BY-4.0, limit: 16}
optim: {lr: 1.0e-3}
batch: 8
images: 8
mini: {data: {path: "real:digits", limit: 8}}
"""


@pytest.mark.parametrize(
    ("name", "licence"),
    [
        ("spi_gan_celeba", "non-commercial"),
        ("dd_gan_celeba", "non-commercial"),
        ("spi_gan_church", None),
        ("spi_gan_cifar10_k1", None),
        ("spi_gan_digits", "CC-BY-4.0"),
        ("teacher_digits", "CC-BY-4.0"),
        ("tiny_sd", "CC-BY-4.0"),
    ],
)
def test_recipes_state_that_of_their_data_set(name, licence):
    assert load_recipe(name).data.licence == licence
    assert load_recipe(name, mini=True).data.licence == "CC-BY-4.0"  # digits


def test_other_images_have_another_whoever_names_them(tmp_path):
    assert load_recipe("spi_gan_celeba", ["data.path=mine"]).data.licence is None
    assert load_recipe("spi_gan_celeba", ["data.licence=CC0-1.0", "data.path=mine"]).data.licence == "CC0-1.0"
    assert load_recipe("spi_gan_celeba", ["data.path=celeba_hq"]).data.licence == "non-commercial"  # the same
    assert load_recipe("spi_gan_celeba", ["data.limit=3"]).data.licence == "non-commercial"
    (tmp_path / "mine.yaml").write_text("extends: spi_gan_celeba\nname: mine\ndata: {path: mine}\n")
    assert load_recipe(tmp_path / "mine.yaml").data.licence is None
    assert load_recipe(tmp_path / "mine.yaml", mini=True).data.licence == "CC-BY-4.0"


def test_it_goes_into_the_checkpoint_and_the_card(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(RECIPE)
    for value, licence in (("CC-BY-4.0", "CC-BY-4.0"), ("null", None), ("my own terms", "my own terms")):
        out = tmp_path / str(licence)
        with pytest.raises(SystemExit) as done:
            main(["train", "mine.yaml", "--out", str(out), "--set", f"data.licence={value}"])
        assert done.value.code == 0, capsys.readouterr().err
        assert read_meta(out / "checkpoints" / "last.safetensors")["spec"]["licence"] == (licence or "not stated")
        made = export_checkpoint(str(out), "safetensors", out / "x.safetensors")
        card = made.card.read_text()
        assert made.licence == (licence or "not stated")
        assert f"Images it was trained on: licence {f'`{licence}`' if licence else 'not stated'}." in card
        assert ("license: unknown" in card) == (licence is None)


def test_a_student_that_starts_from_another_keeps_that_ones(tmp_path):
    start = tiny_student(tmp_path / "s.safetensors")  # CC0-1.0
    assert Setup(None, licence="mine", start=start).product_licence() == "mine; CC0-1.0"
    assert Setup(None, start=start).product_licence() == "CC0-1.0" and Setup(None).product_licence() == "not stated"
    assert "licence" not in SPIGAN.Options.model_fields
