"""Telling whether two bases are the same, and whether one has changed."""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ..core import quantized
from ..core.errors import UserError
from ..core.merge import unmerged_state
from ..core.sharded import whole

_SAMPLES = 1024
_GROUP, _AT_ONCE = 1 << 24, 1 << 20  # words that are weighed from 1 on, and those that are computed with at a time
# Most tensors are small, and numpy asks less of a call than torch does: sums modulo 2 to the 64 are the same in any order.
_FIRST_POSITIONS = np.arange(1, 1 + (1 << 17)) % 65521
_FINGERPRINT = "fingerprint_before_quantization"  # an attribute of a component that was quantized, or sharded


@torch.no_grad()
def checksum(modules: Mapping[str, nn.Module]) -> str:
    """Digest every byte of the parameters and buffers of modules, adapters left out.

    Computed where the tensors lie, with exact integer arithmetic, so that it costs one pass over the memory. Sharded ones
    are gathered one after the other, so all processes have to ask.

    Args:
        modules: By name.

    Returns:
        16 hex digits.
    """
    digest = hashlib.sha256()
    for component, module in sorted(modules.items()):
        for name, held in module.state_dict().items():
            for part, tensor in quantized.plain_parts(whole(held)).items():
                told = f"{component}.{name}{part} {tensor.dtype} {tuple(tensor.shape)} {_checksum(tensor)}\n"
                digest.update(told.encode())
    return digest.hexdigest()[:16]


@torch.no_grad()
def fingerprint(modules: Mapping[str, nn.Module]) -> str:
    """Digest which weights these are, from a sample of every tensor, rounded to bfloat16.

    Args:
        modules: By name; where adapters are merged, the weights count as they were before.

    Returns:
        16 hex digits, the same for one base in float32, float16, bfloat16, or quantized by `quantize`.

    Raises:
        UserError: Weights are offloaded to where they cannot be read.
    """
    before = {known for module in modules.values() if (known := getattr(module, _FINGERPRINT, None)) is not None}
    if len(before) == 1:
        return str(before.pop())
    told: list[str] = []
    samples: list[Tensor] = []
    for component, module in sorted(modules.items()):
        for name, tensor in unmerged_state(module).items():
            if tensor.is_meta:
                raise UserError(
                    f"which base this is cannot be told: the weights of {component} are offloaded and not there between"
                    " calls; load adapters before you enable sequential offloading, or call pipe.remove_all_hooks() first"
                )
            flat = _readable(tensor).reshape(-1)
            told.append(f"{component}.{name} {tuple(tensor.shape)}")
            samples.append(flat[:: max(1, flat.numel() // _SAMPLES)])
    digest = hashlib.sha256()
    for name, sample in zip(told, _rounded(samples), strict=True):
        digest.update(name.encode() + sample)
    return digest.hexdigest()[:16]


def _rounded(samples: Sequence[Tensor]) -> list[bytes]:
    """The bytes of samples, numbers as those of bfloat16. Those of a kind come from their device with one copy."""
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for number, sample in enumerate(samples):
        kinds.setdefault((sample.device, sample.dtype), []).append(number)
    found = [b""] * len(samples)
    for (_, dtype), numbers in kinds.items():
        whole = torch.cat([samples[number] for number in numbers])
        whole = (whole.to(torch.bfloat16).view(torch.int16) if dtype.is_floating_point else whole).cpu()
        content, start = whole.numpy().tobytes(), 0
        for number in numbers:
            end = start + samples[number].numel() * whole.element_size()
            found[number] = content[start:end]
            start = end
    return found


def quantize(modules: Mapping[str, nn.Module], kind: str, device: torch.device | None = None) -> None:
    """Quantize the Linear layers of all components of a base, which keeps its fingerprint: adapters of it still fit.

    Args:
        modules: By name.
        kind: nf4 or int8.
        device: Where to compute.

    Raises:
        UserError: As ``core.quantized.quantize``.
    """
    quantized.check(kind)
    keep_fingerprint(modules)
    for module in modules.values():
        quantized.quantize(module, kind, device)


def keep_fingerprint(modules: Mapping[str, nn.Module]) -> None:
    """Keep with all components of a base which one it is, for when its weights are changed or lie in several processes.

    Args:
        modules: By name.

    Raises:
        UserError: As `fingerprint`.
    """
    found = fingerprint(modules)
    for module in modules.values():
        setattr(module, _FINGERPRINT, found)


def _readable(tensor: Tensor) -> Tensor:
    """The numbers that a tensor stands for; torchao's wrap others, and sharded ones lie in several processes."""
    dense: Tensor = tensor.dequantize() if quantized.torchao_kind(tensor) is not None else whole(tensor)
    return dense


def _checksum(tensor: Tensor) -> tuple[int, int]:
    """The sum of the bytes, and their sum weighted by position, both modulo 2 to the 64."""
    data = tensor.detach().contiguous().reshape(-1)
    if data.storage_offset() * data.itemsize % 4:  # a part of another tensor, not looked at as words where it lies
        data = data.clone()
    missing = -data.nbytes % 4
    words = (torch.nn.functional.pad(data.view(torch.uint8), (0, missing)) if missing else data).view(torch.int32)
    if words.is_cpu and words.numel() <= len(_FIRST_POSITIONS):
        few = words.numpy().astype(np.int64)
        return int(few.sum()) % 2**64, int(few @ _FIRST_POSITIONS[: len(few)]) % 2**64
    plain = weighted = 0
    for group in torch.split(words, _GROUP):
        of_group, start = 0, 1
        for chunk in torch.split(group, _AT_ONCE):  # few: on a device that a run fills, this takes memory too
            values = chunk.to(torch.int64)
            position = torch.arange(start, start + len(values), device=values.device) % 65521
            plain = (plain + int(values.sum())) % 2**64
            of_group += int((values * position).sum())
            start += len(values)
        weighted = (weighted * 31 + of_group) % 2**64
    return plain, weighted
