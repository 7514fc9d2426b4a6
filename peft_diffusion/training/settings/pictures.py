"""What a training on pictures is told: one dataclass for flags, TOML file and Python. Imports no torch."""

import math
import re
from collections.abc import Sequence
from dataclasses import KW_ONLY
from pathlib import Path

from ...bases import family as families
from ...bases.asked import AskedPrediction
from ...bases.family import Role
from ...core.errors import UserError, did_you_mean
from ...core.settings import (
    COUNT,
    NATURAL,
    POSITIVE,
    SHARE,
    Flag,
    Group,
    OnePath,
    OptionalPath,
    Paths,
    Range,
    Texts,
    explained,
    flag,
    setting,
    settings_class,
)
from .captions import DATA, CaptionSettings
from .choices import (
    HuberSchedule,
    Keep,
    Loss,
    MaxTokens,
    Preset,
    PriorTarget,
    Scheduler,
    TimestepBias,
)
from .datasets import Datasets, FolderSettings
from .shared import ADAPTER, LEARNING, MACHINE, RESULT, WATCH, Resolved, SharedConfig, adapter_path

# What a preset adapts, by role: of text encoders the first.
PRESET_ROLES: dict[str, tuple[Role, ...]] = {"style": ("denoiser",), "subject": ("denoiser", "text encoder")}


def preset_components(preset: Preset) -> tuple[str, ...]:
    """Name the components that a preset adapts, as Stable Diffusion of all versions has them.

    Args:
        preset: The preset.

    Returns:
        Their names.
    """
    return families.SMALL_DIFFUSION.by_roles(PRESET_ROLES[preset])


_PRIOR = Group("Keeping the class", 3)
_NOISE = 1000  # the timesteps of all bases here, of which the last is nearly noise


@settings_class()
class _PictureConfig:
    """What a run learns from and what it makes."""

    folder: Paths = setting(
        (),
        "Image folders to learn from, with their subfolders. Several are read as one; a --dataset has settings of its own.",
        RESULT,
        free_on_resume=True,
    )
    _: KW_ONLY
    output: OptionalPath = setting(
        None,
        "The adapter file to write; by default the folder's name with .safetensors, in the present directory.",
        RESULT,
        flag=Flag(aliases=("-o",)),
        place=True,
        free_on_resume=True,
    )
    base: str = setting(
        "icons", "The model to teach: icons (embedded), a diffusers folder, a .safetensors checkpoint or a hub id.", RESULT
    )
    preset: Preset = setting(
        "style",
        "Where the values that you leave out come from: style learns the look that all pictures share, subject one "
        "character or thing from a few pictures.",
        RESULT,
        free_on_resume=True,
    )

    prediction: AskedPrediction = setting(
        "auto",
        "What the base predicts, epsilon or v, where its files do not say it or say it wrongly; a run tests what they say "
        "on the first pictures, and warns.",
        RESULT,
    )

    max_tokens: MaxTokens = setting(
        "none",
        "How much of a caption is read: 75, 150 or 225 tokens, and the rest is cut; or all of it, in chunks of 75 (none).",
        DATA,
    )
    weighted_captions: bool = setting(
        False,
        "Read (word:1.3), (word), [word] and BREAK in captions as in prompts; otherwise brackets are letters. The escapes "
        "\\( and \\) are brackets either way.",
        DATA,
    )
    clip_skip: int | None = setting(
        None,
        "Which layer of the text encoder is learned with, counted from the last, which is 1, as A1111 and kohya count; by "
        "default the one that the base was trained with: 1, and 2 for Stable Diffusion XL.",
        DATA,
        Range(1, 12),
    )
    background: str = setting("white", "Colour behind transparent pictures: a name or #rrggbb.", DATA)
    resolution: int | None = setting(
        None, "Pixels a side of a square picture; by default the base's own.", DATA, Range(1, 8192), unit="pixels"
    )
    held_out: float | None = setting(
        None,
        "Share of the pictures kept apart to measure on (0 to below 1); by default a tenth where there are 20 or more, two "
        "of 6 to 19, and none of fewer. 0 trains on all.",
        DATA,
        SHARE,
    )
    cache: OptionalPath = setting(
        None,
        "Folder to keep encoded pictures in, so that the next run on them starts faster; by default only memory.",
        DATA,
        place=True,
        free_on_resume=True,
    )
    dataset: Datasets = setting(
        (),
        'A folder with settings of its own: "FOLDER NAME=VALUE ...", as in "pictures/hats repeats=3 trigger=hat flip=true", '
        "or [[dataset]] in TOML. Give it again for more folders; see help(pd.Dataset) for the names.",
        DATA,
    )
    dataset_config: OptionalPath = setting(
        None,
        "A dataset file of sd-scripts (TOML or JSON) or OneTrainer's concepts (JSON), read as it is, in place of folders or "
        "beside them.",
        DATA,
        place=True,
        free_on_resume=True,
    )
    repeats: Texts = setting(
        (),
        "SUBFOLDER=N: draw its pictures N times in an epoch, for a few that count; a subfolder named 10_name is "
        "drawn 10 times without that.",
        DATA,
    )
    folder_weight: Texts = setting(
        (), "SUBFOLDER=WEIGHT: what its pictures count in the loss, below 1 for doubtful ones.", DATA
    )

    class_prompt: Texts = setting(
        (),
        'What the subject is one of, as in "a portrait of a woman": the base draws pictures of it, and what they '
        "show is kept as it was. For a subject that should leave the rest alone; give it again for more kinds.",
        _PRIOR,
    )
    class_images: int | None = setting(
        None, "Pictures that the base draws for the class prompts; they are kept for later runs.", _PRIOR, COUNT
    )
    regularisation: Paths = setting(
        (),
        "A folder of pictures of the class, in place of those that the base draws or beside them; repeats and "
        "captions as usual, without the trigger. Give it again for more folders.",
        _PRIOR,
        free_on_resume=True,
    )
    prior_weight: float = setting(
        1.0,
        "What the pictures of the class count in the loss; raise it when prompts without the trigger change.",
        _PRIOR,
        NATURAL,
    )
    prior_target: PriorTarget = setting(
        "base",
        "What is learned from pictures of the class: to answer as the base does (base), which keeps more of it, or "
        "the pictures themselves (noise), for a folder of better ones than the base draws.",
        _PRIOR,
    )


@explained
@settings_class(kw_only=True)
class TrainConfig(SharedConfig, CaptionSettings, FolderSettings, _PictureConfig):
    """Everything a training run is told. A field left at None gets the preset's value for the base.

    Raises:
        UserError: A value is one that no run can use.
    """

    dropout: float = setting(
        0.0,
        "Share of a layer's inputs that a LoRA does not see in a step; against overfitting on a few pictures.",
        ADAPTER,
        SHARE,
    )
    block: Texts = setting(
        (),
        'In place of method and target: "COMPONENT TARGET METHOD NAME=VALUE ..." (lr=... too); several train together.',
        ADAPTER,
        table=("component", "target", "method"),
    )
    target: str | None = setting(
        None,
        "Layers to adapt: attention, attention+ff, all-linear, conv, all, ..., or a regular expression over module "
        "paths; by default those that the method was made for, attention+ff for a LoRA. LAYERS@BLOCKS are those in some "
        "blocks, as attention@mid,up.1; attention@content,style is B-LoRA on SDXL.",
        ADAPTER,
    )
    components: Texts = setting(
        (),
        "Parts to adapt, with commas: unet (by default), or unet,text_encoder for words that the base does not "
        "know (by default for a subject); SDXL has a text_encoder_2 too.",
        ADAPTER,
    )

    beside_dropout: float = setting(
        0.0,
        "Share of the steps in which the adapters of --beside are off, so that what is learned goes with them and without.",
        ADAPTER,
        SHARE,
    )
    beside_keep: float = setting(
        0.0,
        "What it counts in the loss that prompts which call the adapters of --beside are answered as without the new one, "
        "which makes a step about twice as long, and keeps most of their styles. 0 is off.",
        ADAPTER,
        NATURAL,
    )
    beside_prompt: Texts = setting(
        (),
        'A prompt that calls the adapters of --beside, as in "ink drawing of a cat", for --beside-keep; by default this '
        "run's captions with the triggers that their files name. Give it again for more, of different things.",
        ADAPTER,
    )

    epochs: float | None = setting(
        None,
        "Length as passes over the pictures, instead of steps; wins over them.",
        LEARNING,
        POSITIVE,
        free_on_resume=True,
        instead_of="steps",
    )
    batch_size: int | None = setting(None, "Pictures computed at once; lower it when memory runs out.", LEARNING, COUNT)
    unet_lr: float | None = setting(
        None,
        "Learning rate of the UNet. Lower it when the loss rises, raise it when nothing changes; 0 freezes it.",
        LEARNING,
        NATURAL,
    )
    text_encoder_lr: float | None = setting(
        None, "Learning rate of the text encoders, when they are among the components; 0 freezes them.", LEARNING, NATURAL
    )
    text_encoder_2_lr: float | None = setting(
        None, "Learning rate of SDXL's second text encoder; by default that of the first. 0 freezes it.", LEARNING, NATURAL
    )
    text_encoder_until: float = setting(
        1.0,
        "Share of the run in which text encoders learn; afterwards they stay as they are, and words keep what they mean.",
        LEARNING,
        Range(0, 1, above=True),
    )
    block_lr: Texts = setting(
        (),
        "BLOCK=RATE: the learning rate of what is trained in a block, such as down_blocks.1, mid, up.0 or OUT05, in place "
        "of its component's; 0 freezes it. Give it again for more.",
        LEARNING,
    )
    scheduler: Scheduler | None = setting(
        None,
        "Course of the learning rate after the warm-up: constant, or falling to 0 as a cosine (with restarts), in a "
        "line, as a power of one, or at the end alone.",
        LEARNING,
    )
    warmup: int | None = setting(
        None, "Steps in which the learning rate rises from 0; by default at most a fifth of the run.", LEARNING, NATURAL
    )
    min_snr_gamma: float | None = setting(
        None, "Holds down the weight of nearly clean timesteps (5 is usual, 0 is off).", LEARNING, NATURAL
    )
    timestep_bias: TimestepBias | None = setting(
        None,
        "Timesteps to draw more often: later ones, with more noise, where colours and forms are decided; earlier "
        "ones, where surfaces and lines are; those in the middle (logit-normal); or none.",
        LEARNING,
    )
    logit_mean: float = setting(
        0.0,
        "Where logit-normal has its middle: above 0 among the noisier timesteps, below 0 among the others.",
        LEARNING,
        Range(-10, 10),
    )
    logit_std: float = setting(1.0, "How wide logit-normal is; lower draws fewer far from its middle.", LEARNING, POSITIVE)
    timesteps: str = setting(
        "",
        "FIRST-LAST: train on these timesteps alone, of 0 (nearly clean) to 1000 (noise); 500-1000 for composition, 0-500 "
        "for surfaces. By default all.",
        LEARNING,
    )
    noise_offset: float = setting(
        0.0, "Noise that shifts whole channels, for very dark or very light pictures (0.05 is much).", LEARNING, NATURAL
    )
    multires_noise: float = setting(
        0.0,
        "Noise of coarser shapes too, each so much as strong as the finer one (0.3 is usual, 0 is off); for large "
        "dark or light areas, where an offset is too blunt.",
        LEARNING,
        SHARE,
    )
    zero_terminal_snr: bool = setting(
        False,
        "Let the schedule end in pure noise, so that pictures can be all dark or light; for bases with v-prediction only.",
        LEARNING,
    )
    loss: Loss = setting(
        "l2",
        "l2; or huber or smooth-l1, in which outliers count less, for folders with bad pictures among the good ones.",
        LEARNING,
    )
    huber_c: float = setting(
        0.1,
        "The error from which huber and smooth-l1 grow in a line (above 0, at most 1); lower ignores more.",
        LEARNING,
        Range(0, 1, above=True),
    )
    huber_schedule: HuberSchedule = setting(
        "snr",
        "How huber-c gets lower with the noise: after its share (snr), with the timestep (exponential), or not (constant).",
        LEARNING,
    )
    debiased: bool | None = setting(
        None,
        "Weigh timesteps so that none dominates what is learned; in place of min-snr-gamma, for details that stay "
        "vague. By default where a small base learns words alone, which else cost it the subjects.",
        LEARNING,
        flag=Flag(negative=True),
    )
    seed: int = setting(
        0, "Number that all chance comes from: same seed, settings and pictures, same adapter.", LEARNING, NATURAL
    )

    run_dir: OptionalPath = setting(
        None,
        "Folder for settings, metrics, previews and checkpoints; by default runs/NAME, after the output file.",
        WATCH,
        place=True,
        free_on_resume=True,
    )
    save_every: int | None = setting(
        None,
        "Steps between checkpoints; each comes with a measurement on the pictures kept apart. By default a sixth "
        "of the run.",
        WATCH,
        COUNT,
        free_on_resume=True,
    )
    preview_prompts: Texts = setting(
        (), "Prompts of the previews; by default two captions, and two of what no picture shows.", WATCH, free_on_resume=True
    )
    preview_prompts_file: OptionalPath = setting(
        None,
        "A text file with a preview a line, as generate --prompts-file reads it; a prompt in quotes takes its options too.",
        WATCH,
        free_on_resume=True,
    )
    preview_every: int | None = setting(
        None,
        "Steps between previews; 0 draws them at start and end only, which is the default on a CPU.",
        WATCH,
        NATURAL,
        free_on_resume=True,
    )
    preview_steps: int = setting(20, "Denoising steps of a preview; 0 draws none.", WATCH, NATURAL, free_on_resume=True)

    shard_base: bool = setting(
        False,
        "Shard the base over the processes of torchrun or accelerate launch; for one too large for a card, as it is slower.",
        MACHINE,
        free_on_resume=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        parts = tuple(part.strip() for item in self.components for part in item.split(",") if part.strip())
        parts = parts if self.components else preset_components(self.preset)
        object.__setattr__(self, "components", tuple(dict.fromkeys(parts)))
        known = [name for name, one in families.components().items() if one.role != "language model"]
        unknown = [part for part in self.components if part not in known]
        if unknown or not self.components:
            near = did_you_mean(unknown[0], known) if unknown else ""
            raise UserError(f"--components {','.join(unknown) or 'is empty'}: there are {', '.join(known)}{near}")
        if self.shard_base and self.quantize:
            raise UserError("--shard-base cannot shard what --quantize packs; leave one of them away")
        timestep_range(self.timesteps)
        block_rates(self.block_lr)
        self._check_beside()
        if self.debiased and self.min_snr_gamma:
            raise UserError("--debiased and --min-snr-gamma weigh timesteps both; leave one of them away")

    def _check_beside(self) -> None:
        """Raise UserError for what does nothing, or cannot be, of the adapters that the run is trained beside."""
        for name in ("beside_dropout", "beside_keep", "beside_prompt"):
            if getattr(self, name) and not self.beside:
                raise UserError(f"{flag(name)} is about adapters that are trained beside; name them with --beside")
        if self.beside_prompt and not self.beside_keep:
            raise UserError("--beside-prompt has the prompts of --beside-keep; give it a weight too, as 1")
        of_class = self.class_prompt or self.regularisation or any(one.regularisation for one in self.dataset)
        if self.beside_keep and of_class:
            raise UserError(
                "--beside-keep and pictures of a class both stand beside each batch; leave one of them away. With --beside,"
                " pictures of a --regularisation folder are answered as the others do too"
            )


@settings_class(kw_only=True)
class ResolvedConfig(TrainConfig, Resolved):
    """A configuration in which the preset, the base and the machine have filled every value a run needs."""

    output: OnePath
    run_dir: OnePath
    resolution: int
    held_out: float
    caption_dropout: float
    unet_lr: float
    text_encoder_lr: float
    text_encoder_2_lr: float
    steps: int
    batch_size: int
    scheduler: Scheduler
    warmup: int
    min_snr_gamma: float
    timestep_bias: TimestepBias
    debiased: bool
    keep: Keep
    save_every: int
    keep_last: int
    preview_every: int
    class_images: int


def block_rates(texts: Sequence[str]) -> dict[str, float]:
    """Read learning rates of blocks.

    Args:
        texts: ``BLOCK=RATE`` each.

    Returns:
        The rates by the name of the block.

    Raises:
        UserError: A text is none.
    """
    found: dict[str, float] = {}
    for text in texts:
        name, _, told = text.rpartition("=")
        rate = float(told) if re.fullmatch(r"\d*\.?\d+(?:[eE][+-]?\d+)?", told.strip()) else math.nan
        if not name.strip() or not math.isfinite(rate):
            raise UserError(f"--block-lr {text!r}: give a block and its rate, as in mid=1e-5")
        found[name.strip()] = rate
    return found


def timestep_range(text: str) -> tuple[int, int] | None:
    """Read a range of timesteps.

    Args:
        text: ``FIRST-LAST``, or nothing.

    Returns:
        Both; None for all timesteps.

    Raises:
        UserError: It is no range.
    """
    first, dash, last = text.partition("-")
    if not text:
        return None
    if not (dash and first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        raise UserError(f"--timesteps {text!r}: give the first and the last, as in 0-500")
    if int(last) > _NOISE:
        raise UserError(f"--timesteps {text!r}: the last is at most {_NOISE}, which is noise")
    return int(first), int(last)


def output_path(config: TrainConfig) -> Path:
    """Name the adapter file of a run.

    Args:
        config: The settings.

    Returns:
        The file.

    Raises:
        UserError: Its name does not end in .safetensors.
    """
    folders = [*config.folder, *(one.folder for one in config.dataset if not one.regularisation)]
    if not folders:
        raise UserError("no image folder was given: name the folder that holds the pictures")
    return adapter_path(config.output, folders[0].resolve().name or "adapter")


def run_path(config: TrainConfig) -> Path:
    """Name the run folder of a run.

    Args:
        config: The settings.

    Returns:
        The folder.
    """
    return config.run_dir or Path("runs") / output_path(config).stem
