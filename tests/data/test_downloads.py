"""The papers' data sets as they are downloaded: LSUN's LMDB, CIFAR-10's pickles; and the first images of a set."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch

from d2o.data import images as module
from d2o.data import lmdb_pages
from d2o.data.images import open_images
from d2o.data.threads import map_threads
from d2o.errors import MissingImages, UserError
from tests.data.test_images import by_class, encoded, png, random_pixels, write_folder, write_tar, write_zip

# ---- LMDB.


def church(root: Path, values: dict[bytes, bytes]) -> Path:
    folder = root / "church_outdoor_train_lmdb"
    with lmdb.open(str(folder), map_size=1 << 20) as environment, environment.begin(write=True) as transaction:
        for key, value in values.items():
            transaction.put(key, value)
    return folder


@pytest.mark.parametrize("at_once", [True, False])
def test_lmdb(tmp_path, monkeypatch, at_once):
    if not at_once:
        monkeypatch.setattr(module, "DECODE_AT_ONCE", 0)
    kinds = {b"1b": "PNG", b"0a": "WEBP", b"10": "PNG"}
    values = {
        key: encoded(random_pixels(i), kind, **({"lossless": True} if kind == "WEBP" else {}))
        for i, (key, kind) in enumerate(kinds.items())
    }
    folder = church(tmp_path, values)
    found = open_images(folder)
    assert found.names == ["0a.webp", "10.png", "1b.png"] and found.labels is None and found.shape == (3, 6, 6)
    wanted = torch.stack([torch.from_numpy(random_pixels(i)).permute(2, 0, 1) for i in (1, 2, 0)])
    assert torch.equal(found.images(slice(None)), wanted)
    again = open_images(folder / "data.mdb", limit=2)  # a second time, and by its file
    assert torch.equal(again.images(slice(None)), wanted[:2])
    assert all(torch.equal(image, wanted[1]) for image in map_threads(lambda i: again.images([1])[0], range(8)))


def test_lmdb_of_bare_pixels(tmp_path):
    pixels = [random_pixels(i, (8, 8, 3)) for i in range(3)]
    found = open_images(church(tmp_path, {str(i).encode(): p.tobytes() for i, p in enumerate(pixels)}))
    assert torch.equal(found.images(slice(None)), torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2))


def test_lmdb_that_is_bad(tmp_path):
    folder = church(tmp_path, {b"a": png(0), b"length": b"12"})
    with pytest.raises(UserError, match="length: not an image file"):
        open_images(folder)
    assert len(open_images(folder, on_bad="skip")) == 1
    (folder / "data.mdb").write_bytes(b"cut off")
    with pytest.raises(UserError, match="not a readable LMDB"):
        open_images(folder)
    with pytest.raises(UserError, match="unpack it, and give the folder that it lies in"):
        open_images(write_zip(tmp_path / "x.zip", {"church_outdoor_train_lmdb/data.mdb": b"x"}))


def test_lmdb_of_many_pages(tmp_path):
    """Branches, values on the leaves and on pages of their own; what was overwritten and removed is gone. As LMDB
    itself reads it."""
    folder = church(tmp_path, {b"%05d" % i: bytes(i % 5000) for i in range(300)})
    with lmdb.open(str(folder), map_size=1 << 20) as environment, environment.begin(write=True) as transaction:
        for i in range(0, 300, 7):
            transaction.delete(b"%05d" % i)
        transaction.put(b"00001", b"another")
        expected = [(key, value) for key, value in transaction.cursor()]
    data = (folder / "data.mdb").read_bytes()
    found = list(lmdb_pages.key_places(data))
    assert [(key, data[begin : begin + size]) for key, begin, size in found] == expected and len(found) == 257


def test_lmdb_that_is_damaged_anywhere(tmp_path):
    """Read or refused, whatever byte is changed and wherever it is cut: LMDB itself ends the process."""
    folder = church(tmp_path, {b"%02d" % i: bytes(50 * i) for i in range(60)})
    data, random = (folder / "data.mdb").read_bytes(), np.random.default_rng(0)
    for i in range(600):
        changed = bytearray(data)
        for place in random.integers(0, len(data) if i % 2 else 8500, 1 + i % 4):
            changed[place] = random.integers(256)
        with contextlib.suppress(lmdb_pages.Damaged):
            assert all(begin + size <= len(data) for _, begin, size in lmdb_pages.key_places(bytes(changed)))
        cut = int(random.integers(0, len(data)))
        with contextlib.suppress(lmdb_pages.Damaged):
            assert all(begin + size <= cut for _, begin, size in lmdb_pages.key_places(data[:cut]))


# ---- CIFAR-10 ----


def text(value: str) -> bytes:
    """A string as Python 2's pickler writes it."""
    return b"U" + bytes([len(value)]) + value.encode()


def array(pixels: np.ndarray) -> bytes:
    made = b"cnumpy.core.multiarray\n_reconstruct\nq\x06cnumpy\nndarray\nq\x07K\x00\x85U\x01b\x87Rq\x08"
    kind = b"cnumpy\ndtype\nq\x09U\x02u1K\x00K\x01\x87Rq\x0a(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    raw = pixels.tobytes()
    shape = b"".join(b"M" + struct.pack("<H", n) for n in pixels.shape) + b"\x86"
    return made + b"(K\x01" + shape + kind + b"\x89T" + struct.pack("<I", len(raw)) + raw + b"tb"


def batch(pixels: np.ndarray, labels: list[int]) -> bytes:
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    names = b"](" + b"".join(text(f"img{i}.png") for i in range(len(labels))) + b"e"
    entries = (
        text("batch_label")
        + text("training batch")
        + text("labels")
        + numbers
        + text("data")
        + array(pixels)
        + text("filenames")
        + names
    )
    return b"\x80\x02}q\x01(" + entries + b"u."


NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PIXELS = np.random.default_rng(0).integers(0, 256, (10, 3, 32, 32), dtype=np.uint8)
LABELS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]


def cifar() -> dict[str, bytes]:
    files = {
        f"data_batch_{i + 1}": batch(PIXELS[2 * i : 2 * i + 2].reshape(2, -1), LABELS[2 * i : 2 * i + 2])
        for i in range(5)
    }
    files["batches.meta"] = (
        b"\x80\x02}("
        + text("label_names")
        + b"]("
        + b"".join(map(text, NAMES))
        + b"e"
        + text("num_vis")
        + b"M\x00\x0cu."
    )
    return {
        f"cifar-10-batches-py/{name}": data
        for name, data in (files | {"test_batch": files["data_batch_1"], "readme.html": b""}).items()
    }


@pytest.mark.parametrize("kind", ["folder", "above", "tar.gz", "zip"])
def test_cifar_10(tmp_path, kind):
    if kind in ("folder", "above"):
        path = write_folder(tmp_path, cifar()) / ("cifar-10-batches-py" if kind == "folder" else ".")
    else:
        path = (write_tar if kind == "tar.gz" else write_zip)(tmp_path / f"cifar-10-python.{kind}", cifar())
    found = open_images(path)
    assert torch.equal(found.images(slice(None)), torch.from_numpy(PIXELS)) and found.labels.tolist() == LABELS
    assert found.class_names == list(NAMES) and "test set is left out" in found.notes[0]
    assert found.fingerprint == open_images(path).fingerprint


def test_cifar_10_that_is_bad(tmp_path):
    with pytest.raises(UserError, match="CIFAR-10 without data_batch_2"):
        open_images(
            write_folder(tmp_path / "a", {name: data for name, data in cifar().items() if "batch_2" not in name})
        )
    name = "cifar-10-batches-py/data_batch_3"
    for data, why in (
        (b"\x80\x02cos\nsystem\n(S'true'\ntR.", "os.system.*nothing was executed"),
        (cifar()[name][:3000], "is truncated"),
        (batch(PIXELS[:2, :1].reshape(2, -1), [0, 0]), "no images of CIFAR-10"),
        (batch(PIXELS[:2].reshape(2, -1), [0, 10]), "no labels of CIFAR-10"),
    ):
        with pytest.raises(UserError, match=f"{name}.*{why}"):
            open_images(write_folder(tmp_path / "b", cifar() | {name: data}))


# ---- the first images ----


def test_limit(tmp_path):
    folder = write_folder(tmp_path / "x", by_class())
    whole, part = open_images(folder), open_images(folder, limit=4)
    assert part.names == whole.names[:4] and part.classes == 3 and part.labels.tolist() == [0, 0, 0, 1]
    assert torch.equal(part.images(slice(None)), whole.images(range(4)))
    assert "the first 4 of 7 images, as asked" in part.notes and part.fingerprint != whole.fingerprint
    assert open_images(folder, limit=7).fingerprint == open_images(folder, limit=100).fingerprint == whole.fingerprint
    digits = open_images("real:digits", limit=10)
    assert (
        torch.equal(digits.images(slice(None)), open_images("real:digits").images(range(10)))
        and len(digits.labels) == 10
    )
    with pytest.raises(UserError, match="the first 0 images are none"):
        open_images(folder, limit=0)
    with pytest.raises(MissingImages):
        open_images(tmp_path / "nowhere")
