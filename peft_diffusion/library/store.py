"""The file of a library: one database of SQLite. Imports no torch.

It holds an entry an adapter with the words that it is found by, and the embeddings
of each adapter as one blob of float16. Changes are made in transactions, so that a process which is killed leaves the file
whole.
"""

import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..core.errors import UserError
from ..core.files import at_home
from .entries import Entry
from .terms import call_of
from .words import COLUMNS

if TYPE_CHECKING:
    import numpy as np

_VERSION = 1
_WAIT = 10.0  # seconds for another process that writes
_TABLES = f"""
CREATE TABLE IF NOT EXISTS facts (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS adapters (
    id INTEGER PRIMARY KEY, path TEXT NOT NULL UNIQUE, size INTEGER NOT NULL, modified INTEGER NOT NULL,
    sha256 TEXT NOT NULL, beside TEXT NOT NULL, fits TEXT NOT NULL, calls TEXT NOT NULL, entry TEXT NOT NULL,
    {", ".join(f"{name} TEXT NOT NULL" for name, _ in COLUMNS)}
);
CREATE INDEX IF NOT EXISTS adapters_by_sha256 ON adapters (sha256);
CREATE TABLE IF NOT EXISTS vectors (adapter INTEGER PRIMARY KEY, labels TEXT NOT NULL, data BLOB NOT NULL);
"""


def usual_place() -> Path:
    """Tell where a library lies that is not named.

    Returns:
        ``peft-diffusion/library.sqlite3`` in the user's folder for data: ``XDG_DATA_HOME``, ``LOCALAPPDATA`` on Windows, or
        ``~/.local/share``.
    """
    told = os.environ.get("XDG_DATA_HOME") or (os.environ.get("LOCALAPPDATA") if os.name == "nt" else None)
    home = Path(told) if told and Path(told).is_absolute() else at_home(Path("~/.local/share"))
    return home / "peft-diffusion" / "library.sqlite3"


class Vectors(NamedTuple):
    """The embeddings of an adapter.

    Attributes:
        labels: Of each: what kind it is of, what was embedded, and a number that belongs to it; see `encoder.Kind`.
        data: (count, width), float16.
    """

    labels: Sequence[tuple[str, str, float]]
    data: "np.ndarray[Any, Any]"


class Row(NamedTuple):
    """What of an entry is compared when its file is added again.

    Attributes:
        id: Its number.
        path: Its file.
        size: In bytes.
        modified: When it was changed last, in nanoseconds.
        sha256: Of the file.
        beside: See `Entry`.
    """

    id: int
    path: Path
    size: int
    modified: int
    sha256: str
    beside: str


class Store:
    """An open library file.

    Args:
        path: The file. It is made where it is missing.
        make: Whether it may be made; else a missing file is told.

    Attributes:
        path: The file.
    """

    def __init__(self, path: Path, make: bool = True) -> None:
        self.path = path
        if not make and not path.is_file():
            raise UserError(
                f"there is no library {path}; make one with: peft-diffusion library add FOLDER, or name it with --library"
            )
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is no file; name the library's file with --library")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{path.parent} cannot be made: {error.strerror}; name another file with --library") from None
        with self._told():
            self._base = sqlite3.connect(path, timeout=_WAIT, isolation_level=None, check_same_thread=False)
            self._base.execute("PRAGMA trusted_schema = OFF")
            self._prepare()

    def close(self) -> None:
        """Close the file."""
        self._base.close()

    @property
    def changes(self) -> int:
        """How often it was changed: what was read of it is of one such number."""
        return int(self.fact("changes") or 0)

    def fact(self, key: str) -> str:
        """Look something up that is known of the whole library.

        Args:
            key: Its name.

        Returns:
            That; "" where nothing is known.
        """
        return str(next(iter(self.rows("SELECT value FROM facts WHERE key = ?", key)), ("",))[0])

    def set_fact(self, key: str, value: str) -> None:
        """Keep something of the whole library.

        Args:
            key: Its name.
            value: That.
        """
        self.rows("INSERT INTO facts VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value", key, value)

    def rows(self, question: str, *values: object) -> list[tuple[Any, ...]]:
        """Ask the database.

        Args:
            question: In SQL, with ? for values.
            values: Those.

        Returns:
            The rows.

        Raises:
            UserError: The file is damaged, or another process writes to it too long.
        """
        with self._told():
            return self._base.execute(question, values).fetchall()

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Make changes together: all of them are kept, or, where an error ends it, none.

        Yields:
            Nothing.

        Raises:
            UserError: As `rows`.
        """
        self.rows("BEGIN IMMEDIATE")
        try:
            before = self.changes
            yield
            self.set_fact("changes", str(before + 1))
            self.rows("COMMIT")
        except BaseException:
            if self._base.in_transaction:
                self._base.execute("ROLLBACK")
            raise

    def known(self) -> list[Row]:
        """List what is compared of each entry.

        Returns:
            The rows.
        """
        told = self.rows("SELECT id, path, size, modified, sha256, beside FROM adapters ORDER BY path")
        return [Row(one[0], Path(one[1]), *one[2:]) for one in told]

    def entries(self, ids: Sequence[int] | None = None) -> dict[int, Entry]:
        """Read entries.

        Args:
            ids: Their numbers; None for all.

        Returns:
            By number, in the order of their paths.
        """
        chosen = "" if ids is None else f" WHERE id IN ({', '.join(map(str, map(int, ids)))})"
        return {
            number: Entry.of_json(text)
            for number, text in self.rows(f"SELECT id, entry FROM adapters{chosen} ORDER BY path")
        }

    def columns(self, ids: Sequence[int]) -> dict[int, tuple[str, ...]]:
        """Read the words that adapters are found by.

        Args:
            ids: Their numbers.

        Returns:
            By number the columns of `words.COLUMNS`, terms with spaces between.
        """
        names = ", ".join(name for name, _ in COLUMNS)
        rows = self.rows(f"SELECT id, {names} FROM adapters WHERE id IN ({', '.join(map(str, map(int, ids)))})")
        return {row[0]: row[1:] for row in rows}

    def put(self, entry: Entry, number: int | None = None) -> int:
        """Write an entry.

        Args:
            entry: The entry.
            number: The one that it replaces; None for a new one.

        Returns:
            Its number.
        """
        columns = tuple(" ".join(terms) for terms in entry.columns())
        told = (str(entry.path), entry.size, entry.modified, entry.sha256, entry.beside, _fits(entry), _calls(entry))
        values = (number, *told, entry.to_json(), *columns)
        marks = ", ".join("?" * len(values))
        self.rows(f"INSERT OR REPLACE INTO adapters VALUES ({marks})", *values)
        return int(self.rows("SELECT id FROM adapters WHERE path = ?", str(entry.path))[0][0])

    def drop(self, number: int) -> None:
        """Take an entry out.

        Args:
            number: Its number.
        """
        self.rows("DELETE FROM adapters WHERE id = ?", number)
        self.rows("DELETE FROM vectors WHERE adapter = ?", number)

    def put_vectors(self, number: int, vectors: Vectors) -> None:
        """Write the embeddings of an adapter.

        Args:
            number: Its number.
            vectors: Those.
        """
        data = vectors.data.astype("<f2").tobytes()
        labels = json.dumps(vectors.labels, ensure_ascii=False)
        self.rows("INSERT OR REPLACE INTO vectors VALUES (?, ?, ?)", number, labels, data)

    def _prepare(self) -> None:
        """Make what is missing. Raises UserError for the file of another program, or of a newer version."""
        version = self.rows("PRAGMA user_version")[0][0]
        if version > _VERSION:
            raise UserError(f"{self.path} was written by a newer peft_diffusion (format {version}); update the package")
        if version == 0:
            if self.rows("SELECT count(*) FROM sqlite_master")[0][0]:
                raise UserError(f"{self.path} is a database of another program; name another file with --library")
            self._base.executescript(f"BEGIN; {_TABLES} PRAGMA user_version = {_VERSION}; COMMIT")

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise UserError(
                f"the library {self.path} cannot be used now: {error}; close what writes to it, or try again"
            ) from None
        except sqlite3.DatabaseError as error:
            raise UserError(
                f"{self.path} is no library, or is damaged: {error}; move it away, and add the folders again"
            ) from None


def _fits(entry: Entry) -> str:
    """What decides whether it fits a base; the same text for entries that are alike in it."""
    told = {key: entry.base.get(key, "") for key in ("name", "fingerprint", "prediction_type")}
    return json.dumps([entry.families, told], sort_keys=True)


def _calls(entry: Entry) -> str:
    """The words that call it, for each of the ways the parts that a prompt has to hold."""
    return json.dumps([call for trigger in entry.triggers if (call := call_of(trigger))])
