"""`python -m d2o` (and so `torchrun -m d2o`) and the console script `d2o`. Nothing is imported before an interruption
can end politely."""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import signal
from types import FrameType

IMPORTING = "<frozen importlib._bootstrap>"


def interrupted(number: int, frame: FrameType | None) -> None:
    """SIGINT. While a module is being imported there is nothing to save, and what an exception would do there depends
    on whose module it is (a traceback, a misleading ImportError): the process ends. Else as usual, by
    KeyboardInterrupt."""
    while frame is not None:
        if frame.f_code.co_filename == IMPORTING:
            os.write(2, b"stopped\n")
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


def main() -> None:
    """Entry point of the program."""
    gc.disable()  # till a command begins: nothing but modules and commands is made, which all stay
    atexit.register(gc.freeze)  # nor is what is left searched for circles at the end; both are a fifth of --help's time
    if (
        signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ):  # not where whoever started us ignores it (nohup, `&` in a script)
        signal.signal(signal.SIGINT, interrupted)
    try:
        from d2o.cli.app import main as run
    except KeyboardInterrupt:  # between two imports
        os.write(2, b"stopped\n")
        raise SystemExit(130) from None
    try:
        run()
    finally:  # all is written and said; what is left is taking the interpreter apart
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGINT, signal.SIG_IGN)


if __name__ == "__main__":
    main()
