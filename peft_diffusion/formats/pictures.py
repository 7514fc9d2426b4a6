"""Learned words in pictures, as A1111 keeps and shares them: ``modules/textual_inversion/image_embedding.py`` there.

The word is JSON, with each tensor as nested lists under ``TORCHTENSOR``. It stands in the text entry ``sd-ti-embedding`` of
a PNG, in base64; or in the pixels, so that it outlives programs that drop texts: compressed by zlib, the lower four bits of
each byte in a block of pixels on the left of the picture and the upper four on the right, a black column beside each. There
the lower four bits of each channel are the data, XORed with a linear congruential generator's numbers, and the upper ones a
pattern to look at.
"""

import base64
import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bases import family as families
from ..core.errors import UserError
from ..core.parsing import json_value, refusing
from .container import Entry, Header, is_finite, stamp_of
from .layouts import embedding

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image
    from torch import Tensor

_ENDINGS = (".png", ".webp")
_TEXT = "sd-ti-embedding"
_TENSOR = "TORCHTENSOR"
_MOST_PIXELS = 2**25  # of a picture; A1111 makes them 512 high
_MOST_BYTES = 2**26  # of the JSON, which for 75 vectors of 1280 numbers has 2 MiB
_FACTOR, _INCREMENT, _NUMBERS = 1664525, 1013904223, 255  # of the generator, modulo 2**32, and how many values it gives
_LOW = 0x0F  # the bits of a channel that are data


def is_picture(path: Path) -> bool:
    """Tell by a file's name whether it is read as a picture.

    Args:
        path: The file.

    Returns:
        Whether it is.
    """
    return path.suffix.lower() in _ENDINGS


def read_picture(path: Path) -> "tuple[Header, dict[str, Tensor]]":
    """Read the learned word that a picture holds.

    Args:
        path: The picture.

    Returns:
        What a header would tell, and the vectors as a file of A1111 has them.

    Raises:
        UserError: There is no such file, it is no picture, or holds no word that can be used.
    """
    stamp = stamp_of(path)
    text = _of_picture(path)
    if text is None:
        raise UserError(f"{path} is a picture that holds no embedding of A1111; an adapter is a .safetensors or .pt file")
    with refusing(f"{path}: its embedding is damaged"):
        told = json_value(text)
        tensors = told["string_to_param"]
        (vectors,) = [_tensor(path, one) for one in tensors.values()]
        name = told.get("name")
    word = re.sub(r"\s+", "_", name.strip()) if isinstance(name, str) else ""
    first = next(name for name, one in families.components().items() if embedding.ALONE in one.embeddings)
    metadata = {embedding.KEY: json.dumps({first: {word: []}}, ensure_ascii=False)} if word else {}
    entries = {embedding.ALONE: Entry("float32", tuple(vectors.shape), 0, 0)}
    return Header(path, metadata, entries, stamp[0], stamp), {embedding.ALONE: vectors}


def _tensor(path: Path, value: Mapping[str, Any]) -> "Tensor":
    import torch

    found = torch.tensor(value[_TENSOR], dtype=torch.float32)
    if not is_finite(found):
        raise UserError(f"{path}: its embedding holds NaN or infinity; it is damaged or its training diverged")
    return found


def _of_picture(path: Path) -> str | None:
    """The JSON that a picture holds; None where it holds none. Raises UserError."""
    from PIL import Image

    with refusing(f"{path} is no picture that can be read"), Image.open(path) as image:
        if image.width * image.height > _MOST_PIXELS:
            raise UserError(f"{path} has {image.width} x {image.height} pixels, more than any embedding of A1111")
        image.load()
        text = getattr(image, "text", {}).get(_TEXT)
        if text is not None:
            return _limited(base64.b64decode(text), path)
        return _of_pixels(image, path)


def _limited(data: bytes, path: Path) -> str:
    if len(data) > _MOST_BYTES:
        raise UserError(f"{path} holds {len(data)} bytes of text, more than any embedding")
    return data.decode()


def _of_pixels(image: "Image.Image", path: Path) -> str | None:
    import numpy as np

    pixels = np.asarray(image.convert("RGB"))
    lit = pixels.min(2) > 0  # what surrounds the picture is black
    rows, columns = np.flatnonzero(lit.max(1)), np.flatnonzero(lit.max(0))
    if not len(rows):
        return None
    bits = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] & _LOW
    black = np.flatnonzero(bits.max(2).max(0) == 0)
    if len(black) < 2:
        return None
    low, high = _plain(bits[:, : black[0]]), _plain(bits[:, black[-1] + 1 :])
    if low.shape != high.shape or not low.size:
        return None
    unpacked = zlib.decompressobj()
    try:
        data = unpacked.decompress((high << 4 | low).tobytes(), _MOST_BYTES + 1)
    except zlib.error:  # a picture with two black columns, as one in a frame
        return None
    return _limited(data, path)


def _plain(block: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    """The data of a block of pixels, which are XORed with the generator's numbers row by row."""
    import numpy as np

    mixed: np.ndarray[Any, Any] = block ^ (_numbers(block.size).reshape(block.shape) & np.uint8(_LOW))
    return mixed


def _numbers(count: int) -> "np.ndarray[Any, Any]":
    """The generator's first numbers: of those that are known, as many again follow from one factor and one increment."""
    import numpy as np

    known = np.array([_INCREMENT], np.uint32)
    factor, increment = _FACTOR, _INCREMENT
    while len(known) < count:
        known = np.concatenate([known, known * np.uint32(factor) + np.uint32(increment)])
        factor, increment = factor * factor % 2**32, (factor + 1) * increment % 2**32
    numbers: np.ndarray[Any, Any] = (known[:count] % _NUMBERS).astype(np.uint8)
    return numbers
