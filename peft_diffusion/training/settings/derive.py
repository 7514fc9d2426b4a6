"""From what was said to all values that a run needs: the rest comes from preset, base, method and the number of steps."""

import math
from collections.abc import Callable, Container, Mapping
from dataclasses import fields
from typing import Any, Protocol

from ... import methods
from ...bases import family as families
from ...bases.family import Family
from ...core.errors import UserError
from .blocks import ranked
from .choices import OptimizerName
from .pictures import PRESET_ROLES, ResolvedConfig, TrainConfig, output_path, run_path
from .presets import (
    CLASS_IMAGES,
    HELD_OUT_FROM,
    KEPT,
    LONGEST,
    SMALL,
    TEXT_DEFAULTS,
    TEXT_RATES,
)
from .text import ResolvedTextConfig, TextTrainConfig, language_output, language_run


class Base(Protocol):
    """What the defaults depend on; `bases.BaseInfo` has it."""

    @property
    def family(self) -> str: ...
    @property
    def resolution(self) -> int: ...


def resolve(
    config: TrainConfig, base: Base, pictures: int, device: str, batches_per_epoch: int | None = None
) -> ResolvedConfig:
    """Fill what was left out from the preset, the base, the number of usable pictures and the kind of device.

    Epochs become steps when it is known how many batches they make; until then the preset's steps stand. Methods without a
    rank have none.
    """
    values = {field.name: getattr(config, field.name) for field in fields(TrainConfig)}
    if config.epochs is not None and batches_per_epoch is not None:
        values["steps"] = max(1, math.ceil(config.epochs * batches_per_epoch / config.accumulation))
        values["epochs"] = None
    family = families.find(base.family)
    preset = family.presets[config.preset]
    values["components"] = adapted_components(config, family)
    settings = {name: one.rate for name, one in families.components().items() if one.rate in values}

    def rate(component: str, method: str) -> float:
        given: float | None = getattr(config, settings[component])
        usual: float = preset[settings[component]]
        return given or own_rate(config.optimizer, methods.find(method).rates.on_pictures(usual, small=family.small))

    values["block"] = tuple(with_rate(text, settings, rate) for text in config.block)
    values |= {setting: rate(component, config.method) for component, setting in settings.items()}
    fill(values, {"debiased": _debiased(config, base)})
    if values["debiased"]:
        values["min_snr_gamma"] = 0.0
    if config.optimizer == "schedule-free":
        fill(values, {"scheduler": "constant"})
    fill(values, preset)
    if not ranked(config):
        values["rank"] = None
    if config.warmup is None:  # a short run is not spent on it
        values["warmup"] = min(values["warmup"], values["steps"] // 5)
    fill(
        values,
        {
            "output": output_path(config),
            "run_dir": run_path(config),
            "resolution": base.resolution,
            "keep": KEPT[config.preset],
            "class_images": CLASS_IMAGES,
            "held_out": 0.1 if pictures >= HELD_OUT_FROM else 0.0,
            "save_every": math.ceil(values["steps"] / 6),
            "preview_every": 0 if device == "cpu" else math.ceil(values["steps"] / 5),
        },
    )
    return ResolvedConfig(**values)


def adapted_components(config: TrainConfig, family: Family) -> tuple[str, ...]:
    """Name the components that a run adapts.

    Args:
        config: What was asked for; before a base is known, it names components of the most usual families.
        family: That of the base.

    Returns:
        Those that were chosen, or the family's own of the preset's roles.
    """
    roles = PRESET_ROLES[config.preset]
    chosen = config.components != families.SMALL_DIFFUSION.by_roles(roles)
    return config.components if chosen else family.by_roles(roles)


def _debiased(config: TrainConfig, base: Base) -> bool:
    """Whether timesteps are weighed where nobody said so.

    What is drawn is decided in the noisiest ones, where an unweighed loss of epsilon is small whatever the network answers:
    8 learned tokens kept 7% of 60 subjects with it, and 42% with this, with more of the style besides.
    """
    alone = not config.block and methods.find(config.method).debiased_when_small
    return families.find(base.family).small and alone and not config.min_snr_gamma


def resolve_language(
    config: TextTrainConfig, *, parameters: int, context: int, windows: float | None = None
) -> ResolvedTextConfig:
    """Fill what was left out, from the base's parameters and context (tokens).

    Epochs become steps when the windows of one are known; until then the default steps stand. Raises UserError for a
    window longer than the base takes.
    """
    values = {field.name: getattr(config, field.name) for field in fields(TextTrainConfig)}
    if config.context is not None and config.context > context:
        raise UserError(f"--context {config.context} is more than the base takes, which is {context} tokens")
    small = parameters < SMALL
    fill(values, TEXT_DEFAULTS[small])

    def rate(_: str, method: str) -> float:
        rates = methods.find(method).rates
        return config.lr or own_rate(config.optimizer, rates.on_text(TEXT_RATES[small], small=small))

    values["block"] = tuple(with_rate(text, ("lm",), rate) for text in config.block)
    fill(values, {"lr": rate("lm", config.method)})
    if config.epochs is not None and windows is not None:
        values["steps"] = max(1, math.ceil(config.epochs * windows / (values["batch_size"] * config.accumulation)))
        values["epochs"] = None
    fill(
        values,
        {
            "output": language_output(config),
            "run_dir": language_run(config),
            "context": min(context, LONGEST),
            "scheduler": "constant" if config.optimizer == "schedule-free" else "cosine",
            "save_every": math.ceil(values["steps"] / 6),
            "keep": "best",
        },
    )
    return ResolvedTextConfig(**values)


def own_rate(optimizer: OptimizerName, rate: float) -> float:
    """A default learning rate as an optimizer takes it: for one that finds it, a factor."""
    return 1.0 if optimizer == "prodigy" else rate


def with_rate(block: str, components: Container[str], rate: Callable[[str, str], float]) -> str:
    """A block that says its learning rate, so that settings that were written down mean the same when they are read.

    ``rate`` gives that of a component and a method. What is no block of these components stays as it is.
    """
    words = block.split()
    if len(words) < 3 or words[0] not in components or any(word.startswith("lr=") for word in words[3:]):
        return block
    return f"{block} lr={rate(words[0], words[2])}"


def fill(values: dict[str, Any], defaults: Mapping[str, Any]) -> None:
    """Give the fields at None a default."""
    values |= {name: value for name, value in defaults.items() if values[name] is None}
