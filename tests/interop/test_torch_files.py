"""Published weights are read whatever they are packed in, and nothing in them is executed."""

import copy
import os
import pickle
import random
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from d2o.errors import UserError
from d2o.interop import torch_files
from d2o.interop.torch_files import read_tensors
from tests.interop.nvidia_writer import EasyDict, Persistent, Run, damage, dumps

# torch.jit.script is on its way out, but the files that it wrote stay.
pytestmark = [
    pytest.mark.usefixtures("nvidia_modules"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]
FORMATS = ("safetensors", "archive", "legacy", "script", "module pickle")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.MaxPool2d(2))
        self.layers.add_module("mixed_1", nn.Sequential(nn.Linear(4, 4, bias=False)))
        self.register_buffer("table", torch.arange(6).reshape(2, 3).t())
        self.register_buffer("small", torch.linspace(0, 1, 5, dtype=torch.float16))
        self.register_buffer("none", torch.empty(0, 2))

    def forward(self, x):
        raise RuntimeError("executed")


def published(module):
    """A module as NVIDIA pickles it: its own classes by their source, torch's as they are."""
    children = {name: published(child) for name, child in module._modules.items()}
    if not type(module).__module__.startswith("torch.nn"):
        return Persistent(
            type(module).__name__, {**module.__dict__, "_modules": children, "_init_args": (), "_init_kwargs": {}}
        )
    shallow = copy.copy(module)
    shallow.__dict__ = {**module.__dict__, "_modules": children}
    return shallow


def write(path, kind, module):
    if kind == "safetensors":
        save_file({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, path)
    elif kind == "script":
        torch.jit.script(module).save(str(path))
    elif kind == "module pickle":
        path.write_bytes(dumps(published(module)))
    else:
        torch.save(module.state_dict(), path, _use_new_zipfile_serialization=kind == "archive")


def same(found, state, prefix=""):
    assert list(found) and set(found) == {prefix + name for name in state}
    for name, tensor in state.items():
        assert found[prefix + name].dtype == tensor.dtype and torch.equal(found[prefix + name], tensor), name


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_state_dict(tmp_path, kind):
    net = Net()
    write(tmp_path / "weights", kind, net)
    same(read_tensors(tmp_path / "weights"), net.state_dict())


def test_checkpoints_with_other_things_in_them(tmp_path):
    net = Net()
    torch.save(
        {"epoch": 3, "state_dict": net.state_dict(), "arch": "x", "optimizer": {"groups": [1, 2]}},
        tmp_path / "x.pth.tar",
    )
    same(read_tensors(tmp_path / "x.pth.tar"), net.state_dict(), "state_dict.")
    (tmp_path / "x.pkl").write_bytes(dumps(EasyDict(G_ema=published(net), options=EasyDict(size=3))))
    same(read_tensors(tmp_path / "x.pkl"), net.state_dict(), "G_ema.")


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("kind", ["archive", "legacy", "script", "module pickle", "source"])
def test_nothing_is_executed(tmp_path, kind):
    trap, path = tmp_path / "sprung", tmp_path / "weights"
    if kind == "source":
        empty = {"_parameters": {}, "_buffers": {}, "_modules": {}}
        path.write_bytes(dumps(Persistent("Net", empty, module_src=f"import os; os.mkdir({str(trap)!r})")))
    elif kind == "module pickle":
        path.write_bytes(pickle.dumps({"w": Trap(trap)}))
    elif kind == "script":
        write(tmp_path / "good", "script", Net())
        repack(tmp_path / "good", path, "data.pkl", lambda _: pickle.dumps(Trap(trap), protocol=2))
    else:
        torch.save({"w": torch.ones(2), "trap": Trap(trap)}, path, _use_new_zipfile_serialization=kind == "archive")
    with pytest.raises(UserError) as caught:
        read_tensors(path)
    assert not trap.exists() and str(path) in caught.value.message and "\n" not in caught.value.message
    if kind != "source":
        assert "mkdir" in caught.value.message


def repack(source, path, suffix, change):
    """The zip file with the content of one member changed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(old.read(name)) if name.endswith(suffix) else old.read(name))


@pytest.mark.parametrize("kind", FORMATS)
def test_truncated_and_damaged_files_are_refused_in_one_line(tmp_path, kind):
    """Whatever is done to a file, it is read or refused; nothing else is raised, and nothing grows beyond the file."""
    write(tmp_path / "whole", kind, Net())
    content = (tmp_path / "whole").read_bytes()
    path, rng = tmp_path / "weights", random.Random(0)
    for broken in [content[: len(content) * k // 8] for k in range(8)] + [damage(content, rng) for _ in range(60)]:
        path.write_bytes(broken)
        try:
            found = read_tensors(path)
            assert len(broken) >= len(content) * 7 // 8 and all(
                isinstance(tensor, torch.Tensor) for tensor in found.values()
            )
        except UserError as error:
            assert str(path) in error.message and "\n" not in error.message


def test_foreign_files(tmp_path):
    for content, message in [
        (b"", "is empty"),
        (b"<html>404</html>", "no weights file"),
        (b"\x80", "no weights file"),
        (b"\x80\x04N.", "no module"),
    ]:
        (tmp_path / "x.pth").write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_tensors(tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("images/1.png", b"")
    torch.save({"epoch": 1}, tmp_path / "none.pt")
    for name, message in [
        ("x.zip", "not one that torch.save"),
        ("none.pt", "holds no tensors"),
        ("gone.pt", "no such file"),
        ("", "is a folder"),
    ]:
        with pytest.raises(UserError, match=message):
            read_tensors(tmp_path / name)


def test_archives_that_lie_about_sizes(tmp_path, monkeypatch):
    write(tmp_path / "good", "script", Net())
    repack(tmp_path / "good", tmp_path / "short", "data/0", lambda content: content[:-4])
    with pytest.raises(UserError, match=r"damaged tensor '\w+': it has a storage of another length"):
        read_tensors(tmp_path / "short")
    monkeypatch.setattr(torch_files, "MAX_SCRIPT_PICKLE", 1000)
    with zipfile.ZipFile(tmp_path / "bomb", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(100_000))
    with pytest.raises(UserError, match="would unpack to much more"):
        read_tensors(tmp_path / "bomb")


def test_dictionaries_that_hold_themselves(tmp_path):
    loop = {"w": torch.ones(1)}
    loop["a"] = loop["b"] = loop
    torch.save(loop, tmp_path / "loop.pt")
    with pytest.raises(UserError, match="nests them deeper"):
        read_tensors(tmp_path / "loop.pt")
    (tmp_path / "call.pkl").write_bytes(dumps({"a": Run(getattr, 1, "real")}))
    with pytest.raises(UserError, match="holds no tensors"):
        read_tensors(tmp_path / "call.pkl")
