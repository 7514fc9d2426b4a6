"""Prompts of previews that tell a style from copies: subjects that the pictures show, beside some that they do not."""

import re
from collections.abc import Sequence

from ...data.captions import around
from ..settings.choices import Preset

EACH = 2
"""How many previews there are of each kind by default."""

# Things that look unlike each other, in words that every base knows; of a subject, places that it is not in.
_THINGS = (
    "a lighthouse", "a bicycle", "a fox", "a teapot", "a castle", "a sailing ship", "a mushroom", "a violin", "an owl",
    "a windmill", "a cactus", "a steam train",
)  # fmt: skip
_PLACES = (
    "on a snowy mountain", "in a market", "riding a bicycle", "under water", "beside a lighthouse", "in a library",
    "on the moon", "in a desert at night",
)  # fmt: skip
_ARTICLES = frozenset(("a", "an", "the", "some"))
_EMPTY = frozenset(("on", "in", "at", "under", "beside", "riding")) | _ARTICLES  # which tell no subject


def unseen(captions: Sequence[str], preset: Preset, count: int = EACH) -> list[str]:
    """Write captions of what the pictures do not show, in the words that all of theirs share.

    Args:
        captions: Those of the pictures, a line each.
        preset: For a style these are other things, for a subject the same one elsewhere.
        count: How many.

    Returns:
        Captions, fewer where the pictures show all that is known here.
    """
    shown = {word for caption in captions for word in _words(caption)}
    before, after = shared(captions)
    found = [text for text in (_THINGS if preset == "style" else _PLACES) if not (_words(text) - _EMPTY) & shown]
    return [around(before, text, after) for text in found[:count]]


def shared(captions: Sequence[str]) -> tuple[str, str]:
    """Find the words that all captions begin and end with: often those of a style, where no trigger is.

    Args:
        captions: Those of the pictures.

    Returns:
        The words at the beginning, without an article behind them, and those at the end; "" where there are none, and where
        all captions are the same.
    """
    rows = [caption.split() for caption in dict.fromkeys(captions)]
    if len(rows) < 2:
        return "", ""
    first = _common(rows)
    last = _common([row[len(first) :][::-1] for row in rows])[::-1]
    while first and first[-1].lower() in _ARTICLES:
        first = first[:-1]
    # A comma before the words at the end stands at another word in each caption.
    comma = "," if last and all(row[-len(last) - 1].endswith(",") for row in rows if len(row) > len(last)) else ""
    return " ".join(first), f"{comma} {' '.join(last)}".strip()


def _common(rows: Sequence[Sequence[str]]) -> list[str]:
    """The words that all rows begin with."""
    columns = zip(*rows, strict=False)  # to the end of the shortest
    found: list[str] = []
    for column in columns:
        if len(set(column)) > 1:
            break
        found.append(column[0])
    return found


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))
