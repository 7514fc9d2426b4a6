"""The weights of the judges, as safetensors within xz: the whole tree has to stay small enough to travel.

The first bytes of all halves stand before the second ones, which xz takes for a tenth less.
"""

import json
import lzma
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read weights.

    Args:
        path: A file of `write`.

    Returns:
        Tensors by name, in float32, and the metadata.
    """
    packed = lzma.decompress(path.read_bytes())
    data = np.frombuffer(packed, np.uint8).reshape(2, -1).T.tobytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return {name: tensor.float() for name, tensor in load(data).items()}, header.get("__metadata__", {})


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write weights.

    Args:
        path: The file.
        tensors: By name.
        metadata: Beside them.
    """
    data = save({name: _rounded(tensor) for name, tensor in tensors.items()}, dict(metadata or {}) or None)
    data += b"\0" * (len(data) % 2)
    apart = np.frombuffer(data, np.uint8).reshape(-1, 2).T.tobytes()
    path.write_bytes(lzma.compress(apart, preset=9 | lzma.PRESET_EXTREME))


def _rounded(tensor: Tensor) -> Tensor:
    """Halves of 8 bits behind the point, not 10: what is lost is far below what a judge's training leaves open."""
    bits = tensor.half().contiguous().view(torch.int16).to(torch.int32) & 0xFFFF
    kept = (bits + 1 + (bits >> 2 & 1)) & ~3
    exact = (kept & 0x7C00) == 0x7C00  # never into infinity
    return torch.where(exact, bits, kept).to(torch.int16).view(torch.float16).reshape(tensor.shape)
