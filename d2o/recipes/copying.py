"""A shipped recipe as the text of a file of one's own."""

from __future__ import annotations

import itertools

from d2o.recipes.find import Found
from d2o.recipes.layers import read_recipe
from d2o.settings.yaml_text import Problems, dump, plain


def copied(found: Found) -> str:
    """The file as it is; of a variant the keys that it comes to, written out in one layer (`extends` and `variants`
    are gone, comments too), under the head of its file. UserError: as `read_recipe`."""
    text = found.path.read_text(encoding="utf-8")
    if found.variant is None:
        return text
    problems = Problems()
    keys = plain(read_recipe(found, problems))
    if problems:
        raise problems.error()
    head = "".join(itertools.takewhile(lambda line: line.startswith("#"), text.splitlines(keepends=True)))
    first = [key for key in ("name", "title", "method", "teacher") if key in keys]
    last = [key for key in ("reproduces", "mini") if key in keys]
    middle = [key for key in keys if key not in (*first, *last)]
    return f"# Variant {found.variant} of:\n{head}{dump({key: keys[key] for key in (*first, *middle, *last)})}"
