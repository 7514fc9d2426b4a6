"""Pictures as requests and answers carry them: base64, of files with A1111's text in them."""

import base64
import binascii
import hashlib
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, get_args

from PIL import Image

from ..core.errors import UserError
from ..core.settings import not_among
from ..data import images
from ..data.picture_formats import PictureFormat, a1111_text
from ..data.problems import PictureError
from ..generation import recipe as recipes
from ..generation.recipe import Recipe

_QUALITY = 80  # A1111's default of jpeg_quality
_PAIR = re.compile(r'\s*([\w ./-]+):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')
_LEAST_PAIRS = 3  # fewer are a last line of words


class Given(NamedTuple):
    """A picture of a request.

    Attributes:
        image: RGB.
        sha256: The digest of its bytes.
    """

    image: Image.Image
    sha256: str


def decoded(text: str, where: str) -> bytes:
    """Read base64, bare or as a data address.

    Args:
        text: What the request holds.
        where: What errors call it.

    Returns:
        The bytes.

    Raises:
        UserError: It is something else, such as an address on the web, which is never fetched.
    """
    head, comma, tail = text.partition(",")
    body = tail if comma and head.startswith("data:") else text
    try:
        return base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError):
        raise UserError(f"{where} is no picture in base64; send its bytes so, addresses are not fetched") from None


def read(text: str, where: str, most: int, background: str = "white") -> Given:
    """Read a picture of a request.

    Args:
        text: Its base64.
        where: What errors call it.
        most: The pixels that it may have.
        background: The CSS colour behind what is transparent.

    Returns:
        The picture.

    Raises:
        UserError: It is none, or too large.
    """
    content = decoded(text, where)
    try:
        return Given(images.read_picture(content, where, background, most), hashlib.sha256(content).hexdigest())
    except PictureError as error:
        raise UserError(f"{where}: {error.problem.message}") from None


def encoded(image: Image.Image, recipe: Recipe, form: PictureFormat) -> str:
    """Write a picture with its recipe as base64.

    Args:
        image: The picture.
        recipe: What it was made from.
        form: The format.

    Returns:
        The base64.

    Raises:
        UserError: The recipe has no room in a JPEG.
    """
    file, texts = io.BytesIO(), recipes.carried(recipe)
    if not texts.fits(form):
        raise UserError("the recipe has no room in a JPEG; take samples_format png or webp")
    image.save(file, **texts.options(form, _QUALITY))
    return base64.b64encode(file.getvalue()).decode("ascii")


def format_of(name: object) -> PictureFormat:
    """Read the option ``samples_format``.

    Args:
        name: Its value.

    Returns:
        The format.

    Raises:
        UserError: It is another.
    """
    plain = str(name).lower().replace("jpg", "jpeg")
    for one in get_args(PictureFormat):
        if plain == one:
            found: PictureFormat = one
            return found
    raise UserError(not_among("samples_format", get_args(PictureFormat), name))


def told_by(content: bytes, where: str, most: int) -> tuple[str, dict[str, str]]:
    """Read what a picture tells of itself.

    Args:
        content: The file.
        where: What errors call it.
        most: The pixels that it may have.

    Returns:
        A1111's text, "" for none; and all other texts by name.

    Raises:
        UserError: It is no picture, or too large.
    """
    try:
        image = images.decoded(content, where, most)
    except PictureError as error:
        raise UserError(f"{where}: {error.problem.message}") from None
    items = {name: value for name, value in image.info.items() if isinstance(name, str) and isinstance(value, str)}
    items.pop("parameters", None)
    return a1111_text(image), items


def parse(text: str) -> dict[str, str]:
    """Part A1111's text into its fields, as its ``parse_generation_parameters`` names them.

    Args:
        text: A prompt, perhaps a line "Negative prompt: ...", and a line "Steps: 20, Sampler: Euler a, ...".

    Returns:
        By name: "Prompt", "Negative prompt", and the fields; a size also as "Size-1" and "Size-2".
    """
    lines = text.strip().split("\n")
    pairs = [(match[1].strip(), match[2]) for match in _PAIR.finditer(lines[-1])]
    if len(pairs) < _LEAST_PAIRS:
        pairs = []
    else:
        lines = lines[:-1]
    begin = next((at for at, line in enumerate(lines) if line.startswith("Negative prompt:")), len(lines))
    negative = "\n".join(lines[begin:]).removeprefix("Negative prompt:").strip()
    found = {"Prompt": "\n".join(lines[:begin]).strip(), "Negative prompt": negative}
    return found | _fields(dict(pairs))


def _fields(pairs: Mapping[str, str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in pairs.items():
        plain = re.sub(r"\\(.)", r"\1", value[1:-1]) if value.startswith('"') else value.strip()
        sides = re.fullmatch(r"(\d+)x(\d+)", plain)
        found |= {f"{name}-1": sides[1], f"{name}-2": sides[2]} if sides else {name: plain}
    return found


def save(folder: Path, stem: str, image: Image.Image, recipe: Recipe) -> None:
    """Keep a picture in a folder, under a name that no other has.

    Args:
        folder: The folder, which is made where it is not there.
        stem: The beginning of the name.
        image: The picture.
        recipe: What it was made from.

    Raises:
        UserError: It cannot be written.
    """
    names = (f"{stem}.png" if number == 1 else f"{stem}-{number}.png" for number in range(1, 100_000))
    path = next(folder / name for name in names if not (folder / name).exists())
    recipes.write(path, image, recipe)
