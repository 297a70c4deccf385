"""Prompt files: what is in them, unchanged; what is wrong with them, by its line."""

import hashlib
import json
import pickle
import sys
import tracemalloc

import numpy as np
import pytest
import torch

from d2o.data import prompt_files as module
from d2o.data.prompt_files import open_prompts
from d2o.data.prompts import Prompts, pack, unpack
from d2o.errors import UserError

TEXTS = [
    "a photo of a cat",
    "ein Löwe 🦁",
    " two  spaces ",
    "tab\tand \x07 bell",
    "x" * 5000,
    "日本語",
    "a photo of a cat",
    "\x0b",
]


@pytest.fixture
def write(tmp_path):
    def run(name, data):
        path = tmp_path / name
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return path

    return run


@pytest.fixture
def table(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    def run(columns, rows=3, kind=None):
        path = tmp_path / "p.parquet"
        made = pyarrow.table({name: pyarrow.array(values, kind) for name, values in columns.items()})
        parquet.write_table(made, path, row_group_size=rows)
        return path

    return run


def check(prompts, texts):
    assert len(prompts) == len(texts) and list(prompts) == texts
    assert [prompts[i] for i in range(len(texts))] == texts and prompts[-1] == texts[-1]
    index = [3, 0, 3, -1, 1]
    assert (
        prompts.many(index)
        == prompts.many(np.array(index))
        == prompts.many(torch.tensor(index))
        == [texts[i] for i in index]
    )
    assert prompts.many([]) == []
    for wrong in (len(texts), -len(texts) - 1):
        with pytest.raises(IndexError):
            prompts[wrong]
    again = pickle.loads(pickle.dumps(prompts))
    assert list(again) == texts and again.sha256 == prompts.sha256 and again.path == prompts.path


@pytest.mark.parametrize("begin", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("end", ["", "\n", "\n\n \n\n"])
def test_lines_of_text(write, begin, newline, end):
    texts = TEXTS[:-1]
    path = write("p.txt", begin + (newline.join(texts) + end.replace("\n", newline)).encode())
    prompts = open_prompts(path)
    check(prompts, texts)
    assert prompts.path == path and prompts.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("column", ["prompt", "text", "caption"])
def test_lines_of_json(write, column):
    texts = [*TEXTS, "with\na newline", ""]
    lines = [json.dumps({"id": i, column: text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(texts)]
    check(open_prompts(write("p.jsonl", "\n".join(lines) + "\n")), texts)


@pytest.mark.parametrize("column", ["prompt", "text", "caption"])
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_tables(table, column, rows):
    texts = [*TEXTS, ""]
    check(open_prompts(table({"url": ["u"] * len(texts), column: texts}, rows)), texts)


def test_the_first_of_the_known_columns_counts(write, table):
    record = {"caption": "c", "prompt": "p", "text": "t"}
    assert open_prompts(write("p.jsonl", json.dumps(record)))[0] == "p"
    assert open_prompts(table({name: [value] for name, value in record.items()}))[0] == "p"


def test_tables_of_other_string_types(table):
    import pyarrow

    for kind in (pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())):
        assert list(open_prompts(table({"prompt": TEXTS}, kind=kind))) == TEXTS


def test_lists_need_no_file():
    prompts = Prompts.from_list(TEXTS)
    check(prompts, TEXTS)
    assert prompts.path is None and prompts.sha256 != Prompts.from_list(TEXTS[::-1]).sha256
    assert Prompts.from_list(["ab", "c"]).sha256 != Prompts.from_list(["a", "bc"]).sha256
    for wrong in ([], "one string", ["a", 3], ["half a character: \ud800"]):
        with pytest.raises(UserError):
            Prompts.from_list(wrong)


@pytest.mark.parametrize(
    "name, data, words",
    [
        ("p.txt", b"", "holds no prompts"),
        ("p.txt", b"\xef\xbb\xbf", "holds no prompts"),
        ("p.txt", b"\n \n", "holds no prompts"),
        ("p.txt", b"a\n\nb\n", "line 2 is blank"),
        ("p.txt", b"a\r\nb\r\n\r\nc\r\n", "line 3 is blank"),
        ("p.txt", b"\na\n", "line 1 is blank"),
        ("p.txt", b"a\n \t \nb", "line 2 is blank"),
        ("p.txt", b"a\nb\ncaf\xe9\nd\n", "line 3: not UTF-8"),
        ("p.txt", "two\nlines".encode("utf-16"), "line 1: not UTF-8"),
        ("p.txt", b"a\n" * 5000 + b"\xff\n" + b"a\n", "line 5001: not UTF-8"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "b"\n', "line 2: not JSON"),
        ("p.jsonl", b'{"prompt": "a"}\n["b"]\n', "line 2: not an object"),
        ("p.jsonl", b'{"prompt": "a"}\n{"text": "b"}\n', "line 2: its 'prompt' is missing"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": 3}\n', "line 2: its 'prompt' is not a string"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "\\ud800"}\n', "line 2: not Unicode text"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "\xff"}\n', "line 2: not UTF-8"),
        ("p.jsonl", b'{"prompt": "a"}\n\n{"prompt": "b"}\n', "line 2 is blank"),
        ("p.jsonl", b'{"title": "a", "url": "b"}\n', "line 1: no 'prompt', 'text' or 'caption'; it has title, url"),
        ("p.jsonl", b"[" * 100000, "line 1: not JSON"),
        ("p.parquet", b"PAR1 and no more", "truncated or not a parquet file"),
        ("p.csv", b"a,b", "prompts come as .txt, .jsonl, .parquet"),
    ],
)
def test_mistakes_are_told_by_their_line(write, name, data, words):
    with pytest.raises(UserError, match=words):
        open_prompts(write(name, data))


def test_mistakes_in_tables(table):
    import pyarrow

    with pytest.raises(UserError, match="row 5: its 'text' is missing"):
        open_prompts(table({"text": ["a", "b", "c", "d", None, "e"]}))
    with pytest.raises(UserError, match="no column 'prompt', 'text' or 'caption'; it has title, url"):
        open_prompts(table({"title": ["a"], "url": ["b"]}))
    with pytest.raises(UserError, match="its column 'prompt' holds int64, not strings"):
        open_prompts(table({"prompt": [1, 2]}))
    with pytest.raises(UserError, match="it has no rows"):
        open_prompts(table({"prompt": []}, kind=pyarrow.string()))
    path = table({"prompt": ["a" * 1000] * 100})
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(UserError, match="truncated or not a parquet file"):
        open_prompts(path)


def test_missing_files_and_packages(tmp_path, write, monkeypatch):
    with pytest.raises(UserError, match="no such file: .*p.txt"):
        open_prompts(tmp_path / "p.txt")
    (tmp_path / "d.txt").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        open_prompts(tmp_path / "d.txt")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'd2o\[pairs\]'"):
        open_prompts(write("p.parquet", b""))


def test_urls_are_copied_once_for_each_version(tmp_path, monkeypatch):
    from fsspec.implementations.memory import MemoryFileSystem

    monkeypatch.setenv("D2O_HOME", str(tmp_path / "home"))
    fs = MemoryFileSystem()
    fs.pipe_file("/prompts-test/p.txt", b"one\ntwo\n")
    prompts = open_prompts("memory://prompts-test/p.txt")
    assert list(prompts) == ["one", "two"] and (tmp_path / "home" / "prompts") in prompts.path.parents
    monkeypatch.setattr(module, "download", lambda url, path: path)  # it is there
    assert list(open_prompts("memory://prompts-test/p.txt")) == ["one", "two"]
    monkeypatch.undo()
    monkeypatch.setenv("D2O_HOME", str(tmp_path / "home"))
    fs.pipe_file("/prompts-test/p.txt", b"three\n")
    assert list(open_prompts("memory://prompts-test/p.txt")) == ["three"]
    fs.rm("/prompts-test", recursive=True)
    with pytest.raises(UserError, match="no such file: memory://prompts-test/p.txt"):
        open_prompts("memory://prompts-test/p.txt")


def test_memory_is_a_few_bytes_a_prompt(write):
    n = 100_000
    path = write(
        "p.txt",
        "".join(
            f"a photo of a rather long prompt with the number {i:08d} in it, so that it takes some space\n"
            for i in range(n)
        ),
    )
    tracemalloc.start()
    prompts = open_prompts(path)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 24 * n and peak < path.stat().st_size * 2.5  # (a list of them would hold 150 bytes each)
    assert prompts[n - 1].endswith("99999 in it, so that it takes some space")


def test_a_table_holds_two_of_its_groups(table, monkeypatch):
    prompts = open_prompts(table({"prompt": [f"p{i}" for i in range(100)]}, rows=10))
    assert len(prompts._groups) == module.GROUPS
    reads = []
    read = prompts._file.read_row_group

    class Counting:
        def read_row_group(self, group, columns):
            reads.append(group)
            return read(group, columns=columns)

    prompts._file = Counting()
    prompts._groups.clear()
    order = np.random.RandomState(0).permutation(100)
    assert prompts.many(order) == [f"p{i}" for i in order] and reads == list(
        range(10)
    )  # each once, in whatever order one asks
    assert len(prompts._groups) == module.GROUPS


def test_packing():
    tensors = pack(TEXTS)
    assert {name: t.dtype for name, t in tensors.items()} == {"prompt_bytes": torch.uint8, "prompt_ends": torch.int64}
    assert tensors["prompt_ends"].tolist()[:2] == [16, 30] and len(tensors["prompt_bytes"]) == sum(
        len(t.encode()) for t in TEXTS
    )
    for index in ([2, 0, 2], range(len(TEXTS)), torch.tensor([7, 1]), np.array([4])):
        assert unpack({**tensors, "target": torch.ones(1)}, index) == [TEXTS[i] for i in index]
    assert (
        unpack(pack(["", ""]), [1, 0]) == ["", ""]
        and unpack(pack(["", "a", ""]), [0, 1, 2]) == ["", "a", ""]
        and unpack(tensors, []) == []
    )


def test_prompts_that_ship(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    shipped = open_prompts("digits")
    assert len(set(shipped)) == 120 and shipped[0] == "a handwritten zero"
    (tmp_path / "digits").mkdir()
    with pytest.raises(UserError):  # what is there comes first
        open_prompts("digits")
