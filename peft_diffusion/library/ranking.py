"""Which adapters of a library a prompt asks for, and why. Imports no torch.

Three things are asked of each adapter, and each is answered from 0 to 1: whether words of the prompt are its own
(`words.Index`), whether the prompt means what it shows (`encoder.near_texts`), and whether the prompt calls it by a
trigger. They are joined as causes that work independently, by a noisy or (Pearl 1988, "Probabilistic Reasoning in
Intelligent Systems", 4.3.2): the score is 1 less the product of what each leaves open. Reciprocal rank fusion (Cormack,
Clarke and Buettcher 2009) needs no such answers, but knows ranks alone, and the best of a library that holds nothing of the
kind would be first with it as well. Bruch, Gai and Ingber 2023 (https://arxiv.org/abs/2210.11934) find that joining scores
whose bounds are known ranks better too.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from ..core.shortening import brief
from .encoder import Array, Encoder, caption_weights, near_pictures, near_texts
from .entries import Entry
from .fits import Wanted, fits
from .terms import call_of, calls, terms_of
from .words import COLUMNS, Index

if TYPE_CHECKING:
    from .store import Store

CALLED = 0.8
"""What a trigger in the prompt tells by itself: four times of five it is meant as one."""
LEAST = 0.15
"""The score below which an adapter has nothing to do with a prompt."""
_WEAKEST = 0.4  # the strength of an adapter with the least score; one of score 1 has all of its own
_SHOWN = 8  # words that are named as a reason
_PLACES: Mapping[str, str] = {
    "called": "calls it",
    "named": "in its name",
    "shown": "what it always shows",
    "told": "in its captions and description",
}
_NEAR = 0.05  # a nearness below it is none to speak of


@dataclass(frozen=True)
class Found:
    """An adapter that a prompt may ask for.

    Attributes:
        entry: What is known of it.
        score: From 0 to 1.
        words: How far words of the prompt are its own, from 0 to 1.
        meaning: How near the prompt is to it, from 0 to 1.
        called: Whether the prompt holds one of its triggers.
        because: Why, a line for each reason.
        status: "" where its file is as it was; "missing" or "changed".
    """

    entry: Entry
    score: float
    words: float
    meaning: float
    called: bool
    because: tuple[str, ...]
    status: str = ""

    @property
    def strength(self) -> float:
        """At which it would be drawn with: from 0.4 to 1 by its score, times the strength that it is meant to be used at."""
        share = (self.score - LEAST) / (1 - LEAST)
        return round((_WEAKEST + (1 - _WEAKEST) * min(max(share, 0.0), 1.0)) * self.entry.strength, 2)

    def line(self) -> str:
        """Tell it in one line."""
        return f"{self.entry.name} ({self.score:.2f}): {'; '.join(self.because)}"


class Snapshot:
    """What of a library is held in memory to answer quickly, as of one state of the file.

    Args:
        store: The library.
    """

    def __init__(self, store: "Store") -> None:
        self.changes = store.changes
        self._store = store
        rows = store.rows("SELECT id, fits, calls FROM adapters ORDER BY id")
        self.places: Array = np.array([row[0] for row in rows], dtype=np.int64)
        known = {text: number for number, text in enumerate(dict.fromkeys(row[1] for row in rows))}
        self._fits = list(known)
        self._fit: Array = np.array([known[row[1]] for row in rows], dtype=np.int64)
        self._calls: dict[str, list[tuple[int, list[list[str]]]]] = {}
        for place, row in enumerate(rows):
            for parts in json.loads(row[2]):
                self._calls.setdefault(parts[0][0], []).append((place, parts))

    @cached_property
    def index(self) -> Index:
        """Finds adapters by words."""
        return Index(self._store)

    @cached_property
    def vectors(self) -> "Embedded":
        """The embeddings of all."""
        return Embedded.read(self._store, self.places)

    def fitting(self, wanted: Wanted | None) -> Array:
        """Find the adapters that fit a base.

        Args:
            wanted: The base; None for any.

        Returns:
            (adapters,), whether each fits.
        """
        if wanted is None:
            return np.ones(len(self.places), bool)
        found: Array = np.array([fits(text, wanted) for text in self._fits], bool)[self._fit]
        return found

    def called(self, terms: Sequence[str]) -> Array:
        """Find the adapters that a prompt calls.

        Args:
            terms: Those of the prompt.

        Returns:
            Whether it calls each.
        """
        found = np.zeros(len(self.places), bool)
        for term in dict.fromkeys(terms):
            for place, parts in self._calls.get(term, ()):
                found[place] = found[place] or calls(terms, parts)
        return found


@dataclass(frozen=True)
class Rows:
    """Embeddings of one kind, those of an adapter one after the other.

    Attributes:
        matrix: (rows, width), float32.
        owners: (rows,), the place of the adapter, rising.
        extra: (rows,): of texts how much each counts, of pictures what `encoder.Encoder.pictures` gave.
    """

    matrix: Array
    owners: Array
    extra: Array

    def of(self, place: int) -> slice:
        """Find the rows of an adapter.

        Args:
            place: Its place.

        Returns:
            The rows.
        """
        first, end = np.searchsorted(self.owners, (place, place + 1))
        return slice(int(first), int(end))

    def raise_to(self, best: Array, each: Array) -> None:
        """Raise the nearness of adapters to that of their nearest row.

        Args:
            best: (adapters,), which is changed.
            each: (rows,).
        """
        if len(each):
            starts, owners = self._starts
            best[owners] = np.maximum(best[owners], np.maximum.reduceat(each, starts))

    @cached_property
    def _starts(self) -> tuple[Array, Array]:
        """The first row of each adapter that has one, and the adapters."""
        starts = np.flatnonzero(np.diff(self.owners, prepend=-1))
        return starts, self.owners[starts]


@dataclass(frozen=True)
class Embedded:
    """The embeddings of all adapters of a library.

    Attributes:
        texts: Those of texts.
        pictures: Those of pictures. A prompt is compared with them as another vector, so they are apart.
    """

    texts: Rows
    pictures: Rows

    @classmethod
    def read(cls, store: "Store", places: Array) -> "Embedded":
        """Read all.

        Args:
            store: The library.
            places: The numbers of its adapters, rising.

        Returns:
            The embeddings.
        """
        rows = store.rows("SELECT adapter, labels, data FROM vectors ORDER BY adapter")
        labels = [json.loads(row[1]) for row in rows]
        numbers = np.repeat(np.array([row[0] for row in rows], np.int64), [len(one) for one in labels])
        owners = np.searchsorted(places, numbers)
        flat = [label for several in labels for label in several]
        data = np.frombuffer(b"".join(row[2] for row in rows), "<f2")
        matrix = data.reshape(len(flat), -1) if flat else data.reshape(0, 0)
        kinds = [label[0] for label in flat]
        seen = np.array([kind == "picture" for kind in kinds], bool)
        captions = np.array([kind == "caption" for kind in kinds], bool)
        offsets = np.array([label[2] for label in flat], np.float32)
        return cls(
            Rows(matrix[~seen].astype(np.float32), owners[~seen], caption_weights(captions[~seen])),
            Rows(matrix[seen].astype(np.float32), owners[seen], offsets[seen]),
        )

    def near(self, encoder: Encoder, text: str, count: int) -> tuple[Array, tuple[Array, Array]]:
        """Tell how near a prompt is to each adapter.

        Args:
            encoder: What embedded them.
            text: The prompt.
            count: How many adapters there are.

        Returns:
            (count,) the nearness of the nearest embedding of each; and that of all texts, and of all pictures.
        """
        best = np.zeros(count, np.float32)
        texts = pictures = best[:0]
        asked = np.ascontiguousarray(encoder.asked(text).T)
        if len(self.texts.matrix):
            texts = near_texts(encoder, self.texts.matrix @ asked[0], self.texts.extra)
        if len(self.pictures.matrix) and encoder.sees:
            pictures = near_pictures(encoder, self.pictures.matrix @ asked[1], self.pictures.extra)
        self.texts.raise_to(best, texts)
        self.pictures.raise_to(best, pictures)
        return best, (texts, pictures)


@dataclass(frozen=True)
class Ranking:
    """All adapters of a library, as a prompt asks for them.

    Attributes:
        snapshot: The library.
        terms: Those of the prompt.
        words: How far words of the prompt are each one's own.
        meaning: How near each is.
        called: Whether each is called.
        each: The nearness of every text, and of every picture.
        fitting: Whether each fits the base.
    """

    snapshot: Snapshot
    terms: tuple[str, ...]
    words: Array
    meaning: Array
    called: Array
    each: tuple[Array, Array]
    fitting: Array

    @cached_property
    def scores(self) -> Array:
        """From 0 to 1, whether each is meant."""
        made: Array = 1 - (1 - self.words) * (1 - self.meaning) * (1 - CALLED * self.called)
        return made

    @cached_property
    def others(self) -> int:
        """How many would be found if they fitted the base."""
        return int((~self.fitting & (self.scores >= LEAST)).sum())

    def best(self, count: int, least: float) -> list[int]:
        """Find those that are meant most.

        Args:
            count: How many.
            least: The score that they have at least.

        Returns:
            Their places; of equal scores the first that was added is first.
        """
        good = np.flatnonzero(self.fitting & (self.scores >= least))
        if len(good) > count:
            # Sorts what can be among the best alone; all that equal the last of them can.
            edge = np.partition(self.scores[good], len(good) - count)[len(good) - count]
            good = good[self.scores[good] >= edge]
        order = np.argsort(-self.scores[good], kind="stable")[:count]
        return [int(place) for place in good[order]]

    def found(self, places: Sequence[int], store: "Store") -> list[Found]:
        """Say what is known of adapters, and why they are found.

        Args:
            places: Theirs.
            store: The library.

        Returns:
            One each, in that order.
        """
        numbers = [int(self.snapshot.places[place]) for place in places]
        entries, columns = store.entries(numbers), store.columns(numbers)
        made = []
        for place, number in zip(places, numbers, strict=True):
            entry = entries[number]
            told = float(self.scores[place]), float(self.words[place]), float(self.meaning[place]), bool(self.called[place])
            because = self._because(place, number, entry, columns[number], store)
            made.append(Found(entry, *told, because, entry.status()))
        return made

    def _because(self, place: int, number: int, entry: Entry, columns: Sequence[str], store: "Store") -> tuple[str, ...]:
        reasons = []
        if self.called[place]:
            own = (one for one in entry.triggers if (parts := call_of(one)) and calls(self.terms, parts))
            said = " ".join(next(own, entry.trigger).replace("{}", " ").split())
            reasons.append(f'the prompt has its trigger "{said}"')
        left = list(dict.fromkeys(self.terms))
        for (name, _), column in zip(COLUMNS, columns, strict=True):
            there = set(column.split())
            common = [term for term in left if term in there]
            left = [term for term in left if term not in there]
            if common:
                reasons.append(f"{', '.join(common[:_SHOWN])} ({_PLACES[name]})")
        if self.meaning[place] >= _NEAR:
            reasons.append(self._nearest(place, number, store))
        return tuple(reasons)

    def _nearest(self, place: int, number: int, store: "Store") -> str:
        labels = json.loads(store.rows("SELECT labels FROM vectors WHERE adapter = ?", number)[0][0])
        (texts, pictures), vectors = self.each, self.snapshot.vectors
        # The labels of an adapter are those of its texts, then those of its pictures.
        own = np.concatenate([texts[vectors.texts.of(place)], pictures[vectors.pictures.of(place)]])
        kind, what, _ = labels[int(np.argmax(own))]
        words_of: Mapping[str, str] = {"text": "what it shows", "caption": "its caption", "picture": "its picture"}
        return f'near {words_of[kind]} "{brief(what)}" ({self.meaning[place]:.2f})'


def rank(snapshot: Snapshot, text: str, wanted: Wanted | None, encoder: Encoder | None) -> Ranking:
    """Ask all adapters of a library.

    Args:
        snapshot: The library.
        text: The prompt.
        wanted: The base that they have to fit; None for any.
        encoder: What embedded them; None to go by words alone.

    Returns:
        What each answers.
    """
    terms = terms_of(text)
    by_words = snapshot.index.scores(terms)
    near: Array = np.zeros(len(snapshot.places), np.float32)
    each: tuple[Array, Array] = near[:0], near[:0]
    if encoder is not None and terms:
        near, each = snapshot.vectors.near(encoder, text, len(snapshot.places))
    return Ranking(snapshot, terms, by_words, near, snapshot.called(terms), each, snapshot.fitting(wanted))
