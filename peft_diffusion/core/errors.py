"""Errors that a person at the keyboard reads. Imports no torch."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can mend. The message says what was wrong, where, and what to do; commands print it as one line."""


class UnknownMethodError(UserError):
    """A method of a name that none has.

    Attributes:
        name: The name.
    """

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


class DamagedError(UserError):
    """A tensor that a site of a file must have and has not, whatever the base."""


class FoldError(UserError):
    """An adapter that cannot be expressed as a change of its site's weight and bias."""


class Interrupted(KeyboardInterrupt):
    """What ran was stopped, by a signal or by whoever asked for it; the message says how far it came, and how to go on."""


def first_line(error: Exception) -> str:
    """Shorten an error.

    Args:
        error: Any.

    Returns:
        The first line of its text that says something, with the next one where it ends in a colon; its type where none does.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):
        return f"{lines[0]} {lines[1]}"
    return lines[0] if lines else type(error).__name__


def did_you_mean(given: object, known: Iterable[str]) -> str:
    """Name the choice that a wrong one is nearest to, for the end of a message.

    Args:
        given: What stood there.
        known: The choices.

    Returns:
        "; did you mean 'NAME'?"; empty where none is near, and where what stood there is no text.
    """
    near = nearest(given, known) if isinstance(given, str) else None
    return "" if near is None else f"; did you mean {near!r}?"


def nearest(given: str, known: Iterable[str]) -> str | None:
    """Find the name that another is nearest to, whatever the case of its letters.

    Args:
        given: What stood there.
        known: The names.

    Returns:
        One of them; None where none is near.
    """
    names = {name.casefold(): name for name in known}
    found = difflib.get_close_matches(given.casefold(), names, 1)
    return names[found[0]] if found else None
