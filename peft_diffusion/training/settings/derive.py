"""From what was asked for to all values that a run needs: the rest comes from preset, base, method and number of steps."""

import math
from collections.abc import Callable, Container, Mapping
from typing import Any, Protocol, TypeVar

from ... import methods
from ...bases import family as families
from ...bases.family import Family
from ...core.errors import UserError
from ...core.settings import Settings, flag, pick, settings_of
from ...core.wording import number_of
from .choices import AVERAGES, FINDS_RATE, OptimizerName, Precision
from .pictures import PRESET_ROLES, ResolvedConfig, TrainConfig, output_path, preset_components, run_path
from .placements import ranked
from .presets import (
    CLASS_IMAGES,
    FEW_APART,
    FEW_FROM,
    HELD_OUT_FROM,
    KEPT,
    LONGEST,
    RATE_LIKE,
    SMALL,
    TEXT_DEFAULTS,
    TEXT_RATES,
)
from .resumption import derived_before
from .shared import AskedSettings, MethodSettings, SharedConfig
from .text import ResolvedTextConfig, TextTrainConfig, language_output, language_run

S = TypeVar("S", bound=Settings)


class Base(Protocol):
    """What the defaults depend on; `bases.BaseInfo` has it."""

    @property
    def name(self) -> str: ...
    @property
    def family(self) -> str: ...
    @property
    def resolution(self) -> int: ...


class Derivation:
    """The values of a configuration while what was left out is filled, and in words where each came from."""

    def __init__(self, config: Settings) -> None:
        self.values = {one.name: getattr(config, one.name) for one in settings_of(type(config))}
        self.asked = {name: value for name, value in self.values.items() if value is not None}
        self.derived: dict[str, str] = {}

    def put(self, values: Mapping[str, Any], source: str) -> None:
        """Set values, whatever was asked for.

        Args:
            values: By setting.
            source: Where they come from, in words.
        """
        self.values |= values
        self.derived |= {name: source for name, value in values.items() if value != self.asked.get(name)}

    def fill(self, values: Mapping[str, Any], source: str) -> None:
        """Set those values that are not known yet.

        Args:
            values: By setting.
            source: Where they come from, in words.
        """
        self.put({name: value for name, value in values.items() if self.values[name] is None}, source)

    def leave_out(self, name: str) -> None:
        """Set a value that says nothing in this run to None, as if nobody had asked for it.

        Args:
            name: The setting.
        """
        self.values[name] = None
        self.asked.pop(name, None)
        self.derived.pop(name, None)

    def put_steps(self, count: float, a_step: int, of: str) -> None:
        """Derive the steps of a run from its epochs.

        Args:
            count: Pieces, such as pictures, in all epochs.
            a_step: How many of them a step takes.
            of: What they are, in words.
        """
        epochs = self.values["epochs"]
        self.values["epochs"] = None
        self.put({"steps": max(1, math.ceil(count / a_step))}, f"from {epochs:g} epochs of the {of}")

    def fill_from_steps(self) -> None:
        """What follows from the number of steps."""
        steps = self.values["steps"]
        if self.values["save_every"] is None:
            self.fill({"keep_last": 0}, "without --save-every")
        self.fill({"save_every": math.ceil(steps / 6)}, f"from {steps} steps")
        self.fill({"keep_last": steps}, f"from {steps} steps")

    def put_precision(self, precision: Precision, device: str) -> None:
        """Set what an automatic precision comes to.

        Args:
            precision: The precision.
            device: Where the run takes place.
        """
        if self.values["precision"] == "auto":
            self.put({"precision": precision}, f"from device {device}")

    def put_places(self, output: object, run_dir: object) -> None:
        """Set where the run and its file lie, which is the run's own, whoever chose it: it is found there when it goes on.

        Args:
            output: The adapter file.
            run_dir: The run folder.
        """
        places = {"output": output, "run_dir": run_dir}
        self.values |= places
        self.asked |= places

    def resolved(self, kind: type[S]) -> S:
        """Make the whole configuration.

        Args:
            kind: Its class.

        Returns:
            The configuration.

        Raises:
            UserError: A value cannot be.
        """
        return pick(kind, {**self.values, "asked": self.asked, "derived": self.derived})


def resolve(
    config: TrainConfig,
    base: Base,
    pictures: int,
    device: str,
    batches_per_epoch: int | None = None,
    *,
    precision: Precision = "auto",
    before: Mapping[str, Any] | None = None,
) -> ResolvedConfig:
    """Fill what was left out from the preset, the base, the number of usable pictures and the kind of device.

    Args:
        config: What was asked for.
        base: What is known of the base.
        pictures: How many can be used.
        device: The kind of device: cpu, cuda, mps.
        batches_per_epoch: The batches of one pass over the pictures, by which epochs become steps; until they are known,
            the preset's steps stand.
        precision: What an automatic precision comes to.
        before: The settings of the run that goes on, as its checkpoints hold them; None for a new run.

    Returns:
        The whole configuration. Methods without a rank have none.
    """
    found, family = Derivation(config), families.find(base.family)
    preset, for_base = f"from preset {config.preset}", f"from preset {config.preset} for {base.name}"
    if config.epochs is not None and batches_per_epoch is not None:
        found.put_steps(config.epochs * batches_per_epoch, config.accumulation, "pictures")
    if config.components == preset_components(config.preset):
        del found.asked["components"]
        found.put({"components": adapted_components(config, family)}, preset)
    elif (left := adapted_components(config, family)) != config.components:
        found.put({"components": left}, "without those of rate 0")
    found.put_precision(precision, device)
    _put_rates(found, config, family, for_base)
    found.fill({"debiased": _debiased(config, family)}, f"from method {config.method} for {base.name}")
    if found.values["debiased"]:
        found.put({"min_snr_gamma": 0.0}, "from debiased")
    if config.optimizer in AVERAGES:
        found.fill({"scheduler": "constant"}, f"from optimizer {config.optimizer}")
    found.fill(family.defaults(config.preset), for_base)
    if not ranked(config):
        found.leave_out("rank")
    if config.warmup is None:
        _put_warmup(found, before)
    found.fill_from_steps()
    _fill_previews(found, device)
    resolution, source = resolution_of(config, base)
    found.fill({"resolution": resolution}, source)
    if (apart := derived_before(before, "held_out")) is not None:  # others were told of to an older version
        found.fill({"held_out": apart}, "from the run that goes on")
    found.fill({"held_out": share_apart(pictures)}, f"from {number_of(pictures, 'picture')}")
    found.fill({"keep": KEPT[config.preset]}, preset)
    found.fill({"class_images": CLASS_IMAGES}, "by default")
    found.put_places(output_path(config), run_path(config))
    return found.resolved(ResolvedConfig)


def resolution_of(config: TrainConfig, base: Base) -> tuple[int, str]:
    """Choose the resolution of a run: where every folder has its own, the largest.

    Args:
        config: What was asked for.
        base: What is known of the base.

    Returns:
        Pixels a side, and where they come from, in words.
    """
    if config.resolution is not None:
        return config.resolution, "asked for"
    own = [max(one.resolution or (0,)) for one in config.dataset if not one.regularisation]
    if not config.folder and own and all(own):
        return max(own), "from the data sets"
    return base.resolution, f"from base {base.name}"


def share_apart(pictures: int) -> float:
    """Choose how many pictures are kept apart to measure on where nothing was said.

    Args:
        pictures: How many there are.

    Returns:
        Their share: a tenth, or two of a few; 0 where each one is worth more in training than in measuring.
    """
    if pictures >= HELD_OUT_FROM:
        return 0.1
    return FEW_APART / pictures if pictures >= FEW_FROM else 0.0


def _put_rates(found: Derivation, config: TrainConfig, family: Family, for_base: str) -> None:
    """The learning rates of the components, and those of blocks that say none."""
    settings, defaults = _rate_settings(family, found.values), family.defaults(config.preset)

    def rate(component: str, method: str) -> float:
        setting = settings[component]
        given = _said(config, setting)
        usual: float = defaults[RATE_LIKE.get(setting, setting)]
        if given is not None:
            return given
        return own_rate(config.optimizer, methods.find(method).rates.on_pictures(usual, small=family.small))

    found.put({"block": tuple(with_rate(text, settings, rate) for text in config.block)}, "with the rates of this run")
    rates = {setting: rate(component, config.method) for component, setting in settings.items()}
    found.fill(rates, _rate_source(config, for_base))


def _rate_settings(family: Family, known: Container[str]) -> dict[str, str]:
    """The settings with the learning rates of components, those of all families, as placements may name any.

    Raises UserError where the family of the base names one that is not known.
    """
    for one in family.components:
        if one.rate not in known:
            there = ", ".join(dict.fromkeys(rate for row in families.components().values() if (rate := row.rate) in known))
            raise UserError(
                f"the family of bases {family.name!r} has no setting with the learning rate of its {one.name}:"
                f" {one.rate!r} is none; there are: {there}"
            )
    rows = families.components() | {one.name: one for one in family.components}
    return {name: one.rate for name, one in rows.items() if one.rate in known}


def _rate_source(config: SharedConfig, for_base: str) -> str:
    """Where a learning rate that nobody chose comes from, in words."""
    if config.optimizer in FINDS_RATE or config.optimizer == "lion":
        return f"from optimizer {config.optimizer}"
    return for_base if config.method == SharedConfig.method else f"from method {config.method}, {for_base}"


def _put_warmup(found: Derivation, before: Mapping[str, Any] | None) -> None:
    """The steps of the warm-up: a short run is not spent on it.

    One that goes on keeps its own. It may have other steps now, and is past its warm-up.
    """
    own = derived_before(before, "warmup")
    longest = found.values["steps"] // 5
    if own is not None:
        found.put({"warmup": own}, "from the run that goes on")
    elif found.values["warmup"] > longest:
        found.put({"warmup": longest}, f"from {found.values['steps']} steps")


def _fill_previews(found: Derivation, device: str) -> None:
    """The steps between previews: on a CPU they would take as long as the run."""
    if device == "cpu":
        found.fill({"preview_every": 0}, f"from device {device}")
    else:
        found.fill({"preview_every": math.ceil(found.values["steps"] / 5)}, f"from {found.values['steps']} steps")


def adapted_components(config: TrainConfig, family: Family) -> tuple[str, ...]:
    """Name the components that a run adapts.

    Args:
        config: What was asked for; before a base is known, it names components of the most usual families.
        family: That of the base.

    Returns:
        Those that were chosen, or the family's own of the preset's roles; the text encoders for a method that reads words.
    """
    if config.components != preset_components(config.preset):
        return _learning(config, config.components)
    reads_words = not config.block and methods.find(config.method).reads_words
    return _learning(config, family.by_roles(("text encoder",) if reads_words else PRESET_ROLES[config.preset]))


def _learning(config: TrainConfig, components: tuple[str, ...]) -> tuple[str, ...]:
    """The components but those that a rate of 0 freezes. Raises UserError where none is left."""
    frozen = _frozen(config)
    left = tuple(name for name in components if name not in frozen)
    if not left:
        flags = " and ".join(sorted({flag(families.rate_setting(name)) for name in components}))
        raise UserError(f"{flags} 0 leaves nothing to train; --components and other rates choose what learns")
    return left


def _frozen(config: TrainConfig) -> frozenset[str]:
    """The components, of all families, whose learning rate was said to be 0."""
    rates = {name: row.rate for name, row in families.components().items() if row.role != "language model"}
    return frozenset(name for name, rate in rates.items() if _said(config, rate) == 0)


def _said(config: TrainConfig, setting: str) -> float | None:
    """The learning rate that a person gave, or that of the component that it otherwise is like."""
    given: float | None = getattr(config, setting, None)
    return getattr(config, RATE_LIKE[setting]) if given is None and setting in RATE_LIKE else given


def undecided(config: AskedSettings) -> frozenset[str]:
    """Name the settings that the base or the machine may give another value than what was asked for.

    Args:
        config: What was asked for.

    Returns:
        Those that were left out, and those whose text is completed or means what suits the base.
    """
    left_out = {one.name for one in settings_of(type(config)) if getattr(config, one.name) is None}
    completed = {"block"} if isinstance(config, MethodSettings) and config.block else set()
    completed |= {"precision"} if config.precision == "auto" else set()
    if isinstance(config, TrainConfig) and (config.components == preset_components(config.preset) or _frozen(config)):
        completed |= {"components"}
    return frozenset(left_out | completed)


def _debiased(config: TrainConfig, family: Family) -> bool:
    """Whether timesteps are weighed where nobody said so.

    What is drawn is decided in the noisiest ones, where an unweighed loss of epsilon is small whatever the network answers:
    8 learned tokens kept 7% of 60 subjects with it, and 42% with this, with more of the style besides.
    """
    alone = not config.block and methods.find(config.method).debiased_when_small
    return family.small and alone and not config.min_snr_gamma


def resolve_language(
    config: TextTrainConfig,
    *,
    parameters: int,
    context: int,
    windows: float | None = None,
    device: str = "cpu",
    precision: Precision = "auto",
) -> ResolvedTextConfig:
    """Fill what was left out from the base and the kind of device.

    Args:
        config: What was asked for.
        parameters: Those of the base.
        context: The most tokens that the base knows places for.
        windows: The windows of one pass over the text, by which epochs become steps; until they are known, the default
            steps stand.
        device: The kind of device: cpu, cuda, mps.
        precision: What an automatic precision comes to.

    Returns:
        The whole configuration.

    Raises:
        UserError: A window is longer than the base takes.
    """
    if config.context is not None and config.context > context:
        raise UserError(f"--context {config.context} is more than the base takes, which is {context} tokens")
    found, small = Derivation(config), parameters < SMALL
    for_base = f"for a base of {parameters:,} parameters"
    found.fill(TEXT_DEFAULTS[small], for_base)

    def rate(_: str, method: str) -> float:
        rates = methods.find(method).rates
        return config.lr or own_rate(config.optimizer, rates.on_text(TEXT_RATES[small], small=small))

    block = tuple(with_rate(text, config.components, rate) for text in config.block)
    found.put({"block": block}, "with the rates of this run")
    found.fill({"lr": rate("", config.method)}, _rate_source(config, for_base))
    if config.epochs is not None and windows is not None:
        found.put_steps(config.epochs * windows, found.values["batch_size"] * config.accumulation, "text")
    found.put_precision(precision, device)
    found.fill({"context": min(context, LONGEST)}, f"from the base, which takes {context}")
    scheduler = "constant" if config.optimizer == "schedule-free" else "cosine"
    found.fill({"scheduler": scheduler}, f"from optimizer {config.optimizer}")
    found.fill_from_steps()
    found.fill({"keep": "best"}, "by default")
    found.put_places(language_output(config), language_run(config))
    return found.resolved(ResolvedTextConfig)


def own_rate(optimizer: OptimizerName, rate: float) -> float:
    """Bring a default learning rate to what an optimizer takes.

    Args:
        optimizer: Its name.
        rate: The rate.

    Returns:
        The rate; 1 for an optimizer that finds it, which takes a factor; a fifth for Lion.
    """
    # Lion's steps have the size of the rate in every number, which its authors set 3 to 10 times lower (Chen et al. 2023,
    # https://arxiv.org/abs/2302.06675, section 5).
    return 1.0 if optimizer in FINDS_RATE else rate / 5 if optimizer == "lion" else rate


def with_rate(block: str, components: Container[str], rate: Callable[[str, str], float]) -> str:
    """Write the learning rate into a placement, so that settings that were written down mean the same when they are read.

    Args:
        block: "COMPONENT TARGET METHOD NAME=VALUE ...".
        components: Those that the base may have; a text with another stays as it is.
        rate: Gives the rate of a component and a method.

    Returns:
        The text with ``lr=``.
    """
    words = block.split()
    if len(words) < 3 or words[0] not in components or any(word.startswith("lr=") for word in words[3:]):
        return block
    return f"{block} lr={rate(words[0], words[2])}"
