"""The command line as cyclopts reads it: the commands, their flags, and what every command takes."""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Parameter

from .. import __version__
from ..core import plugins
from ..core.settings import pick, settings_of
from .commands import DESCRIPTION, HELP_FLAGS, PROGRAM, ROOT, VERSION_FLAG, Entry, Everywhere, WrongCommandLineError
from .config_file import RunFile, whole_numbers
from .flags import explained, flags_of
from .terminal import PlainFormatter

app = App(
    name=PROGRAM,
    help=DESCRIPTION,
    help_flags=HELP_FLAGS,
    help_format="plaintext",
    version=__version__,
    version_flags=VERSION_FLAG,
    config=whole_numbers,
    result_action="return_value",
    exit_on_error=False,
    print_error=False,
    suppress_keyboard_interrupt=False,
)
app.meta.suppress_keyboard_interrupt = False


_SEVERAL = {"runs": f"{__package__}.runs_parser:command"}  # what is a command and has others below it, as an application


def _add(parent: App, entries: Mapping[str, Entry]) -> None:
    """Tell cyclopts of commands; the module of each is imported when it is called."""
    for place, (name, entry) in enumerate(entries.items()):
        target = _SEVERAL.get(name, entry.target) if parent is app else entry.target
        if target is not None:
            parent.command(target, name=name, help=entry.help, sort_key=place)
        else:
            several = App(name=name, help=entry.help, sort_key=place)
            _add(several, entry.below)
            parent.command(several)


_add(app, ROOT.below)
_Flags: Any = flags_of(Everywhere.__name__, __name__, settings_of(Everywhere))


@app.meta.default
def _launch(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    told: Annotated[_Flags | None, Parameter(name="*")] = None,
) -> None:
    everywhere = Everywhere() if told is None else pick(Everywhere, told)
    with notes(everywhere.debug):
        file = None if everywhere.config is None else RunFile(everywhere.config)
        for module in (*everywhere.plugin, *(file.plugins() if file else ())):
            plugins.load_plugin(module)
        app.config = (whole_numbers,) if file is None else (file, whole_numbers)
        try:
            app(tokens)
        finally:  # the application outlives the command where a program or a test calls `main` more than once
            app.config = (whole_numbers,)


def run(given: Sequence[str]) -> None:
    """Run the command that a command line names.

    Args:
        given: The words after the name of the program.

    Raises:
        WrongCommandLineError: There is no such command, flag or value, or one is missing.
    """
    try:
        app.meta(given)
    except CycloptsError as error:
        raise WrongCommandLineError(explained(error)) from error


@contextlib.contextmanager
def notes(debug: bool) -> Iterator[None]:
    """Show what the package logs inside, as notes on the present stderr; a program that calls `main` has its own log.

    Args:
        debug: Whether what is of use for finding faults is shown, too.

    Returns:
        A context, at whose end the log is as before.
    """
    logger = logging.getLogger("peft_diffusion")
    before = logger.level, logger.propagate
    handler = logging.StreamHandler()
    handler.setFormatter(PlainFormatter("note: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]
