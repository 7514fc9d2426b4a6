"""What a training run is told: one dataclass for flags, TOML file and Python. Imports no torch."""

import json
import math
from collections.abc import Callable, Container, Mapping
from dataclasses import KW_ONLY, MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeAlias, get_args

from cyclopts import Group, Parameter

from ...core.errors import UserError
from ...core.settings import Settings

Preset: TypeAlias = Literal["style", "subject"]
Masks: TypeAlias = Literal["files", "alpha", "off"]
PriorTarget: TypeAlias = Literal["base", "noise"]
Loss: TypeAlias = Literal["l2", "huber", "smooth-l1"]
HuberSchedule: TypeAlias = Literal["snr", "exponential", "constant"]
TimestepBias: TypeAlias = Literal["none", "later", "earlier"]
Scheduler: TypeAlias = Literal["constant", "cosine", "linear"]
Precision: TypeAlias = Literal["auto", "float32", "bfloat16"]
Quantize: TypeAlias = Literal["nf4", "int8"]
OptimizerName: TypeAlias = Literal["adamw", "adamw8bit", "prodigy", "schedule-free"]
Memory: TypeAlias = Literal["auto", "low", "off"]
Keep: TypeAlias = Literal["best", "last"]
LogWith: TypeAlias = Literal["tensorboard"]
MissingCaptions: TypeAlias = Literal["stop", "name", "empty", "skip"]

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
RATES = {"unet": "unet_lr", "text_encoder": "text_encoder_lr", "text_encoder_2": "text_encoder_lr"}
"""The setting that holds a component's learning rate."""
HELD_OUT_FROM = 20  # pictures; with fewer, each one is worth more in training than in measuring

RESULT = Group("What to make", sort_key=1)
_DATA = Group("Pictures and captions", sort_key=2)
_PRIOR = Group("Keeping the class", sort_key=3)
ADAPTER = Group("Adapter", sort_key=3)
LEARNING = Group("Learning", sort_key=4)
_OPTIMIZER = Group("Optimizer", sort_key=5)
WATCH = Group("Watching and keeping", sort_key=6)
_MACHINE = Group("Machine", sort_key=7)


FIND_LR = (
    "Find a learning rate by trials and stop; for a new base, method or kind of data. Takes as long as about five runs. "
    "No adapter is written."
)


class Base(Protocol):
    """What the defaults depend on; `bases.BaseInfo` has it."""

    @property
    def family(self) -> str: ...
    @property
    def resolution(self) -> int: ...


class MethodSettings(Protocol):
    """Which methods are trained where; `TrainConfig` has it."""

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


class RunSettings(Settings, MethodSettings, Protocol):
    """What the course of a run depends on, whatever it learns from; `ResolvedConfig` has it."""

    @property
    def output(self) -> Path: ...
    @property
    def run_dir(self) -> Path: ...
    @property
    def steps(self) -> int: ...
    @property
    def accumulation(self) -> int: ...
    @property
    def scheduler(self) -> Scheduler: ...
    @property
    def warmup(self) -> int: ...
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
    def patience(self) -> int: ...
    @property
    def cuda_graph(self) -> bool: ...
    @property
    def optimizer(self) -> OptimizerName: ...


@dataclass(frozen=True, kw_only=True)
class SharedConfig:
    """What every training is told, whatever it learns from. Raises UserError for a value that no run can use.

    Python orders the fields of a class by its bases, the last one first. What a kind of training is told before all this,
    such as its source, is therefore in a class of its own, and stands last among the bases.
    """

    method: Annotated[str, Parameter(group=ADAPTER)] = "lora"
    """What is trained at each layer: lora, or another method of the package."""
    rank: Annotated[int | None, Parameter(group=ADAPTER)] = None
    """Rank of a LoRA and its kin: how much it can hold, and how large the file is."""
    alpha: Annotated[float | None, Parameter(group=ADAPTER)] = None
    """A LoRA is scaled by alpha / rank; by default alpha is the rank."""
    option: Annotated[tuple[str, ...], Parameter(group=ADAPTER, negative=(), consume_multiple=False)] = ()
    """Another hyper-parameter of the method, as NAME=VALUE; give it again for more."""

    steps: Annotated[int | None, Parameter(group=LEARNING)] = None
    """Number of steps."""

    optimizer: Annotated[OptimizerName, Parameter(group=_OPTIMIZER)] = "adamw"
    """What moves the weights: adamw; adamw8bit, whose state takes a quarter of the memory (needs bitsandbytes); prodigy,
    which finds its learning rate (prodigyopt); or schedule-free, for a run that may end at any step (schedulefree)."""
    accumulation: Annotated[int, Parameter(group=_OPTIMIZER)] = 1
    """Batches that make one step; raise it to keep the effect of a batch that memory does not hold."""
    weight_decay: Annotated[float, Parameter(group=_OPTIMIZER)] = 0.01
    """The optimizer's pull of the adapter's weights towards 0."""
    clip: Annotated[float, Parameter(group=_OPTIMIZER)] = 1.0
    """Largest norm of a step's gradient; 0 is no limit."""
    ema: Annotated[float, Parameter(group=_OPTIMIZER)] = 0.0
    """Decay of the average of the weights that is saved in their place (0.99 or more; 0 is off)."""

    resume: Annotated[bool, Parameter(group=WATCH, negative=())] = False
    """Go on from the newest checkpoint of the run folder."""
    overwrite: Annotated[bool, Parameter(group=WATCH, negative=())] = False
    """Replace an output file and a run folder that are there already."""
    log_every: Annotated[int, Parameter(group=WATCH)] = 10
    """Steps between readings of the loss; rarer is a little faster on a GPU."""
    keep: Annotated[Keep | None, Parameter(group=WATCH)] = None
    """Weights to write: the best by the loss on what is kept apart, or the last. By default the last of a style, whose look
    still gains when that loss no longer falls, and else the best; with nothing kept apart, the last."""
    keep_checkpoints: Annotated[int, Parameter(group=WATCH)] = 2
    """How many of the newest checkpoints stay, beside the best one; more to compare them, at the cost of disk."""
    patience: Annotated[int, Parameter(group=WATCH)] = 0
    """End after so many measurements without a new lowest loss (0 never); saves time where a run may be too long."""

    log_with: Annotated[LogWith | None, Parameter(group=WATCH)] = None
    """Log losses, rates, measurements and previews for tensorboard too, under logs/ of the run folder; to watch it live."""

    device: Annotated[str, Parameter(group=_MACHINE)] = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1, mps."""
    precision: Annotated[Precision, Parameter(group=_MACHINE)] = "auto"
    """Precision of the base in training; auto is bfloat16 on a GPU that has it, else float32. Adapters are float32."""
    cuda_graph: Annotated[bool, Parameter(group=_MACHINE)] = True
    """On CUDA, record each step once as a CUDA graph and run it from there, which spares the host most of its work, and fuse
    norms, gates and a LoRA with what they stand beside. What cannot be recorded runs without, and says why."""
    memory: Annotated[Memory, Parameter(group=_MACHINE)] = "auto"
    """low computes the base's blocks twice to hold less of them, and encodes pictures one by one; off does not; auto does
    where a run would not fit otherwise."""
    quantize: Annotated[Quantize | None, Parameter(group=_MACHINE)] = None
    """Hold the base's linear layers in fewer bits while training, which saves memory: int8, or nf4 for the least."""

    def __post_init__(self) -> None:
        check_values(self)
        if self.optimizer == "schedule-free" and self.ema:
            raise UserError("--optimizer schedule-free averages the weights itself; leave --ema away")


@dataclass(frozen=True)
class _PictureConfig:
    """What a run learns from and what it makes."""

    folder: Annotated[tuple[Path, ...], Parameter(group=RESULT, negative=())]
    """Image folders to learn from, with their subfolders. Several are read as one."""
    _: KW_ONLY
    output: Annotated[Path | None, Parameter(group=RESULT, alias="-o")] = None
    """The adapter file to write; by default the folder's name with .safetensors, in the present directory."""
    base: Annotated[str, Parameter(group=RESULT)] = "icons"
    """The model to teach: icons (embedded), a diffusers folder, a .safetensors checkpoint or a hub id."""
    preset: Annotated[Preset, Parameter(group=RESULT)] = "style"
    """Where the values that you leave out come from: style learns the look that all pictures share, subject one character
    or thing from a few pictures."""

    trigger: Annotated[str, Parameter(group=_DATA)] = ""
    """Words that call the style, put into every caption: "ink style", or "ink drawing of {}" with {} for the caption."""
    missing_captions: Annotated[MissingCaptions, Parameter(group=_DATA)] = "stop"
    """What becomes of pictures without caption: stop, use the file name, use no words (empty), or skip them."""
    caption_dropout: Annotated[float | None, Parameter(group=_DATA)] = None
    """Share of captions left empty in training (0 to 1); a little keeps guidance working."""
    wildcards: Annotated[bool, Parameter(group=_DATA, negative=())] = False
    """Take one of {a|b} in captions, another in every step, for words that should not matter; {{ and }} are braces."""
    shuffle_tags: Annotated[bool, Parameter(group=_DATA, negative=())] = False
    """Shuffle comma-separated tags in every step; for tag captions, so that their order means nothing."""
    keep_tags: Annotated[int, Parameter(group=_DATA)] = 0
    """So many tags at the front stay in place when tags are shuffled."""
    flip: Annotated[bool, Parameter(group=_DATA, negative=())] = False
    """Learn from mirrored pictures too; not for a style with writing or a side that matters."""
    upscale: Annotated[bool, Parameter(group=_DATA, negative=())] = False
    """Enlarge pictures below the resolution; otherwise they are trained at their own size."""
    background: Annotated[str, Parameter(group=_DATA)] = "white"
    """Colour behind transparent pictures: a name or #rrggbb."""
    resolution: Annotated[int | None, Parameter(group=_DATA)] = None
    """Pixels a side of a square picture; by default the base's own."""
    held_out: Annotated[float | None, Parameter(group=_DATA)] = None
    """Share of the pictures kept apart to measure on (0 to below 1); by default a tenth where there are 20 or more."""
    cache: Annotated[Path | None, Parameter(group=_DATA)] = None
    """Folder to keep encoded pictures in, so that the next run on them starts faster; by default only memory."""
    repeats: Annotated[tuple[str, ...], Parameter(group=_DATA, negative=(), consume_multiple=False)] = ()
    """SUBFOLDER=N: draw its pictures N times in an epoch, for a few that count; a subfolder named 10_name is drawn 10 times
    without that."""
    folder_weight: Annotated[tuple[str, ...], Parameter(group=_DATA, negative=(), consume_multiple=False)] = ()
    """SUBFOLDER=WEIGHT: what its pictures count in the loss, below 1 for doubtful ones."""
    masks: Annotated[Masks, Parameter(group=_DATA)] = "files"
    """What of a picture is learned: the white of NAME-mask.png beside it (files), what is not transparent where there is
    no such file (alpha), or all of it (off)."""

    class_prompt: Annotated[tuple[str, ...], Parameter(group=_PRIOR, negative=(), consume_multiple=False)] = ()
    """What the subject is one of, as in "a portrait of a woman": the base draws pictures of it, and what they show is kept
    as it was. For a subject that should leave the rest alone; give it again for more kinds."""
    class_images: Annotated[int | None, Parameter(group=_PRIOR)] = None
    """Pictures that the base draws for the class prompts; they are kept for later runs."""
    regularisation: Annotated[tuple[Path, ...], Parameter(group=_PRIOR, negative=())] = ()
    """A folder of pictures of the class, in place of those that the base draws or beside them; repeats and captions as
    usual, without the trigger. Give it again for more folders."""
    prior_weight: Annotated[float, Parameter(group=_PRIOR)] = 1.0
    """What the pictures of the class count in the loss; raise it when prompts without the trigger change."""
    prior_target: Annotated[PriorTarget, Parameter(group=_PRIOR)] = "base"
    """What is learned from pictures of the class: to answer as the base does (base), which keeps more of it, or the pictures
    themselves (noise), for a folder of better ones than the base draws."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(SharedConfig, _PictureConfig):
    """Everything a training run is told. A field left at None gets the preset's value for the base.

    Raises UserError for a value that no run can use.
    """

    dropout: Annotated[float, Parameter(group=ADAPTER)] = 0.0
    """Share of a layer's inputs that a LoRA does not see in a step; against overfitting on a few pictures."""
    block: Annotated[tuple[str, ...], Parameter(group=ADAPTER, negative=(), consume_multiple=False)] = ()
    """In place of method and target: "COMPONENT TARGET METHOD NAME=VALUE ..." (lr=... too); several train together."""
    target: Annotated[str | None, Parameter(group=ADAPTER)] = None
    """Layers to adapt: attention, attention+ff, all-linear, conv, all, ..., or a regular expression over module paths; by
    default those that the method was made for, attention+ff for a LoRA."""
    components: Annotated[tuple[str, ...], Parameter(group=ADAPTER, negative=())] = ()
    """Parts to adapt, with commas: unet (by default), or unet,text_encoder for words that the base does not know (by default
    for a subject); SDXL has a text_encoder_2 too."""

    epochs: Annotated[float | None, Parameter(group=LEARNING)] = None
    """Length as passes over the pictures, instead of steps; wins over them."""
    batch_size: Annotated[int | None, Parameter(group=LEARNING)] = None
    """Pictures computed at once; lower it when memory runs out."""
    unet_lr: Annotated[float | None, Parameter(group=LEARNING)] = None
    """Learning rate of the UNet. Lower it when the loss rises, raise it when nothing changes."""
    text_encoder_lr: Annotated[float | None, Parameter(group=LEARNING)] = None
    """Learning rate of the text encoders, when they are among the components."""
    scheduler: Annotated[Scheduler | None, Parameter(group=LEARNING)] = None
    """Course of the learning rate after the warm-up: constant, or falling to 0 as a cosine or in a line."""
    warmup: Annotated[int | None, Parameter(group=LEARNING)] = None
    """Steps in which the learning rate rises from 0; by default at most a fifth of the run."""
    min_snr_gamma: Annotated[float | None, Parameter(group=LEARNING)] = None
    """Holds down the weight of nearly clean timesteps (5 is usual, 0 is off)."""
    timestep_bias: Annotated[TimestepBias | None, Parameter(group=LEARNING)] = None
    """Timesteps to draw more often: later ones, with more noise, where colours and forms are decided; earlier ones, where
    surfaces and lines are; or none."""
    noise_offset: Annotated[float, Parameter(group=LEARNING)] = 0.0
    """Noise that shifts whole channels, for very dark or very light pictures (0.05 is much)."""
    multires_noise: Annotated[float, Parameter(group=LEARNING)] = 0.0
    """Noise of coarser shapes too, each so much as strong as the finer one (0.3 is usual, 0 is off); for large dark or light
    areas, where an offset is too blunt."""
    zero_terminal_snr: Annotated[bool, Parameter(group=LEARNING, negative=())] = False
    """Let the schedule end in pure noise, so that pictures can be all dark or light; for bases with v-prediction only."""
    loss: Annotated[Loss, Parameter(group=LEARNING)] = "l2"
    """l2; or huber or smooth-l1, in which outliers count less, for folders with bad pictures among the good ones."""
    huber_c: Annotated[float, Parameter(group=LEARNING)] = 0.1
    """The error from which huber and smooth-l1 grow in a line (above 0, at most 1); lower ignores more."""
    huber_schedule: Annotated[HuberSchedule, Parameter(group=LEARNING)] = "snr"
    """How huber-c gets lower with the noise: after its share (snr), with the timestep (exponential), or not (constant)."""
    debiased: Annotated[bool | None, Parameter(group=LEARNING)] = None
    """Weigh timesteps so that none dominates what is learned; in place of min-snr-gamma, for details that stay vague. By
    default where a small base learns words alone, which else cost it the subjects."""
    seed: Annotated[int, Parameter(group=LEARNING)] = 0
    """Number that all chance comes from: same seed, settings and pictures, same adapter."""

    run_dir: Annotated[Path | None, Parameter(group=WATCH)] = None
    """Folder for settings, metrics, previews and checkpoints; by default runs/NAME, after the output file."""
    save_every: Annotated[int | None, Parameter(group=WATCH)] = None
    """Steps between checkpoints; each comes with a measurement on the pictures kept apart. By default a sixth of the run."""
    preview_prompts: Annotated[tuple[str, ...], Parameter(group=WATCH, negative=())] = ()
    """Prompts of the previews; by default captions of pictures kept apart."""
    preview_every: Annotated[int | None, Parameter(group=WATCH)] = None
    """Steps between previews; 0 draws them at start and end only, which is the default on a CPU."""
    preview_steps: Annotated[int, Parameter(group=WATCH)] = 20
    """Denoising steps of a preview; 0 draws none."""

    shard_base: Annotated[bool, Parameter(group=_MACHINE, negative=())] = False
    """Shard the base over the processes of torchrun or accelerate launch; for one too large for a card, as it is slower."""

    def __post_init__(self) -> None:
        parts = tuple(part.strip() for item in self.components for part in item.split(",") if part.strip())
        parts = parts if self.components else PRESET_COMPONENTS.get(self.preset, ("unet",))
        object.__setattr__(self, "components", tuple(dict.fromkeys(parts)))
        unknown = [part for part in self.components if part not in COMPONENTS]
        if unknown or not self.components:
            raise UserError(f"--components {','.join(unknown) or 'is empty'}: there are {', '.join(COMPONENTS)}")
        super().__post_init__()
        if self.shard_base and self.quantize:
            raise UserError("--shard-base cannot shard what --quantize packs; leave one of them away")
        if self.debiased and self.min_snr_gamma:
            raise UserError("--debiased and --min-snr-gamma weigh timesteps both; leave one of them away")


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig(TrainConfig):
    """A configuration in which the preset, the base and the machine have filled every value a run needs."""

    output: Path
    run_dir: Path
    resolution: int
    held_out: float
    caption_dropout: float
    unet_lr: float
    text_encoder_lr: float
    steps: int
    batch_size: int
    scheduler: Scheduler
    warmup: int
    min_snr_gamma: float
    timestep_bias: TimestepBias
    debiased: bool
    keep: Keep
    save_every: int
    preview_every: int
    class_images: int


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

# Presets as data: values per family of bases; "other" are small bases such as the embedded one.
_LATENT_DIFFUSION: dict[str, Any] = {
    "rank": 16,
    "unet_lr": 1e-4,
    "text_encoder_lr": 1e-5,
    "steps": 1500,
    "batch_size": 4,
    "scheduler": "cosine",
    "warmup": 50,
    "min_snr_gamma": 5.0,
    "timestep_bias": "none",
    "caption_dropout": 0.05,
}
_SMALL_DIFFUSION: dict[str, Any] = {
    **_LATENT_DIFFUSION,
    "unet_lr": 1e-3,
    "text_encoder_lr": 1e-4,
    "steps": 300,
    "batch_size": 8,
    "warmup": 10,
    "min_snr_gamma": 0.0,
    "timestep_bias": "later",
}
# A step of a subject holds as many pictures of the class besides, which the base looks at too.
_SUBJECT: dict[str, Any] = {**_LATENT_DIFFUSION, "steps": 800, "batch_size": 2, "scheduler": "constant"}
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "subject": {
        "sd1": _SUBJECT,
        "sd2": _SUBJECT,
        "sdxl": {**_SUBJECT, "rank": 32},
        "other": {**_SMALL_DIFFUSION, "batch_size": 4, "timestep_bias": "none"},
    },
    "style": {
        "sd1": _LATENT_DIFFUSION,
        "sd2": _LATENT_DIFFUSION,
        "sdxl": {**_LATENT_DIFFUSION, "rank": 32},
        "other": _SMALL_DIFFUSION,
    },
}
PRESET_COMPONENTS: dict[str, tuple[str, ...]] = {"style": ("unet",), "subject": ("unet", "text_encoder")}
_KEPT: dict[str, Keep] = {"style": "last", "subject": "best"}
CLASS_IMAGES = 100

# How many times the rate of a LoRA suits a method by default: the fewer numbers it trains, and the further they are from the
# weights, the faster they must move. Of three rates for each, a factor of about 3 apart, these had the lowest loss on unseen
# drawings of a style that the embedded base had learned in 150 steps (scripts/evaluate_styles.py's measure).
_RATE_FACTORS: dict[str, float] = {
    "loha": 0.5, "oft": 3.0, "lokr": 3.0, "bottleneck": 3.0, "bitfit": 10.0, "ia3": 30.0, "prefix": 30.0,
}  # fmt: skip
# Learned words have rates of their own, whatever the component's: embeddings are large numbers. This is what A1111's textual
# inversion starts with. Of six rates from 4e-4 to 4e-2 on the embedded base, whose embeddings are five times as large as
# CLIP's, the prompt looked most like a style at the same rate, and words that kept the subjects at twice that.
_WORD_RATES: dict[str, float] = {"tokens": 5e-3, "prompt": 5e-3}
_SMALL_WORD_RATES: dict[str, float] = {**_WORD_RATES, "tokens": 1e-2}

# Fields that a resumed run may have otherwise: they change where things go and how often one looks, not what is learned.
# The pictures and captions themselves are compared apart, so folders may have moved.
_SOURCES = ("folder", "regularisation", "texts", "held_out_text", "missing_captions")
_PLACES = ("output", "run_dir", "cache", "device", "cuda_graph", "memory", "shard_base", "preset", "resume", "overwrite")
_LENGTHS = ("steps", "epochs", "save_every", "log_every", "preview_prompts", "preview_every", "preview_steps")
_ENDS = ("keep", "keep_checkpoints", "patience", "log_with")
FREE_ON_RESUME = frozenset((*_SOURCES, *_PLACES, *_LENGTHS, *_ENDS))
_OF_THE_COMMAND = ("resume", "overwrite")  # said anew with every command, so in no file


def resolve(
    config: TrainConfig, base: Base, pictures: int, device: str, batches_per_epoch: int | None = None
) -> ResolvedConfig:
    """Fill what was left out from the preset, the base, the number of usable pictures and the kind of device.

    Epochs become steps when it is known how many batches they make; until then the preset's steps stand. Methods without a
    rank have none.
    """
    from .blocks import ranked  # which needs torch

    values = {field.name: getattr(config, field.name) for field in fields(TrainConfig)}
    if config.epochs is not None and batches_per_epoch is not None:
        values["steps"] = max(1, math.ceil(config.epochs * batches_per_epoch / config.accumulation))
        values["epochs"] = None
    preset = PRESETS[config.preset][base.family]

    def rate(component: str, method: str) -> float:
        given: float | None = getattr(config, RATES[component])
        words = _SMALL_WORD_RATES if base.family == "other" else _WORD_RATES
        of_lora: float = preset[RATES[component]]
        return given or own_rate(config.optimizer, words.get(method, of_lora * _RATE_FACTORS.get(method, 1.0)))

    values["block"] = tuple(with_rate(text, COMPONENTS, rate) for text in config.block)
    values |= {RATES[component]: rate(component, config.method) for component in COMPONENTS}
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
            "keep": _KEPT[config.preset],
            "class_images": CLASS_IMAGES,
            "held_out": 0.1 if pictures >= HELD_OUT_FROM else 0.0,
            "save_every": math.ceil(values["steps"] / 6),
            "preview_every": 0 if device == "cpu" else math.ceil(values["steps"] / 5),
        },
    )
    return ResolvedConfig(**values)


def _debiased(config: TrainConfig, base: Base) -> bool:
    """Whether timesteps are weighed where nobody said so.

    What is drawn is decided in the noisiest ones, where an unweighed loss of epsilon is small whatever the network answers:
    8 learned tokens kept 7% of 60 subjects with it, and 42% with this, with more of the style besides.
    """
    return base.family == "other" and not config.block and config.method in _WORD_RATES and not config.min_snr_gamma


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


def output_path(config: TrainConfig) -> Path:
    """The adapter file of a run. Raises UserError for a name that does not end in .safetensors."""
    if not config.folder:
        raise UserError("no image folder was given: name the folder that holds the pictures")
    return adapter_path(config.output, config.folder[0].resolve().name or "adapter")


def adapter_path(output: Path | None, name: str) -> Path:
    """The adapter file that was named, or one of that name. Raises UserError for one that does not end in .safetensors."""
    output = output or Path(f"{name}.safetensors")
    if output.suffix != ".safetensors":
        raise UserError(f"--output {output}: the adapter is a .safetensors file; name it {output.name}.safetensors")
    return output


def run_path(config: TrainConfig) -> Path:
    """The run folder of a run."""
    return config.run_dir or Path("runs") / output_path(config).stem


def check_values(config: Settings) -> None:
    """Raise UserError for a setting that is not among its choices or out of its range."""
    names = {field.name for field in fields(config)}
    for name, choices in _CHOICES.items():
        if name in names and getattr(config, name) not in choices:
            raise UserError(f"{_flag(name)} is one of {', '.join(c for c in choices if c)}, not {getattr(config, name)!r}")
    for name, limits in _RANGES.items():
        if name in names:
            _check_range(name, getattr(config, name), limits)


def to_json(config: Settings) -> dict[str, Any]:
    """The fields as JSON values; paths as text."""
    values = ((field.name, getattr(config, field.name)) for field in fields(config))
    return {name: _plain(value) for name, value in values if name not in _OF_THE_COMMAND}


def to_toml(config: Settings) -> str:
    """The fields as TOML, for `--config`; those at None are left out."""
    known = to_json(config)
    # Not ASCII: TOML knows no surrogate pairs, which JSON would write an emoji as.
    lines = [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in known.items() if value is not None]
    return "\n".join(lines) + "\n"


def changes(before: Mapping[str, Any], now: RunSettings) -> list[str]:
    """How a configuration differs from the one that a run was started with, in what the result depends on."""
    from .blocks import ranked  # which needs torch

    current = to_json(now)
    # A run of an older version was told nothing of what came later, and went by what is the default now.
    before = {field.name: _plain(field.default) for field in fields(now) if field.default is not MISSING} | dict(before)
    if not ranked(now):  # an older version wrote down a rank that said nothing
        before["rank"] = current["rank"]
    names = [name for name in current if name not in FREE_ON_RESUME and before.get(name) != current[name]]
    return [f"{_flag(name)} was {before.get(name)}, now {current[name]}" for name in names]


def fill(values: dict[str, Any], defaults: Mapping[str, Any]) -> None:
    """Give the fields at None a default."""
    values |= {name: value for name, value in defaults.items() if values[name] is None}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _flag(name: str) -> str:
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
    raise UserError(f"{_flag(name)} must be {low}{high}, not {value}")
