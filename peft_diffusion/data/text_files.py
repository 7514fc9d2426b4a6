"""Read plain text to learn from: files, and folders of .txt files; everything wrong is told before anything is spent."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import UserError

_COMPANIONS = re.compile(r"(?i)(licen[cs]e|readme|attribution|notice|copying|credits|authors)([\W_].*)?")
_SHOWN = 5


@dataclass(frozen=True)
class Document:
    """A text: its name below the folder that was read, its content, and the SHA-256 of its bytes in hex."""

    name: str
    text: str
    digest: str


@dataclass(frozen=True)
class Texts:
    """What was read, in a fixed order, and in words what was left out and why."""

    documents: tuple[Document, ...]
    left_out: tuple[str, ...]

    def describe(self) -> list[str]:
        """Lines for the person: how much there is, and what is not part of it."""
        size = sum(len(document.text) for document in self.documents)
        lines = [f"{len(self.documents)} {'texts' if len(self.documents) > 1 else 'text'}, {size:,} characters"]
        if self.left_out:
            more = len(self.left_out) - _SHOWN
            shown = "; ".join(self.left_out[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")
            lines.append(f"{len(self.left_out)} files left out: {shown}")
        return lines


def read_texts(places: Sequence[Path]) -> Texts:
    """The texts of files, whatever their ending, and of folders with their subfolders, there of .txt files.

    Raises UserError for a place that is not there, for a file that is named and cannot be used, and where nothing is left.
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
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() or any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        if path.suffix.lower() != ".txt":
            left_out.append(f"{name} is no .txt file")
        elif _COMPANIONS.fullmatch(path.stem):
            left_out.append(f"{name} is about the texts")
        else:
            try:
                documents.append(_read(path, name))
            except UserError as error:
                left_out.append(str(error))


def _read(path: Path, name: str) -> Document:
    """One text, line ends as newlines. Raises UserError where the file cannot be read, is empty or is no UTF-8."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"there is no file or folder {path}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path} is no text in UTF-8: byte {error.start + 1}, in line {line}, is none of it; convert it (iconv)"
        ) from None
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise UserError(f"{path} is empty: there is nothing to learn from it")
    return Document(name, text, hashlib.sha256(data).hexdigest())
