"""Settings that were asked for and do nothing beside the others. Imports no torch."""

from collections.abc import Callable

from ...bases import family as families
from ...core.settings import flag
from .pictures import ResolvedConfig, TrainConfig

_OF_CLASS = (
    lambda config: bool(config.class_prompt or config.regularisation or any(one.regularisation for one in config.dataset)),
    "--class-prompt or --regularisation",
)
_OF_PREVIEWS = (lambda config: config.preview_steps > 0, "--preview-steps above 0")
_OF_LOGITS = (lambda config: config.timestep_bias == "logit-normal", "--timestep-bias logit-normal")
_OF_LOSS = (lambda config: config.loss != "l2", "--loss huber or smooth-l1")


def _drops_or_shuffles(config: ResolvedConfig) -> bool:
    own = (one.shuffle_tags or one.tag_dropout for one in config.dataset)
    return bool(config.shuffle_tags or config.tag_dropout or any(own))


# By name: whether it does something, and what it needs for that.
_NEEDS: dict[str, tuple[Callable[[ResolvedConfig], bool], str]] = {
    "keep_tags": (_drops_or_shuffles, "--shuffle-tags or --tag-dropout"),
    "huber_c": _OF_LOSS,
    "huber_schedule": _OF_LOSS,
    "cycles": (lambda config: config.scheduler == "cosine-with-restarts", "--scheduler cosine-with-restarts"),
    "power": (lambda config: config.scheduler == "polynomial", "--scheduler polynomial"),
    "decay": (lambda config: config.scheduler == "warmup-stable-decay", "--scheduler warmup-stable-decay"),
    "logit_mean": _OF_LOGITS,
    "logit_std": _OF_LOGITS,
    "class_images": (lambda config: bool(config.class_prompt), "--class-prompt"),
    "prior_weight": _OF_CLASS,
    "prior_target": _OF_CLASS,
    "preview_every": _OF_PREVIEWS,
    "preview_prompts": _OF_PREVIEWS,
    "preview_prompts_file": _OF_PREVIEWS,
}


def idle(asked: TrainConfig, config: ResolvedConfig) -> list[str]:
    """Find what was asked for in vain.

    Args:
        asked: The settings as they were given.
        config: The same, whole.

    Returns:
        A line for each setting that does nothing, with what it needs.
    """
    fields = TrainConfig.__dataclass_fields__
    given = [name for name, field in fields.items() if getattr(asked, name) != field.default]
    found = [(name, _NEEDS[name][1]) for name in given if name in _NEEDS and not _NEEDS[name][0](config)]
    rates = {name: families.rate_setting(name) for name in families.components()}
    used = {rates[name] for name in config.components}
    for rate in given:
        if rate in rates.values() and rate not in used and getattr(asked, rate) != 0:
            trained = next(name for name, own in rates.items() if own == rate)
            found.append((rate, f"--components {','.join((*config.components, trained))}"))
    return [f"{flag(name)} does nothing without {needs}" for name, needs in found]
