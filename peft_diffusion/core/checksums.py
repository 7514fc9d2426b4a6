"""Checksums in what a run writes for itself, so that a bit which a disk or a copy changed is seen. Imports no torch.

Files of older versions have none, and are taken as they are.
"""

import hashlib
import json
import re
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

KEY = "sha256"
"""The entry that holds the checksum of the others."""

_LINE = "crc32"
_END = re.compile(rb'(?P<body>.*), "crc32": "(?P<sum>[0-9a-f]{8})"\}(?P<rest>.*)', re.DOTALL)
_COMMENT = "# SHA-256 of what stands above: "


def of_tensors(*tensors: "Tensor") -> str:
    """Digest tensors.

    Args:
        tensors: The tensors, of any shape and on any device.

    Returns:
        SHA-256 of their types, shapes and bytes, in hex.
    """
    state = hashlib.sha256()
    for tensor in tensors:
        state.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        state.update(bytes_of(tensor))
    return state.hexdigest()


def bytes_of(tensor: "Tensor") -> memoryview:
    """Give the bytes of a tensor.

    Args:
        tensor: The tensor, of any shape and on any device.

    Returns:
        Its bytes in order, without a copy where they lie so on the CPU.
    """
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def of_text(text: str) -> str:
    """Digest a text.

    Args:
        text: The text.

    Returns:
        SHA-256 of its UTF-8, in hex.
    """
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def sealed(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Add the checksum of entries to them.

    Args:
        entries: JSON values by name.

    Returns:
        The entries, with `KEY` as the last.
    """
    own = {name: value for name, value in entries.items() if name != KEY}
    return {**own, KEY: _of_entries(own)}


def opened(entries: Mapping[str, Any]) -> dict[str, Any] | None:
    """Take the checksum from what `sealed` gave.

    Args:
        entries: What was read.

    Returns:
        The entries without it; None where they are not those that were written.
    """
    own = {name: value for name, value in entries.items() if name != KEY}
    return own if KEY not in entries or entries[KEY] == _of_entries(own) else None


def sealed_line(entries: Mapping[str, Any]) -> bytes:
    """Write entries as a line of JSON whose last entry is the CRC-32 of the line without it.

    Args:
        entries: JSON values by name, at least one.

    Returns:
        The line with its end, in UTF-8.
    """
    body = json.dumps(entries, ensure_ascii=False).encode()
    return body[:-1] + f', "{_LINE}": "{zlib.crc32(body):08x}"}}\n'.encode()


def opened_line(line: bytes) -> tuple[bytes, bool | None]:
    """Take the checksum from a line that `sealed_line` wrote.

    Args:
        line: The line, without its end.

    Returns:
        The JSON without the checksum, and whether it is what was written; None where the line has no checksum.
    """
    match = _END.fullmatch(line)
    if match is None:
        return line, None
    body = match["body"] + b"}"
    return body, not match["rest"] and zlib.crc32(body) == int(match["sum"], 16)


def sealed_comment(text: str) -> str:
    """Add a comment with the checksum of a text to its end.

    Args:
        text: Whole lines, in a language whose comments begin with ``#``.

    Returns:
        The text with the comment.
    """
    return f"{text}{_COMMENT}{of_text(text)}\n"


def is_as_written(text: str) -> bool:
    """Whether a text is what `sealed_comment` gave.

    Args:
        text: The text, perhaps edited.

    Returns:
        Whether it is; also where it has no such comment at all.
    """
    body, found, noted = text.rpartition(_COMMENT)
    return not found or noted == f"{of_text(body)}\n"


def _of_entries(entries: Mapping[str, Any]) -> str:
    read_back = json.loads(json.dumps(entries))  # where every name is text, by which they are sorted
    return of_text(json.dumps(read_back, ensure_ascii=False, sort_keys=True))
