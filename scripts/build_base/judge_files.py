"""The weights of the judges, as safetensors within xz: the whole tree has to stay small enough to travel."""

import json
import lzma
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load, save
from torch import Tensor


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read weights.

    Args:
        path: A file of `write`.

    Returns:
        Tensors by name, in float32, and the metadata.
    """
    data = lzma.decompress(path.read_bytes())
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return {name: tensor.float() for name, tensor in load(data).items()}, header.get("__metadata__", {})


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write weights.

    Args:
        path: The file.
        tensors: By name.
        metadata: Beside them.
    """
    path.write_bytes(lzma.compress(save(dict(tensors), dict(metadata or {}) or None), preset=9 | lzma.PRESET_EXTREME))
