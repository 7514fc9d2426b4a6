"""The command line: finds the command, and turns what goes wrong into one clear line."""

import contextlib
import io
import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence

from ..core.errors import UserError
from ..core.events import interrupts_apart, terminations_cleaned_up
from . import lean
from .commands import HELP_FLAGS, WrongCommandLineError, find
from .help import show
from .terminal import say

OK, FAILED, USAGE, BUG, INTERRUPTED = 0, 1, 2, 70, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; what goes wrong is told in one line on stderr.

    Args:
        arguments: The words after the name of the program; by default those that it was called with.

    Returns:
        The exit code: 0; 1 for what the user can mend; 2 for a wrong command line; 70 for a bug; 130 for Ctrl-C.
    """
    # Read when the libraries are loaded, which is later. They speak of packages that nobody asked for; OpenMP's threads
    # wait in a busy loop, which makes a step up to ten times as slow on a machine that does something else too.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    for library in ("bitsandbytes", "torchao", "torch.utils._pytree"):  # the last on behalf of torchao
        logging.getLogger(library).setLevel(logging.ERROR)
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal has no letters for is no reason to stop
    given = list(sys.argv[1:] if arguments is None else arguments)
    with interrupts_apart():
        return _run(given)


def run_process(arguments: Sequence[str] | None = None) -> int:
    """Run the command line as all that a process does: as `main`, and no signal meets the interpreter's own end.

    SIGTERM and SIGHUP remove what is half written before they end the process.

    Args:
        arguments: As of `main`.

    Returns:
        The exit code, as of `main`.
    """
    lean.claim()
    with interrupts_apart(), terminations_cleaned_up():
        code = main(arguments)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with contextlib.suppress(OSError):
            sys.stdout.flush()
    return code


def _run(given: list[str]) -> int:
    """Run a command; returns the exit code."""
    try:
        if _asks_for_help(given):
            show(given)
        else:
            from .parser import run  # with cyclopts, which takes as long to import as a help to print

            run(given)
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        if "--debug" in given:
            say("".join(traceback.format_exception(error)).rstrip(), error=True)
        return _explain(error)
    return OK


def _asks_for_help(given: Sequence[str]) -> bool:
    """Whether the words have a flag for it, or no command that can be called, and nothing that is wrong."""
    options = given[: given.index("--")] if "--" in given else given
    if any(flag in options for flag in HELP_FLAGS):
        return True
    _, entry, rest = find(given)
    return entry.target is None and not rest


def _explain(error: BaseException) -> int:
    """Say in one line what went wrong; returns the exit code."""
    if isinstance(error, BrokenPipeError):
        # Whoever read the output has closed it; keep the interpreter from complaining when it flushes at exit.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    if isinstance(error, KeyboardInterrupt):
        # A run that saved where it stands says how to go on, which is no error.
        return _say(str(error) or "interrupted", INTERRUPTED)
    if isinstance(error, WrongCommandLineError):
        return _fail(str(error), USAGE)
    if isinstance(error, UserError):
        return _fail(str(error), FAILED)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}", FAILED)
    # The second is torch's, which is not imported here; on a CPU it raises a plain RuntimeError.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error):
        return _fail("out of memory; make the pictures smaller or lower --batch-size", FAILED)
    return _fail(f"{type(error).__name__}: {error}; this is a bug, and --debug shows where", BUG)


def _fail(message: str, code: int) -> int:
    return _say(f"error: {message}", code)


def _say(message: str, code: int) -> int:
    with contextlib.suppress(OSError):
        say(" ".join(message.split()), error=True)
    return code
