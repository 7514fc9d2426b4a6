"""Choices and ranges of settings. Imports no torch."""

import math
from dataclasses import dataclass, fields
from typing import get_args

from ...core.errors import UserError
from ...core.settings import Settings
from .choices import (
    HuberSchedule,
    Keep,
    LogWith,
    Loss,
    Masks,
    Memory,
    MissingCaptions,
    OptimizerName,
    Precision,
    Preset,
    PriorTarget,
    Quantize,
    Scheduler,
    TimestepBias,
)


@dataclass(frozen=True)
class _Range:
    low: float
    high: float = math.inf
    above: bool = False  # low itself is out
    below: bool = False  # high itself is out


_CHOICES: dict[str, tuple[str | None, ...]] = {
    "preset": get_args(Preset),
    "masks": get_args(Masks),
    "prior_target": get_args(PriorTarget),
    "loss": get_args(Loss),
    "huber_schedule": get_args(HuberSchedule),
    "keep": (*get_args(Keep), None),
    "log_with": (*get_args(LogWith), None),
    "missing_captions": get_args(MissingCaptions),
    "scheduler": (*get_args(Scheduler), None),
    "timestep_bias": (*get_args(TimestepBias), None),
    "precision": get_args(Precision),
    "quantize": (*get_args(Quantize), None),
    "optimizer": get_args(OptimizerName),
    "memory": get_args(Memory),
}
_POSITIVE = _Range(0, above=True)
_COUNT, _NATURAL = _Range(1), _Range(0)
_SHARE = _Range(0, 1, below=True)
_RANGES: dict[str, _Range] = {
    "caption_dropout": _Range(0, 1),
    "keep_tags": _NATURAL,
    "resolution": _COUNT,
    "held_out": _SHARE,
    "rank": _COUNT,
    "alpha": _POSITIVE,
    "dropout": _SHARE,
    "context": _Range(2),
    "lr": _POSITIVE,
    "unet_lr": _POSITIVE,
    "text_encoder_lr": _POSITIVE,
    "steps": _COUNT,
    "epochs": _POSITIVE,
    "batch_size": _COUNT,
    "accumulation": _COUNT,
    "warmup": _NATURAL,
    "min_snr_gamma": _NATURAL,
    "noise_offset": _NATURAL,
    "multires_noise": _SHARE,
    "huber_c": _Range(0, 1, above=True),
    "class_images": _COUNT,
    "prior_weight": _NATURAL,
    "weight_decay": _NATURAL,
    "clip": _NATURAL,
    "ema": _SHARE,
    "seed": _NATURAL,
    "save_every": _COUNT,
    "log_every": _COUNT,
    "keep_checkpoints": _COUNT,
    "patience": _NATURAL,
    "preview_every": _NATURAL,
    "preview_steps": _NATURAL,
}


def check_values(config: Settings) -> None:
    """Raise UserError for a setting that is not among its choices or out of its range."""
    names = {field.name for field in fields(config)}
    for name, choices in _CHOICES.items():
        if name in names and getattr(config, name) not in choices:
            raise UserError(f"{flag(name)} is one of {', '.join(c for c in choices if c)}, not {getattr(config, name)!r}")
    for name, limits in _RANGES.items():
        if name in names:
            _check_range(name, getattr(config, name), limits)


def flag(name: str) -> str:
    """The flag of a field."""
    return f"--{name.replace('_', '-')}"


def _check_range(name: str, value: float | None, limits: _Range) -> None:
    if value is None:
        return
    low_enough = value < limits.high if limits.below else value <= limits.high
    high_enough = value > limits.low if limits.above else value >= limits.low
    if low_enough and high_enough and math.isfinite(value):
        return
    low = f"above {limits.low:g}" if limits.above else f"{limits.low:g} or more"
    high = "" if limits.high == math.inf else f", {'below' if limits.below else 'at most'} {limits.high:g}"
    raise UserError(f"{flag(name)} must be {low}{high}, not {value}")
