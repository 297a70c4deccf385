"""libyaml, where it reads a file, reads what PyYAML's own parser does."""

from __future__ import annotations

import pytest
import yaml

from d2o.errors import UserError
from d2o.settings.yaml_text import compose
from d2o.shipped import recipe_folders, table_folders

TEXTS = (
    "a:\nb: 1\n",
    "a: # c\n  \nb: {c: , d: [1, 2, 1e-4, 1_0, 010, .inf]}",
    "a: |\n  x\n  y\nb: >\n  z\n",
    "---\na: 1\n...\n",
    'a: \'x\n  y\'\n"b": "q\\u0041"',
    "? a\n: b",
    "a: !!str 1\nb: &x yes\n<<: 2020-01-01",
    "a: {b: x:y, c: http://x.y/z}\nd: [x#y, 'it''s']\ne: x #y",
    "a:\n- 1\n-\n  - {b: c}\n",
    "\ufeffa: \U0001f600",
)


def tree(node):
    if node is None:
        return None
    value = node.value
    if isinstance(node, yaml.MappingNode):
        value = [(tree(key), tree(inner)) for key, inner in value]
    elif isinstance(node, yaml.SequenceNode):
        value = [tree(inner) for inner in value]
    return type(node), node.tag, node.start_mark.line, value


def both(text, monkeypatch):
    """What is read with libyaml where it can be, and without."""
    read = []
    for there in (True, False):
        monkeypatch.setattr(yaml, "__with_libyaml__", there)
        try:
            read.append(tree(compose.__wrapped__(text, "f")))
        except UserError as error:
            read.append(error.message)
    return read


needs_libyaml = pytest.mark.skipif(not yaml.__with_libyaml__, reason="PyYAML was built without libyaml")


@needs_libyaml
@pytest.mark.parametrize("text", TEXTS)
def test_both_read_the_same(text, monkeypatch):
    fast, slow = both(text, monkeypatch)
    assert fast == slow and not isinstance(fast, str)


@pytest.mark.long
@needs_libyaml
def test_shipped_files_are_read_fast_and_the_same(monkeypatch):
    paths = [path for folder in (*recipe_folders(), *table_folders()) for path in folder.glob("*.yaml")]
    assert len(paths) > 40
    for path in paths:
        text = path.read_text(encoding="utf-8")
        assert "\t" not in text
        fast, slow = both(text, monkeypatch)
        assert fast == slow and not isinstance(fast, str), path


@needs_libyaml
@pytest.mark.parametrize(
    "text", ["a: &x 1\nb: *x", "a:\tb", "a: [1\n", "a: b: c", 'a: "\0"', "a: 'x", "{" * 500, "---\na: 1\n---\nb: 2"]
)
def test_what_is_refused_is_refused_in_the_same_words(text, monkeypatch):
    fast, slow = both(text, monkeypatch)
    assert isinstance(fast, str) and fast == slow


def test_deep_sections_are_read_by_either(monkeypatch):
    fast, slow = both("[" * 40 + "]" * 40, monkeypatch)
    assert fast == slow and fast is not None
