"""Read plain text to learn from: files, and folders of .txt files. Every problem is listed before any computation."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..core.encodings import unicode_text
from ..core.errors import UserError
from ..core.files import files_below, regular
from ..core.wording import number_of

_COMPANIONS = re.compile(r"(?i)(licen[cs]e|readme|attribution|notice|copying|credits|authors)([\W_].*)?")
_SHOWN = 5


@dataclass(frozen=True)
class Document:
    """A text.

    Attributes:
        name: Its path below the folder that was read.
        text: Its content, with newlines as line ends.
        digest: SHA-256 of the file's bytes, in hex.
    """

    name: str
    text: str
    digest: str


@dataclass(frozen=True)
class Texts:
    """The texts that were read.

    Attributes:
        documents: The texts, in a fixed order.
        left_out: A line for each file that was left out, with the reason.
    """

    documents: tuple[Document, ...]
    left_out: tuple[str, ...]

    def describe(self) -> list[str]:
        """Describe how much text there is and what was left out, in lines of plain text."""
        size = sum(len(document.text) for document in self.documents)
        lines = [f"{number_of(len(self.documents), 'text')}, {size:,} characters"]
        if self.left_out:
            more = len(self.left_out) - _SHOWN
            shown = "; ".join(self.left_out[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")
            lines.append(f"{number_of(len(self.left_out), 'file')} left out: {shown}")
        return lines


def read_texts(places: Sequence[Path]) -> Texts:
    """Read the texts of files and folders.

    Args:
        places: Files with any ending, and folders, of which the .txt files in all subfolders are read.

    Returns:
        The texts and what was left out.

    Raises:
        UserError: A place does not exist, a file that was named cannot be used, or nothing is left.
    """
    documents: list[Document] = []
    left_out: list[str] = []
    for place in places:
        if place.is_dir():
            _read_folder(place, documents, left_out)
        else:
            documents.append(_read(place, place.name))
    if not documents:
        where = ", ".join(map(str, places)) or "nothing was named"
        why = f" ({'; '.join(left_out[:_SHOWN])})" if left_out else ""
        raise UserError(f"there is no text to learn from in {where}: put UTF-8 .txt files there{why}")
    return Texts(tuple(documents), tuple(left_out))


def _read_folder(folder: Path, documents: list[Document], left_out: list[str]) -> None:
    for path in files_below(folder):
        name = path.relative_to(folder).as_posix()
        if path.exists() and not path.is_file():
            left_out.append(f"{name} is no ordinary file")
        elif path.suffix.lower() != ".txt":
            left_out.append(f"{name} is no .txt file")
        elif _COMPANIONS.fullmatch(path.stem):
            left_out.append(f"{name} is about the texts")
        else:
            try:
                documents.append(_read(path, name))
            except UserError as error:
                left_out.append(str(error))


def _read(path: Path, name: str) -> Document:
    """One text, line ends as newlines. Raises UserError where the file cannot be read, is empty or is no Unicode."""
    try:
        data = regular(path).read_bytes()
    except FileNotFoundError:
        raise UserError(f"there is no file or folder {path}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    try:
        text = unicode_text(data)
    except ValueError as error:
        raise UserError(f"{path} {error}; convert it to UTF-8 (iconv)") from None
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise UserError(f"{path} is empty: there is nothing to learn from it")
    return Document(name, text, hashlib.sha256(data).hexdigest())
