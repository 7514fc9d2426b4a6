"""The command line: finds the command, and turns what goes wrong into one clear line."""

import contextlib
import io
import logging
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import App, CycloptsError, Parameter

from .. import __version__
from ..core import plugins
from ..core.errors import UserError
from ..core.events import interrupts_apart, terminations_cleaned_up
from . import lean
from .config_file import RunFile, whole_numbers
from .flags import explained
from .terminal import PlainFormatter, say

# Each command is the function of its name in the module of its name; its module is imported when it is called.
COMMANDS = {
    "train": "Learn a style from a folder of images and write it as one adapter file.",
    "caption": "Describe the pictures of a folder, change their captions, or count what these hold.",
    "generate": "Make pictures from prompts, with any number of adapters.",
    "blend": "Draw a labelled sheet from all of one adapter to all of another.",
    "grid": "Draw a labelled sheet over values of settings, of strengths or of words.",
    "evaluate": "Measure what adapters do on pictures that they never saw, alone and with each other.",
    "serve": "Keep a base loaded and draw for programs that speak A1111's HTTP interface.",
    "import-config": "Write a training of sd-scripts, kohya_ss or OneTrainer as a TOML file of settings.",
    "runs": "List runs as a table, or compare two side by side.",
    "inspect": "Tell what an adapter file holds, and whether two fit together.",
    "merge": "Make one adapter of several, or fold adapters into a base and write a checkpoint.",
    "extract": "Write what a checkpoint was trained to, beyond its base, as a LoRA.",
    "resize": "Write an adapter with other ranks.",
    "strength": "Write an adapter that does at strength 1 what another does at a given one.",
    "split": "Write the parts of an adapter, by component or by block, as files of their own.",
    "join": "Write one file of several that change different sites.",
    "rename-trigger": "Give a word of an adapter another name.",
    "convert": "Write an adapter file anew in another layout, dtype or method, without its base.",
    "demo": "Teach two sample styles, generate with each and blend them: the whole thing in minutes.",
}
TEXT_COMMANDS = {
    "train": "Teach a language model a text and write it as one adapter file.",
    "generate": "Let a language model go on from prompts, with any number of adapters.",
}
COMPOSE_COMMANDS = {"train": "Learn how much of each adapter acts in each block and step, from a few pictures for each."}
LIBRARY_COMMANDS = {
    "add": "Add adapter files and folders to a library, or bring it up to date.",
    "search": "Find the adapters of a library that a prompt or a description asks for.",
    "list": "List the adapters of a library, and which of their files moved, changed or are gone.",
    "remove": "Take adapters out of a library; their files stay.",
}
RUNS_COMMANDS = {"export": "Write the adapter in a checkpoint of a run as an adapter file."}
_APPS = {"runs": "command"}  # commands that have others below them: the name of the App in their module
METADATA_COMMANDS = {  # functions of these names with "_entries" behind, as `set` is taken
    "get": "Show the metadata of a safetensors file, or the values of some entries.",
    "set": "Add or replace entries of the metadata of a safetensors file.",
    "remove": "Remove entries of the metadata of a safetensors file.",
}
OK, FAILED, USAGE, BUG, INTERRUPTED = 0, 1, 2, 70, 130
_PLUGIN = Parameter(
    help="A module that adds methods, families of bases or layouts of files; give it again for more.",
    negative=(),
    consume_multiple=False,
    show_default=False,
)
# The usage of commands with more settings than others: to collect it from these takes a tenth of the time of their help.
_USAGE = {"train": "[OPTIONS] [ARGS]", "generate": "[OPTIONS] [ARGS]"}
_TRAINING = (("train",), ("text", "train"))  # the commands whose help lists the methods

app = App(
    name="peft-diffusion",
    help="Teach Stable Diffusion a style from a folder of images, generate with it, blend several.",
    help_format="plaintext",
    version=__version__,
    config=whole_numbers,
    result_action="return_value",
    exit_on_error=False,
    print_error=False,
    suppress_keyboard_interrupt=False,
)
app.meta.suppress_keyboard_interrupt = False
for _place, (_name, _help) in enumerate(COMMANDS.items()):
    _home = _name.replace("-", "_")
    _function = _APPS.get(_name, _home)
    _line = {"usage": f"Usage: peft-diffusion {_name} {_USAGE[_name]}"} if _name in _USAGE else {}
    app.command(f"peft_diffusion.cli.{_home}:{_function}", name=_name, help=_help, sort_key=_place, **_line)
_text = App(name="text", help="The same for language models: teach one a text, and let it write.", sort_key=len(COMMANDS))
for _place, (_name, _help) in enumerate(TEXT_COMMANDS.items()):
    _text.command(f"peft_diffusion.cli.text:{_name}", name=_name, help=_help, sort_key=_place)
app.command(_text)
_metadata = App(name="metadata", help="Show and change what a safetensors file says of itself.", sort_key=len(COMMANDS) + 1)
for _place, (_name, _help) in enumerate(METADATA_COMMANDS.items()):
    _metadata.command(f"peft_diffusion.cli.metadata:{_name}_entries", name=_name, help=_help, sort_key=_place)
app.command(_metadata)
_compose = App(name="compose", help="Learn how to weigh adapters that are there already.", sort_key=len(COMMANDS) + 2)
for _place, (_name, _help) in enumerate(COMPOSE_COMMANDS.items()):
    _compose.command(f"peft_diffusion.cli.compose:{_name}", name=_name, help=_help, sort_key=_place)
app.command(_compose)
_library = App(name="library", help="Find adapters by what they teach.", sort_key=len(COMMANDS) + 3)
for _place, (_name, _help) in enumerate(LIBRARY_COMMANDS.items()):
    _library.command(f"peft_diffusion.cli.library:{_name}_adapters", name=_name, help=_help, sort_key=_place)
app.command(_library)


@app.meta.default
def _launch(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    config: Annotated[Path | None, Parameter(help="A TOML file of settings; flags override it.")] = None,
    plugin: Annotated[tuple[str, ...], _PLUGIN] = (),
    debug: Annotated[bool, Parameter(help="Show where in the program an error came from.", negative=())] = False,
) -> None:
    with _notes(debug):
        file = None if config is None else RunFile(config)
        for module in (*plugin, *(file.plugins() if file else ())):
            plugins.load_plugin(module)
        app.config = (whole_numbers,) if file is None else (file, whole_numbers)
        try:
            app(tokens)
        finally:  # the application outlives the command where a program or a test calls `main` more than once
            app.config = (whole_numbers,)


_HELP_FLAGS = tuple(app.help_flags)


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
            _print_help(given)
        else:
            app.meta(given)
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        if "--debug" in given:
            say("".join(traceback.format_exception(error)).rstrip(), error=True)
        return _explain(error)
    return OK


def _asks_for_help(given: Sequence[str]) -> bool:
    options = given[: given.index("--")] if "--" in given else given
    return any(flag in options for flag in _HELP_FLAGS)


def _print_help(given: Sequence[str]) -> None:
    """Print the help of the command, whatever else is on its line: to parse that takes a third of the time."""
    words = [word for word in given if word not in _HELP_FLAGS]
    command, _, _ = app.parse_commands(words)
    app.help_epilogue = _methods(given) if command in _TRAINING else None
    app.help_print(words)


def _methods(given: Sequence[str]) -> str:
    """A line for each method, those of plug-ins that the command line names included; none of these is imported for it."""
    from .. import methods

    pairs = zip(given, [*given[1:], ""], strict=True)
    named = [word.removeprefix("--plugin=") for word in given if word.startswith("--plugin=")]
    told = methods.lines([*named, *(value for word, value in pairs if word == "--plugin")])
    width = max(map(len, told))
    return "\n".join(["Methods, for --method and --block:", *(f"  {n:{width}}  {line}" for n, line in sorted(told.items()))])


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
    if isinstance(error, CycloptsError):
        return _fail(explained(error), USAGE)
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


@contextlib.contextmanager
def _notes(debug: bool) -> Iterator[None]:
    """Show what the package logs inside, as notes on the present stderr; a program that calls `main` has its own log."""
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
