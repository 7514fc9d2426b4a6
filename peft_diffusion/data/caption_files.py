"""Where captions come from: text files beside the images, metadata files, or the file names themselves."""

import csv
import io
import posixpath
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..core.parsing import json_value
from .problems import Problem

Source = Literal["sidecar", "metadata", "name", "none"]
SIDECARS: tuple[str, ...] = (".txt", ".caption")
METADATA: tuple[str, ...] = ("metadata.jsonl", "metadata.csv")
COLUMNS: tuple[str, ...] = ("text", "caption", "prompt")

_LEADING = re.compile(r"^\d+[\s_.-]+(?=\S)")
_TRAILING = re.compile(r"(?<=\S)[\s_.-]+\d+$")
_PADDED_LEADING = re.compile(r"^0\d*[\s_.-]+(?=\S)")
_PADDED_TRAILING = re.compile(r"(?<=\S)[\s_.-]+0\d*$|\s*\(\d+\)$")
_CAMERA = re.compile(
    r"(?i)(img|dsc[fn]?|pxl|mvimg|p|image|picture|photo|screen ?shot|untitled|download|frame|file|scan)?[\W\d_]*"
)


def plain_name(name: str) -> str:
    """Normalise a relative path to NFC: macOS stores accents decomposed, other systems and metadata files do not.

    Args:
        name: The path.

    Returns:
        Its composed spelling.
    """
    return unicodedata.normalize("NFC", name)


def name_captions(stems: Collection[str]) -> dict[str, str]:
    """Read captions from file names.

    Underscores and dashes are spaces. A counter at either end is dropped when it is zero-padded or in brackets, or when all
    the names have one: `001_red_apple` and a folder of `cat-1`, `dog-2` lose theirs, a single `apollo-11` does not.

    Args:
        stems: File names without folder and extension.

    Returns:
        The caption of each stem; "" for names such as IMG_1234.
    """
    counted = len(stems) > 1
    leading = _LEADING if counted and all(_LEADING.match(stem) for stem in stems) else _PADDED_LEADING
    trailing = _TRAILING if counted and all(_TRAILING.search(stem) for stem in stems) else _PADDED_TRAILING
    return {stem: _name_caption(leading.sub("", trailing.sub("", stem))) for stem in stems}


def _name_caption(stem: str) -> str:
    if _CAMERA.fullmatch(stem):
        return ""
    return " ".join(plain_name(re.sub(r"[_-]+", " ", stem)).split())


@dataclass(frozen=True)
class Captions:
    """What the caption files of a folder say, by the image's relative path.

    Attributes:
        sidecars: Captions from files beside the images; "" for one left blank.
        metadata: Captions from metadata files.
        problems: What was wrong with the files.
        any_files: Whether the folder has caption files at all.
    """

    sidecars: Mapping[str, str]
    metadata: Mapping[str, str]
    problems: tuple[Problem, ...]
    any_files: bool

    def of(self, name: str) -> tuple[str, Source]:
        """Look up an image's caption; the file beside it wins over metadata.

        Args:
            name: The image's relative path.

        Returns:
            The caption, "" if there is none, and where it came from.
        """
        key = plain_name(name)
        if self.sidecars.get(key):
            return self.sidecars[key], "sidecar"
        if self.metadata.get(key):
            return self.metadata[key], "metadata"
        return "", "none"


def read_captions(root: Path, files: Iterable[str], pictures: Collection[str]) -> Captions:
    """Read the caption files of a folder.

    Args:
        root: The folder.
        files: All its files, as POSIX paths relative to `root`.
        pictures: Those of them that are images.

    Returns:
        The captions and the problems.
    """
    files = list(files)
    sidecars, problems = _read_sidecars(root, files, pictures)
    metadata: dict[str, str] = {}
    found = [name for name in files if is_metadata(name)]
    # The file nearest to a picture speaks first, and JSON lines before CSV.
    for name in sorted(found, key=lambda name: (-name.count("/"), not name.lower().endswith(".jsonl"), name)):
        problems += _read_metadata(root, name, {plain_name(file) for file in files}, metadata)
    return Captions(sidecars, metadata, tuple(problems), bool(sidecars or found))


def is_metadata(name: str) -> bool:
    """Tell whether a file lists captions.

    Args:
        name: Its path.

    Returns:
        True for `metadata.jsonl` and `metadata.csv`.
    """
    return posixpath.basename(name).lower() in METADATA


def is_sidecar(name: str) -> bool:
    """Tell whether a file may be a caption beside an image.

    Args:
        name: Its path.

    Returns:
        True for `.txt` and `.caption`.
    """
    return posixpath.splitext(name)[1].lower() in SIDECARS


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8-sig")


def _read_sidecars(root: Path, files: Iterable[str], pictures: Collection[str]) -> tuple[dict[str, str], list[Problem]]:
    by_stem: dict[str, list[str]] = {}
    for picture in pictures:
        by_stem.setdefault(posixpath.splitext(plain_name(picture))[0], []).append(picture)
    captions: dict[str, str] = {}
    problems: list[Problem] = []
    sidecars = [name for name in files if is_sidecar(name)]
    for name in sorted(sidecars, key=lambda name: (SIDECARS.index(posixpath.splitext(name)[1].lower()), name)):
        where, owners = str(root / name), by_stem.get(posixpath.splitext(plain_name(name))[0], [])
        if not owners:
            problems.append(
                Problem(where, "caption without a picture", "no picture has this name", "Rename it or delete it")
            )
            continue
        try:
            caption = " ".join(_text(root / name).split())
        except (OSError, UnicodeDecodeError) as error:
            problems.append(Problem(where, "unreadable caption", f"cannot be read ({error})", "Save it as UTF-8 text"))
            caption = ""
        for owner in map(plain_name, owners):
            if captions.get(owner) and caption and captions[owner] != caption:
                message = "a second caption for the same picture, not used"
                problems.append(Problem(where, "two captions", message, "Keep the .txt or the .caption file"))
            captions[owner] = captions.get(owner) or caption
    return captions, problems


def _read_metadata(root: Path, name: str, files: Collection[str], captions: dict[str, str]) -> list[Problem]:
    """Add the captions of one metadata file to `captions`, where nearer files are already in, and list its problems."""
    where, base = str(root / name), posixpath.dirname(plain_name(name))
    problems: list[Problem] = []
    seen: set[str] = set()

    def broken(line: int | None, message: str, fix: str, kind: str = "broken metadata") -> None:
        problems.append(Problem(where, kind, message, fix, line))

    try:
        text = _text(root / name)
    except (OSError, UnicodeDecodeError) as error:
        broken(None, f"cannot be read ({error})", "Save it as UTF-8 text")
        return problems
    for line, row in _csv_rows(text) if name.lower().endswith(".csv") else _json_rows(text):
        if isinstance(row, str):
            broken(line, row, "Mend the line")
            continue
        file_name = row.get("file_name")
        if not isinstance(file_name, str) or not file_name:
            broken(line, 'has no "file_name"', 'Give every line a "file_name" and a "text"')
            continue
        key = posixpath.normpath(posixpath.join(base, plain_name(file_name.replace("\\", "/"))))
        caption = next((row[column] for column in COLUMNS if row.get(column)), "")
        if not isinstance(caption, str):
            broken(line, f"the caption of {file_name} is no text", 'Write "text" as a string')
        elif key not in files:
            broken(line, f"names {file_name}, which is not there", "Mend the name or delete the line", "no such picture")
        elif key in seen:
            broken(line, f"a second caption for {file_name}, not used", "Delete one of the two", "two captions")
        else:
            seen.add(key)
            captions.setdefault(key, " ".join(caption.split()))
    return problems


def _json_rows(text: str) -> Iterator[tuple[int, Mapping[str, object] | str]]:
    """Line numbers from 1, each with its object or with what is wrong with the line."""
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json_value(line)
        except ValueError as error:
            yield number, f"is no JSON ({error})"
            continue
        yield number, row if isinstance(row, dict) else 'is not like {"file_name": "a.png", "text": "a cat"}'


def _csv_rows(text: str) -> Iterator[tuple[int, Mapping[str, object] | str]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        columns = [column.strip() for column in reader.fieldnames or ()]
        if "file_name" not in columns or not set(columns) & set(COLUMNS):
            yield 1, f"the header ({', '.join(columns) or 'empty'}) needs the columns file_name and text"
            return
        reader.fieldnames = columns
        for row in reader:
            yield reader.line_num, {column: value for column, value in row.items() if isinstance(column, str)}
    except (csv.Error, ValueError) as error:
        yield reader.line_num, f"is no CSV ({error})"
