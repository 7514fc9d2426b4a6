"""Write the weights of the judges as `peft_diffusion.evaluation.stored` reads them.

Of the scales of an output the one that loses least is taken.
"""

import lzma
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from peft_diffusion.evaluation.stored import SCALE

_LARGEST = 31  # of 6 bits


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
        stored |= {name: numbers, name + SCALE: scale}
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
