"""Example pictures of an adapter: those beside its file, and the one in it. Pictures of strangers, so all has limits.

Imports no torch.
"""

import base64
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import UserError
from ..core.files import refuse_larger
from ..core.parsing import refusing
from ..data.drawn_from import a1111_prompt

if TYPE_CHECKING:
    from PIL import Image

_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
_KINDS = ("PNG", "JPEG", "WEBP")  # no other decoder is tried
_MOST_BYTES = 2**25  # of a file
_MOST_PIXELS = 2**26
_MOST_OF_THUMBNAIL = 2**23  # letters of base64
_MOST = 8  # pictures of an adapter
_MOST_LETTERS = 2**16  # of what a picture says of its making
_SIDE = 512  # pixels that a picture is brought to
_DATA = re.compile(r"data:image/(?:png|jpe?g|webp);base64,", re.IGNORECASE)


def examples_of(path: Path) -> tuple[Path, ...]:
    """Find the pictures beside an adapter file.

    Args:
        path: The file.

    Returns:
        ``NAME.png``, ``NAME.preview.png``, ``NAME.1.png`` and the like, also as JPEG and WebP; at most eight.
    """
    stems = ("", ".preview", *(f".{number}" for number in range(10)))
    named = (path.with_name(f"{path.stem}{stem}{ending}") for stem in stems for ending in _ENDINGS)
    return tuple(one for one in named if one.is_file())[:_MOST]


def open_example(path: Path) -> "Image.Image":
    """Open an example picture.

    Args:
        path: The picture.

    Returns:
        It in RGB, of at most 512 pixels a side.

    Raises:
        UserError: It is none, or is too large.
    """
    refuse_larger(path, _MOST_BYTES, "example pictures", "it is not looked at")
    with refusing(f"{path} is not looked at"):
        return _opened(path.read_bytes(), str(path))


def thumbnail_in(told: str, where: str) -> "Image.Image":
    """Open the picture that a file holds in its metadata.

    Args:
        told: ``modelspec.thumbnail``: a picture in base64, as an address of data.
        where: What errors call the file.

    Returns:
        It in RGB, of at most 512 pixels a side.

    Raises:
        UserError: It is none, or is too large.
    """
    match = _DATA.match(told)
    if match is None or len(told) > _MOST_OF_THUMBNAIL:
        raise UserError(f"{where}: its thumbnail is no picture in base64 of at most {_MOST_OF_THUMBNAIL:,} letters")
    with refusing(f"{where}: its thumbnail is not looked at"):
        return _opened(base64.b64decode(told[match.end() :], validate=True), where)


def prompts_of(pictures: Sequence[Path]) -> tuple[list[str], list[str]]:
    """Read what pictures were drawn from, as A1111 and this package write it into PNG files.

    Args:
        pictures: The files.

    Returns:
        The prompts; and what could not be read.
    """
    found: list[str] = []
    notes: list[str] = []
    for path in pictures:
        if path.suffix.lower() != ".png":
            continue
        try:
            told = _parameters(path)
        except UserError as error:
            notes.append(str(error))
            continue
        if isinstance(told, str) and len(told) <= _MOST_LETTERS:
            prompt = a1111_prompt(told)
            found += [prompt[:2000]] if prompt else []
    return found, notes


def _parameters(path: Path) -> object:
    """What a PNG says it was drawn from, without a look at its pixels. Raises UserError for what is none, or too large."""
    from PIL import Image

    refuse_larger(path, _MOST_BYTES, "example pictures")
    with refusing(f"{path} is not read"), Image.open(path, formats=_KINDS[:1]) as image:
        return image.info.get("parameters")


def _opened(data: bytes, where: str) -> "Image.Image":
    from PIL import Image

    with Image.open(io.BytesIO(data), formats=_KINDS) as image:
        if image.width * image.height > _MOST_PIXELS:
            raise UserError(f"{where} has {image.width} x {image.height} pixels, more than an example picture has")
        small: Any = image
        small.draft("RGB", (_SIDE, _SIDE))  # of a JPEG: decodes no more than is needed
        made: Image.Image = image.convert("RGB")
    made.thumbnail((_SIDE, _SIDE))
    return made
