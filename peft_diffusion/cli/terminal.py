"""The one place that writes to the terminal: words of others cannot steer it. Imports no rich, which takes time."""

import logging
import os
import re
import sys

# Escape sequences begin with these, bells ring, a line is written over from its start; the last turn the direction.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

_STYLES = {"heading": "1", "name": "36", "aside": "2", "required": "31"}  # bold, cyan, faint, red


def plain(text: str) -> str:
    """Take control characters out of a text, but for ends of lines and tabs.

    Args:
        text: With whatever a file name, a caption or a recipe brought into it.

    Returns:
        The text that is left.
    """
    return _CONTROLS.sub("", text)


def say(text: object, *, error: bool = False) -> None:
    """Write a text and the end of a line.

    Args:
        text: What is written, without its control characters.
        error: Whether on stderr, where what is no result belongs.
    """
    write(plain(str(text)), error=error)


def coloured(text: str, style: str) -> str:
    """Colour a text where it is written to a terminal that shows colours, for `write`.

    Args:
        text: Any, whose control characters are taken out.
        style: What it is: ``heading``, ``name``, ``aside`` or ``required``; empty for what has no colour.

    Returns:
        The text.
    """
    shown = plain(text)
    return f"\x1b[{_STYLES[style]}m{shown}\x1b[0m" if style and shown.strip() and _shows_colours() else shown


def write(text: str, *, error: bool = False) -> None:
    """Write a text made of what `plain` and `coloured` gave, and the end of a line.

    Args:
        text: What is written as it is.
        error: Whether on stderr.
    """
    print(text, file=sys.stderr if error else sys.stdout, flush=True)


def _shows_colours() -> bool:
    """Whether stdout is a terminal that shows colours, and nobody has said that there should be none."""
    wanted = not os.environ.get("NO_COLOR") and os.environ.get("TERM") not in ("dumb", "unknown")
    return wanted and os.name != "nt" and sys.stdout.isatty()


class PlainFormatter(logging.Formatter):
    """Formats what is logged, without control characters."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record as `logging.Formatter` does, and take control characters out.

        Args:
            record: What is logged.

        Returns:
            The line.
        """
        return plain(super().format(record))
