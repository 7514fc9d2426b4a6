"""Where captions come from: text files beside the images, metadata files, or the file names themselves."""

import csv
import io
import posixpath
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..core.encodings import unicode_text, western_text
from ..core.parsing import json_value
from .problems import Problem

Source = Literal["sidecar", "metadata", "dataset", "recipe", "name", "folder", "none"]
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
        broken: Images whose caption is there and cannot be read.
        files: The file beside an image that its caption came from, or is left blank.
    """

    sidecars: Mapping[str, str]
    metadata: Mapping[str, str]
    problems: tuple[Problem, ...]
    any_files: bool
    broken: frozenset[str] = frozenset()
    files: Mapping[str, str] = field(default_factory=dict)

    def of(self, name: str) -> tuple[str, Source]:
        """Look up an image's caption; the file beside it wins over metadata.

        Args:
            name: The image's relative path.

        Returns:
            The caption, "" if there is none, and where it came from. Each line of it is an alternative, as in sd-scripts
            and OneTrainer.
        """
        key = plain_name(name)
        if self.sidecars.get(key):
            return self.sidecars[key], "sidecar"
        if self.metadata.get(key):
            return self.metadata[key], "metadata"
        return "", "none"


def read_captions(
    root: Path, files: Iterable[str], pictures: Collection[str], extensions: Sequence[str] = SIDECARS
) -> Captions:
    """Read the caption files of a folder.

    Args:
        root: The folder.
        files: All its files, as POSIX paths relative to `root`.
        pictures: Those of them that are images.
        extensions: What the names of files beside images end in, the first that there is counts.

    Returns:
        The captions and the problems.
    """
    files = list(files)
    sidecars, problems, broken, beside = _read_sidecars(root, files, pictures, extensions)
    metadata: dict[str, str] = {}
    found = [name for name in files if is_metadata(name)]
    # The file nearest to a picture speaks first, and JSON lines before CSV.
    for name in sorted(found, key=lambda name: (-name.count("/"), not name.lower().endswith(".jsonl"), name)):
        problems += _read_metadata(root, name, {plain_name(file) for file in files}, metadata)
    return Captions(sidecars, metadata, tuple(problems), bool(sidecars or found), broken, beside)


def is_metadata(name: str) -> bool:
    """Tell whether a file lists captions.

    Args:
        name: Its path.

    Returns:
        True for `metadata.jsonl` and `metadata.csv`.
    """
    return posixpath.basename(name).lower() in METADATA


def is_sidecar(name: str, extensions: Sequence[str] = SIDECARS) -> bool:
    """Tell whether a file may be a caption beside an image.

    Args:
        name: Its path.
        extensions: What the names of such files end in, in small letters.

    Returns:
        Whether its own does.
    """
    return posixpath.splitext(name)[1].lower() in extensions


def _text(path: Path, problems: list[Problem], kind: str) -> str | None:
    """The content of a file, and a problem where its encoding is guessed; None for a file that cannot be read.

    That always stops: who allows pictures without captions does not mean those whose caption is damaged.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        problems.append(Problem(str(path), kind, f"cannot be read ({error.strerror})", "Check the file", stops=True))
        return None
    try:
        return unicode_text(data)
    except ValueError as error:
        text = western_text(data)
        if text is None:
            problems.append(Problem(str(path), kind, str(error), "Save it as UTF-8 text, or delete it", stops=True))
            return None
    word = re.search(r"[^ \t\r\n]*[^\0-\x7f][^ \t\r\n]*", text)  # a space that does not break is a letter here
    shown = "" if word is None else f", as in \u201c{word[0]}\u201d"
    message = f"is no UTF-8, and read as Western European (cp1252){shown}"
    problems.append(Problem(str(path), "caption read as cp1252", message, "Save it as UTF-8 where that is wrong"))
    return text


def _lines(text: str) -> str:
    """A caption with single spaces, its lines apart: they are alternatives, and not one sentence."""
    return "\n".join(" ".join(line.split()) for line in re.split(r"\r\n|\r|\n", text) if line.strip())


def _read_sidecars(
    root: Path, files: Iterable[str], pictures: Collection[str], extensions: Sequence[str]
) -> tuple[dict[str, str], list[Problem], frozenset[str], dict[str, str]]:
    """The captions beside images, what is wrong with them, the images of those that cannot be read, and the files."""
    by_stem: dict[str, list[str]] = {}
    for picture in pictures:
        by_stem.setdefault(posixpath.splitext(plain_name(picture))[0], []).append(picture)
    captions: dict[str, str] = {}
    beside: dict[str, str] = {}
    problems: list[Problem] = []
    broken: set[str] = set()
    sidecars = [name for name in files if is_sidecar(name, extensions)]
    for name in sorted(sidecars, key=lambda name: (extensions.index(posixpath.splitext(name)[1].lower()), name)):
        where, owners = str(root / name), by_stem.get(posixpath.splitext(plain_name(name))[0], [])
        if not owners:
            problems.append(
                Problem(where, "caption without a picture", "no picture has this name", "Rename it or delete it")
            )
            continue
        text = _text(root / name, problems, "unreadable caption")
        broken.update(map(plain_name, owners) if text is None else ())
        caption = _lines(text or "")
        for owner in map(plain_name, owners):
            if captions.get(owner) and caption and captions[owner] != caption:
                message = "a second caption for the same picture, not used"
                problems.append(Problem(where, "two captions", message, "Keep the .txt or the .caption file"))
            if not captions.get(owner) and (caption or owner not in beside):
                beside[owner] = name
            captions[owner] = captions.get(owner) or caption
    return captions, problems, frozenset(broken), beside


def _read_metadata(root: Path, name: str, files: Collection[str], captions: dict[str, str]) -> list[Problem]:
    """Add the captions of one metadata file to `captions`, where nearer files are already in, and list its problems."""
    where, base = str(root / name), posixpath.dirname(plain_name(name))
    problems: list[Problem] = []
    seen: set[str] = set()

    def broken(line: int | None, message: str, fix: str, kind: str = "broken metadata") -> None:
        # What cannot be read stops; a line about a picture that is not there, or a second one, does no harm.
        problems.append(Problem(where, kind, message, fix, line, stops=kind == "broken metadata"))

    text = _text(root / name, problems, "broken metadata")
    if text is None:
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
            captions.setdefault(key, _lines(caption))
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
