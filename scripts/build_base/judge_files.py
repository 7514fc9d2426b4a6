"""The weights of the judges, as safetensors within xz: the whole tree has to stay small enough to travel.

Weights of layers are whole numbers of 6 bits, with one scale per output, the one that loses least; what is lost is far below
what a judge's training leaves open. All else is in halves.
"""

import json
import lzma
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

_SCALE = ".scale"  # behind the name of a tensor of bytes
_LARGEST = 31  # of 6 bits


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read weights.

    Args:
        path: A file of `write`.

    Returns:
        Tensors by name, in float32, and the metadata.
    """
    data = lzma.decompress(path.read_bytes())
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    stored = load(data)
    scales = {name.removesuffix(_SCALE): tensor.float() for name, tensor in stored.items() if name.endswith(_SCALE)}
    tensors = {name: tensor.float() for name, tensor in stored.items() if not name.endswith(_SCALE)}
    return {name: one * scales.get(name, 1) for name, one in tensors.items()}, header.get("__metadata__", {})


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write weights.

    Args:
        path: The file.
        tensors: By name.
        metadata: Beside them.
    """
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.ndim < 2:
            stored[name] = tensor.half()
            continue
        numbers, scale = _rounded(tensor.float())
        stored |= {name: numbers, name + _SCALE: scale}
    path.write_bytes(lzma.compress(save(stored, dict(metadata or {}) or None), preset=9 | lzma.PRESET_EXTREME))


def _rounded(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers, and for each output the scale that brings them nearest to the tensor."""
    within = tuple(range(1, tensor.ndim))
    largest = tensor.abs().amax(within, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    scales = largest * torch.linspace(0.4, 1, 25).view(-1, *[1] * tensor.ndim) / _LARGEST  # the outermost may be cut
    lost = torch.stack([(_whole(tensor, scale) * scale - tensor).square().sum(within) for scale in scales])
    scale = scales[lost.argmin(0), torch.arange(len(tensor))]
    return _whole(tensor, scale).to(torch.int8), scale


def _whole(tensor: Tensor, scale: Tensor) -> Tensor:
    return (tensor / scale).round().clamp(-_LARGEST, _LARGEST)
