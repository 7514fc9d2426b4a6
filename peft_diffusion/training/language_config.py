"""What a training on text is told: one dataclass for flags, TOML file and Python. Imports no torch."""

import math
from dataclasses import KW_ONLY, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar

from cyclopts import Group, Parameter

from ..core.errors import UserError
from ..data.text import read_texts
from .config import Precision, Quantize, Scheduler, adapter_path, check_values, fill

_RESULT = Group("What to make", sort_key=1)
_DATA = Group("Text", sort_key=2)
_ADAPTER = Group("Adapter", sort_key=3)
_STEPS = Group("Learning", sort_key=4)
_WATCH = Group("Watching and keeping", sort_key=5)
_MACHINE = Group("Machine", sort_key=6)

HELD_OUT_FROM = 20  # windows; with fewer, each one is worth more in training than in measuring
LONGEST = 1024  # tokens of a window, unless more are asked for


@dataclass(frozen=True)
class TextTrainConfig:
    """Everything a training on text is told. A field left at None gets a value that suits the base.

    Raises UserError for a value that no run can use.
    """

    components: ClassVar[tuple[str, ...]] = ("lm",)

    texts: Annotated[tuple[Path, ...], Parameter(group=_RESULT, negative=())]
    """Text to learn from: UTF-8 files, or folders with .txt files. Several are read as one."""
    _: KW_ONLY
    output: Annotated[Path | None, Parameter(group=_RESULT, alias="-o")] = None
    """The adapter file to write; by default the text's name with .safetensors, in the present directory."""
    base: Annotated[str, Parameter(group=_RESULT)] = "tiny-lm"
    """The model to teach: tiny-lm (embedded), a folder in the format of transformers, or a hub id."""

    held_out_text: Annotated[tuple[Path, ...], Parameter(group=_DATA, negative=())] = ()
    """Text to measure on instead of a part of what is learned from: files or folders."""
    held_out: Annotated[float | None, Parameter(group=_DATA)] = None
    """Share at the end of each text kept apart to measure on (0 to below 1); by default a tenth where there is enough."""
    context: Annotated[int | None, Parameter(group=_DATA)] = None
    """Tokens of a window; by default what the base takes, at most 1024."""

    method: Annotated[str, Parameter(group=_ADAPTER)] = "lora"
    """What is trained at each layer: lora, or another method of the package."""
    rank: Annotated[int | None, Parameter(group=_ADAPTER)] = None
    """Rank of a LoRA and its kin: how much it can hold, and how large the file is."""
    alpha: Annotated[float | None, Parameter(group=_ADAPTER)] = None
    """A LoRA is scaled by alpha / rank; by default alpha is the rank."""
    dropout: Annotated[float, Parameter(group=_ADAPTER)] = 0.0
    """Share of a layer's inputs that a LoRA does not see in a step; against overfitting on a short text."""
    option: Annotated[tuple[str, ...], Parameter(group=_ADAPTER, negative=(), consume_multiple=False)] = ()
    """Another hyper-parameter of the method, as NAME=VALUE; give it again for more."""
    block: Annotated[tuple[str, ...], Parameter(group=_ADAPTER, negative=(), consume_multiple=False)] = ()
    """In place of method and target: "lm TARGET METHOD NAME=VALUE ..." (lr=... too); several train together."""
    target: Annotated[str, Parameter(group=_ADAPTER)] = "attention+ff"
    """Layers to adapt: attention, attention+ff, all-linear, or a regular expression over module paths."""

    lr: Annotated[float | None, Parameter(group=_STEPS)] = None
    """Learning rate. Lower it when the loss rises, raise it when nothing changes."""
    steps: Annotated[int | None, Parameter(group=_STEPS)] = None
    """Number of steps."""
    epochs: Annotated[float | None, Parameter(group=_STEPS)] = None
    """Length as passes over the text, instead of steps; wins over them."""
    batch_size: Annotated[int | None, Parameter(group=_STEPS)] = None
    """Windows computed at once; lower it when memory runs out."""
    accumulation: Annotated[int, Parameter(group=_STEPS)] = 1
    """Batches that make one step; raise it to keep the effect of a batch that memory does not hold."""
    scheduler: Annotated[Scheduler, Parameter(group=_STEPS)] = "cosine"
    """Course of the learning rate after the warm-up: constant, or falling to 0 as a cosine or in a line."""
    warmup: Annotated[int, Parameter(group=_STEPS)] = 10
    """Steps in which the learning rate rises from 0."""
    weight_decay: Annotated[float, Parameter(group=_STEPS)] = 0.01
    """AdamW's pull of the adapter's weights towards 0."""
    clip: Annotated[float, Parameter(group=_STEPS)] = 1.0
    """Largest norm of a step's gradient; 0 is no limit."""
    ema: Annotated[float, Parameter(group=_STEPS)] = 0.0
    """Decay of the average of the weights that is saved in their place (0.99 or more; 0 is off)."""
    seed: Annotated[int, Parameter(group=_STEPS)] = 0
    """Number that all chance comes from: same seed, settings and text, same adapter."""

    run_dir: Annotated[Path | None, Parameter(group=_WATCH)] = None
    """Folder for settings, metrics and checkpoints; by default runs/NAME, after the output file."""
    resume: Annotated[bool, Parameter(group=_WATCH, negative=())] = False
    """Go on from the newest checkpoint of the run folder."""
    overwrite: Annotated[bool, Parameter(group=_WATCH, negative=())] = False
    """Replace an output file and a run folder that are there already."""
    save_every: Annotated[int | None, Parameter(group=_WATCH)] = None
    """Steps between checkpoints; each comes with a measurement on the text kept apart. By default a sixth of the run."""
    log_every: Annotated[int, Parameter(group=_WATCH)] = 10
    """Steps between readings of the loss; rarer is a little faster on a GPU."""

    device: Annotated[str, Parameter(group=_MACHINE)] = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1, mps."""
    precision: Annotated[Precision, Parameter(group=_MACHINE)] = "auto"
    """Precision of the base in training; auto is bfloat16 on a GPU that has it, else float32. Adapters are float32."""
    quantize: Annotated[Quantize | None, Parameter(group=_MACHINE)] = None
    """Hold the base's linear layers in fewer bits while training, which saves memory: int8, or nf4 for the least."""

    def __post_init__(self) -> None:
        check_values(self)
        if self.held_out_text and self.held_out:
            raise UserError("--held-out takes a share of the text and --held-out-text another text; give one of them")

    def check(self) -> None:
        """Find out what can be told without the base. Raises UserError for texts that cannot be read."""
        language_output(self)
        for places in (self.texts, self.held_out_text):
            if places:
                read_texts(places)


@dataclass(frozen=True, kw_only=True)
class ResolvedTextConfig(TextTrainConfig):
    """A configuration in which the base and the machine have filled every value a run needs."""

    output: Path
    run_dir: Path
    context: int
    lr: float
    steps: int
    batch_size: int
    save_every: int


# What suits a base by its size: below this many parameters, and from there on.
SMALL = 50_000_000
_DEFAULTS: dict[bool, dict[str, Any]] = {
    True: {"lr": 3e-3, "steps": 300, "batch_size": 8},
    False: {"lr": 2e-4, "steps": 500, "batch_size": 4},
}


def resolve_language(
    config: TextTrainConfig, *, parameters: int, context: int, windows: int | None = None
) -> ResolvedTextConfig:
    """Fill what was left out, from the base's parameters and context (tokens).

    Epochs become steps when the windows of one are known; until then the default steps stand. Raises UserError for a
    window longer than the base takes.
    """
    values = {field.name: getattr(config, field.name) for field in fields(TextTrainConfig)}
    if config.context is not None and config.context > context:
        raise UserError(f"--context {config.context} is more than the base takes, which is {context} tokens")
    fill(values, _DEFAULTS[parameters < SMALL])
    if config.epochs is not None and windows is not None:
        values["steps"] = max(1, math.ceil(config.epochs * windows / (values["batch_size"] * config.accumulation)))
        values["epochs"] = None
    fill(
        values,
        {
            "output": language_output(config),
            "run_dir": language_run(config),
            "context": min(context, LONGEST),
            "save_every": math.ceil(values["steps"] / 6),
        },
    )
    return ResolvedTextConfig(**values)


def language_output(config: TextTrainConfig) -> Path:
    """The adapter file of a run. Raises UserError for a name that does not end in .safetensors."""
    if not config.texts:
        raise UserError("no text was given: name the file or the folder that holds it")
    return adapter_path(config.output, config.texts[0].resolve().stem)


def language_run(config: TextTrainConfig) -> Path:
    """The run folder of a run."""
    return config.run_dir or Path("runs") / language_output(config).stem
