"""How well the words of a prompt match those of adapters: BM25 over four columns. Imports no torch.

BM25 (Robertson and Zaragoza 2009, "The Probabilistic Relevance Framework") as SQLite's FTS5 computes it, with the inverse
document frequency of Lucene, which is above 0 for every word: in a library of two adapters the one of FTS5 would say that a
word of one of them tells nothing. Where SQLite has no FTS5, the same is computed in memory.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from .store import Store

COLUMNS: tuple[tuple[str, float], ...] = (("called", 8.0), ("named", 4.0), ("shown", 4.0), ("told", 1.0))
"""What adapters are found by, and how much a word there counts: what calls them, their names, what they always show, and all
else that is told of them."""

_K1, _B = 1.2, 0.75  # of FTS5
_LEAST_IDF = 1e-6  # of FTS5
_WEIGHTS = ", ".join(str(weight) for _, weight in COLUMNS)
_ASKED = f"SELECT rowid, bm25(words, {_WEIGHTS}) FROM words WHERE words MATCH ?"

Hits = tuple["np.ndarray[Any, Any]", "np.ndarray[Any, Any]"]
"""The numbers of adapters that have a term, and how much of it, from 0 to 1: saturated, whatever else they hold."""


class Index(Protocol):
    """Finds the adapters that have a term."""

    def hits(self, term: str) -> Hits:
        """Find the adapters that have a term.

        Args:
            term: As `terms.terms_of` makes it.

        Returns:
            Their numbers, and how much each has of it.
        """
        ...


class Fts5:
    """The index of SQLite.

    Args:
        store: The library.
        total: How many adapters it has.
    """

    def __init__(self, store: "Store", total: int) -> None:
        self._store = store
        self._total = total

    def hits(self, term: str) -> Hits:
        """Find the adapters that have a term."""
        found = self._store.rows(_ASKED, f'"{term}"')
        told = np.array(found, dtype=np.float64).reshape(-1, 2)
        count = len(told)
        # FTS5 multiplies by its own inverse document frequency, which is taken out again.
        idf = max(math.log((self._total - count + 0.5) / (count + 0.5)), _LEAST_IDF)
        return told[:, 0].astype(np.int64), -told[:, 1] / (idf * (_K1 + 1))


class InMemory:
    """The same index in memory.

    Args:
        texts: By the number of an adapter its columns, terms with spaces between.
    """

    def __init__(self, texts: Mapping[int, Sequence[str]]) -> None:
        counted: dict[str, dict[int, float]] = {}
        lengths: dict[int, int] = {}
        for number, columns in texts.items():
            several = [column.split() for column in columns]
            lengths[number] = sum(map(len, several))
            for (_, weight), terms in zip(COLUMNS, several, strict=True):
                for term in terms:
                    own = counted.setdefault(term, {})
                    own[number] = own.get(number, 0.0) + weight
        self._counted = counted
        self._lengths = lengths
        self._usual = max(sum(lengths.values()) / max(len(lengths), 1), 1e-9)

    def hits(self, term: str) -> Hits:
        """Find the adapters that have a term."""
        own = self._counted.get(term, {})
        numbers = np.array(list(own), dtype=np.int64)
        count = np.array(list(own.values()))
        length = np.array([self._lengths[number] for number in own]) / self._usual
        return numbers, count / (count + _K1 * (1 - _B + _B * length))


def idf(total: int, having: int) -> float:
    """Tell how much a term tells.

    Args:
        total: How many adapters there are.
        having: How many have it.

    Returns:
        The inverse document frequency as Lucene has it, above 0.
    """
    return math.log(1 + (total - having + 0.5) / (having + 0.5))


def scores(index: Index, terms: Sequence[str], places: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    """Score all adapters by the words of a prompt.

    Args:
        index: Finds those that have a term.
        terms: Those of the prompt.
        places: The numbers of all adapters, rising.

    Returns:
        For each from 0 to 1: BM25 as a share of what an adapter would get that had nothing but these words, and all of them.
        Words that no adapter has count too: of a prompt that is mostly of them, the rest tells little.
    """
    found, most = np.zeros(len(places)), 0.0
    for term in dict.fromkeys(terms):
        numbers, share = index.hits(term)
        weight = idf(len(places), len(numbers))
        most += weight
        found[np.searchsorted(places, numbers)] += weight * share
    return found / most if most else found
