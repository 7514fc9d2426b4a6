"""The formats that pictures are written in, and where each carries texts: PNG in chunks, JPEG and WebP in EXIF. No torch."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from ..core.errors import UserError

if TYPE_CHECKING:  # the settings of commands import this module, whose help needs no Pillow
    from PIL import Image

PictureFormat: TypeAlias = Literal["png", "jpeg", "webp"]

KEY = "peft_diffusion"  # of our own text, which is JSON
_A1111 = "parameters"  # what A1111 calls its chunk
_EXIF, _USER_COMMENT = 0x8769, 0x9286
_PRIVATE = 0xC634  # DNGPrivateData: bytes of a program that is named first, which others leave as they are
_OWN = KEY.encode() + b"\0"
_UNICODE = b"UNICODE\0"  # of EXIF 2.3: UTF-16 follows
_MOST_EXIF = 65533 - 8  # bytes that a segment of a JPEG holds, less its own length and name
_MOST_JSON = 1 << 28  # bytes, unpacked
_QUALITY = 95


@dataclass(frozen=True)
class _Format:
    """What Pillow calls a format, its endings, the usual one first, and the name of its module where that can be missing."""

    pillow: str
    endings: tuple[str, ...]
    feature: str | None = None


_FORMATS: Mapping[PictureFormat, _Format] = MappingProxyType(
    {
        "png": _Format("PNG", (".png",)),
        "jpeg": _Format("JPEG", (".jpg", ".jpeg"), "jpg"),
        "webp": _Format("WEBP", (".webp",), "webp"),
    }
)
READ = tuple(one.pillow for one in _FORMATS.values())
"""What Pillow calls those that are read."""


def ending(kind: PictureFormat | None) -> str:
    """Tell how the names of files of a format end.

    Args:
        kind: The format; None for the usual one.

    Returns:
        The ending, such as ".png".
    """
    return _FORMATS[kind or "png"].endings[0]


def format_of(path: Path) -> PictureFormat:
    """Tell which format a file is to be of.

    Args:
        path: The file.

    Returns:
        The format of its ending.

    Raises:
        UserError: None that carries recipes has it, or this Pillow cannot write it.
    """
    for kind, one in _FORMATS.items():
        if path.suffix.lower() in one.endings:
            if one.feature and not _has(one.feature):
                raise UserError(f"{path}: this Pillow cannot write {one.pillow}; take .png, or install Pillow anew")
            return kind
    endings = ", ".join(ending for one in _FORMATS.values() for ending in one.endings)
    raise UserError(f"{path}: pictures are written as {endings}, which carry the recipe")


def _has(feature: str) -> bool:
    from PIL import features

    return bool(features.check(feature))


@dataclass(frozen=True)
class Carried:
    """Texts that a picture carries.

    Attributes:
        own: JSON for this package, in ASCII.
        a1111: What A1111 writes, for galleries and other programs; None for nothing.
    """

    own: str
    a1111: str | None = None

    def options(self, kind: PictureFormat, quality: int | None = None) -> dict[str, Any]:
        """Say how Pillow writes a picture with them.

        Args:
            kind: The format.
            quality: From 1 to 100, of those that lose something; WebP loses nothing at 100. None for 95.

        Returns:
            Arguments of `Image.save`, the format among them.
        """
        name = _FORMATS[kind].pillow
        if kind == "png":
            from PIL import PngImagePlugin

            info = PngImagePlugin.PngInfo()
            if self.a1111 is not None:
                info.add_text(_A1111, self.a1111)
            info.add_text(KEY, self.own)
            return {"format": name, "pnginfo": info}
        quality = _QUALITY if quality is None else quality
        told: dict[str, Any] = {"format": name, "exif": self._exif(), "quality": quality}
        # Half the colours of a JPEG would blur what is drawn in lines.
        return told | ({"subsampling": 0} if kind == "jpeg" else {"lossless": quality == 100})

    def fits(self, kind: PictureFormat) -> bool:
        """Tell whether a format has room for them.

        Args:
            kind: The format.

        Returns:
            Whether it has.
        """
        return kind != "jpeg" or len(self._exif()) <= _MOST_EXIF

    def _exif(self) -> bytes:
        from PIL import Image

        exif = Image.Exif()
        exif[_PRIVATE] = _OWN + zlib.compress(self.own.encode("ascii"))
        if self.a1111 is not None:  # as A1111 writes it, by piexif's UserComment
            exif.get_ifd(_EXIF)[_USER_COMMENT] = _UNICODE + self.a1111.encode("utf-16-be")
        return exif.tobytes()


def a1111_text(image: "Image.Image") -> str:
    """Read what A1111 wrote into a picture, or what we did in its place.

    Args:
        image: The picture, whose pixels are read already, as text may stand behind them.

    Returns:
        The text; "" where there is none.
    """
    found = image.info.get(_A1111)
    if isinstance(found, str):
        return found
    try:
        comment = image.getexif().get_ifd(_EXIF).get(_USER_COMMENT)
    except Exception:  # whatever broken EXIF makes Pillow raise, the picture tells nothing there
        return ""
    if not isinstance(comment, bytes) or not comment.startswith(_UNICODE):
        return ""
    return comment.removeprefix(_UNICODE).decode("utf-16-be", "replace")


def own_text(image: "Image.Image") -> str | None:
    """Read the JSON that a picture carries.

    Args:
        image: The picture, whose pixels are read already, as text may stand behind them.

    Returns:
        The JSON; None where there is none.

    Raises:
        ValueError: It is damaged, or unpacks to more than is read.
    """
    if image.format == "PNG":
        text: str | None = image.info.get(KEY)
        return text
    kept = image.getexif().get(_PRIVATE, b"")
    if not isinstance(kept, bytes) or not kept.startswith(_OWN):
        return None
    unpacked = zlib.decompressobj()
    try:
        found = unpacked.decompress(kept.removeprefix(_OWN), _MOST_JSON)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if not unpacked.eof:
        raise ValueError("it ends early, or is too long")
    return found.decode("ascii")
