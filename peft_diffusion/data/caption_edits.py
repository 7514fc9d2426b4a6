"""Change captions that are there, and count what they hold. Imports no torch."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.files import write_bytes
from ..core.wording import number_of
from .captions import distinct_tags, split_tags
from .folder import TrainingImage

_WORDS = 8  # in the mean of a tag, above which captions are taken for sentences
_SHOWN = 40


def replaced(caption: str, find: str, replacement: str) -> str:
    """Replace words in a caption, but not parts of words.

    Args:
        caption: Lines, each of which is a caption.
        find: The words.
        replacement: What comes in their place; where nothing does, tags that are left empty go too.

    Returns:
        The caption; as it is where the words do not occur.
    """
    before = r"(?<!\w)" if re.match(r"\w", find) else ""
    after = r"(?!\w)" if re.search(r"\w\Z", find) else ""
    pattern = re.compile(before + re.escape(find) + after)
    return "\n".join(_replaced(line, pattern, replacement) for line in caption.split("\n"))


def _replaced(line: str, pattern: re.Pattern[str], replacement: str) -> str:
    found, count = pattern.subn(lambda _: replacement, line)
    if not count:
        return line
    found = " ".join(found.split())
    return found if replacement.strip() else ", ".join(split_tags(found))


def edit(pictures: Iterable[TrainingImage], edits: Sequence[tuple[str, str]]) -> tuple[list[Path], int]:
    """Replace words in the caption files of pictures. A file is written aside and renamed, and only where it changes.

    Args:
        pictures: The pictures.
        edits: What is found and what comes in its place, done in turn.

    Returns:
        The files that were written, and how many captions stand elsewhere, such as in metadata, and stay.
    """
    files: dict[Path, str] = {}
    elsewhere = 0
    for picture in pictures:
        if picture.source == "sidecar" and picture.caption_file is not None:
            files[picture.caption_file] = picture.caption
        elsewhere += picture.source == "metadata"
    written = []
    for path, caption in files.items():
        changed = caption
        for find, replacement in edits:
            changed = replaced(changed, find, replacement)
        if changed != caption:
            write_bytes(path, f"{changed}\n".encode())
            written.append(path)
    return written, elsewhere


@dataclass(frozen=True)
class Statistics:
    """What captions hold.

    Attributes:
        pictures: How many pictures there are.
        bare: The files of those without a caption of their own.
        tags: In how many captions each tag occurs, the most frequent first. A tag is what stands between commas.
        words: The same of words.
        longest: The most words of a caption.
        repeated: How many captions are those of another picture too.
    """

    pictures: int
    bare: tuple[Path, ...]
    tags: Mapping[str, int]
    words: Mapping[str, int]
    longest: int
    repeated: int

    @property
    def sentences(self) -> bool:
        """Whether captions look like sentences, whose tags tell nothing."""
        uses = sum(self.tags.values())
        return bool(uses) and sum(len(tag.split()) * count for tag, count in self.tags.items()) / uses > _WORDS

    def to_json(self) -> dict[str, Any]:
        """Give all of it as JSON values.

        Returns:
            The values by name.
        """
        return {
            "pictures": self.pictures,
            "captions": self.pictures - len(self.bare),
            "without_caption": [str(path) for path in self.bare],
            "longest_words": self.longest,
            "repeated": self.repeated,
            "sentences": self.sentences,
            "tags": dict(self.tags),
            "words": dict(self.words),
        }

    def lines(self) -> tuple[str, ...]:
        """Tell how many captions there are, and the most frequent tags of them, or words of sentences."""
        captions = self.pictures - len(self.bare)
        lines = [f"{captions} of {self.pictures} pictures have captions, of at most {self.longest} words"]
        lines += [f"{number_of(self.repeated, 'caption')} the same as another picture's"] if self.repeated else []
        lines += [f"without: {path}" for path in self.bare[:5]]
        lines += [f"and {len(self.bare) - 5} more"] if len(self.bare) > 5 else []
        what, counts = ("words", self.words) if self.sentences else ("tags", self.tags)
        if counts:
            lines.append(f"{len(counts)} {what}:")
        lines += [f"{count:6}  {count / captions:4.0%}  {name}" for name, count in list(counts.items())[:_SHOWN]]
        lines += [f"and {len(counts) - _SHOWN} more (all of them: --json)"] if len(counts) > _SHOWN else []
        return tuple(lines)


def statistics(pictures: Sequence[TrainingImage]) -> Statistics:
    """Count what the captions of pictures hold; each counts a tag once.

    Args:
        pictures: The pictures. Captions that are names of files or folders count as none.

    Returns:
        The counts.
    """
    own = {picture.path: picture.caption for picture in pictures if picture.source in ("sidecar", "metadata")}
    captions = list(own.values())
    tags: Counter[str] = Counter()
    words: Counter[str] = Counter()
    for caption in captions:
        tags.update(distinct_tags(caption))
        words.update(set(re.findall(r"\w[\w'-]*", caption.lower())))
    return Statistics(
        pictures=len(pictures),
        bare=tuple(picture.path for picture in pictures if picture.path not in own),
        tags=dict(_ordered(tags)),
        words=dict(_ordered(words)),
        longest=max((len(line.split()) for caption in captions for line in caption.split("\n")), default=0),
        repeated=sum(count for count in Counter(captions).values() if count > 1),
    )


def _ordered(counts: Counter[str]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))
