"""What happens in a library, as data. Imports no torch."""

from dataclasses import dataclass, field
from pathlib import Path

from ..core.events import Event, Noted
from ..core.wording import number_of
from .ranking import Found


@dataclass(frozen=True)
class Added(Event):
    """What came of adding files.

    Attributes:
        library: The library's file.
        total: How many adapters it has now.
        added: New ones.
        changed: Those whose file, or what stands beside it, is another than before.
        moved: From where, by where they are now.
        unchanged: How many are as they were.
        copies: Files with the bytes of another that is there, which are not added, and that other.
        left_out: Files that are none that can be added, and why.
        gone: Those of the folders that were gone through whose files are not there any more. They stay in the library.
        embedded: How many were embedded.
        encoder: By what; "none" for words alone.
        sees: Whether pictures were embedded too.
        notes: What of the files was not read, and why.
    """

    library: Path
    total: int
    added: tuple[Path, ...]
    changed: tuple[Path, ...]
    moved: dict[Path, Path]
    unchanged: int
    copies: dict[Path, Path]
    left_out: tuple[tuple[Path, str], ...]
    gone: tuple[Path, ...]
    embedded: int
    encoder: str
    sees: bool
    notes: tuple[str, ...]

    def lines(self) -> tuple[str, ...]:
        """Tell it to a person."""
        counts = {"added": self.added, "changed": self.changed, "moved": self.moved}
        told = [f"{len(several)} {what}" for what, several in counts.items() if several]
        told += [f"{self.unchanged} unchanged"] if self.unchanged else []
        lines = [f"{self.library}: {', '.join(told) or 'nothing new'}; {number_of(self.total, 'adapter')} in all"]
        lines += [f"moved: {now} (was {before})" for now, before in self.moved.items()]
        lines += [f"not added: {path} has the same bytes as {other}" for path, other in self.copies.items()]
        lines += [f"not added: {path} {why}" if why[:1].islower() else f"not added: {why}" for path, why in self.left_out]
        lines += [f"missing: {path} is not there any more; library remove takes it out" for path in self.gone]
        lines += [f"note: {note}" for note in self.notes]
        if self.embedded:
            pictures = "" if self.sees else "; it sees no pictures, so that these count for nothing"
            lines.append(f"{number_of(self.embedded, 'adapter')} embedded by {self.encoder}{pictures}")
        return tuple(lines)


def others_told(others: int) -> str:
    """Say that adapters were left out because of the base.

    Args:
        others: How many.

    Returns:
        That, in a line.
    """
    return f"{others} more would be found, but do not fit the base, or do not tell theirs"


@dataclass(frozen=True)
class Chosen(Noted):
    """Adapters were chosen for a prompt.

    Attributes:
        message: All that follows in words.
        written: The prompt as it was written.
        prompt: As it is drawn, with the triggers that were added.
        found: The adapters that it asks for, the best first.
        added: The triggers that were added.
        others: How many were left out because they do not fit the base.
        notes: What was left out otherwise, and why.
        beside: Those that another prompt asks for more, where several have the same adapters.
    """

    message: str = field(init=False)
    written: str
    prompt: str
    found: tuple[Found, ...]
    added: tuple[str, ...]
    others: int
    notes: tuple[str, ...]
    beside: tuple[Found, ...] = ()

    @property
    def every(self) -> tuple[Found, ...]:
        """All adapters that it is drawn with, the best first."""
        return tuple(sorted((*self.found, *self.beside), key=lambda one: -one.score))

    def __post_init__(self) -> None:
        object.__setattr__(self, "message", "\n".join(self._said()))

    def _said(self) -> list[str]:
        lines = [f'for "{self.written}" {one.strength:g} of {one.line()}' for one in self.found]
        if self.beside:
            names = ", ".join(one.entry.name for one in self.beside)
            lines.append(f'for "{self.written}" too: {names}, which another prompt asks for more')
        if not self.every:
            lines.append(f'for "{self.written}" no adapter of the library is meant')
        if self.others:
            lines.append(others_told(self.others))
        lines += self.notes
        if self.added:
            lines.append(f'added to the prompt: {", ".join(self.added)}; it is now "{self.prompt}"')
        return lines

    def lines(self) -> tuple[str, ...]:
        """Tell it to a person."""
        return tuple(self.message.splitlines())
