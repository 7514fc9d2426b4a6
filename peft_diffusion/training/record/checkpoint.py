"""Checkpoints: everything that a run goes on from, in one safetensors file, written aside and renamed."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ...core.files import write_bytes
from ..loop.trainer import Divergence, TrainerState

_KEY = "peft_diffusion_checkpoint_2"  # the number is of the order in which parameters lie in the flat tensors


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
    """A state with its origin, the loss on held-out pictures there, and the seconds trained so far."""

    state: TrainerState
    origin: Origin
    held_out: float | None
    seconds: float


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
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}
    write_bytes(path, save(tensors, {_KEY: json.dumps(told)}))


def read_origin(path: Path) -> Origin | None:
    """Read what the run of a checkpoint depended on, without its tensors.

    Args:
        path: The file.

    Returns:
        The origin; None where the file is none, or is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            return Origin(**json.loads((file.metadata() or {})[_KEY])["origin"])
    except Exception:  # damage has no list of what it raises
        return None


def read(path: Path) -> Checkpoint | None:
    """Read a checkpoint.

    Args:
        path: The file.

    Returns:
        The checkpoint; None where the file is none, or is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            told = json.loads((file.metadata() or {})[_KEY])
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        state = TrainerState(told["step"], tensors, Divergence(**told["divergence"]))
        return Checkpoint(state, Origin(**told["origin"]), told["held_out"], told["seconds"])
    except Exception:  # damage has no list of what it raises
        return None
