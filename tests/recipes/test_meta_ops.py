"""Shapes from memory are torch's own."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from d2o.recipes.load import load_recipe
from d2o.recipes.meta_ops import RememberedShapes
from d2o.recipes.plan import make_plan


class Called(TorchDispatchMode):
    """What reaches torch."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_only_the_first_call_of_a_kind_reaches_torch():
    def calls(x, y):
        return x * y, x + 1, F.group_norm(x, 2), x.sum(1), x.max(1).values, x.transpose(0, 1) * 2, x * 2, x * 2.0

    def make(dtype, memory_format, device="meta"):
        x = torch.empty(2, 4, 6, 6, dtype=dtype, device=device).to(memory_format=memory_format)
        return x, torch.empty(4, 1, 6, dtype=dtype, device=device)

    for dtype, memory_format in (
        (torch.float32, torch.contiguous_format),
        (torch.float32, torch.channels_last),
        (torch.bfloat16, torch.contiguous_format),
    ):
        x, y = make(dtype, memory_format)
        expected = calls(x, y)
        for again in (False, True):
            with Called() as seen, RememberedShapes():
                found = calls(x, y)
            for a, b in zip(found, expected):
                assert (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)
            assert len({a.untyped_storage()._cdata for a in found[:4]}) == 4  # each has its own memory
            if again:
                assert not {"aten::mul.Tensor", "aten::native_group_norm", "aten::max.dim"} & set(seen.names)
    x, y = make(torch.float32, torch.contiguous_format, "cpu")  # what has values is computed
    x.fill_(3), y.fill_(2)
    with RememberedShapes():
        assert all((x * y == 6).all() for _ in range(2)) and (x.mul_(2) == 6).all()


def test_views_and_changes_stay_what_they_are():
    x = torch.empty(4, 6, device="meta")
    for _ in range(2):
        with RememberedShapes():
            assert x.view(24).untyped_storage()._cdata == x.untyped_storage()._cdata
            assert x.mul_(2) is x


@pytest.mark.long
def test_plans_are_the_same_with_and_without(monkeypatch):
    for name in ("sid_digits", "spi_gan_digits"):
        recipe = load_recipe(name, mini=True)
        plan = make_plan(recipe)
        with monkeypatch.context() as plain:
            plain.setattr("d2o.recipes.counting.RememberedShapes", nullcontext)
            without = make_plan(recipe)
        assert plan == without and any(part.startswith("activations") for part in plan.memory), name
