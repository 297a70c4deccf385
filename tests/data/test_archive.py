"""Every format reads back as what was written, by d2o and by the format's own reader, and holds nothing of the
clock."""

import io
import itertools
import json
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from d2o.data import archive as module
from d2o.data.archive import archive_for, check_free, join_pieces
from d2o.data.images import open_images
from d2o.errors import UserError

SUFFIXES = ["", ".zip", ".tar", ".npz"]
RECORD = {"format": "d2o-samples", "text": "é", "n": 7}


def images_of(channels=1, n=7, size=8):
    return torch.randint(0, 256, (n, channels, size, size), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def build(out, images, labels=None, cuts=(0, 3, 7)):
    """Write in parts, cut at `cuts`, and join."""
    archive = archive_for(out)
    parts = [
        archive.encode(a, images[a:b], None if labels is None else labels[a:b]) for a, b in itertools.pairwise(cuts)
    ]
    target = out.with_name("joined")
    archive.join(target, lambda: iter(parts), labels, len(images), RECORD)
    target.rename(out / "samples.json" if archive.in_place else out)
    return archive


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("labelled", [True, False])
def test_images_labels_and_record_read_back(tmp_path, suffix, channels, labelled):
    images, labels = images_of(channels), torch.tensor([5, 0, 5, 2, 9, 1, 1]) if labelled else None
    archive = build(tmp_path / f"x{suffix}", images, labels)
    assert check_free(archive) == RECORD
    found = open_images(tmp_path / f"x{suffix}")
    assert torch.equal(found.images(range(7)), images) and found.bad == []
    assert torch.equal(found.labels, labels) if labelled else found.labels is None


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_bytes_do_not_depend_on_the_cuts_or_the_day(tmp_path, suffix, monkeypatch):
    images, labels = images_of(), torch.arange(7)
    build(tmp_path / f"a{suffix}", images, labels)
    monkeypatch.setattr("time.time", lambda: 2e9)
    build(tmp_path / f"b{suffix}", images, labels, (0, 1, 2, 7))
    one, two = (
        [p.read_bytes() for p in sorted((tmp_path / f"{name}{suffix}").rglob("*.*")) or [tmp_path / f"{name}{suffix}"]]
        for name in "ab"
    )
    assert one == two and one


def test_standard_readers_accept_the_files(tmp_path):
    images, labels = images_of(), torch.arange(7)
    for suffix in SUFFIXES:
        build(tmp_path / f"x{suffix}", images, labels)
    with zipfile.ZipFile(tmp_path / "x.zip") as file:
        assert file.testzip() is None
        assert file.namelist()[:2] == ["00000/img00000000.png", "00000/img00000001.png"] and len(file.namelist()) == 9
        assert json.loads(file.read("dataset.json"))["labels"][3] == ["00000/img00000003.png", 3]
        assert {info.date_time for info in file.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert np.array_equal(
            np.asarray(Image.open(io.BytesIO(file.read("00000/img00000006.png")))), images[6, 0].numpy()
        )
    with tarfile.open(tmp_path / "x.tar") as file:
        assert file.getnames() == [
            ".samples.json",
            *(f"img{i:08d}.{kind}" for i in range(7) for kind in ("png", "cls")),
        ]
        assert file.extractfile("img00000004.cls").read() == b"4"
        assert {(member.mtime, member.mode, member.isreg()) for member in file} == {(0, 0o644, True)}
    with np.load(tmp_path / "x.npz", allow_pickle=False) as arrays:
        assert np.array_equal(arrays["arr_0"], images.permute(0, 2, 3, 1).numpy())
        assert arrays["labels"].tolist() == [*range(7)] and json.loads(str(arrays["samples"])) == RECORD
    assert (tmp_path / "x" / "00000" / "img00000002.png").exists()


@pytest.mark.long
def test_a_zip_of_more_entries_than_16_bits_count(tmp_path, monkeypatch):
    n = 66_000
    monkeypatch.setattr(module, "save_png_bytes", lambda image: b"png")
    archive = archive_for(tmp_path / "x.zip")
    part = archive.encode(0, torch.zeros(n, 1, 1, 1, dtype=torch.uint8), None)
    archive.join(archive.out, lambda: iter([part]), None, n, RECORD)
    with zipfile.ZipFile(archive.out) as file:
        assert len(file.namelist()) == n + 2 and file.read("00065/img00065999.png") == b"png"
    assert check_free(archive) == RECORD


def test_a_zip_entry_beyond_32_bits(tmp_path):
    offset = 2**32 + 10
    with open(tmp_path / "x.zip", "wb") as file:
        file.seek(offset)  # a hole: takes no room on the disk
        entry = module._zip_local(b"a", 0xDEADBEEF, b"data")
        listing = module._zip_central(b"a", 0xDEADBEEF, 4, offset)
        file.write(entry + listing + module._zip_end(1, len(listing), offset + len(entry)))
    with zipfile.ZipFile(tmp_path / "x.zip") as file:
        assert file.infolist()[0].header_offset == offset
        with pytest.raises(zipfile.BadZipFile, match="CRC"):
            file.read("a")  # it is found; its checksum is not that of "data"


def test_folders_of_a_thousand(tmp_path):
    archive = archive_for(tmp_path / "x")
    archive.encode(998, images_of(n=4), None)
    assert sorted(str(p.relative_to(archive.out)) for p in archive.out.rglob("*.png")) == [
        "00000/img00000998.png",
        "00000/img00000999.png",
        "00001/img00001000.png",
        "00001/img00001001.png",
    ]


def test_pieces_of_a_part_join_to_the_same_part():
    archive, images = archive_for("x.zip"), images_of()
    whole = archive.encode(5, images, None)
    joined = join_pieces([archive.encode(5, images[:2], None), archive.encode(7, images[2:], None)])
    assert whole.keys() == joined.keys() and all(torch.equal(whole[name], joined[name]) for name in whole)


def test_unknown_suffixes_and_channels(tmp_path):
    with pytest.raises(UserError, match=r"unknown output format '.rar'") as error:
        archive_for(tmp_path / "x.rar")
    assert ".zip" in error.value.hint
    with pytest.raises(UserError, match="4 channels"):
        archive_for("x.zip").encode(0, images_of(4), None)
    (tmp_path / "dots.in.name").mkdir()
    assert archive_for(tmp_path / "dots.in.name").in_place


def test_only_our_own_files_are_taken_for_finished(tmp_path):
    assert check_free(archive_for(tmp_path / "free.zip")) is None
    (tmp_path / "empty").mkdir()
    assert check_free(archive_for(tmp_path / "empty")) is None
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("x")
    np.savez(tmp_path / "b.npz", arr_0=np.zeros(3))
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as file:
        file.writestr("samples.json", "[]")
    for name in ("a.zip", "a.tar", "a.npz"):
        (tmp_path / name).write_text("foreign")
    for name in ("folder", "b.npz", "c.zip", "a.zip", "a.tar", "a.npz"):
        with pytest.raises(UserError, match="holds no samples that d2o made; it is left as it is"):
            check_free(archive_for(tmp_path / name))
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        check_free(archive_for(tmp_path / "file"))
