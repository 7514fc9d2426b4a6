"""Files of prompts, a line each with what is said of it, as kohya's trainer reads them. Imports no torch."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.encodings import unicode_text
from ..core.errors import UserError
from ..core.files import at_home
from ..core.shortening import brief

_OPTION = re.compile(r"\s--(?=\S)")
# What follows a prompt, by the names of sd-scripts: the setting that it is here, and what it takes.
_OPTIONS: Mapping[str, tuple[str, Callable[[str], Any], str]] = {
    "n": ("negative", str, "words"),
    "w": ("width", int, "a whole number"),
    "h": ("height", int, "a whole number"),
    "d": ("seed", int, "a whole number"),
    "l": ("guidance", float, "a number"),
    "s": ("steps", int, "a whole number"),
}
_OTHERS = {"g": "guidance", "ss": "scheduler", "t": "timesteps", "cn": "control pictures", "f": "frames", "am": "strengths"}


@dataclass(frozen=True)
class PromptLine:
    """A prompt, and what is said of it alone.

    Attributes:
        prompt: What the picture shows.
        told: Settings by name: negative, width, height, seed, guidance, steps.
    """

    prompt: str
    told: Mapping[str, Any]


def parse_line(line: str) -> PromptLine:
    """Read ``a red cat --n blurry --w 640 --h 512 --d 7 --l 5.5 --s 30``.

    Args:
        line: A prompt, and behind it negative prompt, width, height, seed, guidance and steps, each where it is wanted.

    Returns:
        The prompt and what is said of it.

    Raises:
        UserError: An option is not known, or its value is none.
    """
    prompt, *options = _OPTION.split(line)
    told: dict[str, Any] = {}
    for option in options:
        name, _, value = option.strip().partition(" ")
        if name.lower() not in _OPTIONS:
            known = ", ".join(f"--{known} ({setting})" for known, (setting, _, _) in _OPTIONS.items())
            more = f" ({_OTHERS[name.lower()]} of sd-scripts)" if name.lower() in _OTHERS else ""
            raise UserError(f'the prompt "{brief(prompt)}" has --{brief(name)}{more}, which is not read; known are {known}')
        setting, kind, takes = _OPTIONS[name.lower()]
        try:
            told[setting] = kind(value.strip())
        except ValueError:
            raise UserError(f'--{name} of the prompt "{brief(prompt)}" takes {takes}, not {brief(value)!r}') from None
    return PromptLine(prompt.strip(), told)


def read_prompts(path: Path) -> tuple[str, ...]:
    """Read a file of prompts.

    Args:
        path: A text file with a prompt a line; empty lines and those that begin with # are left out.

    Returns:
        The lines.

    Raises:
        UserError: It is no text, or holds no prompt.
    """
    path = at_home(path)
    found = lines_of(path, "the file of prompts")
    if not found:
        raise UserError(f"the file of prompts {path} holds none; write one a line")
    return found


def lines_of(path: Path, what: str) -> tuple[str, ...]:
    """Read what stands in a text file, an entry a line.

    Args:
        path: The file; empty lines and those that begin with # are left out.
        what: What errors call it.

    Returns:
        The lines, without space around them.

    Raises:
        UserError: It cannot be read, or is no text.
    """
    try:
        lines = [line.strip() for line in unicode_text(path.read_bytes()).splitlines()]
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"{what} {path} cannot be read: it {error}") from None
    return tuple(line for line in lines if line and not line.startswith("#"))
