"""The YAML of recipes and tables: a tree of values that know their file and line, and the text of a resolved recipe.

Plain YAML with numbers as people write them: 1e-4 is a float (PyYAML takes it for a text), 1_000 and 010 are integers,
only true and false are booleans, dates are texts. Anchors, aliases, merge keys and tags are refused: a file says what
it means where it says it.
"""

from __future__ import annotations

import functools
import itertools
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError

from d2o.errors import UserError
from d2o.inputs import Json, JsonObject, check_input
from d2o.settings.wording import show
from d2o.shipped import shown

MAX_BYTES = 1_000_000  # a recipe has a few kilobytes; whatever is larger is a checkpoint or a data set
DEEP = 32  # sections within sections that are read fast
TAG = "tag:yaml.org,2002:"
NULL = re.compile(r"^(?:~|null|Null|NULL|)$")
BOOLEAN = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
INTEGER = re.compile(r"^[-+]?[0-9]+(?:_[0-9]+)*$|^0x[0-9a-fA-F]+$")
FLOAT = re.compile(
    r"^[-+]?(?:[0-9]+(?:_[0-9]+)*(?:\.(?:[0-9]+(?:_[0-9]+)*)?)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
)


@dataclass(frozen=True)
class Mark:
    """Where a value was written: `file` is a path, or `--set a.b` with line 0; `path` the keys there; `overlay`: it
    changes another."""

    file: str
    line: int = 0
    path: tuple[str, ...] = ()
    overlay: bool = False


@dataclass
class Node:
    """A value of the file: a dict of Nodes, or plain data; which of the two, its reader knows or asks."""

    value: Any
    mark: Mark


@dataclass
class Problems:
    """What is wrong, in the order found; each thing once. `what` is being read."""

    what: str = "recipe"
    lines: dict[tuple[str, int, str], None] = field(default_factory=dict)
    marks: set[Mark] = field(default_factory=set)

    def add(self, mark: Mark, text: str) -> None:
        self.marks.add(mark)
        self.lines[(mark.file, mark.line, text)] = None

    def __bool__(self) -> bool:
        return bool(self.lines)

    def error(self) -> UserError:
        """One problem a line: files in the order in which they were met, each from top to bottom."""
        files = list(dict.fromkeys(file for file, _, _ in self.lines))
        ordered = sorted(self.lines, key=lambda line: (files.index(line[0]), line[1]))
        return UserError(
            "\n".join(f"{file}:{line}: {text}" if line else f"{file}: {text}" for file, line, text in ordered)
        )


class _Loader(yaml.SafeLoader):
    """Composes nodes; refuses aliases."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise ComposerError(None, None, "aliases", self.peek_event().start_mark)
        return super().compose_node(parent, index)


if yaml.__with_libyaml__:

    class _Fast(yaml.CSafeLoader):
        """libyaml's, twenty times as fast; it also takes aliases, and nests deeper."""


class _Dumper(yaml.SafeDumper):
    """Lists on one line; quotes every text that YAML 1.1 or our loader would read as something else."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _dump_list(dumper: yaml.SafeDumper, data: list[object]) -> yaml.Node:
    return dumper.represent_sequence(TAG + "seq", data, flow_style=True)


def _dump_text(dumper: yaml.SafeDumper, data: str) -> yaml.Node:
    return dumper.represent_scalar(
        TAG + "str", data, style=None if data.isprintable() else '"'
    )  # PyYAML folds some separators otherwise


_LOADERS = (_Loader, _Fast) if yaml.__with_libyaml__ else (_Loader,)
for _loader in _LOADERS:
    _loader.yaml_implicit_resolvers = {}
    _loader.add_implicit_resolver(TAG + "null", NULL, ["~", "n", "N", ""])
    _loader.add_implicit_resolver(TAG + "bool", BOOLEAN, list("tTfF"))
for _class in (*_LOADERS, _Dumper):  # integers first: every integer looks like a float too
    _class.add_implicit_resolver(TAG + "int", INTEGER, list("-+0123456789"))
    _class.add_implicit_resolver(TAG + "float", FLOAT, list("-+.0123456789"))
_Dumper.add_representer(list, _dump_list)
_Dumper.add_representer(str, _dump_text)


def dump(data: JsonObject) -> str:
    """The text of a file that reads back to equal data; keys keep their order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=140)


def read(path: Path, what: str) -> yaml.Node | None:
    """The node tree of a file (a recipe, a table), None for an empty one. UserError: unreadable, or not YAML, in one
    line."""
    where = shown(path)
    check_input(path, f"a {what}")
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"cannot read {where}: {error.strerror or error}") from error
    if len(data) > MAX_BYTES:
        raise UserError(f"{where} is not a {what}: it is larger than {MAX_BYTES // 1000} kB")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not a {what}: it is not a text in UTF-8 (byte {error.start})") from error
    return compose(text, where, what)


@functools.lru_cache(
    maxsize=8
)  # a recipe is read for each of its variants, and each member of a sweep; nobody changes it
def compose(text: str, file: str, what: str = "recipe") -> yaml.Node | None:
    """The node tree, None for an empty text. UserError: not YAML, one line."""
    try:
        node = _fast(text)
        return yaml.compose(text, Loader=_Loader) if node is None else node
    except yaml.MarkedYAMLError as error:
        raise UserError(_not_yaml(error, text, file, what)) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(f"{file}:{line}: not a YAML text: it has the control character {error.character!r}") from error
    except RecursionError as error:
        raise UserError(f"{file}: not a {what}: nested too deeply") from error


def _fast(text: str) -> yaml.Node | None:
    """The node tree by libyaml; None: by PyYAML's own parser, which finds what is wrong, or nothing is."""
    if not yaml.__with_libyaml__ or "\t" in text:  # it takes tabs where PyYAML does not
        return None
    try:
        root = yaml.compose(text, Loader=_Fast)
    except (yaml.YAMLError, UnicodeEncodeError):  # the latter of a lone surrogate
        return None
    seen, level = set(), [] if root is None else [root]
    for _ in range(DEEP):
        if not level:
            return root
        below: list[yaml.Node] = []
        for node in level:
            if id(node) in seen:  # an alias
                return None
            seen.add(id(node))
            if isinstance(node, yaml.MappingNode):
                below += itertools.chain.from_iterable(node.value)
            elif isinstance(node, yaml.SequenceNode):
                below += node.value
        level = below
    return None


def _not_yaml(error: yaml.MarkedYAMLError, text: str, file: str, what: str) -> str:
    problem, mark = str(error.problem), error.problem_mark or error.context_mark
    lines = text.splitlines()
    line = mark.line if mark else 0
    here = lines[line] if line < len(lines) else ""
    if "'\\t'" in problem or here[: len(here) - len(here.lstrip())].count("\t"):
        why = "a tab; YAML is indented with spaces"
    elif "quoted scalar" in str(error.context) and error.context_mark:
        line, why = error.context_mark.line, "a quote is opened here and never closed"
    elif "mapping values are not allowed" in problem:
        why = "a second `:` in one line, or wrong indentation; put texts with `: ` in quotes"
    elif error.context and "flow" in str(error.context) and error.context_mark:
        line, why = error.context_mark.line, f"a bracket is opened here and not closed as it should be ({problem})"
    elif "another document" in problem:
        why = f"a second document begins here (`---`); a {what} is one document"
    elif "aliases" in problem:
        why = f"aliases are not used in {what}s; write the value out"
    else:
        why = f"not YAML: {problem}"
    return f"{file}:{line + 1}: {why}"


def build(node: yaml.Node, mark: Mark, problems: Problems) -> Node:
    """Values with their places. Duplicate keys, keys that are not texts, tags: reported, and left out."""
    mark = Mark(mark.file, node.start_mark.line + 1 if mark.line else 0, mark.path, mark.overlay)
    if not isinstance(node, yaml.MappingNode):
        return Node(_plain(node, mark, problems), mark)
    if node.tag != TAG + "map":
        problems.add(mark, f"{_at(mark)}tags like {node.tag} are not used in {problems.what}s")
    values: dict[str, Node] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1 if mark.line else 0
        here = Mark(mark.file, line, mark.path, mark.overlay)
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != TAG + "str":
            written = key_node.value if isinstance(key_node, yaml.ScalarNode) else "a list or section"
            problems.add(here, f"{_at(mark)}a key must be a text, not {written}")
            continue
        key = key_node.value
        here = Mark(mark.file, line, (*mark.path, key), mark.overlay)
        if key in values:
            problems.add(
                here,
                (
                    f"{_at(here)}given twice (first in line {values[key].mark.line})"
                    if line
                    else f"{_at(here)}given twice"
                ),
            )
            continue
        values[key] = build(value_node, here, problems)
        values[key].mark = here  # the key's line, not that of a value on the next lines
    return Node(values, mark)


def _at(mark: Mark) -> str:
    return f"{'.'.join(mark.path)}: " if mark.path else ""


def _plain(node: yaml.Node, mark: Mark, problems: Problems) -> Json:
    """Plain data: scalars, lists, and sections in lists."""
    if isinstance(node, yaml.SequenceNode) and node.tag == TAG + "seq":
        return [_plain(item, mark, problems) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        return plain(build(node, mark, problems))
    if isinstance(node, yaml.ScalarNode):
        try:
            return _scalar(node.tag.removeprefix(TAG), node.value)
        except (ValueError, KeyError):
            problems.add(mark, f"{_at(mark)}cannot read {show(node.value)} as {node.tag.removeprefix(TAG)}")
            return None
    problems.add(mark, f"{_at(mark)}tags like {node.tag} are not used in {problems.what}s")
    return None


def _scalar(kind: str, text: str) -> str | float | bool | None:
    text.encode()  # a lone surrogate ("\ud800") is a UnicodeEncodeError, which is a ValueError: no file could hold it
    if kind == "int":
        number = int(text, 16 if text.lower().startswith("0x") else 10)
        if abs(number) >= 2**63:  # no setting is, and no library takes it
            raise ValueError
        return number
    if kind == "float":
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    if kind == "bool":
        return {"true": True, "false": False}[text.lower()]
    if kind == "null":
        return None
    if kind == "str":
        return text
    raise KeyError(kind)


def plain(section: Node) -> JsonObject:
    """The values of a section without their places."""
    return {key: plain(node) if isinstance(node.value, dict) else node.value for key, node in section.value.items()}
