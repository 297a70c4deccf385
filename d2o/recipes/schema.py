"""What a recipe may say: the sections that live with their readers, put together.

Every field has a description with its unit and default (`describe` lists them). Nothing here reads files: that is
`load.py`.
"""

from __future__ import annotations

import functools
import json
from typing import TYPE_CHECKING, NamedTuple

from pydantic import BaseModel, Field, PrivateAttr, ValidationError, ValidationInfo, field_validator
from pydantic_core import to_jsonable_python

from d2o.data.data_section import DataSection
from d2o.data.pairs_section import PairsSection
from d2o.errors import UserError, unknown
from d2o.inputs import Json, JsonObject
from d2o.recipes.aliases import method_of, own_name, place_of
from d2o.recipes.former import FORMER, GOES, KINDS, is_former, place_as_written, renewed
from d2o.settings.section import NonEmpty, Section, Seed, field
from d2o.settings.wording import Problem, Schema, Shape, dotted, phrase, tree, word
from d2o.settings.yaml_text import dump
from d2o.students.student_section import StudentSection
from d2o.training.eval_section import EvalSection
from d2o.training.train_section import TrainSection

if TYPE_CHECKING:
    from d2o.methods.base import Options

LOADER_KEYS = {
    "extends": "another recipe, by path (relative to this file) or name, with a variant or without (NAME:VARIANT), that"
    " this one changes; one level only",
    "variants": "changes of this recipe by name, each any of the other keys, merged over them: FILE:VARIANT, or"
    " --variant. The run is called `name` with _VARIANT behind, if the variant does not name it. A file without `name`"
    " is trained only as one of its variants; one that extends another has that one's variants too",
    "mini": "what `--mini` changes: any of the other keys, merged over them",
}
"""Top-level keys that the loader uses up: they are in files, never in a `Recipe`."""


class SubjectSection(Section):
    """What is trained, and from what."""

    name: str = field(
        ...,
        "name of the run and of its product: letters, digits and . _ + -",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$",
        json_schema_extra={"words": "a name of letters, digits and . _ + - that begins with a letter or digit"},
    )
    title: str = field("", "one line for people")
    method: NonEmpty = field(..., "training method; its own settings are in a section of that name (`-` written `_`)")
    teacher: NonEmpty | None = field(None, "builtin name, or path of a checkpoint")
    seed: Seed = field(0, "seed of everything random in training")
    data: DataSection | None = field(None, "real images")
    network: JsonObject | None = field(
        None, "architecture, for what is trained from scratch: `arch` and that network's arguments"
    )
    student: StudentSection = Field(StudentSection(), description="how the one-step generator starts")
    pairs: PairsSection | None = field(None, "teacher's samples to train on")
    prompts: NonEmpty | None = field(
        None,
        "file of prompts (txt, jsonl, parquet), for teachers that take text: those that a method draws from, or, with"
        " `data:`, one for each image in their order (default none: those of `pairs:`)",
    )


class Recipe(TrainSection, SubjectSection):
    """One run. `options` holds the method's own section, validated by that method's `Options`."""

    reproduces: JsonObject | None = field(None, "the published number this aims at: paper, table, row, value, ...")
    _options: Options | None = PrivateAttr(None)
    _notes: list[str] = PrivateAttr(default_factory=list)

    @field_validator("eval")
    @classmethod
    def _has_its_images(cls, value: EvalSection | None, info: ValidationInfo) -> EvalSection | None:
        if value is not None and value.reference == "data" and "data" in info.data and info.data["data"] is None:
            raise ValueError("reference: data means the recipe's own images, and it has no `data:` section")
        return value

    @property
    def notes(self) -> list[str]:
        """What to say of how it was written: names of the release before."""
        return self._notes

    @property
    def options(self) -> Options:
        """The method's own settings, an instance of its `Options`."""
        assert self._options is not None  # `check` puts them there, and nothing else makes a Recipe
        return self._options

    @classmethod
    def from_dict(cls, data: JsonObject, where: str = "recipe") -> Recipe:
        """From what `resolved` gives, e.g. in a checkpoint's metadata. UserError: one line per problem, `where` in
        front."""
        recipe, problems = check(data)
        if recipe is None:
            raise UserError("\n".join(f"{where}: {dotted(p.path)}: {p.text}" for p in problems))
        return recipe

    def resolved(self) -> JsonObject:
        """All settings, defaults included, as plain data in a fixed order: a recipe without `extends` and `mini` that
        gives this one."""
        data = {**self.model_dump(), section_key(self.method): self.options.model_dump()}
        return to_jsonable_python(data, inf_nan_mode="constants")

    def to_yaml(self) -> str:
        """`resolved()` as the text of a recipe file; `load_recipe` reads it back to an equal Recipe."""
        return dump(self.resolved())


def section_key(method: str) -> str:
    """The key of a method's own section: `spi-gan` -> `spi_gan`."""
    return method.replace("-", "_")


def check(data: JsonObject) -> tuple[Recipe | None, list[Problem]]:
    """The Recipe that plain data (no `extends`, no `mini`) stands for, or None and everything that is wrong with it."""
    recipe, problems = _of_former(own_name(data))
    return recipe, [Problem(place_of(data, problem.path), problem.text) for problem in problems]


def _of_former(data: JsonObject) -> tuple[Recipe | None, list[Problem]]:
    if is_former(data):
        recipe, problems = _check(renewed(data))
        if recipe is not None:
            recipe._notes.append(f"method: {FORMER} is {', '.join(KINDS)} now, this one {recipe.method}; {GOES}")
        return recipe, [Problem(place_as_written(data, problem.path), problem.text) for problem in problems]
    return _check(data)


def _check(data: JsonObject) -> tuple[Recipe | None, list[Problem]]:
    from d2o.methods.base import get_method, method_names

    rest, method, names = dict(data), data.get("method"), method_names()
    sections = {section_key(name): name for name in names}
    problems: list[Problem] = []
    own: Json = None
    known = isinstance(method, str) and method in names
    if known:
        own = rest.pop(section_key(str(method)), {})
    elif isinstance(method, str) and method:
        error = unknown("method", method, names)
        problems.append(Problem(("method",), f"{error.message} ({error.hint})"))
        rest.pop(section_key(method), None)
    for key in [key for key in rest if key in sections and key not in Recipe.model_fields]:
        value = rest.pop(key)
        if known and value is not None:  # null takes away the section of another method, from a recipe that is extended
            problems.append(
                Problem(
                    (key,),
                    f"unknown key: it belongs to method {sections[key]!r}, but this recipe's method is {method!r}",
                )
            )

    shape = shape_of(method)
    recipe, options = None, None
    try:  # JSON mode: strict, but lists may stand for tuples
        recipe = Recipe.model_validate_json(json.dumps(rest))
    except ValidationError as error:
        problems += word(error, rest, (), shape)
    if known:
        try:
            options = get_method(str(method)).Options.model_validate_json(
                json.dumps({} if own is None else own), strict=True
            )
        except ValidationError as error:
            problems += word(error, own, (section_key(str(method)),), shape)
    if recipe is None or problems:
        return None, problems
    recipe._options = options
    return recipe, []


def shape_of(method: object = None) -> Shape:
    """What a recipe of that method may hold; without the method's own section when there is no such method."""
    from d2o.methods.base import get_method, method_names

    whole, method = _tree(Recipe), method_of(method)
    if isinstance(method, str) and method in method_names():
        own = {**_tree(get_method(method).Options), "description": f"settings of method {method}"}
        whole = {**whole, "properties": {**whole["properties"], section_key(method): own}}
    return Shape(whole, list(LOADER_KEYS))


@functools.cache
def _tree(model: type[BaseModel]) -> Schema:
    return tree(model)


class Row(NamedTuple):
    """One key of a recipe, for printing."""

    key: str
    expected: str
    description: str


def describe(method: str | None = None) -> list[Row]:
    """Every key that a recipe may have, in order; with a method, those of its own section too."""
    shape = shape_of(method)
    rows = [(path, shape.at(path) or {}) for path in shape.paths()]
    loader = [Row(key, "a text" if key == "extends" else "a section", text) for key, text in LOADER_KEYS.items()]
    return [Row(dotted(path), phrase(schema), schema.get("description", "")) for path, schema in rows] + loader
