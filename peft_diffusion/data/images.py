"""Open an image file of any supported kind as plain RGB, and check one without trusting it."""

import hashlib
import io
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageCms, ImageColor, UnidentifiedImageError, features

from peft_diffusion.core.errors import UserError

from . import picture_names
from .drawn_from import NOTHING, Told, drawn_from
from .problems import PictureError, Problem

# Pillow reads AVIF where it was built with libavif, as its wheels are from 11.3 on.
_AVIF: bool = bool(features.check("avif"))
FORMATS: tuple[str, ...] = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", *(("AVIF",) if _AVIF else ()))
SUFFIXES: frozenset[str] = picture_names.SUFFIXES - (set() if _AVIF else {".avif"})
MAX_PIXELS: int = 89_478_485
"""Pixels above which a picture is refused unless the caller says otherwise: Pillow's own mark, 256 MiB of RGB."""

_ORIENTATION = 0x0112
_TURNS: dict[int, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_header_lock = threading.Lock()


@dataclass(frozen=True)
class Checked:
    """An image that decodes.

    Attributes:
        width: Pixels, after EXIF rotation.
        height: Pixels, after EXIF rotation.
        digest: SHA-256 of the file's bytes, in hex.
        told: What it tells of the prompt that it was drawn from.
    """

    width: int
    height: int
    digest: str
    told: Told = NOTHING


def check_picture(path: Path, max_pixels: int = MAX_PIXELS) -> Checked:
    """Decode an image once to be sure that it can be used.

    Args:
        path: The file.
        max_pixels: Larger images are refused from the header, before they are decoded.

    Returns:
        Its size and digest, and what it tells of its prompt.

    Raises:
        PictureError: The file is not a whole, sane image.
    """
    try:
        with path.open("rb") as file:
            image = _decode(file, str(path), max_pixels)
            width, height = image.size
            if _orientation(image) >= 5:
                width, height = height, width
            file.seek(0)
            return Checked(width, height, hashlib.file_digest(file, "sha256").hexdigest(), drawn_from(image))
    except OSError as error:
        raise PictureError(_unreadable(path, error)) from error


class Checks:
    """Images that were checked, so that folders which are read several times have each of them decoded once.

    They are taken to stay as they are meanwhile.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[Path, int], Checked | Problem] = {}

    def check(self, path: Path, max_pixels: int = MAX_PIXELS) -> Checked:
        """Check an image, now where it was not yet.

        Args:
            path: The file.
            max_pixels: See `check_picture`.

        Returns:
            Its size and digest.

        Raises:
            PictureError: As `check_picture` does.
        """
        key = path, max_pixels
        if key not in self._known:
            try:
                self._known[key] = check_picture(path, max_pixels)
            except PictureError as error:
                self._known[key] = error.problem
        found = self._known[key]
        if isinstance(found, Problem):
            raise PictureError(found)
        return found


def open_picture(
    path: Path | str, background: str = "white", max_pixels: int = MAX_PIXELS, digest: str | None = None
) -> Image.Image:
    """Open an image as it is meant to be seen: upright, 8-bit sRGB, the first frame, transparency on a background.

    Args:
        path: The file.
        background: A CSS colour ("white", "#808080") behind what is transparent.
        max_pixels: Larger images are refused.
        digest: The SHA-256 that the file must still have; None accepts any content.

    Returns:
        An RGB image.

    Raises:
        PictureError: The file is not a whole, sane image, or has changed.
        UserError: The colour does not exist.
    """
    colour = parse_colour(background)
    return _rgb(_open(Path(path), max_pixels, digest), colour)


def read_picture(content: bytes, where: str, background: str = "white", max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read an image of whose file the bytes are there, as `open_picture` opens one.

    Args:
        content: The bytes.
        where: What errors call it.
        background: See `open_picture`.
        max_pixels: See `open_picture`.

    Returns:
        An RGB image.

    Raises:
        PictureError: They are not a whole, sane image.
        UserError: The colour does not exist.
    """
    return _rgb(_upright(content, where, max_pixels), parse_colour(background))


def decoded(content: bytes, where: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image of whose file the bytes are there, for whoever wants what it says of itself besides its pixels.

    Args:
        content: The bytes.
        where: What errors call it.
        max_pixels: See `open_picture`.

    Returns:
        The first frame as the file has it: in its own mode, not turned, with the texts before and behind its pixels.

    Raises:
        PictureError: They are not a whole, sane image.
    """
    return _decode(io.BytesIO(content), where, max_pixels)


def _open(path: Path, max_pixels: int, digest: str | None) -> Image.Image:
    """The first frame, upright, of a file that has this digest, where one is given."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PictureError(_unreadable(path, error)) from error
    if digest is not None and hashlib.sha256(content).hexdigest() != digest:
        raise PictureError(Problem(str(path), "changed", "the file has changed since the folder was read", "Start again"))
    return _upright(content, str(path), max_pixels)


def _upright(content: bytes, where: str, max_pixels: int) -> Image.Image:
    """The first frame, as EXIF turns it."""
    image = decoded(content, where, max_pixels)
    turn = _TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def open_mask(path: Path | str, max_pixels: int = MAX_PIXELS, digest: str | None = None) -> Image.Image:
    """Open a mask, upright, in 8-bit grey: white is learned.

    Args:
        path: The file.
        max_pixels: Larger images are refused.
        digest: See `open_picture`.

    Returns:
        A grey image.

    Raises:
        PictureError: As `open_picture` does.
    """
    return open_picture(path, "black", max_pixels, digest).convert("L")


def open_alpha(path: Path | str, max_pixels: int = MAX_PIXELS, digest: str | None = None) -> Image.Image | None:
    """Read how opaque an image is, upright, in 8-bit grey.

    Args:
        path: The file.
        max_pixels: Larger images are refused.
        digest: See `open_picture`.

    Returns:
        A grey image; None for an image without transparency.

    Raises:
        PictureError: As `open_picture` does.
    """
    image = _open(Path(path), max_pixels, digest)
    if not image.has_transparency_data:
        return None
    return image.convert("RGBA").getchannel("A")


def parse_colour(background: str) -> tuple[int, int, int]:
    """Parse a CSS colour.

    Args:
        background: A name such as white, or #rrggbb.

    Returns:
        Red, green and blue, 0 to 255 each.

    Raises:
        UserError: There is no such colour.
    """
    try:
        red, green, blue = ImageColor.getrgb(background)[:3]
    except ValueError as error:
        raise UserError(f'unknown background colour "{background}": write a name such as white, or #rrggbb') from error
    return red, green, blue


def _unreadable(path: Path, error: OSError) -> Problem:
    reason = error.strerror or str(error)
    return Problem(str(path), "unreadable file", f"cannot be read ({reason})", "Check the file and its permissions")


def _decode(file: BinaryIO, where: str, max_pixels: int) -> Image.Image:
    """The decoded first frame, not yet rotated; the size is checked from the header, before any pixel is decoded."""
    if not file.read(1):
        raise PictureError(Problem(where, "empty file", "the file has 0 bytes", "Copy it again or delete it"))
    file.seek(0)
    try:
        image = _header(file)
    except UnidentifiedImageError as error:
        raise PictureError(
            Problem(where, "not a picture", "the content is no picture", "Delete it or move it out of the folder")
        ) from error
    except Exception as error:
        raise PictureError(_damaged(where, error)) from error
    width, height = image.size
    if width * height > max_pixels:
        message = f"{width}x{height} is {width * height:,} pixels, more than the {max_pixels:,} allowed"
        raise PictureError(Problem(where, "too many pixels", message, "Scale it down or raise the limit on pixels"))
    try:
        image.load()
    # Decoders meet damage with whatever exception they happen to run into: OSError, SyntaxError, struct.error, ...
    except Exception as error:
        raise PictureError(_damaged(where, error)) from error
    return image


def _header(file: BinaryIO) -> Image.Image:
    """The picture before decoding, with Pillow's own limit out of the way: the caller's is checked instead."""
    with _header_lock:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(file, formats=FORMATS)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _damaged(where: str, error: Exception) -> Problem:
    return Problem(where, "damaged picture", f"cannot be decoded ({error})", "Copy or export it again, or delete it")


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where the EXIF data are absent or broken."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # broken EXIF in a sound picture must not cost the picture
        return 1
    return value if value in _TURNS else 1


def _rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    image = _eight_bits(image)
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    image = _to_srgb(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    drawn = image.convert("RGBA")
    canvas = Image.new("RGBA", drawn.size, (*background, 255))
    canvas.alpha_composite(drawn)
    return canvas.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Deep greyscale scaled to 8 bits: Pillow's own conversion clips it to white instead."""
    if not (image.mode.startswith("I") or image.mode == "F"):
        return image
    import numpy as np

    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    brightest = float(values.max())
    # 32-bit files do not say what is white: the least usual range that holds the brightest pixel is taken.
    ranges = {"I": (255.0, 65535.0), "F": (1.0, 255.0, 65535.0)}.get(image.mode, (65535.0,))
    white = next((top for top in ranges if brightest <= top), brightest)
    return Image.fromarray(np.round(np.clip(values / white, 0, 1) * 255).astype(np.uint8))


def _to_srgb(image: Image.Image) -> Image.Image:
    """Colours of an embedded profile (Display P3, Adobe RGB, a press's CMYK) as sRGB, which models are trained on."""
    profile = image.info.get("icc_profile")
    if not profile or image.mode not in ("RGB", "RGBA", "CMYK", "L"):
        return image
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(source):
            return image
        mode = "RGBA" if image.mode == "RGBA" else "RGB"
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode=mode)
    except Exception:  # a broken profile in a sound picture must not cost the picture
        return image
    return image if converted is None else converted
