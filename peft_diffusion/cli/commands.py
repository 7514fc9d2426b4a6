"""The commands that there are, and what makes a command of a function. Imports no cyclopts, which takes time."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from importlib import import_module
from typing import Any

from ..core.settings import (
    PARAMETERS,
    Described,
    Flag,
    OptionalPath,
    Settings,
    Texts,
    explained,
    pick,
    setting,
    settings_class,
    settings_of,
    settle,
)

PROGRAM = "peft-diffusion"
DESCRIPTION = "Teach Stable Diffusion a style from a folder of images, generate with it, blend several."
HELP_FLAGS = ("--help", "-h")
VERSION_FLAG = "--version"

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
METADATA_COMMANDS = {
    "get": "Show the metadata of a safetensors file, or the values of some entries.",
    "set": "Add or replace entries of the metadata of a safetensors file.",
    "remove": "Remove entries of the metadata of a safetensors file.",
}


@explained
@settings_class(kw_only=True)
class Everywhere:
    """What every command takes beside its own settings."""

    config: OptionalPath = setting(None, "A TOML file of settings; flags override it.", PARAMETERS)
    plugin: Texts = setting(
        (),
        "A module that adds methods, families of bases or layouts of files; give it again for more.",
        PARAMETERS,
        flag=Flag(default_shown=False),
    )
    debug: bool = setting(False, "Show where in the program an error came from.", PARAMETERS)

    def __post_init__(self) -> None:
        settle(self)


class WrongCommandLineError(Exception):
    """The words of a command line are none of the program's."""


class Command:
    """A function of settings that can be called by command: what `reads` makes.

    Args:
        function: Takes the settings.
        kinds: Their dataclasses, in the order of its parameters.
    """

    def __init__(self, function: Callable[..., None], kinds: tuple[type[Settings], ...]) -> None:
        self.kinds = kinds
        self._function = function
        self.__name__, self.__doc__, self.__module__ = function.__name__, function.__doc__, function.__module__
        self.__annotations__: dict[str, Any] = {}  # cyclopts asks for them, and takes those of the signature

    @property
    def settings(self) -> tuple[Described, ...]:
        """All that it takes."""
        return tuple(one for kind in self.kinds for one in settings_of(kind))

    @property
    def needs_some(self) -> bool:
        """Whether there is a setting that must be given."""
        return any(one.default is MISSING for one in self.settings)

    @property
    def __signature__(self) -> inspect.Signature:
        """What cyclopts makes the flags from, when it looks: to build it takes longer than to print the help."""
        from .flags import signature

        return signature(self)

    def __call__(self, config: Settings | None = None) -> None:
        """Run it.

        The settings themselves are made here, so that what is wrong with them is told in their own words.

        Args:
            config: A dataclass with the fields of all the settings; None where all are at their defaults.
        """
        given = {one.name: one.default for one in self.settings} if config is None else config
        self._function(*(pick(kind, given) for kind in self.kinds))


def reads(*kinds: type[Settings]) -> Callable[[Callable[..., None]], Command]:
    """Make a command of a function of settings, with the flags of all of them.

    Args:
        kinds: The dataclasses of settings that the function takes, in the order of its parameters.

    Returns:
        The decorator.
    """
    return lambda function: Command(function, kinds)


@dataclass(frozen=True)
class Entry:
    """A command, or several under one name, as it is listed.

    Attributes:
        help: What it does, in a line.
        target: The place of the function, as ``module:name``; None where it only has commands below it.
        below: The commands below it, by name.
    """

    help: str
    target: str | None = None
    below: Mapping[str, "Entry"] = field(default_factory=dict)

    def command(self) -> Command | None:
        """Import the command.

        Returns:
            What `reads` made; None where there are only commands below.
        """
        if self.target is None:
            return None
        module, _, name = self.target.partition(":")
        found = getattr(import_module(module), name)
        assert isinstance(found, Command)
        return found


def _place(module: str, name: str) -> str:
    return f"{__package__}.{module.replace('-', '_')}:{name.replace('-', '_')}"


def _entries(commands: Mapping[str, str], module: str, behind: str = "") -> dict[str, Entry]:
    """The commands of one module."""
    return {name: Entry(told, _place(module, name + behind)) for name, told in commands.items()}


RUNS = {name: Entry(told, _place(name, name)) for name, told in RUNS_COMMANDS.items()}
"""The commands below ``runs``, which is one itself."""

ROOT = Entry(
    DESCRIPTION,
    None,
    {
        **{name: Entry(told, _place(name, name), RUNS if name == "runs" else {}) for name, told in COMMANDS.items()},
        "text": Entry(
            "The same for language models: teach one a text, and let it write.", None, _entries(TEXT_COMMANDS, "text")
        ),
        "metadata": Entry(
            "Show and change what a safetensors file says of itself.",
            None,
            _entries(METADATA_COMMANDS, "metadata", "_entries"),  # as `set` is taken
        ),
        "compose": Entry("Learn how to weigh adapters that are there already.", None, _entries(COMPOSE_COMMANDS, "compose")),
        "library": Entry("Find adapters by what they teach.", None, _entries(LIBRARY_COMMANDS, "library", "_adapters")),
    },
)
"""All of the program: the commands, and those below them."""


def find(words: Sequence[str]) -> tuple[tuple[str, ...], Entry, tuple[str, ...]]:
    """Find the command that a command line names.

    What every command takes may stand before its name.

    Args:
        words: The words after the name of the program.

    Returns:
        The names that lead to it, what is listed of it, and the words from the first on that are none of these.
    """
    flags = {one.flag: one.single is not bool for one in settings_of(Everywhere)}
    names: tuple[str, ...] = ()
    entry, place = ROOT, 0
    while place < len(words):
        word = words[place]
        if word in entry.below:
            names, entry, place = (*names, word), entry.below[word], place + 1
        elif word in flags:
            place += 2 if flags[word] else 1
        elif word.partition("=")[0] in flags:
            place += 1
        else:
            break
    return names, entry, tuple(words[place:])
