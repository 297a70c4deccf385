"""Files that declare what they do not hold: refused by the sizes they declare, before anything is allocated."""

from __future__ import annotations

import gzip
import io
import json
import os
import resource
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from d2o import inputs
from d2o.cli.app import main
from d2o.data.images import open_images
from d2o.data.prompt_files import MAX_LINE_BYTES, open_prompts
from d2o.data.prompts import MAX_PROMPT_BYTES, Prompts
from d2o.errors import UserError
from d2o.evaluation.results import load_records
from d2o.evaluation.statistics_files import load_statistics
from d2o.inputs import parse_json, read_json
from d2o.interop.npz import read_npy, read_npz
from d2o.interop.numpy_pickle import read_pickled
from d2o.interop.torch_files import read_tensors
from d2o.recipes.load import load_recipe


@pytest.fixture(autouse=True)
def limited_memory() -> object:
    """Whoever believes the largest of the declared sizes meets MemoryError here. (Threads reserve some address space
    each.)"""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**34, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def npy(shape: str, dtype: str = "|u1", body: bytes = b"") -> bytes:
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + body


def npz(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return path


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (npy("(1099511627776,)"), "says that it has the shape|says that it has 1,099,511,627,776 bytes"),
        (npy("(1048576, 1024, 1024, 3)"), "says that it has the shape"),
        (npy("(1000, 64, 64, 3)"), "says that it has 12,288,000 bytes"),
        (npy("(2,)", body=b"123"), "says that it has 2 bytes"),
        (npy("(-1,)"), "shape"),
        (npy("(2,)", "|O", b"12"), "Python objects"),
        (npy("(" * 500), "header"),
        (b"\x93NUMPY\2\0\xff\xff\xff\xff{}", "EOF|header|truncated|expected"),
        (b"", "EOF|magic|expected"),
    ],
)
def test_headers_of_arrays(tmp_path: Path, data: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_npy(data)
    path = npz(tmp_path / "x.npz", arr_0=data, mu=data, sigma=data)
    with pytest.raises(ValueError, match=words):
        read_npz(path, lambda name: True)
    with pytest.raises(UserError, match=f"x.npz is not a readable npz: .*({words})"):
        open_images(path)
    with pytest.raises(UserError, match=f"x.npz cannot be read as statistics .*({words})"):
        load_statistics(path)


def zip_of(path: Path, name: str, data: bytes, size: int, packed: int | None = None, method: int = 8) -> Path:
    """A zip whose one member declares `size` and `packed` bytes."""
    body = zlib.compress(data, wbits=-15) if method == 8 else data
    packed = len(body) if packed is None else packed
    fields = (20, 0, method, 0, 33, zlib.crc32(data), packed, size, len(name))
    local = struct.pack("<4s5H3I2H", b"PK\3\4", *fields, 0) + name.encode() + body
    central = struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, *fields, 0, 0, 0, 0, 0, 0) + name.encode()
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1, 1, len(central), len(local), 0)
    path.write_bytes(local + central + end)
    return path


@pytest.mark.parametrize("method", [0, 8])
@pytest.mark.parametrize(
    ("size", "packed"), [(900_000_000, None), (4_000_000_000, 4_000_000_000), (100, 4_000_000_000), (3, None)]
)
def test_sizes_in_a_zip(tmp_path: Path, method: int, size: int, packed: int | None) -> None:
    with pytest.raises(UserError, match="no good image in x.zip"):
        open_images(zip_of(tmp_path / "x.zip", "a.png", b"x" * 1000, size, packed, method))
    with pytest.raises(UserError, match=r"x.npz is not a readable npz"):
        open_images(zip_of(tmp_path / "x.npz", "arr_0.npy", npy("(40,)", body=b"x" * 40), size, packed, method))


def test_an_image_that_inflates(tmp_path: Path) -> None:
    """900 MB of zeros in 900 kB: the member is never unpacked."""
    packer = zlib.compressobj(1, wbits=-15)
    body = b"".join(packer.compress(bytes(10**7)) for _ in range(30)) + packer.flush()
    path = zip_of(tmp_path / "x.zip", "a.png", b"", 300_000_000, len(body))
    data = path.read_bytes()
    place = data.index(b"PK\1\2")
    path.write_bytes(
        data[:35]
        + body
        + data[place : place + 51]
        + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1, 1, 51, 35 + len(body), 0)
    )
    with pytest.raises(UserError, match="it says that it has 300,000,000 bytes; the limit is 268,435,456"):
        open_images(path)


def test_pixels_that_a_header_declares(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 9000, 9000, 8, 2, 0, 0, 0)
    (tmp_path / "a.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"x")) + chunk(b"IEND", b"")
    )
    with pytest.raises(
        UserError, match="a.png: its header says that it has 81,000,000 pixels; the limit is 67,108,864"
    ):
        open_images(tmp_path)


def test_sizes_in_a_tar(tmp_path: Path) -> None:
    for size, words in (
        (8 * 2**30 - 1, "it says that it has 8,589,934,591 bytes; the limit is"),
        (200_000_000, "cut off inside this file"),
    ):
        info = tarfile.TarInfo("a.png")
        info.size = size
        (tmp_path / "x.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(512))
        with pytest.raises(UserError, match=words):
            open_images(tmp_path / "x.tar")


def test_a_gzip_that_inflates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("d2o.data.containers.UNPACKED_FREELY", 10**6)
    with gzip.open(tmp_path / "x.tar.gz", "wb") as file:
        for _ in range(30):
            file.write(bytes(10**6))
    with pytest.raises(UserError, match=r"would unpack from [\d,]+ to more than [\d,]+ bytes; the limit is"):
        open_images(tmp_path / "x.tar.gz")


def test_unpacked_sizes_are_held_against_the_packed_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs.check_unpacked("x", 2**30, 1)
    inputs.check_unpacked("x", 2**40, 2**34)
    with pytest.raises(
        inputs.TooLarge, match="x would unpack from 1,000,000 to 2,000,000,000 bytes; the limit is 1,073,741,824"
    ):
        inputs.check_unpacked("x", 2 * 10**9, 10**6)


DEEP = "[" * 100_000


def test_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json(DEEP)
    with pytest.raises(ValueError, match="the limit is 10"):
        parse_json(" " * 11, 10)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "dataset.json").write_text(DEEP)
    (tmp_path / "set" / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match="does not hold labels as EDM writes them: nested too deeply"):
        open_images(tmp_path / "set")
    (tmp_path / "r.json").write_text(DEEP)
    with pytest.raises(UserError, match="is not a result of `d2o eval`"):
        load_records(tmp_path / "r.json")
    with pytest.raises(UserError, match="is not a readable JSON file"):
        read_json(tmp_path / "r.json")


YAMLS = (
    "a: &a [x]\nb: *a\n",
    "{" * 1000,
    "a: [" * 1000,
    "a: 1" + "0" * 5000,
    "\0",
    "- " * 1000,
    "a: !!python/object:os.system x",
)


@pytest.mark.parametrize("text", YAMLS)
def test_yaml(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError, match=r"r.yaml"):
        load_recipe(str(tmp_path / "r.yaml"))


def test_prompts(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("a cat\n" + "x" * 10_000_000 + "\n")
    with pytest.raises(
        UserError, match=rf"p.txt, line 2: a prompt of 10,000,000 bytes; the limit is {MAX_PROMPT_BYTES:,}"
    ):
        open_prompts(path)
    path = tmp_path / "p.jsonl"
    for record in ({"prompt": "x" * (MAX_PROMPT_BYTES + 1)}, {"prompt": "x", "more": "y" * MAX_LINE_BYTES}):
        path.write_text('{"prompt": "a"}\n' + json.dumps(record) + "\n")
        with pytest.raises(UserError, match=r"p.jsonl, line 2: a prompt of [\d,]+ bytes; the limit is"):
            open_prompts(path)
    with pytest.raises(UserError, match="prompt 1: a prompt of 10,000,000 bytes"):
        Prompts.from_list(["a", "x" * 10_000_000])


def test_tables_of_prompts(tmp_path: Path) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "p.parquet"
    bad = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(struct.pack("<3i", 0, 1, 3)), pa.py_buffer(b"a\xff\xfe")]
    )
    for column, words in (
        (bad, "row 2: not UTF-8"),
        (pa.array(["a", "b", "x" * 100_000]), "row 3: a prompt of 100,000 bytes"),
    ):
        parquet.write_table(pa.table({"text": column}), path)
        with pytest.raises(UserError, match=f"p.parquet, {words}"):
            open_prompts(path)
    parquet.write_table(pa.table({"text": pa.array(["one text"] * 3_000_000).dictionary_encode()}), path)
    found = open_prompts(path)  # 24 MB of text in a few kilobytes
    assert path.stat().st_size < 100_000 and len(found) == 3_000_000 and found[2_999_999] == "one text"


@pytest.mark.parametrize(
    "suffix", [".npz", ".pkl", ".pt", ".txt", ".jsonl", ".zip", ".tar", ".yaml", ".json", ".safetensors"]
)
def test_pipes_are_not_opened(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"pipe{suffix}"
    os.mkfifo(path)
    readers = {
        ".txt": open_prompts,
        ".jsonl": open_prompts,
        ".yaml": lambda p: load_recipe(str(p)),
        ".json": load_records,
    }
    for read in [readers[suffix]] if suffix in readers else [open_images, load_statistics, read_tensors, read_pickled]:
        with pytest.raises(UserError):
            read(path)


def test_names_that_are_not_utf8(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/set\xff"))
    folder.mkdir()
    for i in range(3):
        buffer = io.BytesIO()
        Image.fromarray(np.full((8, 8), 80 * i, np.uint8)).save(buffer, "png")
        Path(os.fsdecode(os.fsencode(folder) + b"/a\xfe%d.png" % i)).write_bytes(buffer.getvalue())
    assert open_images(folder).names == [rf"a\udcfe{i}.png" for i in range(3)]
    with pytest.raises(SystemExit) as done:
        main(
            [
                "eval",
                str(folder),
                "--against",
                "real:digits",
                "--json",
                str(tmp_path / "r.json"),
                "--report",
                str(tmp_path / "r.html"),
            ]
        )
    assert done.value.code == 0, capsys.readouterr().err
    assert json.loads((tmp_path / "r.json").read_text())["x"]["source"] == str(folder)
