"""Reading what others wrote. Imports no torch.

What a parser raises on damaged or hostile input is never listed whole: integers of 400 digits overflow, deep lists exhaust
the stack, a repetition in an expression is too large. So all of it is caught, in the places that go through here.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from .errors import UserError, first_line

_TIME_LIMIT = 2.0  # seconds for an expression on all paths together


@contextmanager
def refusing(complaint: str) -> Iterator[None]:
    """Turn whatever a parser raises into an error for a person.

    Args:
        complaint: What the error says first, such as "a.json cannot be read".

    Raises:
        UserError: In place of any exception but those that end the program.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{complaint}: {first_line(error)}") from None


def json_value(text: str | bytes) -> Any:
    """Parse JSON.

    Args:
        text: The JSON.

    Returns:
        The value.

    Raises:
        ValueError: It is no JSON, is nested too deep, or holds half of a character, which can be neither shown nor written.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    refuse_halves(text if isinstance(text, str) else "", value)
    return value


def refuse_halves(text: str, value: Any) -> None:
    """Refuse half of a character, which an escape in JSON or TOML can make.

    Args:
        text: Where it would be seen as an escape; nothing is looked for where there is none.
        value: What was made of the text.

    Raises:
        ValueError: There is one.
    """
    if "\\u" in text.lower():
        try:
            json.dumps(value, ensure_ascii=False, default=str).encode()
        except RecursionError:
            raise ValueError("it is nested too deep") from None


def number(value: Any) -> float | None:
    """Read a number of a configuration.

    Args:
        value: Any value of JSON.

    Returns:
        The number, infinite where a float holds it no more; None for what is none, as true and false are.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")


def number_in(text: str) -> float | None:
    """Read a number that a person wrote.

    Args:
        text: The text.

    Returns:
        The number, which may be infinite or NaN; None for what is none.
    """
    try:
        return float(text)
    except ValueError:
        return None


def matching(expression: str, texts: Sequence[str], what: str) -> list[str]:
    """Find the texts that a regular expression of the user's matches in full.

    Args:
        expression: As Python's ``re`` has them.
        texts: The texts, such as paths.
        what: What errors call the expression.

    Returns:
        Those that it matches, in their order.

    Raises:
        UserError: It is no expression, or takes too long: one such as ``(a+)+`` may try without end.
    """
    import time

    compiled = compiled_for(expression, what)
    end = time.monotonic() + _TIME_LIMIT
    try:
        return [text for text in texts if compiled.fullmatch(text, timeout=max(end - time.monotonic(), 1e-3))]
    except TimeoutError:
        raise UserError(
            f"{what} {_short(expression)} takes longer than {_TIME_LIMIT:g} seconds on {len(texts)} names; write it"
            " without a repetition inside of a repetition"
        ) from None


def compiled_for(expression: str, what: str) -> Any:
    """Compile a regular expression of the user's.

    Args:
        expression: As Python's ``re`` has them.
        what: What errors call the expression.

    Returns:
        The expression of the library ``regex``, which can be given a time limit.

    Raises:
        UserError: It is no expression.
    """
    import regex

    with refusing(f"{what} {_short(expression)} is neither a name nor a regular expression"):
        return regex.compile(expression)


class Patterns:
    """Values by expressions that an untrusted file brings, matched in linear time, without backtracking.

    Args:
        values: By expression, in the order in which they are tried.
        before: What stands before each expression.
        where: What errors call the file.

    Raises:
        UserError: There are too many expressions, or one is none that can be matched so.
    """

    MOST = 4096
    """Expressions; a file needs at most one for each of its sites."""

    _LONGEST = 1000  # letters of an expression

    def __init__(self, values: Mapping[str, Any], before: str, where: str) -> None:
        import re2

        if len(values) > self.MOST:
            raise UserError(f"{where}: {len(values)} patterns are more than the {self.MOST} that are read")
        options = re2.Options()
        options.log_errors = False
        options.max_mem = 1 << 17  # bytes for each expression
        self._values = []
        for pattern, value in values.items():
            if len(pattern) > self._LONGEST:
                raise UserError(f"{where}: the pattern {_short(pattern)} is longer than {self._LONGEST} letters")
            with refusing(f"{where}: the pattern {_short(pattern)} is no regular expression that is read here"):
                self._values.append((re2.compile(f"{before}({pattern})".encode(), options), value))

    def value(self, text: str, otherwise: Any) -> Any:
        """Look up the value of the first expression that matches a text in full.

        Args:
            text: The text.
            otherwise: The value where none matches.

        Returns:
            The value.
        """
        encoded = text.encode()
        return next((value for pattern, value in self._values if pattern.fullmatch(encoded)), otherwise)


def _short(expression: str) -> str:
    return repr(expression if len(expression) <= 60 else f"{expression[:60]}...")
