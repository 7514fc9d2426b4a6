"""What the commands that make pictures can be told: flags, TOML keys and Python arguments in one place. Imports no torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, TypeAlias, get_args

from cyclopts import Parameter

from ..core.errors import UserError
from ..formats import inspect
from ..formats.container import is_pickle
from .recipe import check_folder, check_target, read

SchedulerName: TypeAlias = Literal["ddim", "pndm", "euler", "euler-a", "heun", "dpm++", "dpm++-karras", "unipc"]
Precision: TypeAlias = Literal["auto", "float32", "bfloat16", "float16"]
Quantize: TypeAlias = Literal["nf4", "int8"]
MAX_SEED = 2**63 - 1
_PICTURES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"))

_Several = Parameter(negative=(), show_default=False)  # no --empty-... flag
_Numbers = Parameter(negative=(), show_default=False, consume_multiple=True)
_Files = Parameter(alias="-a", negative=(), show_default=False)


@dataclass(frozen=True)
class Choice:
    """An adapter file and how much of it: 1 is as trained, 0 nothing."""

    path: Path
    strength: float = 1.0

    @property
    def name(self) -> str:
        """The file's name without folder and ending, as labels show it."""
        return self.path.stem


def parse_choice(text: str) -> Choice:
    """``FILE`` or ``FILE=STRENGTH``. A file that is there by the whole text is meant, also where its name holds a =.

    Raises UserError where the file is missing or the strength is no finite number.
    """
    if Path(text).is_file() or "=" not in text:
        return Choice(_existing(text))
    name, _, amount = text.rpartition("=")
    try:
        strength = float(amount)
    except ValueError:
        if not Path(name).is_file() and not name.lower().endswith(".safetensors"):
            raise UserError(f"there is no adapter file {text}") from None  # the = is part of a path
        raise UserError(f"the strength of {name} must be a number, as in {name}=0.8, not {amount!r}") from None
    if not math.isfinite(strength):
        raise UserError(f"the strength of {name} must be a finite number, not {amount}")
    return Choice(_existing(name), strength)


def parse_choices(texts: Sequence[str]) -> tuple[Choice, ...]:
    """Adapters as the command line names them, their headers read.

    Raises UserError for a missing file, one that is no adapter, a bad strength and a file named twice.
    """
    found = tuple(parse_choice(text) for text in texts)
    for index, choice in enumerate(found):
        if any(choice.path.samefile(other.path) for other in found[:index]):
            raise UserError(f"the adapter {choice.path} is named twice; give it once, with the strength you want")
        if not is_pickle(choice.path):
            inspect(choice.path)
    return found


def _existing(text: str) -> Path:
    path = Path(text)
    if path.is_dir():
        raise UserError(f"{text} is a folder, not an adapter file")
    if not path.is_file():
        raise UserError(f"there is no adapter file {text}")
    return path


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How pictures are made, the same for every command. None means what the base says."""

    prompts: Annotated[tuple[str, ...], _Several] = field(default=(), kw_only=False)
    """What the pictures show, each prompt in quotes."""
    adapter: Annotated[tuple[str, ...], _Files] = ()
    """An adapter FILE, or FILE=STRENGTH (1 is as trained); give it again for more."""
    negative: str = ""
    """What the pictures should not show."""
    steps: int = 25
    """Denoising steps."""
    guidance: float = 5.0
    """How closely to follow the prompt: classifier-free guidance, 1 is none."""
    guidance_stop: float = 1.0
    """Share of the noise levels, from the noisiest, at which guidance acts (0 to 1). Where it stops early, as at 0.4, the
    rest takes half the time and keeps closer to surfaces and colours that were taught, and a little less to the prompt."""
    scheduler: SchedulerName | None = None
    """The sampler; by default the base's own."""
    width: int | None = None
    """In pixels; by default the base's resolution."""
    height: int | None = None
    """In pixels; by default the base's resolution."""
    batch_size: int = 4
    """Pictures computed at once; the pictures do not depend on it."""
    base: str = "icons"
    """The embedded base "icons", a diffusers folder, a checkpoint file or a hub id."""
    device: str = "auto"
    """Such as cpu, cuda or mps; by default the fastest there is."""
    precision: Precision = "auto"
    """Of the base; by default float32 on a CPU and a half precision elsewhere."""
    quantize: Quantize | None = None
    """Hold the base's linear layers in fewer bits, which saves memory: int8, or nf4 for the least (slightly off)."""

    def __post_init__(self) -> None:
        check_quantize(self.quantize)
        _at_least("steps", self.steps, 1)
        _at_least("batch_size", self.batch_size, 1)
        if not 0 <= self.guidance < math.inf:
            raise UserError(f"guidance must be a finite number from 0, not {self.guidance}")
        if not 0 <= self.guidance_stop <= 1:
            raise UserError(f"guidance_stop must be from 0 (no guidance) to 1 (to the end), not {self.guidance_stop}")
        for name in ("width", "height"):
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), 1)
        if self.negative and self.guidance <= 1:
            raise UserError(f"a negative prompt has no effect at guidance {self.guidance:g}; raise it above 1")
        if self.negative and self.guidance_stop == 0:
            raise UserError("a negative prompt has no effect at guidance_stop 0; raise it")

    def choices(self) -> tuple[Choice, ...]:
        """The adapters, parsed and their headers read. Raises UserError as ``parse_choices`` does."""
        return parse_choices(self.adapter)


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(Sampling):
    """Which pictures ``generate`` makes: every prompt with every seed."""

    output: Annotated[Path, Parameter(alias="-o")] = Path("pictures")
    """A .png file, which is replaced; several pictures get numbers after its name. Or a folder, whose files are kept."""
    sheet: Path | None = None
    """Also draw all pictures as one labelled sheet, into this .png file."""
    seed: int = 0
    """The first seed: it decides the noise that a picture starts from."""
    count: int = 1
    """Pictures of each prompt, with the seeds that follow."""
    seeds: Annotated[tuple[int, ...], _Numbers] = ()
    """These seeds instead, one picture each: --seeds 3 7 9."""
    recipe: Annotated[Path | None, Parameter(alias="--from")] = None
    """Make the picture in this PNG again, from the recipe that it carries."""
    image: Path | None = None
    """A picture to start from, which is made anew as far as --strength says; its size is the size of what is made."""
    mask: Path | None = None
    """A picture of the same size: white is painted anew, and what is black stays. Bases for inpainting need it."""
    strength: float | None = None
    """How far to leave the picture of --image behind (above 0 to 1); by default 0.8, and 1 with a mask."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("count", self.count, 1)
        if self.seeds and (self.count != 1 or self.seed != 0):
            raise UserError("give either seeds, or seed and count")
        for seed in (*self.seeds, self.seed, self.seed + self.count - 1):
            _check_seed(seed)
        if self.recipe is not None and self.prompts:
            raise UserError("a recipe brings its own prompt; leave the prompt away")
        if self.recipe is None:
            _check_prompts(self.prompts)
            check_text(self.negative)
            self._check_source()

    def _check_source(self) -> None:
        if self.image is None and (self.mask is not None or self.strength is not None):
            raise UserError("--mask and --strength are for a picture to start from; name it with --image")
        if self.strength is not None and not 0 < self.strength <= 1:
            raise UserError(f"--strength must be above 0 and at most 1, not {self.strength}")

    def check(self) -> None:
        """Find out what can be told without the base. Raises UserError for files that cannot be read or written."""
        self.choices()
        if self.recipe is not None:
            read(self.recipe)
        for path in (self.image, self.mask):
            if path is not None and not path.is_file():
                raise UserError(f"there is no picture {path}")
        for path in (self.output if self.to_file else None, self.sheet):
            if path is not None:
                check_target(path)
        check_folder(self.output.parent if self.to_file else self.output)

    @property
    def to_file(self) -> bool:
        """Whether ``output`` is meant as a file, not as a folder."""
        return self.output.suffix.lower() in _PICTURES and not self.output.is_dir()

    def all_seeds(self) -> tuple[int, ...]:
        """The seeds of each prompt, in order."""
        return self.seeds or tuple(range(self.seed, self.seed + self.count))


@dataclass(frozen=True, kw_only=True)
class BlendConfig(Sampling):
    """The sheet that ``blend`` draws: a row for each prompt, a column for each mix."""

    output: Annotated[Path, Parameter(alias="-o")] = Path("blend.png")
    """The .png file of the sheet, which is replaced."""
    columns: int = 5
    """Mixes, from all of the first adapter to all of the second (and on to a third, where there is one)."""
    plain: Annotated[bool, Parameter(negative=())] = False
    """Begin with a column without any adapter."""
    seed: int = 0
    """The noise that every picture of the sheet starts from."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_prompts(self.prompts)
        check_text(self.negative)
        _check_seed(self.seed)
        if len(self.adapter) < 2:
            raise UserError("a blend needs two adapters, as in --adapter a.safetensors --adapter b.safetensors")
        _at_least("columns", self.columns, len(self.adapter))

    def check(self) -> None:
        """Find out what can be told without the base. Raises UserError for files that cannot be read or written."""
        self.choices()
        check_target(self.output)


def check_quantize(kind: str | None) -> None:
    """Raises UserError for a kind of quantization that there is not."""
    if kind is not None and kind not in get_args(Quantize):
        raise UserError(f"quantize must be one of {', '.join(get_args(Quantize))}, not {kind!r}")


def _check_prompts(prompts: tuple[str, ...]) -> None:
    if isinstance(prompts, str):
        raise UserError("prompts is a tuple of texts, not one text")
    if not prompts:
        raise UserError('there is no prompt; say what the picture shows, as in "a red apple"')
    check_text(*prompts)


def check_text(*texts: str) -> None:
    """Raises UserError for half a character, which a terminal that is not set to UTF-8 can leave in what was typed."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"the prompt {text!a} holds {text[error.start]!a} at letter {error.start + 1}, which is no whole"
                " character; type it again, in UTF-8"
            ) from None


def _check_seed(seed: int) -> None:
    if not 0 <= seed <= MAX_SEED:
        raise UserError(f"a seed is a whole number from 0 to {MAX_SEED}, not {seed}")


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise UserError(f"{name} must be at least {least}, not {value}")


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """What ``inspect`` tells of files."""

    files: Annotated[tuple[Path, ...], _Several] = field(kw_only=False)
    """Adapter files; of several, it is also told whether they fit together."""
    json: Annotated[bool, Parameter(negative=())] = False
    """As JSON, with every site."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """What ``demo`` shows."""

    output: Annotated[Path, Parameter(alias="-o")] = Path("peft-diffusion-demo")
    """The folder for adapters and sheets."""
    steps: int = 300
    """Training steps of each style."""
    seed: int = 0
    """Of training and of the pictures."""
    base: str = "icons"
    """The model to teach."""
    device: str = "auto"
    """Such as cpu, cuda or mps; by default the fastest there is."""

    def __post_init__(self) -> None:
        _at_least("steps", self.steps, 1)
        _check_seed(self.seed)
