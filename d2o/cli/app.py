"""The `d2o` command. Command modules import what is heavy inside their functions, so that --help needs no torch."""

from __future__ import annotations

import errno
import gc
import os
import sys

import typer

from d2o.cli import console, hints
from d2o.cli.env import env
from d2o.cli.eval import evaluate
from d2o.cli.export import export
from d2o.cli.numbers import Command
from d2o.cli.pairs import pairs
from d2o.cli.recipes import recipes
from d2o.cli.sample import sample
from d2o.cli.teachers import teachers
from d2o.cli.train import finetune, train
from d2o.errors import UserError
from d2o.runtime import TRUST, Stopped, share_cores, worker
from d2o.version import __version__

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


# click's ClickException, wherever this typer keeps click (since 0.2x inside itself).
CLICK_ERROR = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")


SURROUNDINGS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
)
"""What is wrong with the disk or its permissions, and not with d2o."""


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"d2o {__version__}")
        raise typer.Exit()


FLAGS = ("--debug", "--quiet", "--trust")
"""Options of all commands, before or behind them: `main` takes them out."""


@app.callback()
def common(
    context: typer.Context,
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and exit."
    ),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error. With any command."),
    trust: bool = typer.Option(
        False,
        "--trust",
        help=(
            "Read d2o's own files without comparing their bytes with the digests they were written with. "
            "With any command."
        ),
    ),
    quiet: bool = typer.Option(
        False, "--quiet", help="Print results and errors only: no progress, no notes. With any command."
    ),
) -> None:
    """Diffusion to one step: turn a slow, many-step diffusion model into a one-step generator."""
    gc.enable()  # which `d2o.__main__` had stopped: a command begins
    hints.typed(context)


app.command(cls=Command)(teachers)
app.add_typer(recipes, name="recipes")
app.command(cls=Command)(pairs)
app.command(cls=Command)(train)
app.command(cls=Command)(finetune)
app.command(cls=Command)(sample)
app.command(name="eval", cls=Command)(evaluate)
app.command(cls=Command)(export)
app.command(cls=Command)(env)


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Exit codes: 0 done; 2 the user's mistake; 1 a fault of d2o; 130 or 143 stopped by SIGINT or SIGTERM,
    work saved."""
    program = arguments is None  # the process is ours, and ends here
    if program:
        share_cores()
    arguments = sys.argv[1:] if arguments is None else arguments
    debug, console.quiet = ("--debug" in arguments), ("--quiet" in arguments)
    if "--trust" in arguments:
        os.environ[TRUST] = "1"
    arguments = [text for text in arguments if text not in FLAGS]
    for stream in (sys.stdout, sys.stderr):  # names of files need not be valid UTF-8, and not every terminal has a †
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = app(arguments, standalone_mode=False, prog_name="d2o")
        if program and worker()[1] > 1 and not code:
            # All is written. Among several processes torch's communication threads can abort an interpreter that takes
            # itself apart.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
        sys.exit(code if isinstance(code, int) else 0)
    except (typer.Abort, KeyboardInterrupt):
        console.err.print("stopped")
        sys.exit(130)
    except Stopped as stop:
        console.err.print("; ".join(filter(None, (stop.message, stop.way))), markup=False)
        sys.exit(stop.exit_code)
    except UserError as error:
        if debug:
            raise
        console.error(error.message, error.hint)
        sys.exit(2)
    except BrokenPipeError:
        sys.exit(141)
    except Exception as error:
        if isinstance(error, CLICK_ERROR):
            error.show()  # type: ignore[attr-defined]
            sys.exit(error.exit_code)  # type: ignore[attr-defined]
        if isinstance(error, OSError) and error.errno in SURROUNDINGS and not debug:
            console.error(
                f"{error.filename or 'a file'}: {error.strerror}", "choose another place, or make room and run again"
            )
            sys.exit(2)
        if debug:
            raise
        if _out_of_memory(error):
            console.error(
                "not enough memory",
                f"{str(error).splitlines()[0] if str(error) else 'it is used up'}; a smaller --batch takes less",
            )
            sys.exit(2)
        hint = "this is a fault of d2o or its surroundings; the same command with --debug shows the traceback"
        console.error(f"{type(error).__name__}: {error}", hint)
        sys.exit(1)


def _out_of_memory(error: Exception) -> bool:
    """Python's own error, CUDA's, or that of torch's allocator on the CPU."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )
