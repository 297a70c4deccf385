"""Hints are written where an error is found, for all commands that may meet it. Here they are made fit for the command
that was typed."""

from __future__ import annotations

import re

import typer
from typer.core import TyperGroup

OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
OTHER_COMMAND = re.compile(r"\bd2o [a-z]+\b")
BREAKS = re.compile(r"(\n|; |, or )")

known: set[str] = set()
"""Options of any command."""
own: set[str] = set()
"""Options of the command that was typed."""
keys: dict[str, str] = {}
"""Options of other commands that are keys of a recipe to this one: --cfg is pairs.cfg to `d2o train`."""


def typed(context: typer.Context) -> None:
    """Remember the command that was typed, of click's context of the whole program."""
    assert isinstance(context.command, TyperGroup)
    commands = context.command.commands
    options = {
        name: {text for param in command.params for text in (*param.opts, *param.secondary_opts)}
        for name, command in commands.items()
    }
    known.update(*options.values())
    own.clear()
    own.update(options.get(context.invoked_subcommand or "", ()), {"--help"})
    keys.clear()
    if context.invoked_subcommand in ("train", "finetune"):
        keys.update({"--extractor": "eval.extractor", "--against": "eval.reference", "--protocol": "eval.protocol"})
        keys.update(
            (option, f"pairs.{option[2:].replace('-', '_')}")
            for option in options["pairs"] - own
            if option.startswith("--")
        )


def fit(hint: str) -> str:
    """The ways out that a hint offers (parted by line breaks, `;` or `, or`), without those by options that this
    command does not have. What names another command (`d2o eval --against`) stays; a recipe's keys stand for the
    options of `d2o pairs` and `d2o eval`.
    """
    parts = BREAKS.split(hint)
    kept = ""
    for separator, part in zip(["", *parts[1::2]], parts[::2], strict=True):
        if not OTHER_COMMAND.search(part):
            part = OPTION.sub(lambda found: keys.get(found.group(), found.group()), part)
            if any(option in known and option not in own for option in OPTION.findall(part)):
                continue
        kept += (separator if kept else "") + (part if kept else part.removeprefix("or "))
    return kept
