"""The help of a command, made from its settings alone: cyclopts and rich take several times as long for the same."""

import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import MISSING, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeAlias

from ..core.settings import Described, settings_of
from .commands import HELP_FLAGS, PROGRAM, VERSION_FLAG, Entry, Everywhere, find
from .terminal import coloured, plain, write

_NARROW = 80  # letters of a line where nothing tells how wide the terminal is
_NAMES_SHARE = 0.35  # of the width, at most, for the names of flags
_TRAINING = (("train",), ("text", "train"))  # the commands whose help lists the methods
_TYPES = {int: "INT", float: "FLOAT", str: "STR", Path: "PATH"}  # what stands for a value
_OWN = (
    (f"{HELP_FLAGS[0]} ({', '.join(HELP_FLAGS[1:])})", "Display this message and exit."),
    (VERSION_FLAG, "Display application version."),
)

Word: TypeAlias = tuple[str, str]
"""A word and its style, which `coloured` knows."""


@dataclass(frozen=True)
class _Row:
    """A line of a panel: names, and what they are for."""

    names: str
    told: list[Word]
    required: bool = False


def show(given: Sequence[str]) -> None:
    """Print the help of the command that a command line names, whatever else is on it.

    Args:
        given: The words after the name of the program.
    """
    names, entry, _ = find([word for word in given if word not in HELP_FLAGS])
    command = entry.command()
    told = () if command is None else command.settings
    width = _width()
    usage = _usage(names, entry, told)
    lines = [*_wrapped([(word, "heading") for word in usage.split()], width), "", *_wrapped(_plain(entry.help), width), ""]
    if entry.below:
        rows = [(name, one.help) for name, one in entry.below.items()] + list(() if names else _OWN)
        lines += _panel("Commands", [_Row(name, _plain(line)) for name, line in rows], width)
    for title, settings in _groups((*settings_of(Everywhere), *told)):
        lines += _panel(title, [_row(one) for one in settings], width)
    if names in _TRAINING:
        lines += ["", *_methods(given, width)]
    write("\n".join(lines))


def _usage(names: Iterable[str], entry: Entry, told: Sequence[Described]) -> str:
    """How the command is typed."""
    must = [one for one in told if one.default is MISSING]
    return " ".join(
        [
            "Usage:",
            PROGRAM,
            *names,
            *(["COMMAND"] if entry.below else []),
            *(f"{one.flag} {_type(one)}" for one in must if not one.positional),
            "[OPTIONS]",
            *(_label(one) for one in must if one.positional),
            *(["[ARGS]"] if any(one.positional and one not in must for one in told) else []),
        ]
    )


def _groups(told: Iterable[Described]) -> list[tuple[str, list[Described]]]:
    """Settings by the title of their group; what needs no flag stands first in each, behind what all commands take."""
    found: dict[tuple[int, str], list[Described]] = {}
    for one in told:
        found.setdefault((one.setting.group.place, one.setting.group.title), []).append(one)
    everywhere = settings_of(Everywhere)
    return [
        (title, sorted(settings, key=lambda one: 0 if one in everywhere else 1 if one.positional else 2))
        for (_, title), settings in sorted(found.items())
    ]


def _row(one: Described) -> _Row:
    """A setting as the help tells it."""
    long = [flag for flag in one.flags if flag.startswith("--")]
    short = [flag for flag in one.flags if not flag.startswith("--")]
    contrary = "no" if one.single is bool else "empty"
    names = [
        *([_label(one)] if one.positional else []),
        *long,
        *short,
        *([] if one.positional or one.single is bool else [_type(one)]),
        *(f"--{contrary}-{flag.removeprefix('--')}" for flag in (long if one.setting.flag.negative else ())),
    ]
    words = _plain(one.setting.help)
    required = one.default is MISSING
    if one.choices:
        words += [(word, "aside") for word in f"[choices: {', '.join(one.choices)}]".split()]
    if not required and one.default is not None and one.setting.flag.default_shown:
        words += [(word, "aside") for word in f"[default: {_default(one.default)}]".split()]
    if required:
        words.append(("[required]", "required"))
    return _Row(" ".join(names), words, required)


def _label(one: Described) -> str:
    """What stands for a value that needs no flag."""
    return one.flag.removeprefix("--").upper()


def _type(one: Described) -> str:
    """What stands for the value of a flag."""
    kind = "CHOICE" if one.choices else _TYPES[str if one.nested else one.single]
    return f"{kind}..." if one.several else kind


def _default(value: Any) -> str:
    if isinstance(value, tuple):
        items = [repr(item) if isinstance(item, str) else str(item) for item in value]
        return f"({', '.join(items)}{',' if len(items) == 1 else ''})"
    return '""' if value == "" else str(value)


def _methods(given: Sequence[str], width: int) -> Iterator[str]:
    """A line for each method, those of plug-ins that the command line names included; none of these is imported for it."""
    from .. import methods

    pairs = zip(given, [*given[1:], ""], strict=True)
    named = [word.removeprefix("--plugin=") for word in given if word.startswith("--plugin=")]
    told = methods.lines([*named, *(value for word, value in pairs if word == "--plugin")])
    first = max(map(len, told))
    yield "Methods, for --method and --block:"
    for name, line in sorted(told.items()):
        for number, words in enumerate(_lines(_plain(line), max(width - first - 4, 1))):
            yield f"  {'' if number else plain(name):{first}}  {_in_colours(words)}"


def _panel(title: str, rows: Sequence[_Row], width: int) -> Iterator[str]:
    """A frame with a title around two columns: names, and what they are for."""
    corners, along, side = ("╭╮╰╯", "─", "│") if _draws_lines() else ("++++", "-", "|")
    most = math.ceil(width * _NAMES_SHARE)
    names = [_hanging(row.names, most) for row in rows]
    first = max(len(line) for lines in names for line in lines)
    marked = any(row.required for row in rows)
    rest = max(width - 4 - (3 if marked else 0) - first - 2, 1)
    yield f"{corners[0]}{along} {title} ".ljust(width - 1, along) + corners[1]
    for row, labels in zip(rows, names, strict=True):
        for number, (label, line) in enumerate(zip_longest(labels, _lines(row.told, rest))):
            mark = ("*  " if row.required and number == 0 else "   ") if marked else ""
            words = line or []
            space = " " * (rest - len(" ".join(word for word, _ in words)))
            name = coloured((label or "").ljust(first), "name")
            yield f"{side} {coloured(mark, 'required')}{name}  {_in_colours(words)}{space} {side}"
    yield corners[2] + along * (width - 2) + corners[3]


def _plain(text: str) -> list[Word]:
    return [(word, "") for word in text.split()]


def _wrapped(words: Iterable[Word], width: int) -> list[str]:
    return [_in_colours(line) for line in _lines(words, width)]


def _hanging(text: str, width: int) -> list[str]:
    """Break a text into lines, of which all but the first stand two letters in."""
    lines = [" ".join(word for word, _ in line) for line in _lines(_plain(text), width, 2)]
    return [f"  {line}" if number else line for number, line in enumerate(lines)]


def _lines(words: Iterable[Word], width: int, hanging: int = 0) -> Iterator[list[Word]]:
    """Break words into lines, all but the first so much shorter; a word that is longer than a line is broken, too."""
    line: list[Word] = []
    used = 0
    for word, style in words:
        rest = word
        while (line and used + 1 + len(rest) > width) or len(rest) > width:
            if line:
                yield line
            else:
                yield [(rest[:width], style)]
                rest = rest[width:]
            line, used = [], 0
            width, hanging = width - hanging, 0
        used += len(rest) + bool(line)
        line.append((rest, style))
    yield line


def _in_colours(line: Iterable[Word]) -> str:
    """Words with spaces between, coloured in runs of one style."""
    runs: list[tuple[str, str]] = []
    for word, style in line:
        if runs and runs[-1][1] == style:
            runs[-1] = (f"{runs[-1][0]} {word}", style)
        else:
            runs.append((word, style))
    return " ".join(coloured(text, style) for text, style in runs)


def _draws_lines() -> bool:
    """Whether what is written to has letters for lines that are drawn."""
    return (sys.stdout.encoding or "utf-8").lower().startswith("utf")  # a text in memory has no encoding


def _width() -> int:
    """How many letters a line of the terminal has; also where what is written goes into a pager."""
    told = os.environ.get("COLUMNS", "")
    if told.isdecimal() and int(told):
        return int(told)
    for stream in (0, 1, 2):
        try:
            return os.get_terminal_size(stream).columns or _NARROW
        except OSError:
            continue
    return _NARROW
