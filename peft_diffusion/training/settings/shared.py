"""What every training is told, whatever it learns from. Imports no torch."""

import shlex
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ... import methods
from ...core.errors import UserError
from ...core.settings import (
    COUNT,
    NATURAL,
    POSITIVE,
    SHARE,
    Flag,
    Group,
    OptionalPath,
    Range,
    Settings,
    Texts,
    setting,
    settings_class,
    settle,
)
from ...formats import layout as layouts
from ...formats.layout import SaveDtype
from .choices import AVERAGES, Keep, LogWith, Memory, OptimizerName, Precision, Quantize, Scheduler

RESULT = Group("What to make", 1)
ADAPTER = Group("Adapter", 3)
LEARNING = Group("Learning", 4)
OPTIMIZER = Group("Optimizer", 5)
WATCH = Group("Watching and keeping", 6)
MACHINE = Group("Machine", 7)


@runtime_checkable
class MethodSettings(Protocol):
    """Which methods are trained where; `TrainConfig` has it, and a training that attaches nothing has not."""

    @property
    def components(self) -> tuple[str, ...]: ...
    @property
    def method(self) -> str: ...
    @property
    def target(self) -> str | None: ...
    @property
    def option(self) -> tuple[str, ...]: ...
    @property
    def block(self) -> tuple[str, ...]: ...
    @property
    def rank(self) -> int | None: ...
    @property
    def alpha(self) -> float | None: ...
    @property
    def dropout(self) -> float: ...
    @property
    def resume(self) -> bool: ...


class AskedSettings(Settings, Protocol):
    """What a run is told that its course depends on before anything is read; `TrainConfig` has it."""

    @property
    def resume(self) -> bool: ...
    @property
    def device(self) -> str: ...
    @property
    def precision(self) -> Precision: ...
    @property
    def log_with(self) -> LogWith | None: ...
    @property
    def notify(self) -> str | None: ...
    @property
    def steps(self) -> int | None: ...
    @property
    def epochs(self) -> float | None: ...


class AskedAdapter(AskedSettings, MethodSettings, Protocol):
    """The same of a run that trains an adapter."""

    @property
    def optimizer(self) -> OptimizerName: ...


class RunSettings(Settings, Protocol):
    """What the course of a run depends on, whatever it trains; `ResolvedConfig` has it."""

    @property
    def asked(self) -> Mapping[str, Any]: ...
    @property
    def derived(self) -> Mapping[str, str]: ...
    @property
    def resume(self) -> bool: ...
    @property
    def output(self) -> Path: ...
    @property
    def precision(self) -> Precision: ...
    @property
    def run_dir(self) -> Path: ...
    @property
    def steps(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def memory(self) -> Memory: ...
    @property
    def accumulation(self) -> int: ...
    @property
    def scheduler(self) -> Scheduler: ...
    @property
    def warmup(self) -> int: ...
    @property
    def cycles(self) -> int: ...
    @property
    def power(self) -> float: ...
    @property
    def decay(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def clip(self) -> float: ...
    @property
    def ema(self) -> float: ...
    @property
    def log_every(self) -> int: ...
    @property
    def save_every(self) -> int: ...
    @property
    def keep(self) -> Keep: ...
    @property
    def keep_checkpoints(self) -> int: ...
    @property
    def keep_last(self) -> int: ...
    @property
    def patience(self) -> int: ...
    @property
    def cuda_graph(self) -> bool: ...
    @property
    def optimizer(self) -> OptimizerName: ...


class AdapterSettings(RunSettings, MethodSettings, Protocol):
    """The same of a run that trains an adapter, with how this begins and what its file is."""

    @property
    def init_from(self) -> Path | None: ...
    @property
    def orthogonal(self) -> float: ...
    @property
    def save_as(self) -> str: ...
    @property
    def save_dtype(self) -> SaveDtype: ...


@settings_class(kw_only=True)
class SharedConfig:
    """What every training is told, whatever it learns from.

    Python orders the fields of a class by its bases, the last one first. What a kind of training is told before all this,
    such as its source, is therefore in a class of its own, and stands last among the bases.

    Raises:
        UserError: A value is one that no run can use.
    """

    method: str = setting(methods.DEFAULT, "What is trained at each layer: the name of a method.", ADAPTER)
    rank: int | None = setting(
        None, "Rank of a LoRA and its kin: how much it can hold, and how large the file is.", ADAPTER, COUNT
    )
    alpha: float | None = setting(None, "A LoRA is scaled by alpha / rank; by default alpha is the rank.", ADAPTER, POSITIVE)
    option: Texts = setting((), "Another hyper-parameter of the method, as NAME=VALUE; give it again for more.", ADAPTER)

    init_from: OptionalPath = setting(
        None,
        "An adapter file to go on from, on whatever it is trained now. Without --rank its rank is taken; at another rank a "
        "LoRA is the nearest to it, or the same with room to learn.",
        ADAPTER,
        place=True,
    )
    beside: Texts = setting(
        (),
        "FILE or FILE=STRENGTH: an adapter that you have already, which acts while the new one learns and stays as it is, "
        "so that what is learned adds to it; it is no part of the new file. Several have commas between, as "
        "A.safetensors=0.7,B.safetensors=0.5, or are given one by one.",
        ADAPTER,
        place=True,
        free_on_resume=True,
    )

    orthogonal: float = setting(
        0.0,
        "Weight of a penalty on reading what the adapters of --beside read at the same layers, a share from 0 to 1 for a "
        "LoRA and its kin; 0 is off.",
        ADAPTER,
        NATURAL,
    )

    steps: int | None = setting(None, "Number of steps.", LEARNING, COUNT, free_on_resume=True)

    cycles: int = setting(1, "Cosines of the scheduler cosine-with-restarts, each from the full rate on.", LEARNING, COUNT)
    power: float = setting(
        1.0, "Of the scheduler polynomial: above 1 it falls early, below 1 late; 1 is a line.", LEARNING, POSITIVE
    )
    decay: float = setting(
        0.2,
        "Share of the run in which the scheduler warmup-stable-decay falls, at its end.",
        LEARNING,
        Range(0, 1, above=True),
    )

    optimizer: OptimizerName = setting(
        "adamw",
        "What moves the weights: adamw; adamw8bit, whose state takes a quarter of the memory (needs bitsandbytes); "
        "adafactor, lion or came, which hold less too (pytorch-optimizer); prodigy, which finds its learning rate "
        "(prodigyopt); schedule-free, for a run that may end at any step (schedulefree); or prodigy-plus, which is both "
        "(prodigy-plus-schedule-free).",
        OPTIMIZER,
    )
    accumulation: int = setting(
        1, "Batches that make one step; raise it to keep the effect of a batch that memory does not hold.", OPTIMIZER, COUNT
    )
    weight_decay: float = setting(0.01, "The optimizer's pull of the adapter's weights towards 0.", OPTIMIZER, NATURAL)
    clip: float = setting(1.0, "Largest norm of a step's gradient; 0 is no limit.", OPTIMIZER, NATURAL)
    ema: float = setting(
        0.0, "Decay of the average of the weights that is saved in their place (0.99 or more; 0 is off).", OPTIMIZER, SHARE
    )

    resume: bool = setting(
        False, "Go on from the newest checkpoint of the run folder.", WATCH, free_on_resume=True, kept=False
    )
    overwrite: bool = setting(
        False, "Replace an output file and a run folder that are there already.", WATCH, free_on_resume=True, kept=False
    )
    log_every: int = setting(
        10, "Steps between readings of the loss; rarer is a little faster on a GPU.", WATCH, COUNT, free_on_resume=True
    )
    keep: Keep | None = setting(
        None,
        "Weights to write: the best by the loss on what is kept apart, or the last. By default the last of a "
        "style, whose look still gains when that loss no longer falls, and else the best; with nothing kept apart, "
        "the last.",
        WATCH,
        free_on_resume=True,
    )
    keep_checkpoints: int = setting(
        2,
        "How many of the newest checkpoints stay, beside the best one; more to compare them, at the cost of disk.",
        WATCH,
        COUNT,
        free_on_resume=True,
    )
    keep_last: int | None = setting(
        None,
        "How many of the newest adapter files of the way stay, in adapters/ of the run folder: one is written with each "
        "checkpoint, and loads as the last one does. By default all where --save-every is given, and else none.",
        WATCH,
        NATURAL,
        free_on_resume=True,
    )
    patience: int = setting(
        0,
        "End after so many measurements without a new lowest loss (0 never); saves time where a run may be too long.",
        WATCH,
        NATURAL,
        free_on_resume=True,
    )

    save_as: str = setting(
        layouts.DEFAULT,
        "Layout of the adapter file, as convert --to has them: kohya, kohya-sgm, diffusers, peft (an --output"
        " FOLDER/adapter_model.safetensors), lycoris, omi, embedding, embedding-a1111, embedding-diffusers.",
        WATCH,
        free_on_resume=True,
    )
    save_dtype: SaveDtype = setting(
        "float32",
        "What the numbers of the adapter file are rounded to: fp16 and bf16 take half the space.",
        WATCH,
        free_on_resume=True,
    )
    log_with: LogWith | None = setting(
        None,
        "Log losses, rates, measurements and previews for tensorboard too, under logs/ of the run folder; to watch it live.",
        WATCH,
        free_on_resume=True,
    )

    notify: str | None = setting(
        None,
        "A command to run at the end, also of a run that failed or was stopped; PEFT_DIFFUSION_STATE, _OUTPUT, _RUN_DIR, "
        "_SECONDS and _ERROR in its environment tell the outcome. No shell reads it.",
        WATCH,
        place=True,
        free_on_resume=True,
    )

    device: str = setting("auto", "Where to compute: auto, cpu, cuda, cuda:1, mps.", MACHINE, free_on_resume=True)
    precision: Precision = setting(
        "auto",
        "Precision of the base in training; auto is bfloat16 on a GPU that has it, float16 on an older one, where losses "
        "are scaled, and else float32. Adapters are float32.",
        MACHINE,
    )
    cuda_graph: bool = setting(
        True,
        "On CUDA, record each step once as a CUDA graph and run it from there, which spares the host most of its "
        "work, and fuse norms, gates and a LoRA with what they stand beside. What cannot be recorded runs without, "
        "and says why.",
        MACHINE,
        flag=Flag(negative=True),
        free_on_resume=True,
    )
    memory: Memory = setting(
        "auto",
        "low computes the base's blocks twice to hold less of them, and encodes pictures one by one; off does not; "
        "auto does where a run would not fit otherwise.",
        MACHINE,
        free_on_resume=True,
    )
    quantize: Quantize | None = setting(
        None,
        "Hold the base's linear layers in fewer bits while training, which saves memory: int8, or nf4 for the least.",
        MACHINE,
    )

    def __post_init__(self) -> None:
        settle(self)
        if self.notify is not None:
            check_command(self.notify)
        if self.save_as != layouts.DEFAULT:
            layouts.find(self.save_as)
        if self.orthogonal and not self.beside:
            raise UserError("--orthogonal needs adapters to be orthogonal to; name them with --beside")
        if self.optimizer in AVERAGES and self.ema:
            raise UserError(f"--optimizer {self.optimizer} averages the weights itself; leave --ema away")


@settings_class(kw_only=True)
class Resolved:
    """What is known of a configuration beside the values that a run goes by.

    Attributes:
        asked: The values that were chosen, and the defaults that are the same for every run.
        derived: Where each of the other values came from, in words: "from preset style for icons".
    """

    asked: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    derived: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)


@settings_class(kw_only=True)
class FindLr:
    """What a command that trains may be asked for in place of a training."""

    find_lr: bool = setting(
        False,
        "Find a learning rate by trials and stop; for a new base, method or kind of data. Takes as long as about five "
        "runs. No adapter is written.",
        LEARNING,
    )

    def __post_init__(self) -> None:
        settle(self)


def check_command(command: str) -> None:
    """See that what ``--notify`` runs is a command.

    Args:
        command: What was given.

    Raises:
        UserError: It cannot be split into words, or has none.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UserError(f"--notify {command!r} is no command: {error}") from None
    if not words:
        raise UserError("--notify is empty; give a command, such as 'notify-send done'")


def adapter_path(output: Path | None, name: str) -> Path:
    """Name an adapter file.

    Args:
        output: The file that was named.
        name: What it is called where none was.

    Returns:
        The file.

    Raises:
        UserError: Its name does not end in .safetensors.
    """
    output = output or Path(f"{name}.safetensors")
    if output.suffix != ".safetensors":
        raise UserError(f"--output {output}: the adapter is a .safetensors file; name it {output.name}.safetensors")
    return output
