"""A library of adapters: a file that knows what each teaches, and finds those that a prompt asks for.

Imports no torch itself; an encoder other than that of the embedded base does.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from ..bases.embedded import ICONS
from ..core.errors import UserError, did_you_mean
from ..core.events import Never, Noted, Observer, Observers, Progress, Stop, check_stop
from ..core.files import at_home, stamp_of
from ..data.captions import check_trigger, with_trigger
from .embedding import embedded_entry
from .encoder import Encoder
from .encoders import NONE, encoder_of, refuse_other
from .entries import Entry, beside_of, files_in, read_entry
from .events import Added, Chosen, others_told
from .fits import Wanted, named
from .ranking import LEAST, Found, Ranking, Snapshot, rank
from .store import Row, Store, usual_place
from .terms import call_of, terms_of

_AT_ONCE = 64  # files that are written together: what was read is not lost where it is stopped


@dataclass(frozen=True)
class Listed:
    """An adapter of a library, and whether its file is still what it was.

    Attributes:
        entry: What is known of it.
        status: "" where it is; "missing" or "changed".
    """

    entry: Entry
    status: str


class Library:
    """A library of adapters in one local file.

    Example:
        library = pd.Library()
        library.add(["loras"])
        for found in library.search("a pencil drawing of a cat", base="icons"):
            print(found.line())

    A library is for one thread at a time; processes may share its file.
    """

    def __init__(self, path: str | Path | None = None, *, make: bool = True) -> None:
        """Open a library.

        Args:
            path: Its file; None for the usual one, in the user's folder for data.
            make: Whether it is made where it is missing.

        Raises:
            UserError: It is missing, damaged, or a file of another program.
        """
        self._store = Store(usual_place() if path is None else at_home(Path(path)), make)
        self._snapshot: Snapshot | None = None

    @property
    def path(self) -> Path:
        """Its file."""
        return self._store.path

    @property
    def encoder(self) -> str:
        """What its adapters are embedded by; "none" for words alone."""
        return self._store.fact("encoder") or ICONS

    def __len__(self) -> int:
        return int(self._store.rows("SELECT count(*) FROM adapters")[0][0])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close its file."""
        self._store.close()

    def add(
        self,
        paths: Iterable[str | Path] = (),
        *,
        encoder: str | None = None,
        observers: Sequence[Observer] = (),
        stop: Stop = Never(),  # noqa: B008 -- has no state
    ) -> Added:
        """Add adapters, or bring what is known of them up to date.

        A file of which size and time are as before is not read again; one with the bytes of another whose file is gone has
        moved.

        Args:
            paths: Files of safetensors, and folders, which are gone through with all below them.
            encoder: What embeds all of the library from now on: ``icons``, ``none``, or a folder or hub id of CLIP or of a
                base. None for what did so before, which is ``icons`` in a new library.
            observers: Are told how far it is, and what came of it.
            stop: Where it is set, nothing more is read; what was read is kept.

        Returns:
            What came of it.

        Raises:
            UserError: A path is not there, there is no such encoder, or the library cannot be written.
            Interrupted: It was stopped. It is a KeyboardInterrupt.
        """
        tell, given = Observers(observers), [_meant(at_home(Path(path))) for path in paths]
        name = self.encoder if encoder is None else encoder
        used = encoder_of(name)
        self._use(name, used, tell)
        files, left = files_in(given)
        taken = _Taken(self._store, files, left)
        for start in range(0, len(files), _AT_ONCE):
            check_stop(stop, f"stopped after {start} of {len(files)} files, which are in the library; add the rest again")
            tell(Progress("reading adapters", start, len(files)))
            taken.take(files[start : start + _AT_ONCE])
        embedded = self._embed(used, taken.notes, tell, stop)
        gone = [row.path for row in taken.rows.values() if _below(row.path, given) and not row.path.exists()]
        made = taken.result(len(self), tuple(gone), embedded, used)
        tell(made)
        return made

    def search(
        self,
        query: str,
        *,
        base: str | Wanted | None = None,
        limit: int = 10,
        words_only: bool = False,
        observers: Sequence[Observer] = (),
    ) -> list[Found]:
        """Find the adapters that a prompt, or a description, asks for.

        Args:
            query: The prompt.
            base: The base that they have to fit: the name of a family, or a base as ``load_base`` takes it;
                None for any.
            limit: How many at most.
            words_only: Whether to go by words alone, without an encoder.
            observers: Are told what the person should know.

        Returns:
            The adapters, the best first, each with the reasons and whether its file is still what it was.

        Raises:
            UserError: There is no such base, or the library is damaged.
        """
        tell = Observers(observers)
        wanted = named(base) if isinstance(base, str) else base
        ranking = self._ranked(query, wanted, words_only, tell)
        found = ranking.found(ranking.best(limit, _ANY), self._store)
        if ranking.others:
            tell(Noted(others_told(ranking.others)))
        return found

    def choose(
        self,
        prompt: str,
        count: int,
        *,
        base: str | Wanted | None = None,
        without: Collection[Path] = (),
        observers: Sequence[Observer] = (),
    ) -> Chosen:
        """Choose adapters for a prompt, and add the triggers that it lacks.

        Args:
            prompt: The prompt.
            count: How many at most. Fewer are chosen where no more have to do with it, or much less than the best one.
            base: As for `search`.
            without: Files that are not chosen, as they are used already.
            observers: Are told what was chosen.

        Returns:
            The adapters, which carry their strengths, and the prompt to draw.

        Raises:
            UserError: As `search`.
        """
        (made,) = self.choose_together([prompt], count, base=base, without=without, observers=observers)
        return made

    def choose_together(
        self,
        prompts: Sequence[str],
        count: int,
        *,
        base: str | Wanted | None = None,
        without: Collection[Path] = (),
        observers: Sequence[Observer] = (),
    ) -> tuple[Chosen, ...]:
        """Choose the same adapters for several prompts, those that any of them asks for most.

        Args:
            prompts: The prompts.
            count: How many for all together at most.
            base: As for `search`.
            without: Files that are not chosen, as they are used already.
            observers: Are told what was chosen.

        Returns:
            For each prompt the adapters that it asks for most, those that others do, and the prompt to draw, which gets the
            triggers of all.

        Raises:
            UserError: As `search`.
        """
        tell = Observers(observers)
        wanted = named(base) if isinstance(base, str) else base
        taken = {path.resolve() for path in without}
        each = [self._asked_for(prompt, count, wanted, taken, tell) for prompt in prompts]
        best: dict[Path, tuple[Found, int]] = {}
        for number, asked in enumerate(each):
            for one in asked.found:
                if one.entry.path not in best or one.score > best[one.entry.path][0].score:
                    best[one.entry.path] = one, number
        together: list[Found] = []
        whose: list[int] = []
        for one, number in sorted(best.values(), key=lambda pair: -pair[0].score):
            why = _unusable(one, together)
            if not why and len(together) == count:
                why = f"{one.entry.path} ({one.score:.2f}) is not taken: others are asked for more, and {count} are chosen"
            if why:
                each[number].notes.append(why)
            else:
                together.append(one)
                whose.append(number)
        made = []
        for number, (prompt, asked) in enumerate(zip(prompts, each, strict=True)):
            drawn, added = with_triggers(prompt, together, asked.notes)
            mine = [of == number for of in whose]
            own = tuple(one for one, is_mine in zip(together, mine, strict=True) if is_mine)
            beside = tuple(one for one, is_mine in zip(together, mine, strict=True) if not is_mine)
            made.append(Chosen(prompt, drawn, own, tuple(added), asked.others, tuple(asked.notes), beside))
            tell(made[-1])
        return tuple(made)

    def _asked_for(
        self, prompt: str, count: int, wanted: Wanted | None, taken: Collection[Path], tell: Observer
    ) -> "_AskedFor":
        """The adapters that one prompt asks for and that can be used."""
        ranking = self._ranked(prompt, wanted, False, tell)
        made = _AskedFor([], [], ranking.others)
        for place in ranking.best(count + _MORE, LEAST):
            (one,) = ranking.found([place], self._store)
            if one.entry.path.resolve() in taken:
                continue
            if made.found and one.score < _BESIDE * made.found[0].score:
                break
            why = _unusable(one, made.found)
            if why:
                made.notes.append(why)
            else:
                made.found.append(one)
            if len(made.found) == count:
                break
        return made

    def entries(self) -> list[Listed]:
        """List all adapters.

        Returns:
            One each, by the paths of their files.
        """
        return [Listed(entry, entry.status()) for entry in self._store.entries().values()]

    def remove(self, names: Iterable[str | Path] = (), *, missing: bool = False) -> list[Entry]:
        """Take adapters out of the library. Their files stay.

        Args:
            names: Files or folders, or names of adapters.
            missing: Whether to take out all whose files are not there any more.

        Returns:
            Those that were taken out.

        Raises:
            UserError: There is none of such a name, or several.
        """
        known = self._store.entries()
        chosen: dict[int, Entry] = {}
        for name in map(str, names):
            chosen.update(_named(name, known))
        if missing:
            chosen.update({number: entry for number, entry in known.items() if not entry.path.exists()})
        with self._store.changing():
            for number in chosen:
                self._store.drop(number)
        return list(chosen.values())

    def _ranked(self, text: str, wanted: Wanted | None, words_only: bool, tell: Observer) -> Ranking:
        if self._snapshot is None or self._snapshot.changes != self._store.changes:
            self._snapshot = Snapshot(self._store)
        return rank(self._snapshot, text, wanted, None if words_only else self._own_encoder(tell))

    def _own_encoder(self, tell: Observer) -> Encoder | None:
        """What embedded the library; where it cannot be used, that is told, and words are gone by alone."""
        try:
            used = encoder_of(self.encoder)
            if used is not None and self._store.fact("fingerprint"):
                refuse_other(used, self._store.fact("fingerprint"))
        except UserError as error:
            tell(Noted(f"found by words alone: {error}"))
            return None
        return used

    def _use(self, name: str, used: Encoder | None, tell: Observer) -> None:
        """Have the library embedded by an encoder: where that is another than before, all embeddings go."""
        told = "" if used is None else used.fingerprint
        if self._store.fact("encoder") == name and self._store.fact("fingerprint") == told:
            return
        with self._store.changing():
            if self._store.fact("encoder"):
                tell(Noted(f"all adapters of the library are embedded anew, by {name}"))
            self._store.rows("DELETE FROM vectors")
            self._store.set_fact("encoder", name)
            self._store.set_fact("fingerprint", told)

    def _embed(self, used: Encoder | None, notes: list[str], tell: Observer, stop: Stop) -> int:
        """Embed all adapters that are not yet; returns how many."""
        if used is None:
            return 0
        rows = self._store.rows("SELECT id FROM adapters WHERE id NOT IN (SELECT adapter FROM vectors) ORDER BY id")
        numbers = [int(row[0]) for row in rows]
        for start in range(0, len(numbers), _AT_ONCE):
            check_stop(stop, f"stopped after {start} of {len(numbers)} were embedded; add goes on there")
            tell(Progress("embedding", start, len(numbers)))
            part = self._store.entries(numbers[start : start + _AT_ONCE])
            made = {number: embedded_entry(entry, used, notes) for number, entry in part.items()}
            with self._store.changing():
                for number, vectors in made.items():
                    self._store.put_vectors(number, vectors)
        return len(numbers)


_ANY = 0.03  # the least score of what a search shows: a word in one of many captions has a little more
_BESIDE = 0.35  # share of the best one's score that others have at least to be drawn with beside it
_MORE = 32  # further ones that are looked at in place of those that cannot be used


class _AskedFor(NamedTuple):
    """The adapters that a prompt asks for, the best first; what is to be told; how many do not fit the base."""

    found: list[Found]
    notes: list[str]
    others: int


class _Taken:
    """What comes of the files of an addition."""

    def __init__(self, store: Store, files: Sequence[Path], left: list[tuple[Path, str]]) -> None:
        self._store = store
        self.rows: dict[Path, Row] = {row.path: row for row in store.known()}
        self._owners = {row.sha256: row for row in self.rows.values()}
        self._left = left
        self._added: list[Path] = []
        self._changed: list[Path] = []
        self._moved: dict[Path, Path] = {}
        self._copies: dict[Path, Path] = {}
        self._unchanged = 0
        self.notes: list[str] = []

    def take(self, files: Sequence[Path]) -> None:
        """Read files, and write them together."""
        entries = [one for path in files if (one := self._read(path)) is not None]
        if entries:
            with self._store.changing():
                for entry, number in entries:
                    made = self._store.put(entry, number)
                    self._store.rows("DELETE FROM vectors WHERE adapter = ?", made)
                    row = Row(made, entry.path, entry.size, entry.modified, entry.sha256, entry.beside)
                    self.rows[entry.path] = self._owners[entry.sha256] = row

    def _read(self, path: Path) -> tuple[Entry, int | None] | None:
        """The entry of a file, and the number of the one that it replaces; None where nothing is to be written."""
        row = self.rows.get(path)
        try:
            size, modified, _ = stamp_of(path)
            same = row is not None and (size, modified) == (row.size, row.modified)
            if row is not None and same and beside_of(path) == row.beside:
                self._unchanged += 1
                return None
            entry = read_entry(path, row.sha256 if row is not None and same else None)
        except UserError as error:
            self._left.append((path, str(error)))
            return None
        except OSError as error:
            self._left.append((path, f"cannot be read: {error.strerror or error}"))
            return None
        self.notes += entry.notes
        return self._placed(entry, row)

    def _placed(self, entry: Entry, row: Row | None) -> tuple[Entry, int | None] | None:
        if row is not None:
            if (row.sha256, row.beside) == (entry.sha256, entry.beside):
                self._unchanged += 1
            else:
                self._changed.append(entry.path)
            return entry, row.id
        other = self._owners.get(entry.sha256)
        if other is None:
            self._owners[entry.sha256] = Row(-1, entry.path, entry.size, entry.modified, entry.sha256, entry.beside)
            self._added.append(entry.path)
            return entry, None
        if other.path.exists():
            self._copies[entry.path] = other.path
            return None
        self._moved[entry.path] = other.path
        self.rows.pop(other.path, None)
        return entry, other.id

    def result(self, total: int, gone: tuple[Path, ...], embedded: int, used: Encoder | None) -> Added:
        """What came of all."""
        return Added(
            self._store.path,
            total,
            tuple(self._added),
            tuple(self._changed),
            self._moved,
            self._unchanged,
            self._copies,
            tuple(self._left),
            gone,
            embedded,
            NONE if used is None else used.name,
            used is not None and used.sees,
            tuple(self.notes),
        )


def with_triggers(prompt: str, found: Sequence[Found], notes: list[str]) -> tuple[str, list[str]]:
    """Add the triggers to a prompt that it lacks.

    Args:
        prompt: The prompt.
        found: The adapters, the best first. The trigger of the best may be a template, into which the prompt goes; of others
            its words are put in front.
        notes: Takes what is to be told of triggers that cannot be added.

    Returns:
        The prompt, and the triggers that were added.
    """
    added: list[str] = []
    said = set(terms_of(prompt))
    for place, one in reversed(list(enumerate(found))):
        trigger = one.entry.trigger
        words = [word for part in call_of(trigger) for word in part]
        if not trigger or said.issuperset(words):
            continue
        if place and "{}" in trigger:
            trigger = " ".join(words)
        try:
            check_trigger(trigger)
        except UserError as error:
            notes.append(f"the trigger of {one.entry.name} is not added: {error}")
            continue
        prompt = with_trigger(prompt, trigger)
        added.insert(0, trigger)
    return prompt, added


def _unusable(one: Found, others: Sequence[Found]) -> str:
    """Why an adapter is not chosen; "" where it is."""
    path = one.entry.path
    if one.status == "missing":
        return (
            f"{path} is meant, but is not there any more; add it where it is now, or take it out: library remove --missing"
        )
    if one.status == "changed":
        return f"{path} is meant, but was changed since it was added; add it again with: peft-diffusion library add {path}"
    twin = next((other for other in others if other.entry.triggers and other.entry.triggers == one.entry.triggers), None)
    return "" if twin is None else f"{path} is not taken: it has the triggers of {twin.entry.path}"


def _meant(path: Path) -> Path:
    """A path without links of its own: one way to say where a file is."""
    return path.absolute() if not path.exists() else path.resolve()


def _below(path: Path, folders: Iterable[Path]) -> bool:
    return any(path.is_relative_to(folder) for folder in folders)


def _named(name: str, known: dict[int, Entry]) -> dict[int, Entry]:
    """The adapters that are meant by a name or a path. Raises UserError."""
    path = at_home(Path(name))
    whole = [_meant(path), path.absolute()]
    found = {number: entry for number, entry in known.items() if any(_below(entry.path, [one]) for one in whole)}
    if not found:
        found = {number: entry for number, entry in known.items() if entry.name.casefold() == name.casefold()}
        if len(found) > 1:
            paths = ", ".join(str(entry.path) for entry in found.values())
            raise UserError(f"{name!r} means several adapters of the library: {paths}; name the file")
    if not found:
        near = did_you_mean(name, [entry.name for entry in known.values()])
        raise UserError(f"the library has no adapter {name!r}{near}")
    return found
