"""What a training of a composition is told: one dataclass for flags, TOML file and Python. Imports no torch."""

from dataclasses import KW_ONLY
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, TypeAlias

from ...core.errors import UserError
from ...core.learned_kinds import LEARNED_KINDS, explanation
from ...core.settings import (
    COUNT,
    NATURAL,
    POSITIVE,
    SHARE,
    Flag,
    OnePath,
    OptionalPath,
    Paths,
    Range,
    as_in,
    explained,
    setting,
    settings_class,
    settle,
)
from ...core.wording import number_of
from .captions import DATA
from .choices import Keep, LogWith, Memory, MissingCaptions, OptimizerName, Precision, Scheduler
from .shared import LEARNING, RESULT, WATCH, Resolved, SharedConfig, adapter_path, check_command
from .text import TextTrainConfig

if TYPE_CHECKING:
    Kind: TypeAlias = str
else:
    Kind: TypeAlias = Literal[tuple(LEARNED_KINDS)]
_RATES = " and ".join(f"{one.rate:g} for {one.name}" for one in LEARNED_KINDS.values())
_BALANCES = " and ".join(f"{one.balance:g} for {one.name}" for one in LEARNED_KINDS.values() if one.balance is not None)


@explained
@settings_class()
class ComposeTrainConfig:
    """What is learned of frozen adapters, and from which pictures.

    Raises:
        UserError: A value is one that no run can use.
    """

    adapters: Paths = setting((), "The adapter files that are weighed. They stay as they are.", RESULT, free_on_resume=True)
    _: KW_ONLY
    data: Paths = setting(
        (),
        "A folder with a few pictures for each adapter, in the same order; captions are read as the adapter was trained, "
        "with its trigger.",
        RESULT,
        flag=Flag(greedy=True, default_shown=False),
        free_on_resume=True,
    )
    output: OptionalPath = setting(
        None,
        "The file to write; by default the adapters' names with + between them, in the present directory.",
        RESULT,
        flag=Flag(aliases=("-o",)),
        place=True,
        free_on_resume=True,
    )
    base: str = setting(
        "icons", "The model: icons (embedded), a diffusers folder, a .safetensors checkpoint or a hub id.", RESULT
    )
    kind: Kind = setting("strengths", explanation(), LEARNING)
    steps: int = setting(100, "Number of steps.", LEARNING, COUNT, free_on_resume=True)
    lr: float | None = setting(None, f"The learning rate; by default {_RATES}.", LEARNING, POSITIVE)
    batch_size: int = setting(4, "Pictures in a step, of all folders alike.", LEARNING, COUNT)
    balance: float | None = setting(
        None,
        "How much gates are kept from leaving an adapter unused, in the mean over prompts, blocks and steps; 0 leaves them "
        f"free. By default {_BALANCES}. Strengths are always free.",
        LEARNING,
        NATURAL,
    )
    seed: int = setting(0, "What all chance comes from.", LEARNING, Range(0, 2**63 - 1))
    missing_captions: MissingCaptions = setting(
        "stop",
        "What becomes of pictures without caption: stop, use the file name, use the prompt that a picture carries and was "
        "drawn from (recipe), use no words (empty), or skip them.",
        DATA,
    )
    resolution: int | None = setting(
        None, "Pixels a side of a square picture; by default the base's.", DATA, Range(1, 8192), unit="pixels"
    )
    held_out: float = setting(
        0.0,
        "Share of the pictures of each folder kept apart to measure on with each checkpoint (0 to below 1), at least one of "
        "two or more; a few numbers hardly learn pictures by heart, so 0, which learns from all, is the usual one.",
        DATA,
        SHARE,
    )
    run_dir: OptionalPath = as_in(TextTrainConfig, "run_dir")
    resume: bool = as_in(SharedConfig, "resume")
    overwrite: bool = as_in(SharedConfig, "overwrite")
    log_every: int = as_in(SharedConfig, "log_every")
    save_every: int = setting(
        25,
        "Steps between checkpoints, from which a run that was stopped goes on; each comes with a measurement on what "
        "--held-out keeps apart.",
        WATCH,
        COUNT,
        free_on_resume=True,
    )
    keep_checkpoints: int = as_in(SharedConfig, "keep_checkpoints")
    log_with: LogWith | None = as_in(SharedConfig, "log_with")
    notify: str | None = as_in(SharedConfig, "notify")
    device: str = as_in(SharedConfig, "device")
    precision: Precision = as_in(SharedConfig, "precision")
    memory: Memory = as_in(SharedConfig, "memory")
    epochs: ClassVar[float | None] = None
    """Steps alone say how long the training is."""

    def __post_init__(self) -> None:
        settle(self)
        if self.notify is not None:
            check_command(self.notify)

    def check(self) -> None:
        """See that there are adapters, and a folder for each; nothing is read.

        Raises:
            UserError: There is not.
        """
        if not self.adapters:
            raise UserError(
                "name the adapters to compose: peft-diffusion compose train A.safetensors B.safetensors --data ..."
            )
        for path in self.adapters:
            file, equals, _ = str(path).rpartition("=")
            if equals and not path.exists() and Path(file).exists():
                raise UserError(f"{path} says a strength, and strengths are what is learned; name {file} alone")
        if len(self.data) != len(self.adapters):
            counts = f"{number_of(len(self.adapters), 'adapter')} and {number_of(len(self.data), 'folder')} of pictures"
            raise UserError(f"{counts}; give --data for each adapter, in the same order")
        kind = LEARNED_KINDS[self.kind]
        if len(self.adapters) < kind.fewest:
            usual = next(iter(LEARNED_KINDS))
            raise UserError(f"{kind.name} share out between adapters; give {kind.fewest} or more, or take --kind {usual}")
        if self.balance is not None and kind.balance is None:
            raise UserError(f"--balance is for gates; {kind.name} are always free, so leave it away")
        adapter_path(self.output, "composition")  # whose name is refused where it is of no such file

    @property
    def target(self) -> Path:
        """The file that is written."""
        return adapter_path(self.output, "+".join(path.stem for path in self.adapters))

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.run_dir or Path("runs") / self.target.stem

    @property
    def rate(self) -> float:
        """The learning rate."""
        return LEARNED_KINDS[self.kind].rate if self.lr is None else self.lr

    @property
    def balance_weight(self) -> float:
        """The weight of the imbalance of the adapters in the loss; 0 where it has no part."""
        return (LEARNED_KINDS[self.kind].balance or 0.0) if self.balance is None else self.balance


@settings_class(kw_only=True)
class ResolvedComposeConfig(ComposeTrainConfig, Resolved):
    """A configuration in which the base and the machine have filled every value a run needs.

    What other trainings have settings for and this one has not is as suits a few numbers that learn for a minute: to record
    steps as a CUDA graph takes about as long as they do.
    """

    output: OnePath
    run_dir: OnePath
    resolution: int
    lr: float
    scheduler: Scheduler = "cosine"
    warmup: int = 0
    cycles: int = 1
    power: float = 1.0
    decay: float = 0.2
    optimizer: OptimizerName = "adamw"
    accumulation: int = 1
    weight_decay: float = 0.0
    clip: float = 1.0
    ema: float = 0.0
    patience: int = 0
    keep: Keep = "last"
    keep_last: int = 0
    cuda_graph: bool = False
