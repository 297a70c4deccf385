"""Images from every container, in every condition: nothing is dropped, reordered or changed without a word."""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from d2o.data import images as module
from d2o.data.images import open_images, save_png_bytes, to_float, to_uint8
from d2o.data.synthetic.digits import digits
from d2o.errors import UserError
from d2o.inputs import MAX_IMAGE_BYTES

CLASSES = ("ant", "bee", "cow")


def random_pixels(seed: int, shape: tuple[int, ...] = (6, 6, 3)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(picture: Image.Image | np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    (Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture).save(buffer, kind, **options)
    return buffer.getvalue()


def png(seed: int, shape: tuple[int, ...] = (6, 6, 3)) -> bytes:
    return encoded(random_pixels(seed, shape))


def write_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def write_zip(path: Path, files: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def write_tar(path: Path, files: dict[str, bytes] | list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as archive:
        for name, data in files.items() if isinstance(files, dict) else files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def by_class(n: int = 7) -> dict[str, bytes]:
    """In the wrong order on purpose."""
    return {f"{CLASSES[i % 3]}/{i:02d}.png": png(i) for i in reversed(range(n))}


def table(rows: object) -> bytes:
    return json.dumps({"labels": rows}).encode()


def expected(seeds: list[int]) -> torch.Tensor:
    return torch.stack([torch.from_numpy(random_pixels(i)).permute(2, 0, 1) for i in seeds])


ORDER = [0, 3, 6, 1, 4, 2, 5]  # of by_class(), by path


@pytest.fixture
def lazy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DECODE_AT_ONCE", 0)


# ---- containers ----


def as_folder(root: Path) -> Path:
    return write_folder(root / "folder", by_class() | {"README": b"", "ant/.DS_Store": b"x"})


def as_zip(root: Path) -> Path:
    return write_zip(root / "set.zip", by_class())


def as_deflated_zip(root: Path) -> Path:
    return write_zip(root / "set.ZIP", by_class(), zipfile.ZIP_DEFLATED)


def as_bzipped_zip(root: Path) -> Path:
    return write_zip(root / "set.zip", by_class(), zipfile.ZIP_BZIP2)


def as_wrapped_zip(root: Path) -> Path:
    return write_zip(
        root / "set.zip", {f"outer/{name}": data for name, data in by_class().items()} | {"__MACOSX/._outer": b"x"}
    )


def as_edm_zip(root: Path) -> Path:
    rows = [[f"00000\\img{k:08d}.png" if k == 3 else f"00000/img{k:08d}.png", seed % 3] for k, seed in enumerate(ORDER)]
    return write_zip(
        root / "edm.zip",
        {f"00000/img{k:08d}.png": png(seed) for k, seed in enumerate(ORDER)} | {"dataset.json": table(rows)},
    )


def as_edm_folder(root: Path) -> Path:
    rows = {f"img{k}.png": seed % 3 for k, seed in enumerate(ORDER)}
    return write_folder(
        root / "edm", {f"img{k}.png": png(seed) for k, seed in enumerate(ORDER)} | {"dataset.json": table(rows)}
    )


def as_plain_tar(root: Path) -> Path:
    return write_tar(root / "set.tar", {f"./{name}": data for name, data in by_class().items()})


def as_cls_tar(root: Path) -> Path:
    files: dict[str, bytes] = {}
    for k, seed in reversed(list(enumerate(ORDER))):
        files |= {f"{k:04d}.cls": f"{seed % 3}\n".encode(), f"{k:04d}.png": png(seed), f"{k:04d}.txt": b"a caption"}
    return write_tar(root / "set.tar", files)


def as_json_targz(root: Path) -> Path:
    files: dict[str, bytes] = {}
    for k, seed in enumerate(ORDER):
        files |= {
            f"{k:04d}.webp": encoded(random_pixels(seed), "WEBP", lossless=True),
            f"{k:04d}.json": json.dumps({"label": seed % 3}).encode(),
        }
    return write_tar(root / "set.tar.gz", files)


def as_shards(root: Path) -> Path:
    for shard, part in enumerate((ORDER[:4], ORDER[4:])):
        files: dict[str, bytes] = {}
        for k, seed in enumerate(part):  # the same keys in every shard, as some writers do
            files |= {f"{k:04d}.png": png(seed), f"{k:04d}.cls": str(seed % 3).encode()}
        write_tar(root / f"part-{shard:03d}.tar", files)
    return root / "part-{000..001}.tar"


def as_globbed_shards(root: Path) -> Path:
    return as_shards(root).with_name("part-*.tar")


def as_npz(root: Path) -> Path:
    np.savez(
        root / "set.npz", images=np.stack([random_pixels(i) for i in ORDER]), labels=np.array([i % 3 for i in ORDER])
    )
    return root / "set.npz"


def as_adm_npz(root: Path) -> Path:
    pixels = np.stack([random_pixels(i) for i in ORDER]).transpose(0, 3, 1, 2)
    np.savez_compressed(root / "set.npz", pixels, np.array([[i % 3] for i in ORDER], dtype=np.float32))
    return root / "set.npz"


ALL = [
    as_folder,
    as_zip,
    as_deflated_zip,
    as_bzipped_zip,
    as_wrapped_zip,
    as_edm_zip,
    as_edm_folder,
    as_plain_tar,
    as_cls_tar,
    as_json_targz,
    as_shards,
    as_globbed_shards,
    as_npz,
    as_adm_npz,
]
NAMED = (as_folder, as_zip, as_deflated_zip, as_bzipped_zip, as_wrapped_zip, as_plain_tar)


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("at_once", [1 << 30, 0], ids=["eager", "lazy"])
def test_every_container_holds_the_same_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make, at_once: int
) -> None:
    monkeypatch.setattr(module, "DECODE_AT_ONCE", at_once)
    found = open_images(make(tmp_path))
    assert len(found) == 7 and found.shape == (3, 6, 6) and found.bad == []
    assert found.labels is not None and found.labels.dtype == torch.int64
    assert found.labels.tolist() == [i % 3 for i in ORDER] and found.classes == 3
    assert found.class_names == (list(CLASSES) if make in NAMED else ["0", "1", "2"])
    pixels = found.images(range(7))
    assert pixels.dtype == torch.uint8 and pixels.is_contiguous()
    assert torch.equal(pixels, expected(ORDER))


def test_the_fingerprint_is_that_of_names_sizes_and_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_images(as_folder(tmp_path)).fingerprint
    assert len(first) == 64
    assert (
        open_images(as_zip(tmp_path)).fingerprint
        == first
        == open_images(tmp_path / "folder", resolution=3, channels=1).fingerprint
    )
    monkeypatch.setattr(module, "DECODE_AT_ONCE", 0)
    assert open_images(tmp_path / "folder").fingerprint == first
    (tmp_path / "folder/ant/00.png").rename(tmp_path / "folder/bee/00.png")
    assert open_images(tmp_path / "folder").fingerprint != first
    np.savez(tmp_path / "a.npz", np.zeros((2, 4, 4), np.uint8))
    np.savez(tmp_path / "b.npz", np.ones((2, 4, 4), np.uint8))
    assert open_images(tmp_path / "a.npz").fingerprint != open_images(tmp_path / "b.npz").fingerprint


def test_indices_in_any_form_and_order(tmp_path: Path) -> None:
    found = open_images(as_folder(tmp_path))
    everything = found.images(slice(None))
    for wanted in ([5, 0, 5, -1], torch.tensor([5, 0, 5, -1]), np.array([5, 0, 5, -1])):
        assert torch.equal(found.images(wanted), everything[[5, 0, 5, 6]])
    assert found.images([]).shape == (0, 3, 6, 6)
    assert torch.equal(found.images(slice(2, 7, 2)), everything[2:7:2])
    for outside in ([7], [-8]):
        with pytest.raises(IndexError, match="7 images"):
            found.images(outside)
    found.images([0])[:] = 0  # what is handed out is a copy
    assert torch.equal(found.images([0]), everything[:1])


def test_lazy_indices_too(tmp_path: Path, lazy: None) -> None:
    found = open_images(as_zip(tmp_path))
    assert torch.equal(found.images([5, 0, 5, -1]), expected([ORDER[i] for i in (5, 0, 5, 6)]))
    assert found.images([]).shape == (0, 3, 6, 6)


def test_order_is_plain_and_ignores_suffixes(tmp_path: Path) -> None:
    names = ["a.png", "a-b.png", "10.png", "9.png", "B.png", "a.jpg"]
    found = open_images(write_folder(tmp_path / "x", {name: png(1) for name in names}))
    assert found.names == ["10.png", "9.png", "B.png", "a.jpg", "a.png", "a-b.png"]


def test_flat_folder_is_unlabelled(tmp_path: Path) -> None:
    found = open_images(write_folder(tmp_path / "x", {"b.png": png(1), "a.png": png(0)}))
    assert found.labels is None and found.classes == 0 and found.class_names == []
    assert found.name == "x"
    assert torch.equal(found.images([0, 1]), expected([0, 1]))


@pytest.mark.parametrize("pack", [write_folder, write_zip])
def test_null_labels_are_no_labels(tmp_path: Path, pack) -> None:
    found = open_images(pack(tmp_path / "x.zip", {"00000/a.png": png(0), "dataset.json": table(None)}))
    assert found.labels is None and "unlabelled, as dataset.json says" in found.notes


def test_label_gaps_keep_their_classes(tmp_path: Path) -> None:
    found = open_images(write_zip(tmp_path / "x.zip", {"a.png": png(0), "dataset.json": table([["a.png", 6]])}))
    assert found.classes == 7 and found.class_names[-1] == "6"


def test_side_files_are_counted(tmp_path: Path) -> None:
    side = {
        "dataset.json": table(None),
        "samples.json": b"{}",
        ".DS_Store": b"",
        "Thumbs.db": b"",
        "notes.txt": b"",
        "README": b"",
    }
    found = open_images(write_folder(tmp_path / "x", {"a.png": png(0)} | side))
    assert len(found) == 1 and found.bad == []
    assert any(
        note.startswith("5 files that are not an image ignored: .DS_Store, README, Thumbs.db") for note in found.notes
    )


def test_classes_are_stated_and_empty_folders_are_none(tmp_path: Path) -> None:
    root = as_folder(tmp_path)
    (root / "aaa").mkdir()
    found = open_images(root)
    assert found.class_names == list(CLASSES)
    assert "classes are the 3 sub-folders: ant, bee, cow" in found.notes
    assert "sub-folders without a file ignored: aaa" in found.notes


def test_linked_class_folders_and_loops(tmp_path: Path) -> None:
    write_folder(tmp_path / "real", {"0.png": png(0), "1.png": png(1)})
    root = write_folder(tmp_path / "x", {"bee/2.png": png(2)})
    (root / "ant").symlink_to(tmp_path / "real")
    (root / "bee" / "loop").symlink_to(root)
    found = open_images(root)
    assert found.names == ["ant/0.png", "ant/1.png", "bee/2.png"]
    assert any("bee/loop" in note and "not followed" in note for note in found.notes)


# ---- digits ----


def test_real_digits() -> None:
    found = open_images("real:digits")
    pixels, labels = digits()
    assert found.name == "real:digits" and len(found) == 1797 and found.shape == (1, 8, 8) and found.classes == 10
    assert torch.equal(found.images(range(1797))[:, 0], torch.from_numpy(pixels))
    assert set(np.unique(pixels)) == {round(v * 255 / 16) for v in range(17)}
    assert found.labels is not None and found.labels.tolist() == labels.tolist()


def test_digit_halves_are_disjoint_stratified_and_fixed() -> None:
    a, b, both = (open_images(f"real:digits{half}") for half in ("/a", "/b", ""))
    assert (len(a), len(b)) == (899, 898)
    assert a.labels is not None and b.labels is not None
    assert (torch.bincount(a.labels) - torch.bincount(b.labels)).abs().max() <= 1
    everything = sorted(map(bytes, both.images(range(1797)).numpy()))
    assert sorted(map(bytes, torch.cat([a.images(range(899)), b.images(range(898))]).numpy())) == everything
    # a change of the split would change every published number
    assert hashlib.sha256(a.images(range(899)).numpy()).hexdigest() == HALF_A


HALF_A = "e3694a7b156bbde7d293ade3fe9682d32921da10fe17804bb01f49d327ec45d3"


def test_unknown_real_set_names_the_nearest() -> None:
    with pytest.raises(UserError, match="real:digits/a"):
        open_images("real:digits/c")


# ---- bad files ----

GOOD_JPEG = encoded(random_pixels(0, (64, 64, 3)), "JPEG")
BAD_FILES = {
    "cut.jpg": (GOOD_JPEG[: len(GOOD_JPEG) // 2], "truncated"),
    "cut.png": (png(0, (64, 64, 3))[:4000], ""),
    "empty.png": (b"", "empty file (0 bytes)"),
    "text.png": (b"this is not an image", "not an image"),
    "photo.heic": (b"some bytes", "not an image file, by its suffix"),
    "deep.tiff": (encoded(Image.fromarray(np.zeros((64, 64), np.float32)), "TIFF"), "32-bit pixels"),
}


@pytest.mark.parametrize("pack", [write_folder, write_zip, write_tar])
@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_refused_or_skipped_by_name(tmp_path: Path, pack, name: str) -> None:
    data, why = BAD_FILES[name]
    target = pack(
        tmp_path / ("x.tar" if pack is write_tar else "x.zip"),
        {f"{i}.png": png(i, (64, 64, 3)) for i in range(5)} | {name: data},
    )
    with pytest.raises(UserError, match="1 bad file of 6 in x") as error:
        open_images(target)
    assert f"\n  {name}: " in error.value.message and why in error.value.message and "--on-bad skip" in error.value.hint
    found = open_images(target, on_bad="skip")
    assert found.names == [f"{i}.png" for i in range(5)] and found.images(range(5)).shape == (5, 3, 64, 64)
    assert [bad for bad, _ in found.bad] == [name] and why in found.bad[0][1]


def test_first_ten_of_many_bad_files_are_listed(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "x", {"good.png": png(0)} | {f"bad{i:02d}.png": b"" for i in range(13)})
    with pytest.raises(UserError) as error:
        open_images(root)
    assert error.value.message.count("empty file") == 10
    assert "13 bad files of 14 in x" in error.value.message and "... and 3 more" in error.value.message
    assert len(open_images(root, on_bad="skip").bad) == 13
    (root / "good.png").unlink()
    with pytest.raises(UserError, match="no good image in x"):
        open_images(root, on_bad="skip")


def test_decompression_bomb_is_a_bad_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    root = write_folder(tmp_path / "x", {"ok.png": png(0), "bomb.png": png(0, (20, 20, 3))})
    found = open_images(root, on_bad="skip")
    assert [name for name, _ in found.bad] == ["bomb.png"] and "decompression bomb" in found.bad[0][1]


def test_overlong_member_is_a_bad_file(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "x.zip", {"ok.png": png(0), "z.png": png(1)}, zipfile.ZIP_DEFLATED)
    entry = path.read_bytes().rindex(b"PK\1\2")  # of z.png in the central directory; its size stands 24 bytes further
    path.write_bytes(path.read_bytes()[: entry + 24] + struct.pack("<I", 900_000_000) + path.read_bytes()[entry + 28 :])
    found = open_images(path, on_bad="skip")
    assert found.bad == [("z.png", f"it says that it has 900,000,000 bytes; the limit is {MAX_IMAGE_BYTES:,}")]


def test_unreadable_files_and_odd_things(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "x", {"ok.png": png(0)})
    (root / "link.png").symlink_to("nowhere")
    os.mkfifo(root / "pipe.png")
    found = open_images(root, on_bad="skip")
    assert [name for name, _ in found.bad] == ["link.png", "pipe.png"]


def test_damaged_zip_member(tmp_path: Path) -> None:
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2):
        path = write_zip(tmp_path / "x.zip", {"a.png": png(0), "b.png": png(1, (6, 6, 3))}, method)
        data = bytearray(path.read_bytes())
        with zipfile.ZipFile(path) as archive:
            begin = archive.getinfo("b.png").header_offset + 30 + len("b.png")
        data[begin + 40 : begin + 44] = bytes(255 - v for v in data[begin + 40 : begin + 44])
        path.write_bytes(data)
        found = open_images(path, on_bad="skip")
        assert found.names == ["a.png"] and [name for name, _ in found.bad] == ["b.png"], method


def test_encrypted_zip_member(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "x.zip", {"a.png": png(0), "b.png": png(1)})
    data = bytearray(path.read_bytes())
    place = data.rindex(b"PK\x01\x02")
    data[place + 8] |= 1
    path.write_bytes(data)
    assert open_images(path, on_bad="skip").bad == [("b.png", "encrypted")]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_members_named_twice(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a.png", png(0))
        archive.writestr("a.png", png(1))
    write_tar(tmp_path / "x.tar", [("a.png", png(0)), ("a.png", png(1))])
    for name in ("x.zip", "x.tar"):
        with pytest.raises(UserError, match="second member of this name"):
            open_images(tmp_path / name)
        assert torch.equal(open_images(tmp_path / name, on_bad="skip").images([0]), expected([1]))


@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
def test_cut_tar_keeps_what_is_whole(tmp_path: Path, suffix: str) -> None:
    path = write_tar(tmp_path / f"x.{suffix}", {f"{i}.png": png(i, (32, 32, 3)) for i in range(4)})
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * 0.6) if suffix == "tar.gz" else 4096 * 2 + 1600])
    with pytest.raises(UserError, match="cut off"):
        open_images(path)
    found = open_images(path, on_bad="skip")
    assert 0 < len(found) < 4 and path.name in [name for name, _ in found.bad]
    assert torch.equal(found.images([0])[0], torch.from_numpy(random_pixels(0, (32, 32, 3))).permute(2, 0, 1))


def test_what_follows_the_end_of_a_tar_is_not_passed_over(tmp_path: Path) -> None:
    one, two = (write_tar(tmp_path / f"{i}.tar", {f"{i}.png": png(i)}).read_bytes() for i in range(2))
    (tmp_path / "both.tar").write_bytes(one + two)
    with pytest.raises(UserError, match=r"both.tar: something that is not a tar member at byte"):
        open_images(tmp_path / "both.tar")
    (tmp_path / "bare.tar").write_bytes(one[:1024])
    assert any("no end mark" in note for note in open_images(tmp_path / "bare.tar").notes)


def test_links_in_a_tar_are_bad(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {"a.png": png(0)})
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("b.png")
        link.type, link.linkname = tarfile.SYMTYPE, "a.png"
        archive.addfile(link)
    assert open_images(path, on_bad="skip").bad == [("b.png", "not a regular file")]


# ---- bad labels ----


@pytest.mark.parametrize(
    ("rows", "bad", "why"),
    [
        ([["a.png", 0]], "b.png", "no label"),
        ([["a.png", 0], ["b.png", None]], "b.png", "no label"),
        ([["a.png", 0], ["b.png", -1]], "b.png", "the label -1 is out of range"),
        ([["a.png", 0], ["b.png", 10**9]], "b.png", "out of range"),
        ([["a.png", 0], ["b.png", "dog"]], "b.png", "'dog' is not a whole number"),
        ([["a.png", 0], ["b.png", True]], "b.png", "not a whole number"),
        ([["a.png", 0], ["b.png", [0, 1]]], "b.png", "not a whole number"),
        ([["a.png", 0], ["b.png", 1], ["b.png", 2]], "b.png", "two labels: 1 and 2"),
        ([["a.png", 0], ["b.png", 1], ["c.png", 2]], "c.png", "named in dataset.json but not there"),
    ],
)
def test_bad_labels_in_dataset_json(tmp_path: Path, rows: list[object], bad: str, why: str) -> None:
    path = write_zip(tmp_path / "x.zip", {"a.png": png(0), "b.png": png(1), "dataset.json": table(rows)})
    with pytest.raises(UserError, match=f"{bad}: "):
        open_images(path)
    found = open_images(path, on_bad="skip")
    assert [name for name, _ in found.bad] == [bad] and why in found.bad[0][1]
    assert len(found) == (2 if bad == "c.png" else 1)


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b'{"lab": 1}', b'{"labels": 3}', b'{"labels": [1, 2]}', b"\xff\xfe", b"[" * 100_000]
)
def test_broken_dataset_json(tmp_path: Path, content: bytes) -> None:
    root = write_folder(tmp_path / "x", {"a.png": png(0), "dataset.json": content})
    with pytest.raises(UserError, match=r"dataset\.json in .* does not hold labels") as error:
        open_images(root, on_bad="skip")
    assert '"labels"' in error.value.hint


def test_images_beside_class_folders_are_bad(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "x", by_class() | {"stray.png": png(9)})
    found = open_images(root, on_bad="skip")
    assert found.bad == [("stray.png", "no class: it lies beside the class sub-folders")] and len(found) == 7


def test_bad_labels_in_a_tar(tmp_path: Path) -> None:
    files = {f"{i}.png": png(i) for i in range(5)} | {"0.cls": b"0", "1.cls": b"one", "2.cls": b"-2", "3.json": b"{"}
    found = open_images(write_tar(tmp_path / "x.tar", files), on_bad="skip")
    assert found.names == ["0.png"]
    whys = dict(found.bad)
    assert "'one' is not a whole number" in whys["1.png"] and "out of range" in whys["2.png"]
    assert "cannot be read from 3.json" in whys["3.png"] and whys["4.png"] == "no label"


def test_two_images_of_one_sample(tmp_path: Path) -> None:
    files = {
        "a.png": png(0),
        "a.cls": b"0",
        "a.seg.png": png(1),
        "b.left.png": png(2),
        "b.right.png": png(3),
        "b.cls": b"1",
        "b.emb.npy": b"x",
    }
    found = open_images(write_tar(tmp_path / "x.tar", files), on_bad="skip")
    assert found.names == ["a.png", "b.left.png"] and found.labels is not None and found.labels.tolist() == [0, 1]
    assert [name for name, _ in found.bad] == ["a.seg.png", "b.right.png"]


def test_json_without_a_label_leaves_a_tar_unlabelled(tmp_path: Path) -> None:
    found = open_images(write_tar(tmp_path / "x.tar", {"a.png": png(0), "a.json": b'{"caption": "x"}'}))
    assert found.labels is None and any("a.json" in note for note in found.notes)


def test_bad_labels_in_an_npz(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.stack([random_pixels(i) for i in range(4)]), y=np.array([1, -1, 0.5, 0]))
    with pytest.raises(UserError, match=r"2 bad files of 4 in x\.npz"):
        open_images(tmp_path / "x.npz")
    found = open_images(tmp_path / "x.npz", on_bad="skip")
    assert [name for name, _ in found.bad] == ["00000001", "00000002"]
    assert (
        found.labels is not None
        and found.labels.tolist() == [1, 0]
        and torch.equal(found.images([0, 1]), expected([0, 3]))
    )


# ---- paths that are no set of images ----


def test_paths_that_are_no_set(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_folder(tmp_path / "texts", {"a.txt": b"", "b.txt": b""})
    write_folder(
        tmp_path,
        {
            "x.png": png(0),
            "x.rar": b"",
            "x.zip": b"not a zip",
            "x.tar": b"not a tar" * 200,
            "x.npz": b"not an npz",
            "y.tar": b"",
        },
    )
    whole = write_zip(tmp_path / "whole.zip", by_class()).read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[:-30])
    for name, message, hint in (
        ("nowhere", "no such file or folder", "accepted: a folder"),
        ("empty", "no images in empty", "accepted: a folder"),
        ("texts", "2 files that are not an image", "accepted: a folder"),
        ("x.png", "not a set of images", "accepted: a folder"),
        ("x.rar", "not a set of images", "accepted: a folder"),
        ("x.zip", "not a readable zip", "cut off"),
        ("cut.zip", "not a readable zip", "cut off"),
        ("x.tar", "not a readable tar", "cut off"),
        ("y.tar", "not a readable tar", "cut off"),
        ("x.npz", "not a readable npz", "cut off"),
        ("no-{0..1}.tar", "no shard", "accepted: a folder"),
        ("no-*.tar", "no shard", "accepted: a folder"),
        ("{x,y}.zip", "no shard", "accepted: a folder"),
        ("*.png", "names tar shards", "accepted: a folder"),
        ("no-{3..1}.tar", "empty or too long", ""),
    ):
        with pytest.raises(UserError) as error:
            open_images(tmp_path / name)
        assert message in error.value.message and hint in error.value.hint, name


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(2), "sigma": np.zeros((2, 2))}, "no array named images"),
        ({"x": np.zeros((2, 4, 4, 3), np.float32)}, "float32, not uint8"),
        ({"x": np.zeros((2, 5, 4, 7), np.uint8)}, r"shape \[2, 5, 4, 7\]"),
        ({"x": np.zeros((4, 4), np.uint8)}, r"shape \[4, 4\]"),
        ({"x": np.zeros((2, 4, 4), np.uint8), "y": np.zeros(3)}, r"shape \[3\]"),
        ({"x": np.zeros((0, 4, 4, 3), np.uint8)}, "no images in x.npz"),
        ({"x": np.array([{}, {}], dtype=object)}, "not a readable npz"),
    ],
)
def test_npz_that_is_no_set(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(UserError, match=message):
        open_images(tmp_path / "x.npz", on_bad="skip")


@pytest.mark.parametrize("wrong", [{"on_bad": "skp"}, {"resize": "lanzcos"}, {"resolution": 0}, {"channels": 2}])
def test_arguments_that_make_no_sense(wrong: dict[str, object]) -> None:
    with pytest.raises(UserError):
        open_images("real:digits", **wrong)


# ---- size and colour ----


def test_different_sizes_need_a_resolution(tmp_path: Path) -> None:
    root = write_folder(
        tmp_path / "x", {"a.png": png(0, (6, 8, 3)), "b.png": png(1, (6, 8, 3)), "c.png": png(2, (5, 9, 3))}
    )
    with pytest.raises(UserError, match=r"a\.png is 8x6, c\.png is 9x5") as error:
        open_images(root)
    assert "resolution" in error.value.hint
    assert open_images(root, resolution=4).shape == (3, 4, 4)


def test_equal_sizes_need_not_be_square(tmp_path: Path) -> None:
    assert open_images(write_folder(tmp_path / "x", {"a.png": png(0, (6, 8, 3))})).shape == (3, 6, 8)


@pytest.mark.parametrize(("width", "height", "left", "top"), [(12, 8, 2, 0), (8, 13, 0, 2), (8, 8, 0, 0), (9, 8, 0, 0)])
def test_centre_crop_without_resizing_takes_the_centre(
    tmp_path: Path, width: int, height: int, left: int, top: int
) -> None:
    pixels = random_pixels(0, (height, width, 3))
    found = open_images(write_folder(tmp_path / "x", {"a.png": encoded(pixels)}), resolution=8)
    assert torch.equal(found.images([0])[0], torch.from_numpy(pixels[top : top + 8, left : left + 8]).permute(2, 0, 1))
    assert ("1 image cropped to the centre square" in found.notes) == (width != height)


@pytest.mark.parametrize("size", [(60, 35), (35, 61), (12, 7), (20, 20), (9, 64)])
@pytest.mark.parametrize("resize", ["lanczos", "bicubic", "bilinear", "box"])
def test_resize_is_that_of_pil_followed_by_the_crop(tmp_path: Path, size: tuple[int, int], resize: str) -> None:
    picture = Image.fromarray(random_pixels(0, (size[1], size[0], 3)))
    found = open_images(write_folder(tmp_path / "x", {"a.png": encoded(picture)}), resolution=16, resize=resize)
    short = min(size)
    big = picture.resize(
        (round(size[0] * 16 / short), round(size[1] * 16 / short)), getattr(Image.Resampling, resize.upper())
    )
    left, top = (big.width - 16) // 2, (big.height - 16) // 2
    wanted = np.asarray(big.crop((left, top, left + 16, top + 16)))
    assert np.array_equal(found.images([0])[0].permute(1, 2, 0).numpy(), wanted)
    assert any(
        note.startswith("1 image " + ("shrunk" if short > 16 else "enlarged")) and resize in note
        for note in found.notes
    )


def test_resize_is_antialiased(tmp_path: Path) -> None:
    board = ((np.indices((64, 64)).sum(0) % 2) * 255).astype(np.uint8)
    pixels = open_images(write_folder(tmp_path / "x", {"a.png": encoded(board)}), resolution=8).images([0])
    assert (pixels.int() - 127).abs().max() <= 4  # without it: 0 or 255


def test_long_strip_is_a_bad_file(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "x", {"a.png": png(0), "strip.png": encoded(np.zeros((1, 60000), np.uint8))})
    found = open_images(root, resolution=128, on_bad="skip")
    assert found.bad == [("strip.png", "60000x1 is too long a strip to resize and crop")]


def test_channels_follow_the_images_unless_asked(tmp_path: Path) -> None:
    grey = random_pixels(0, (6, 6))
    root = write_folder(tmp_path / "x", {"a.png": encoded(grey), "b.png": encoded(grey)})
    assert open_images(root).shape == (1, 6, 6) and open_images(root).notes == []
    repeated = open_images(root, channels=3)
    assert torch.equal(repeated.images([0])[0], torch.from_numpy(grey).expand(3, 6, 6))
    assert repeated.notes == ["2 images repeated from grey to 3 channels"]
    (root / "c.png").write_bytes(png(1))
    mixed = open_images(root)
    assert mixed.shape == (3, 6, 6) and mixed.notes == ["2 images repeated from grey to 3 channels"]
    reduced = open_images(root, channels=1)
    assert reduced.notes == ["1 image reduced from colour to grey (ITU-R 601 luma)"]
    luma = np.array(Image.fromarray(random_pixels(1)).convert("L"))
    assert torch.equal(reduced.images([2])[0, 0], torch.tensor(luma))


def rgba() -> np.ndarray:
    return np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 0, 51]]], np.uint8).repeat(3, 0)


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(Image.fromarray(np.array([[10, 20, 30], [40, 50, 60]], np.uint8)), "PNG", exif=exif)


def palette(**options: object) -> bytes:
    picture = Image.fromarray(np.array([[0, 1]], np.uint8), "L").convert("P")
    picture.putpalette([10, 20, 30, 40, 50, 60])
    return encoded(picture, **options)


CONVERSIONS = {
    "alpha": (encoded(rgba()), [[[255, 255, 204]], [[0, 255, 204]], [[0, 255, 204]]], "with alpha composited on white"),
    "grey and alpha": (
        encoded(Image.fromarray(np.array([[[100, 255], [100, 0]]], np.uint8), "LA")),
        [[[100, 255]]],
        "with alpha composited on white",
    ),
    "palette": (palette(), [[[10, 40]], [[20, 50]], [[30, 60]]], "expanded from a palette"),
    "transparent colour": (
        palette(transparency=1),
        [[[10, 255]], [[20, 255]], [[30, 255]]],
        "with alpha composited on white",
    ),
    "16-bit grey": (
        encoded(Image.fromarray(np.array([[0, 255, 256, 65535]], np.uint16))),
        [[[0, 0, 1, 255]]],
        "reduced from 16 to 8 bits",
    ),
    "16-bit ppm": (b"P6 1 1 65535\n\xff\xff\x80\x80\x00\x00", [[[255]], [[128]], [[0]]], "reduced from 16 to 8 bits"),
    "1 bit": (encoded(Image.fromarray(np.array([[True, False]]))), [[[255, 0]]], "widened from 1 to 8 bits"),
    "cmyk": (
        encoded(Image.new("CMYK", (1, 1), (0, 255, 255, 0)), "TIFF"),
        [[[255]], [[0]], [[0]]],
        "converted from CMYK to RGB",
    ),
    "rotated": (rotated(), [[[40, 10], [50, 20], [60, 30]]], "turned upright as EXIF says"),
    "animation": (
        encoded(Image.new("L", (1, 1), 0), "GIF", save_all=True, append_images=[Image.new("L", (1, 1), 255)]),
        None,
        "cut to the first frame of an animation",
    ),
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_conversions_are_made_and_stated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    data, wanted, note = CONVERSIONS[name]
    root = write_folder(tmp_path / "x", {"a.png": data, "b.png": data})
    found = open_images(root)
    assert f"2 images {note}" in found.notes
    if wanted is not None:
        h, w = len(wanted[0]), len(wanted[0][0])
        assert found.shape == (len(wanted), h if name != "alpha" else 3, w)
        assert found.images([0])[0, :, :h].tolist() == wanted
    monkeypatch.setattr(module, "DECODE_AT_ONCE", 0)
    later = open_images(root)
    assert later.notes == found.notes and torch.equal(later.images([1, 0]), found.images([1, 0]))


def test_every_exif_orientation_is_undone(tmp_path: Path) -> None:
    upright = Image.fromarray(random_pixels(0, (8, 16, 3)).repeat(8, 0).repeat(8, 1))
    stored_as = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # orientation -> the PIL transpose that stores it so
    for kind, suffix in (("JPEG", "jpg"), ("WEBP", "webp"), ("TIFF", "tif")):
        files = {}
        for turn, transpose in stored_as.items():
            exif = Image.Exif()
            exif[0x0112] = turn
            options = (
                {"quality": 95, "subsampling": 0} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
            )
            files[f"{turn}.{suffix}"] = encoded(
                upright.transpose(Image.Transpose(transpose)), kind, exif=exif, **options
            )
        found = open_images(write_folder(tmp_path / suffix, files))
        assert found.shape == (3, 64, 128) and "7 images turned upright as EXIF says" in found.notes
        distance = (
            (found.images(range(7)).int() - torch.from_numpy(np.array(upright)).permute(2, 0, 1).int())
            .abs()
            .float()
            .mean()
        )
        assert distance < 12, kind  # JPEG rounds, and noise is hard on it; a wrong turn gives about 85


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_is_not_a_damaged_image(tmp_path: Path) -> None:
    data = encoded(random_pixels(0), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert len(open_images(write_folder(tmp_path / "x", {"a.jpg": data}))) == 1


def test_a_long_header_is_read_to_its_end(tmp_path: Path) -> None:
    icc = bytes(200_000)
    found = open_images(write_folder(tmp_path / "x", {"a.jpg": encoded(random_pixels(0), "JPEG", icc_profile=icc)}))
    assert found.shape == (3, 6, 6)


def test_arrays_are_converted_like_files(tmp_path: Path) -> None:
    pixels = np.stack([random_pixels(i, (8, 12, 4)) for i in range(3)])
    np.savez(tmp_path / "x.npz", pixels)
    root = write_folder(tmp_path / "x", {f"{i}.png": encoded(image) for i, image in enumerate(pixels)})
    for options in ({}, {"resolution": 4}, {"resolution": 8, "channels": 1}):
        one, other = open_images(tmp_path / "x.npz", **options), open_images(root, **options)
        assert torch.equal(one.images(range(3)), other.images(range(3))) and one.notes == other.notes
    assert open_images("real:digits/a", resolution=16, channels=3).shape == (3, 16, 16)


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        ((2, 5, 5, 3), (3, 5, 5)),
        ((2, 3, 5, 5), (3, 5, 5)),
        ((2, 5, 5), (1, 5, 5)),
        ((2, 1, 5, 6), (1, 5, 6)),
        ((2, 3, 3, 3), (3, 3, 3)),
    ],
)
def test_npz_layouts(tmp_path: Path, shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    np.savez(tmp_path / "x.npz", random_pixels(0, shape))
    assert open_images(tmp_path / "x.npz").shape == wanted


# ---- decoding on demand ----


def broken_later(root: Path) -> Path:
    """Two classes; images 1, 2 (class a) and 4 (class b) have whole headers and broken pixels."""
    data = {i: encoded(random_pixels(i, (64, 64, 3)), "JPEG") for i in range(7)}
    return write_folder(
        root / "x",
        {
            f"{'a' if i < 4 else 'b'}/{i}.jpg": data[i][: len(data[i]) // 2] if i in (1, 2, 4) else data[i]
            for i in range(7)
        },
    )


def test_lazy_refuses_by_name(tmp_path: Path, lazy: None) -> None:
    found = open_images(broken_later(tmp_path))
    assert len(found) == 7 and found.bad == []
    found.images([0, 3])
    with pytest.raises(UserError, match=r"2 bad files of 7 in x:\n  a/1.jpg: .*truncated.*\n  b/4.jpg: ") as error:
        found.images([4, 3, 1])
    assert "skip" in error.value.hint


def test_lazy_skip_puts_the_next_good_image_of_the_class(tmp_path: Path, lazy: None) -> None:
    root = broken_later(tmp_path)
    whole = open_images(root, on_bad="skip")
    pixels = whole.images(range(7))
    assert torch.equal(pixels[[1, 2, 4]], pixels[[3, 3, 5]])
    assert [name for name, _ in whole.bad] == ["a/1.jpg", "a/2.jpg", "b/4.jpg"] and len(whole) == 7
    other = open_images(root, on_bad="skip")  # in another order: the same images stand in
    assert torch.equal(torch.cat([other.images([i]) for i in reversed(range(7))]).flip(0), pixels)


def test_lazy_skip_gives_up_when_a_class_has_no_good_image(tmp_path: Path, lazy: None) -> None:
    root = write_folder(tmp_path / "x", {"a/0.jpg": GOOD_JPEG[:3000], "b/1.jpg": GOOD_JPEG})
    found = open_images(root, on_bad="skip")
    with pytest.raises(UserError, match="no other image of its class"):
        found.images([0])


def test_lazy_still_checks_headers_at_opening(tmp_path: Path, lazy: None) -> None:
    root = write_folder(tmp_path / "x", {"a.png": png(0), "b.png": b"junk"})
    with pytest.raises(UserError, match=r"b\.png: not an image"):
        open_images(root)
    assert open_images(root, on_bad="skip").bad == [("b.png", "not an image, or a kind of one that is not read")]


def test_lazy_file_that_changes_is_bad(tmp_path: Path, lazy: None) -> None:
    root = write_folder(tmp_path / "x", {"a.png": png(0), "b.png": png(1)})
    found = open_images(root)
    (root / "a.png").write_bytes(png(0, (7, 7, 3)))
    (root / "b.png").unlink()
    with pytest.raises(UserError, match=r"a.png: is 7x7, but its header says 6x6\n  b.png: no such file"):
        found.images([0, 1])


def test_photos_with_a_preview_are_no_animations(tmp_path: Path, lazy: None) -> None:
    photo = Image.fromarray(random_pixels(0, (400, 400, 3)))
    data = encoded(photo, "MPO", save_all=True, append_images=[photo.resize((30, 30))])
    assert len(data) > 1 << 16  # the preview is behind what is read for a header
    found = open_images(write_folder(tmp_path / "x", {"a.jpg": data, "b.jpg": data}))
    assert (
        found.shape == (3, 400, 400)
        and found.notes == ["2 images compressed with loss (JPEG)"]
        and found.images([0, 1]).shape == (2, 3, 400, 400)
    )


@pytest.mark.parametrize("make", [as_zip, as_json_targz, as_folder])
def test_many_threads_may_read_at_once(tmp_path: Path, lazy: None, make) -> None:
    found = open_images(make(tmp_path))
    wrong: list[int] = []

    def reader(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(20):
            wanted = random.integers(0, 7, 8)
            if not torch.equal(found.images(wanted), expected([ORDER[i] for i in wanted])):
                wrong.append(seed)

    threads = [threading.Thread(target=reader, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_reads_on(tmp_path: Path, lazy: None) -> None:
    found = open_images(as_zip(tmp_path))
    found.images(range(7))  # the threads exist now, and will not in the child
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(found.images(range(7)), expected(ORDER)) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_without_pread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("d2o.data.containers._PREAD", False)
    assert torch.equal(open_images(as_cls_tar(tmp_path)).images(range(7)), expected(ORDER))


# ---- pixels and pictures ----


def test_floats_and_bytes() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    floats = to_float(every)
    assert floats.dtype == torch.float32 and floats[0] == -1 and floats[-1] == 1
    assert torch.equal(to_uint8(floats), every)
    assert to_uint8(torch.tensor([-3.0, 3.0, 0.0])).tolist() == [0, 255, 128]
    assert to_uint8(torch.zeros(2, dtype=torch.bfloat16)).tolist() == [128, 128]


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (3, 5, 7), (1, 1, 1), (3, 1, 4)])
def test_png_bytes_hold_the_pixels(shape: tuple[int, int, int]) -> None:
    image = torch.from_numpy(random_pixels(0, shape))
    data = save_png_bytes(image)
    assert data == save_png_bytes(image.clone())
    with Image.open(io.BytesIO(data)) as picture:
        picture.verify()
    picture = Image.open(io.BytesIO(data))
    assert picture.format == "PNG" and picture.mode == ("L" if shape[0] == 1 else "RGB")
    pixels = np.asarray(picture)
    assert np.array_equal(pixels[None] if shape[0] == 1 else pixels.transpose(2, 0, 1), image.numpy())
    assert save_png_bytes(image.transpose(1, 2).contiguous().transpose(1, 2)) == data  # strides do not matter
