"""Checkpoints: everything that a run goes on from, in one safetensors file, written aside and renamed."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ...core import checksums
from ...core.files import write_bytes
from ...formats.container import CHECKPOINT
from ..loop.trainer import Divergence, TrainerState

_TENSORS = "sha256_of_tensors"


@dataclass(frozen=True)
class Origin:
    """What a run depends on besides its code: settings, the pictures' digest and the base's."""

    config: Mapping[str, Any]
    data: str
    base: str


def digest(items: Sequence[Mapping[str, str]]) -> str:
    """Digest what is learned from.

    Args:
        items: The pictures or texts.

    Returns:
        16 hex digits.
    """
    found = hashlib.sha256()
    for item in items:
        found.update("\0".join((*item.values(), "")).encode())
    return found.hexdigest()[:16]


@dataclass(frozen=True)
class Checkpoint:
    """A state with its origin, the loss on held-out pictures there, and the seconds trained so far.

    Attributes:
        measured: All losses on what is held out so far, by step; None in a file of an older version.
        lines: How many lines of metrics there were.
        training: Of the training summary of adapter files, what is known before the first step; empty in a file of an older
            version.
    """

    state: TrainerState
    origin: Origin
    held_out: float | None
    seconds: float
    measured: Mapping[int, float] | None = None
    lines: int = 0
    training: Mapping[str, Any] = field(default_factory=dict)


def write(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint; a file of this name is replaced at the end, or left as it was.

    Args:
        path: Where.
        checkpoint: What.

    Raises:
        UserError: The disk refuses.
    """
    state = checkpoint.state
    told = {
        "step": state.step,
        "divergence": asdict(state.divergence),
        "origin": asdict(checkpoint.origin),
        "held_out": checkpoint.held_out,
        "seconds": checkpoint.seconds,
        "measured": None if checkpoint.measured is None else list(checkpoint.measured.items()),
        "lines": checkpoint.lines,
        "training": dict(checkpoint.training),
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}
    told[_TENSORS] = _checksum(tensors)
    write_bytes(path, save(tensors, {CHECKPOINT: json.dumps(checksums.sealed(told))}))


def read(path: Path) -> Checkpoint | None:
    """Read a checkpoint.

    Args:
        path: The file.

    Returns:
        The checkpoint; None where the file is none, or is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            told = _told(file.metadata())
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        state = TrainerState(told["step"], tensors, Divergence(**told["divergence"]))
        measured = told.get("measured")
        if told.get(_TENSORS) not in (None, _checksum(tensors)):
            return None
        return Checkpoint(
            state, Origin(**told["origin"]), told["held_out"], told["seconds"],
            None if measured is None else dict(measured), told.get("lines", 0), told.get("training", {}),
        )  # fmt: skip
    except Exception:  # damage has no list of what it raises
        return None


def _told(metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """What a checkpoint tells beside its tensors; raises ValueError where it is not what was written."""
    told = checksums.opened(json.loads((metadata or {})[CHECKPOINT]))
    if told is None:
        raise ValueError("the checksum is another")
    return told


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    names = sorted(tensors)
    return checksums.of_text(json.dumps([names, checksums.of_tensors(*(tensors[name] for name in names))]))
