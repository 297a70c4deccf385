"""Operators on the meta device answered from memory: torch works out the shape of each result in Python, which takes
0.2 to 15 ms, and a step of a network repeats the same few hundred thousands of times."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

_Form = tuple[torch.Size, tuple[int, ...], torch.dtype]
_PLAIN = (int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format, type(None))  # int: bool, too
_aten = torch.ops.aten
_KEEPING = (_aten.hardtanh_, _aten.relu_, _aten.silu_, _aten.leaky_relu_, _aten.sigmoid_, _aten.tanh_, _aten.gelu_)
_IN_PLACE = {op.default for op in _KEEPING}
"""Activations in place: the argument is the result, of the same form."""
_known: dict[Hashable, _Form | list[_Form | None]] = {}


class RememberedShapes(TorchDispatchMode):
    """A result on the meta device is nothing but shape, strides and dtype: those of the same operator called with
    tensors of the same kind and the same other arguments before. What views its arguments or changes them, but for
    activations in place, is called as ever."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing of this is compiled: what torch puts around the method for it would take half its time."""
        return False

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> object:
        kwargs = kwargs or {}
        if func in _IN_PLACE and args[0].is_meta:
            return args[0]
        key = _key((args, tuple(kwargs.items()))) if _makes_new(func) else None
        if key is None:
            return func(*args, **kwargs)
        key = (func, key)
        if (form := _known.get(key)) is None:
            made = func(*args, **kwargs)
            if (form := _forms(made)) is not None:
                _known[key] = form
            return made
        return tuple(f and _empty(f) for f in form) if isinstance(form, list) else _empty(form)


_new: dict[OpOverload, bool] = {}


def _makes_new(func: OpOverload) -> bool:
    """Whether the results share no memory with the arguments, and the arguments stay as they are."""
    if (known := _new.get(func)) is None:
        schema = func._schema
        known = _new[func] = all(part.alias_info is None for part in (*schema.arguments, *schema.returns))
    return known


def _key(value: object) -> Hashable | None:
    """What a result's form depends on; None: something else."""
    if isinstance(value, Tensor):
        return (value.shape, value.stride(), value.dtype, value.device) if value.layout == torch.strided else None
    if isinstance(value, (tuple, list)):
        parts = tuple([_key(part) for part in value])
        return None if None in parts else parts
    return (type(value), value) if isinstance(value, _PLAIN) else None  # 1 == 1.0 == True


def _forms(made: object) -> _Form | list[_Form | None] | None:
    """Of a tensor its form, of a tuple those of its tensors; None: there is anything else in it."""
    if not isinstance(made, tuple) or not made:
        return _form(made)
    forms = [_form(part) for part in made]
    known = all(part is None or form is not None for part, form in zip(made, forms))
    return forms if known and forms[0] is not None else None


def _form(made: object) -> _Form | None:
    """None: not a tensor on the meta device, or there is more to it than its form."""
    if not isinstance(made, Tensor) or not made.is_meta or made.layout != torch.strided:
        return None
    return made.shape, made.stride(), made.dtype


def _empty(form: _Form) -> Tensor:
    shape, strides, dtype = form
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")
