"""Options of another program, while each finds its counterpart here. Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from math import lcm
from pathlib import Path
from typing import Any

from ....core.encodings import unicode_text
from ....core.errors import UserError
from ....core.files import at_home, regular
from ....core.other_names import known_here_as
from ....core.parsing import json_value, number, number_in
from ....core.settings import Described, settings_of
from ....core.settings_file import parsed
from ..datasets import Dataset
from ..pictures import TrainConfig

SETTINGS: Mapping[str, Described] = {one.name: one for one in settings_of(TrainConfig)}
"""What options become."""


_LARGEST = 1e9  # of all numbers that options have


@dataclass
class Found:
    """What a file of another program says, in the settings of this one.

    Attributes:
        settings: Values of `TrainConfig`.
        datasets: The folders.
        absent: What has no counterpart, a line each.
        longer: How many passes of the other program one of here is, as its folders are drawn.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    datasets: list[Dataset] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    longer: Fraction = Fraction(1)


class Options:
    """Options by name. What is switched off or empty asks for nothing.

    Args:
        given: The options, as a file has them.
        where: What errors and remarks call the file, or the part of it.
        found: What becomes of them.
    """

    def __init__(self, given: Mapping[str, Any], where: str, found: Found) -> None:
        self.left = {name: value for name, value in given.items() if not _off(value)}
        self.given = dict(given)
        self.where = where
        self.found = found

    def take(self, *names: str) -> Any:
        """Take options out.

        Args:
            names: What it may be called.

        Returns:
            The value of the first that is there; None where it is switched off or not there.
        """
        values = [self.left.pop(name, None) for name in names]
        return next((value for value in values if value is not None), None)

    def several(self, *names: str) -> list[Any]:
        """Take values out, of which one may stand without a list.

        Args:
            names: What they may be called.

        Returns:
            The values; none where it is switched off or not there.
        """
        value = self.take(*names)
        return value if isinstance(value, list) else [value] * (value is not None)

    def number(self, *names: str) -> float | None:
        """Take a number out, which a form may have written as a text.

        Args:
            names: What it may be called.

        Returns:
            The number; None where there is none.

        Raises:
            UserError: It is something else.
        """
        value = self.take(*names)
        read = number_in(value) if isinstance(value, str) else number(value)
        if value is not None and (read is None or not abs(read) < _LARGEST):  # nor NaN
            raise UserError(f"{self.where}: {names[0]} is a number, not {value!r:.80}")
        return read

    def whole(self, *names: str) -> int | None:
        """Take a whole number out: see `number`.

        Args:
            names: What it may be called.

        Returns:
            The number; None where there is none.

        Raises:
            UserError: It is something else.
        """
        read = self.number(*names)
        if read is not None and not read.is_integer():
            raise UserError(f"{self.where}: {names[0]} is a whole number, not {read:g}")
        return None if read is None else int(read)

    def lack(self, name: str, value: Any, why: str = "") -> None:
        """Say that an option has no counterpart.

        Args:
            name: The option.
            value: What it was.
            why: More about it.
        """
        if value not in (0, "0"):
            self.found.absent.append(f"{self.where}: {name} = {value!r:.80}{f' ({why})' if why else ''}")

    def rename(self, silent: Sequence[str] = (), why: Mapping[str, str] | None = None) -> None:
        """Turn what is left into the settings that mean the same, and say what has no counterpart.

        Args:
            silent: Options that need none, as they change nothing of what is learned.
            why: More about options without counterpart.

        Raises:
            UserError: A value cannot be.
        """
        for name, value in list(self.left.items()):
            here = known_here_as(name, SETTINGS) or [name] * (name in SETTINGS)
            if name in silent:
                continue
            if len(here) != 1 or isinstance(value, dict):
                self.lack(name, value, (why or {}).get(name, ""))
                continue
            try:
                self.found.settings.setdefault(here[0], SETTINGS[here[0]].taken(_typed(SETTINGS[here[0]], value)))
            except UserError:
                self.lack(name, value, f"here it is {here[0]}, which takes other values")
        self.left.clear()

    def choose(self, name: str, table: Mapping[str, Any], here: str, default: str | None = None) -> None:
        """Take a choice out, by a table of what it is here.

        Args:
            name: The option.
            table: What each choice is here, by its name in small letters.
            here: The setting that it becomes.
            default: What the other program takes where nothing is said; None to say nothing then either.
        """
        value = self.take(name)
        value = default if value is None else value
        if value is None:
            return
        if (key := str(value).lower()) in table:
            self.found.settings[here] = table[key]
        else:
            self.lack(name, value, f"here there are {', '.join(dict.fromkeys(map(str, table.values())))}")


def _off(value: Any) -> bool:
    return value is None or value is False or value in ("", "None", "none") or value in ([], {}, ())


def _typed(one: Described, value: Any) -> Any:
    """A value of a form, which writes numbers as texts, as the setting takes it."""
    if one.single in (int, float) and isinstance(value, str) and (read := number_in(value)) is not None:
        value = read
    if one.single is int and isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def parsed_of(file: Path) -> Any:
    """Read a file of another program.

    Args:
        file: JSON where its name ends so, else TOML.

    Returns:
        What is in it.

    Raises:
        UserError: It cannot be read.
    """
    if file.suffix.lower() != ".json":
        return parsed(file)
    try:
        return json_value(unicode_text(regular(at_home(file)).read_bytes()))
    except ValueError as error:
        raise UserError(f"{file} is no valid JSON: {error}") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None


def existing(path: str, file: Path) -> Path:
    """Find what a file of another program names: from the present directory, or else from the file's own.

    Args:
        path: As it is named.
        file: The file that names it.

    Returns:
        The path.
    """
    plain = Path(path)
    beside = file.parent / plain
    return beside if not plain.is_absolute() and not plain.exists() and beside.exists() else plain


def evenly(found: Found, times: Sequence[Fraction]) -> None:
    """Say how often each folder is drawn, so that pictures come as often beside one another as in the other program.

    There a draw is mirrored or not by chance, and has one of several sizes; here an epoch has them all. So one epoch here
    may be several there.

    Args:
        found: The folders, whose repeats are set.
        times: How often an epoch of the other program draws a picture of each, above 0.
    """
    shares = [count / _ways(one) for one, count in zip(found.datasets, times, strict=True)]
    learned = [share for share, one in zip(shares, found.datasets, strict=True) if not one.regularisation]
    scale = lcm(*(share.denominator for share in learned)) if learned else 1
    repeats = [share * scale for share in shares]
    found.datasets = [replace(one, repeats=max(1, round(count))) for one, count in zip(found.datasets, repeats, strict=True)]
    found.longer = Fraction(scale)


def _ways(one: Dataset) -> int:
    """How many forms of a picture an epoch draws."""
    return (2 if one.flip else 1) * len(one.resolution or (0,))
