"""The weights of the embedded judges: safetensors within xz, as the whole package has to stay small enough to travel.

Weights of layers are whole numbers of 6 bits, with one scale per output; all else is in halves. What is lost is far below
what a judge's training leaves open. ``scripts/build_base/judge_files.py`` writes them.
"""

import json
import lzma
from pathlib import Path

from safetensors.torch import load
from torch import Tensor

SCALE = ".scale"
"""What stands behind the name of a tensor of whole numbers, in the name of its scales."""


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read weights.

    Args:
        path: A file of ``scripts/build_base/judge_files.py``.

    Returns:
        Tensors by name, in float32, and the metadata.
    """
    data = lzma.decompress(path.read_bytes())
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    stored = load(data)
    scales = {name.removesuffix(SCALE): tensor.float() for name, tensor in stored.items() if name.endswith(SCALE)}
    tensors = {name: tensor.float() for name, tensor in stored.items() if not name.endswith(SCALE)}
    return {name: one * scales.get(name, 1) for name, one in tensors.items()}, header.get("__metadata__", {})
