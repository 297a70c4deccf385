"""Reads a pickle as data: nothing in it is imported, called or constructed.

Python's unpickler is an interpreter. Even with an allow-list it calls what it is allowed to find, and damaged or
hostile input makes it reserve gigabytes (a memo index of 2^32) or hash for hours (nested tuples as a dictionary key).
Here a global is a name that the caller must expect, and calling it makes a record. Opcodes: those that CPython's
pickler and torch write in protocols 2 to 5.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


class Malformed(Exception):
    """Damaged, or holds what the caller does not expect; the text says what, without the file's name."""


@dataclass(slots=True, eq=False)
class Global:
    """A reference to `module.name`."""

    name: str


@dataclass(slots=True, eq=False)
class Call:
    """What calling the global `name` with `args` would have made, then given `state` by BUILD."""

    name: str
    args: tuple
    state: object = None


@dataclass(slots=True, eq=False)
class PersistentId:
    """An object that the pickle's writer stored elsewhere."""

    value: object


class InertPickle:
    """One or more pickles, one after another in `data`.

    `expected`: global name -> what calling it makes here: `dict` (called with nothing), `set` (with nothing or a short
    list) or `Call` (with anything). Any other global is refused by name. `max_opcodes` over all of `data` bounds time
    and memory. Text and numbers are copied; byte strings are views of `data`. `python2`: its strings are admitted, of
    which those below 256 bytes are read as text. Keys and set elements must be text or 32-bit integers: others can be
    made slow to hash.
    """

    def __init__(
        self,
        data: memoryview,
        expected: Mapping[str, type],
        max_opcodes: int,
        persistent_ids: bool = False,
        python2: bool = False,
    ):
        self.data, self.expected, self.opcodes_left, self.persistent_ids, self.python2 = (
            data,
            expected,
            max_opcodes,
            persistent_ids,
            python2,
        )
        self.position = 0
        self.calls: list[Call] = []
        """All records so far, in the order in which their calls were met."""

    def load(self) -> object:
        """The next pickle's value. Raises Malformed."""
        try:
            return self._run()
        except IndexError as error:
            raise Malformed(f"is damaged: nothing to work on before byte {self.position}") from error
        except UnicodeDecodeError as error:
            raise Malformed(f"is damaged: no text before byte {self.position}") from error

    def _run(self) -> object:
        stack: list[Any] = []
        marked: list[list[Any]] = []  # the stacks below each mark
        memo: dict[int, Any] = {}
        while True:
            self.opcodes_left -= 1
            if self.opcodes_left < 0:
                raise Malformed("has more opcodes than any file of its kind")
            match opcode := bytes(self.take(1)):
                case pickle.PROTO:
                    if not 2 <= (protocol := self.uint(1)) <= 5:
                        raise Malformed(f"uses pickle protocol {protocol}, which is not supported")
                case pickle.FRAME:
                    if self.uint(8) > len(self.data) - self.position:
                        raise Malformed("is truncated")
                case pickle.STOP:
                    return stack.pop()
                # Stack and memo
                case pickle.MARK:
                    marked.append(stack)
                    stack = []
                case pickle.POP:
                    stack.pop()
                case pickle.POP_MARK:
                    stack = marked.pop()
                case pickle.MEMOIZE:
                    memo[len(memo)] = stack[-1]
                case pickle.BINPUT | pickle.LONG_BINPUT:
                    memo[self.uint(1 if opcode == pickle.BINPUT else 4)] = stack[-1]
                case pickle.BINGET | pickle.LONG_BINGET:
                    index = self.uint(1 if opcode == pickle.BINGET else 4)
                    if index not in memo:
                        raise Malformed(f"is damaged: no memo {index} at byte {self.position}")
                    stack.append(memo[index])
                # Values
                case pickle.NONE:
                    stack.append(None)
                case pickle.NEWTRUE | pickle.NEWFALSE:
                    stack.append(opcode == pickle.NEWTRUE)
                case pickle.BININT1 | pickle.BININT2:
                    stack.append(self.uint(1 if opcode == pickle.BININT1 else 2))
                case pickle.BININT:
                    stack.append(struct.unpack("<i", self.take(4))[0])
                case pickle.LONG1:
                    stack.append(int.from_bytes(self.take(self.uint(1)), "little", signed=True))
                case pickle.BINFLOAT:
                    stack.append(struct.unpack(">d", self.take(8))[0])
                case pickle.SHORT_BINUNICODE | pickle.BINUNICODE | pickle.BINUNICODE8:
                    length = self.uint(
                        {pickle.SHORT_BINUNICODE: 1, pickle.BINUNICODE: 4, pickle.BINUNICODE8: 8}[opcode]
                    )
                    stack.append(str(self.take(length), "utf-8", "surrogatepass"))
                case pickle.SHORT_BINBYTES | pickle.BINBYTES | pickle.BINBYTES8 | pickle.BYTEARRAY8:
                    length = self.uint({pickle.SHORT_BINBYTES: 1, pickle.BINBYTES: 4}.get(opcode, 8))
                    stack.append(self.take(length))
                case pickle.SHORT_BINSTRING | pickle.BINSTRING if self.python2:
                    data = self.take(self.uint(1 if opcode == pickle.SHORT_BINSTRING else 4))
                    stack.append(str(data, "latin1") if opcode == pickle.SHORT_BINSTRING else data)
                # Containers
                case pickle.EMPTY_TUPLE:
                    stack.append(())
                case pickle.TUPLE1 | pickle.TUPLE2 | pickle.TUPLE3:
                    size = {pickle.TUPLE1: 1, pickle.TUPLE2: 2, pickle.TUPLE3: 3}[opcode]
                    if len(stack) < size:
                        raise IndexError
                    stack[-size:] = [tuple(stack[-size:])]
                case pickle.TUPLE:
                    items, stack = stack, marked.pop()
                    stack.append(tuple(items))
                case pickle.EMPTY_LIST:
                    stack.append([])
                case pickle.APPEND:
                    item = stack.pop()
                    _expect(stack[-1], list).append(item)
                case pickle.APPENDS:
                    items, stack = stack, marked.pop()
                    _expect(stack[-1], list).extend(items)
                case pickle.EMPTY_DICT:
                    stack.append({})
                case pickle.SETITEM:
                    items = [stack.pop(), stack.pop()]
                    _expect(stack[-1], dict)[_key(items[1])] = items[0]
                case pickle.SETITEMS:
                    items, stack = stack, marked.pop()
                    if len(items) % 2:
                        raise Malformed(f"is damaged: a key without a value before byte {self.position}")
                    _expect(stack[-1], dict).update((_key(key), value) for key, value in zip(items[::2], items[1::2]))
                case pickle.EMPTY_SET:
                    stack.append(set())
                case pickle.ADDITEMS:
                    items, stack = stack, marked.pop()
                    _expect(stack[-1], set).update(map(_key, items))
                # What would import, call or construct
                case pickle.GLOBAL:
                    stack.append(self.reference(self.line(), self.line()))
                case pickle.STACK_GLOBAL:
                    name = stack.pop()
                    stack.append(self.reference(_expect(stack.pop(), str), _expect(name, str)))
                case pickle.INST:
                    name = self.reference(self.line(), self.line()).name
                    raise Malformed(f"makes an instance of {name!r} in a way that files of its kind do not")
                case pickle.REDUCE | pickle.NEWOBJ:
                    args = _expect(stack.pop(), tuple)
                    stack.append(self.call(_expect(stack.pop(), Global), args))
                case pickle.BUILD:
                    state = stack.pop()
                    if _expect(stack[-1], Call).state is not None:
                        raise Malformed(f"gives {stack[-1].name!r} a state twice")
                    stack[-1].state = state
                case pickle.BINPERSID if self.persistent_ids:
                    stack.append(PersistentId(stack.pop()))
                case _:
                    raise Malformed(
                        f"has opcode {opcode!r} at byte {self.position - 1}, which files of its kind do not use"
                    )

    def take(self, size: int) -> memoryview:
        """The next `size` bytes."""
        if size > len(self.data) - self.position:
            raise Malformed("is truncated")
        self.position += size
        return self.data[self.position - size : self.position]

    def uint(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def line(self) -> str:
        """Text up to the next line break."""
        text, found, _ = bytes(self.data[self.position : self.position + 256]).partition(b"\n")
        if not found:
            raise Malformed(f"is damaged: no name at byte {self.position}")
        self.position += len(text) + 1
        return text.decode()

    def reference(self, module: str, name: str) -> Global:
        full = f"{module[:100]}.{name[:100]}"
        if full not in self.expected:
            raise Malformed(f"refers to {full!r}, which has no place in such a file (nothing was executed)")
        return Global(full)

    def call(self, function: Global, args: tuple) -> object:
        kind = self.expected[function.name]
        if kind is dict and not args:
            return {}
        if kind is set and len(args) <= 1:
            items = _expect(args[0], list) if args else []
            if len(items) <= 64:  # one list could be made into many sets
                return set(map(_key, items))
        if kind is not Call:
            raise Malformed(f"calls {function.name!r} with unexpected arguments")
        record = Call(function.name, args)
        self.calls.append(record)
        return record


def _expect(value: object, kind: type[T]) -> T:
    if type(value) is not kind:
        raise Malformed(f"is damaged: a {type(value).__name__} where a {kind.__name__} belongs")
    return value


def _key(value: object) -> str | int:
    if type(value) is str or (type(value) is int and abs(value) < 2**32):
        return value
    raise Malformed(f"has a {type(value).__name__} that is no text and no small number as a key")
