"""The values that a setting may have where they are few. Imports no torch."""

from typing import Literal, TypeAlias

Preset: TypeAlias = Literal["style", "subject"]
Masks: TypeAlias = Literal["files", "alpha", "off"]
PriorTarget: TypeAlias = Literal["base", "noise"]
Loss: TypeAlias = Literal["l2", "huber", "smooth-l1"]
HuberSchedule: TypeAlias = Literal["snr", "exponential", "constant"]
TimestepBias: TypeAlias = Literal["none", "later", "earlier", "logit-normal"]
Scheduler: TypeAlias = Literal["constant", "cosine", "linear", "cosine-with-restarts", "polynomial", "warmup-stable-decay"]
Precision: TypeAlias = Literal["auto", "float32", "bfloat16", "float16"]
Quantize: TypeAlias = Literal["nf4", "int8"]
OptimizerName: TypeAlias = Literal[
    "adamw", "adamw8bit", "adafactor", "lion", "came", "prodigy", "schedule-free", "prodigy-plus"
]
FINDS_RATE: frozenset[OptimizerName] = frozenset({"prodigy", "prodigy-plus"})
"""Optimizers that find their learning rate, and take a factor of it."""
AVERAGES: frozenset[OptimizerName] = frozenset({"schedule-free", "prodigy-plus"})
"""Optimizers that average the weights themselves, for which the learning rate stays."""
Memory: TypeAlias = Literal["auto", "low", "off"]
Keep: TypeAlias = Literal["best", "last"]
LogWith: TypeAlias = Literal["tensorboard"]
MaxTokens: TypeAlias = Literal["none", "75", "150", "225"]
MissingCaptions: TypeAlias = Literal["stop", "name", "recipe", "empty", "skip"]
CaptionSource: TypeAlias = Literal["auto", "files", "names", "caption"]
