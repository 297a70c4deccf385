"""Writes files as NVIDIA's code does: Python's own pickler, stand-ins for the official classes. Needs the fixture
`nvidia_modules`."""

import pickle
import warnings

import numpy as np
import torch
from torch import nn

from d2o.errors import UserError
from d2o.interop.nvidia_pickle import read_nvidia_pickle
from d2o.networks.build import build_network


class EasyDict(dict):
    __module__ = "dnnlib.util"


def _reconstruct_persistent_obj(meta):
    raise AssertionError("executed")


_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"


class Persistent:
    """Pickles as NVIDIA's persistent classes do."""

    def __init__(self, class_name, state, **meta):
        self.meta = {
            "type": "class",
            "version": 6,
            "module_src": "raise SystemExit",
            "class_name": class_name,
            "state": state,
            **meta,
        }

    def __reduce__(self):
        return _reconstruct_persistent_obj, (self.meta,)


class Run:
    """Pickles as a call of `function`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def official(module, kwargs=None, class_name=None):
    """A module of ours as the official code would pickle its counterpart, under `class_name` if that is not ours."""
    state = {**module.__dict__, "_init_args": (), "_init_kwargs": kwargs or {}, "skip_scale": np.float64(0.5)}
    state["_modules"] = {name: child if child is None else official(child) for name, child in module._modules.items()}
    if isinstance(module, nn.ModuleDict):
        container = nn.ModuleDict()
        container._modules = state["_modules"]
        return container
    return Persistent(class_name or type(module).__name__, state)


def dumps(root, protocol=4):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: TypedStorage is deprecated
        return pickle.dumps(root, protocol=protocol)


def damage(content, rng):
    """`content` with a few bits flipped, bytes replaced, or stretches left out or repeated."""
    damaged = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        place = rng.randrange(len(damaged))
        match rng.randrange(4):
            case 0:
                damaged[place] ^= 1 << rng.randrange(8)
            case 1:
                damaged[place] = rng.randrange(256)
            case 2:
                del damaged[place : place + rng.randrange(1, 40)]
            case 3:
                other = rng.randrange(len(damaged))
                damaged[place:place] = damaged[other : other + rng.randrange(1, 40)]
    return bytes(damaged)


def outcome(path, content):
    """Read `content` and build its network, without memory for the weights; anything but success or UserError
    escapes."""
    path.write_bytes(content)
    try:
        found = read_nvidia_pickle(path)
        assert sum(t.nbytes for t in found.state_dict.values()) <= len(content)
        with torch.device("meta"):
            build_network(found.config())
    except UserError as error:
        assert error.message and "\n" not in error.message
        return "refused"
    return "read"
