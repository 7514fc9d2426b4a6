"""What of an adapter is embedded. Imports no torch itself."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from ..core.errors import UserError
from ..formats.container import read_header
from .encoder import Encoder, Kind
from .entries import Entry
from .pictures import open_example, thumbnail_in
from .store import Vectors
from .terms import terms_of

if TYPE_CHECKING:
    from PIL import Image

T = TypeVar("T")
_CAPTIONS, _PICTURES = 3, 2  # of an adapter, at most
_TERMS = 24  # of what it always shows
_SENTENCE = 2  # terms of a tag from which on it is a caption


def texts_of(entry: Entry) -> list[tuple[Kind, str]]:
    """List the texts of an adapter that are embedded.

    Args:
        entry: The adapter.

    Returns:
        What calls it and what it always shows, or else its name; its description; and some of its captions, spread over all.
    """
    calls = [trigger.replace("{}", " ") for trigger in entry.triggers[:4]]
    called = {term for call in calls for term in terms_of(call)}
    shown = [term for term in entry.shown() if term not in called]
    main = " ".join(", ".join([*calls, " ".join(shown[:_TERMS])]).split()).strip(" ,")
    found: list[tuple[Kind, str]] = [("text", main or entry.title or entry.name)]
    if terms_of(entry.description):
        found.append(("text", entry.description[:300]))
    captions = entry.captions or [tag for tag, count in entry.tags.items() if count and len(terms_of(tag)) >= _SENTENCE]
    return [*found, *(("caption", caption[:300]) for caption in _spread(captions, _CAPTIONS))]


def embedded_entry(entry: Entry, encoder: Encoder, notes: list[str]) -> Vectors:
    """Embed an adapter.

    Args:
        entry: The adapter.
        encoder: By what.
        notes: Takes what could not be looked at.

    Returns:
        Its embeddings. A text of which the encoder knows no word has none.
    """
    texts = texts_of(entry)
    rows = encoder.texts([text for _, text in texts])
    known = [place for place in range(len(texts)) if rows[place].any()]
    labels: list[tuple[str, str, float]] = [(*texts[place], 0.0) for place in known]
    data = rows[known]
    if encoder.sees:
        shown = _pictures(entry, notes)
        seen, offsets = encoder.pictures([image for _, image in shown])
        labels += [("picture", name, float(offset)) for (name, _), offset in zip(shown, offsets, strict=True)]
        data = np.concatenate([data, seen]) if len(shown) else data
    return Vectors(labels, data)


def _pictures(entry: Entry, notes: list[str]) -> "list[tuple[str, Image.Image]]":
    """The pictures of an adapter by name, those that can be looked at."""
    found: list[tuple[str, Image.Image]] = []
    for path in entry.examples:
        if len(found) < _PICTURES:
            try:
                found.append((path.name, open_example(path)))
            except (UserError, OSError) as error:
                notes.append(str(error))
    if entry.thumbnail and len(found) < _PICTURES:
        try:
            told = read_header(entry.path).metadata.get("modelspec.thumbnail", "")
            found.append(("in its file", thumbnail_in(told, str(entry.path))))
        except (UserError, OSError) as error:
            notes.append(str(error))
    return found


def _spread(values: Sequence[T], count: int) -> list[T]:
    """So many of some values, spread over all."""
    if len(values) <= count:
        return list(values)
    return [values[round(place)] for place in np.linspace(0, len(values) - 1, count)]
