"""Fonts for labels in any script: Pillow's own, what matplotlib brings, and those of the system, letter by letter."""

import os
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TypeAlias

from PIL import ImageFont

Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont

_STRIKES = (109, 128, 136, 160, 96, 64, 32)  # sizes that fonts of colour bitmaps have
_JOINING = {"\u200d", *map(chr, range(0xFE00, 0xFE10)), *map(chr, range(0x1F3FB, 0x1F400))}
_UNASSIGNED = "\U0010fffe"  # which no font has a glyph for
_SECONDS = 10  # that fontconfig may take
# Where no fontconfig says it: fonts that systems come with, those for emoji first, as others have some in black.
_KNOWN = (
    "NotoColorEmoji.ttf", "seguiemj.ttf", "Apple Color Emoji.ttc", "NotoSansCJK-Regular.ttc", "NotoSansCJKsc-Regular.otf",
    "SourceHanSans.ttc", "PingFang.ttc", "Hiragino Sans GB.ttc", "msyh.ttc", "YuGothM.ttc", "malgun.ttf",
    "AppleSDGothicNeo.ttc", "wqy-microhei.ttc", "wqy-zenhei.ttc", "DroidSansFallbackFull.ttf", "DroidSansFallback.ttf",
    "NotoSansArabic-Regular.ttf", "NotoSansDevanagari-Regular.ttf", "NotoSansThai-Regular.ttf", "Arial Unicode.ttf",
    "unifont.otf", "unifont.ttf", "FreeSans.ttf",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """Letters that are drawn by one font.

    Attributes:
        text: The letters.
        font: The font.
        scale: What its pixels are multiplied by: fonts of bitmaps have sizes of their own.
    """

    text: str
    font: Font
    scale: float = 1.0

    @property
    def length(self) -> float:
        """In pixels of the label."""
        return float(self.font.getlength(self.text)) * self.scale


def runs(text: str, size: int) -> list[Run]:
    """Part a line by the fonts that draw it.

    Args:
        text: The line.
        size: Of its letters, in pixels.

    Returns:
        The parts, in order; what no font here has is drawn as the first font draws what it lacks.
    """
    usual = main_font(text, size)
    if text.isascii():
        return [Run(text, usual)]
    found: list[Run] = []
    for letters in _clusters(text):
        run = Run(letters, usual) if _has(usual, letters[0]) else _other(letters, size) or Run(letters, usual)
        if found and (found[-1].font, found[-1].scale) == (run.font, run.scale):
            run = Run(found.pop().text + letters, run.font, run.scale)
        found.append(run)
    return found


def missing(text: str) -> str:
    """Tell which letters no font here has.

    Args:
        text: The text.

    Returns:
        Each once, in order.
    """
    size = 20
    first = [letters[0] for letters in _clusters(text) if not letters.isspace()]
    lacking = (one for one in dict.fromkeys(first) if not _has(main_font(text, size), one))
    return "".join(one for one in lacking if _other(one, size) is None)


def main_font(text: str, size: int) -> Font:
    """Choose the font that most of a line is drawn by.

    Args:
        text: The line.
        size: Of its letters, in pixels.

    Returns:
        Pillow's own; for other scripts the one that comes with matplotlib, which knows accents, Greek and Cyrillic.
    """
    return _plain(size) if text.isascii() else _wider(size)


@cache
def _plain(size: int) -> Font:
    return ImageFont.load_default(size)


@cache
def _wider(size: int) -> Font:
    spec = find_spec("matplotlib")
    for folder in (spec.submodule_search_locations if spec else None) or ():
        file = Path(folder) / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
        if file.is_file():
            return ImageFont.truetype(str(file), size)
    return _plain(size)


def _clusters(text: str) -> Iterator[str]:
    """Letters with what joins or changes them, as the parts of one emoji."""
    start = 0
    for end in range(1, len(text) + 1):
        joined = end < len(text) and (
            text[end] in _JOINING or text[end - 1] == "\u200d" or unicodedata.category(text[end]) in ("Mn", "Me")
        )
        if not joined:
            yield text[start:end]
            start = end


@cache
def _has(font: Font, letter: str) -> bool:
    """Whether a font has a glyph for a letter: it is drawn otherwise than what no font has."""
    if letter.isascii() or letter.isspace() or unicodedata.category(letter) in ("Cf", "Cc"):
        return True
    if not isinstance(font, ImageFont.FreeTypeFont):
        return False
    drawn, lacking = (font.getmask(one, mode="RGBA") for one in (letter, _UNASSIGNED))
    return drawn.getbbox() is not None and (drawn.size != lacking.size or list(drawn) != list(lacking))


def _other(letters: str, size: int) -> Run | None:
    """Letters by a font of the system that has the first of them."""
    for file, index in _files(letters[0]):
        opened = _opened(file, index, size)
        if opened is not None and _has(opened[0], letters[0]):
            return Run(letters, *opened)
    return None


@cache
def _opened(file: Path, index: int, size: int) -> tuple[ImageFont.FreeTypeFont, float] | None:
    for strike in (size, *_STRIKES):
        try:
            return ImageFont.truetype(str(file), strike, index=index), size / strike
        except OSError:  # no font, or bitmaps of other sizes
            continue
    return None


@cache
def _files(letter: str) -> tuple[tuple[Path, int], ...]:
    """Fonts that may have a letter: what fontconfig chooses, and those that are known."""
    return tuple(dict.fromkeys([*_by_fontconfig(letter), *((file, 0) for file in _installed())]))


def _by_fontconfig(letter: str) -> list[tuple[Path, int]]:
    program = shutil.which("fc-match")
    if program is None:
        return []
    asked = [program, "--format", "%{file}\n%{index}", f":charset={ord(letter):x}"]
    try:
        told = subprocess.run(asked, capture_output=True, timeout=_SECONDS, check=True).stdout.decode().split("\n")
        return [(Path(told[0]), int(told[1]) & 0xFFFF)]  # above stand the instances of variable fonts
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return []


@cache
def _installed() -> tuple[Path, ...]:
    there: dict[str, Path] = {}
    for folder in _folders():
        for where, _, names in os.walk(folder):
            there |= {name: Path(where) / name for name in names if name in _KNOWN and name not in there}
    return tuple(there[name] for name in _KNOWN if name in there)


def _folders() -> list[Path]:
    home = Path.home()
    if sys.platform == "win32":
        return [Path(os.environ.get("WINDIR", r"C:\Windows")) / "Fonts", home / "AppData/Local/Microsoft/Windows/Fonts"]
    if sys.platform == "darwin":
        return [home / "Library/Fonts", Path("/Library/Fonts"), Path("/System/Library/Fonts")]
    return [home / ".local/share/fonts", home / ".fonts", Path("/usr/local/share/fonts"), Path("/usr/share/fonts")]
