import sys
import types

import pytest

from tests.interop.nvidia_writer import EasyDict, _reconstruct_persistent_obj


@pytest.fixture
def nvidia_modules(monkeypatch):
    """The names that the official pickles refer to, for the pickler to find while it writes."""

    for thing in (_reconstruct_persistent_obj, EasyDict):
        module = types.ModuleType(thing.__module__)
        setattr(module, thing.__name__, thing)
        monkeypatch.setitem(sys.modules, thing.__module__.partition(".")[0], types.ModuleType("package"))
        monkeypatch.setitem(sys.modules, thing.__module__, module)
