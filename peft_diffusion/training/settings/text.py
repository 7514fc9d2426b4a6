"""What a training on text is told: one dataclass for flags, TOML file and Python. Imports no torch."""

from dataclasses import KW_ONLY, field
from pathlib import Path
from typing import ClassVar

from ...bases.family import LANGUAGE
from ...core.errors import UserError
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
    about,
    explained,
    setting,
    settings_class,
)
from ...data.text_files import read_texts
from .choices import Keep, Scheduler
from .shared import ADAPTER, LEARNING, RESULT, WATCH, Resolved, SharedConfig, adapter_path

_DATA = Group("Text", 2)


@settings_class()
class _TextConfig:
    """What a run learns from and what it makes."""

    texts: Paths = field(
        metadata=about(
            "Text to learn from: UTF-8 files, or folders with .txt files. Several are read as one.",
            RESULT,
            free_on_resume=True,
        )
    )
    _: KW_ONLY
    output: OptionalPath = setting(
        None,
        "The adapter file to write; by default the text's name with .safetensors, in the present directory.",
        RESULT,
        flag=Flag(aliases=("-o",)),
        place=True,
        free_on_resume=True,
    )
    base: str = setting(
        "tiny-lm", "The model to teach: tiny-lm (embedded), a folder in the format of transformers, or a hub id.", RESULT
    )

    held_out_text: Paths = setting(
        (), "Text to measure on instead of a part of what is learned from: files or folders.", _DATA, free_on_resume=True
    )
    held_out: float | None = setting(
        None,
        "Share at the end of each text kept apart to measure on (0 to below 1); by default a tenth where there is enough.",
        _DATA,
        SHARE,
    )
    context: int | None = setting(
        None, "Tokens of a window; by default what the base takes, at most 1024.", _DATA, Range(2), unit="tokens"
    )


@explained
@settings_class(kw_only=True)
class TextTrainConfig(SharedConfig, _TextConfig):
    """Everything a training on text is told. A field left at None gets a value that suits the base.

    Raises:
        UserError: A value is one that no run can use.
    """

    components: ClassVar[tuple[str, ...]] = LANGUAGE.by_roles(("language model",))

    dropout: float = setting(
        0.0,
        "Share of a layer's inputs that a LoRA does not see in a step; against overfitting on a short text.",
        ADAPTER,
        SHARE,
    )
    block: Texts = setting(
        (),
        'In place of method and target: "lm TARGET METHOD NAME=VALUE ..." (lr=... too); several train together.',
        ADAPTER,
        table=("component", "target", "method"),
    )
    target: str | None = setting(
        None,
        "Layers to adapt: attention, attention+ff, all-linear, ..., or a regular expression over module paths; by "
        "default those that the method was made for, attention+ff for a LoRA.",
        ADAPTER,
    )

    epochs: float | None = setting(
        None,
        "Length as passes over the text, instead of steps; wins over them.",
        LEARNING,
        POSITIVE,
        free_on_resume=True,
        instead_of="steps",
    )
    batch_size: int | None = setting(None, "Windows computed at once; lower it when memory runs out.", LEARNING, COUNT)
    lr: float | None = setting(
        None,
        "Learning rate, by default one for method and base. Lower it when the loss rises, raise it when nothing changes.",
        LEARNING,
        POSITIVE,
    )
    scheduler: Scheduler | None = setting(
        None,
        "Course of the learning rate after the warm-up: constant, or falling to 0 as a cosine or in a line; by "
        "default a cosine, and constant for schedule-free.",
        LEARNING,
    )
    warmup: int = setting(10, "Steps in which the learning rate rises from 0.", LEARNING, NATURAL)
    seed: int = setting(
        0, "Number that all chance comes from: same seed, settings and text, same adapter.", LEARNING, NATURAL
    )

    run_dir: OptionalPath = setting(
        None,
        "Folder for settings, metrics and checkpoints; by default runs/NAME, after the output file.",
        WATCH,
        place=True,
        free_on_resume=True,
    )
    save_every: int | None = setting(
        None,
        "Steps between checkpoints; each comes with a measurement on the text kept apart. By default a sixth of the run.",
        WATCH,
        COUNT,
        free_on_resume=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.held_out_text and self.held_out:
            raise UserError("--held-out takes a share of the text and --held-out-text another text; give one of them")

    def check(self) -> None:
        """Find out what can be told without the base.

        Raises:
            UserError: A text cannot be read.
        """
        language_output(self)
        for places in (self.texts, self.held_out_text):
            if places:
                read_texts(places)


@settings_class(kw_only=True)
class ResolvedTextConfig(TextTrainConfig, Resolved):
    """A configuration in which the base and the machine have filled every value a run needs."""

    output: OnePath
    run_dir: OnePath
    context: int
    lr: float
    steps: int
    batch_size: int
    scheduler: Scheduler
    save_every: int
    keep_last: int
    keep: Keep


def language_output(config: TextTrainConfig) -> Path:
    """Name the adapter file of a run.

    Args:
        config: The settings.

    Returns:
        The file.

    Raises:
        UserError: Its name does not end in .safetensors.
    """
    if not config.texts:
        raise UserError("no text was given: name the file or the folder that holds it")
    return adapter_path(config.output, config.texts[0].resolve().stem)


def language_run(config: TextTrainConfig) -> Path:
    """Name the run folder of a run.

    Args:
        config: The settings.

    Returns:
        The folder.
    """
    return config.run_dir or Path("runs") / language_output(config).stem
