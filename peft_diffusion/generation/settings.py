"""What the commands that make pictures can be told: flags, TOML keys and Python arguments in one place. Imports no torch."""

import math
import re
from collections.abc import MutableMapping, Sequence
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

from ..bases import family as families
from ..bases.asked import AskedPrediction
from ..bases.prompt_syntax import Weights
from ..bases.schedulers import SCHEDULERS, SPACINGS, canonical
from ..core.errors import UserError, nearest
from ..core.files import at_home, if_address
from ..core.parsing import number_in
from ..core.settings import (
    COUNT,
    NATURAL,
    PARAMETERS,
    WHOLE_SHARE,
    Flag,
    Numbers,
    OnePath,
    OptionalPath,
    Paths,
    Range,
    Texts,
    about,
    explained,
    setting,
    settings_class,
    settle,
)
from ..core.strength_schedule import ByPart
from ..data.picture_formats import PictureFormat, ending, format_of
from ..data.picture_names import CONVERTIBLE, SUFFIXES
from ..data.prompt_lines import read_prompts
from ..data.prompts import refuse_files
from ..formats import Plan, composition, plan
from ..formats.container import adapter_file, title
from ..formats.planning import takes_torch
from ..library.settings import LIBRARY_HELP
from . import amounts
from .compositions import COMPOSITIONS, LEARNED, Compose, explanation
from .control_settings import Control
from .control_settings import parse as parse_control
from .hires import UPSCALERS, Hires, upscaler
from .recipe import check_folder, check_target, read
from .region_settings import FEATHER, Regions, check_compose, says_of_edges

Precision: TypeAlias = Literal["auto", "float32", "bfloat16", "float16"]
Quantize: TypeAlias = Literal["nf4", "int8"]
Tile: TypeAlias = Literal["x", "y", "both"]
Offload: TypeAlias = Literal["model", "group", "sequential"]
RegionsFrom: TypeAlias = Literal["given", "auto"]
MAX_SEED = 2**63 - 1
SEEDS = Range(0, MAX_SEED)
_SIDE = Range(1, 16384)
_STEPS, _GUIDANCE = 25, 5.0  # where nothing says otherwise
_BLEND = Path("blend.png")
_REPORTS = (".json", ".png", ".svg", ".pdf")
_PICTURES = SUFFIXES | CONVERTIBLE


Key: TypeAlias = tuple[Path, str | None, str | None]
"""An adapter file, and what was said of its components and words."""

_WORD = "@word:"


@dataclass(frozen=True)
class Choice:
    """An adapter file and how much of it.

    Attributes:
        path: The file.
        strength: 1 is as trained, 0 nothing.
        plan: What was parsed of the file, to be passed along; None where it was not yet.
        component: Which component names without one mean; None for nothing said.
        word: What its learned word is called, or which of its words is meant; None for nothing said.
        parts: What the strength is multiplied by in parts of the base and over the steps; None where it is the same.
    """

    path: Path
    strength: float = 1.0
    plan: Plan | None = field(default=None, compare=False, repr=False)
    component: str | None = None
    word: str | None = None
    parts: ByPart | None = None

    @property
    def amount(self) -> float | ByPart:
        """How much of it, parts and steps and all."""
        return self.strength if self.parts is None else self.parts.scaled(self.strength)

    def scaled(self, share: float) -> "Choice":
        """Choose so much of what was chosen.

        Args:
            share: What the strength is multiplied by.

        Returns:
            The choice.
        """
        return replace(self, strength=self.strength * share)

    def parsed(self) -> Plan:
        """What the file holds, parsed now where it was not yet.

        Raises:
            UserError: As `formats.plan` does.
        """
        return plan(self.path, component=self.component, word=self.word) if self.plan is None else self.plan

    @property
    def key(self) -> "Key":
        """What of a file is meant."""
        return self.path, self.component, self.word

    def is_same(self, other: "Choice") -> bool:
        """Tell whether another choice means the same of the same file, by whatever path.

        Args:
            other: The other. The files of both are there.

        Returns:
            Whether it does; strengths do not matter.
        """
        return self.key[1:] == other.key[1:] and self.path.samefile(other.path)

    @property
    def text(self) -> str:
        """The choice as ``parse_choice`` reads it."""
        component = f"@{self.component}" if self.component else ""
        word = f"{_WORD}{self.word}" if self.word else ""
        return f"{self.path}{component}{word}={','.join(filter(None, (repr(self.strength), amounts.text_of(self.parts))))}"

    @property
    def name(self) -> str:
        """The file's name without folder and ending, or the name of peft's folder, as labels show it."""
        return title(self.path)


def parse_choice(text: str) -> Choice:
    """Read an adapter as the command line names it, ``FILE`` or ``FILE=STRENGTH``.

    Behind the file ``@COMPONENT`` says which component is meant by names that tell none, and ``@word:WORD`` what its learned
    word is called, or which of its words is meant.

    Args:
        text: The words. Where a file has all of them as its name, that is meant, = and @ and all. A strength is what
            `amounts.parse` reads.

    Returns:
        The file, what of it is meant, and the strength, by default 1.

    Raises:
        UserError: The file is missing, there is no such component, or the strength is none.
    """
    if at_home(Path(text)).exists() or "=" not in text:
        return _chosen(text)
    ends = [match.start() for match in re.finditer("=", text)]
    end = next((end for end in reversed(ends) if is_there(text[:end])), ends[-1])
    name, told = text[:end], text[end + 1 :]
    if not is_there(name) and not name.lower().endswith(".safetensors") and not is_number(told):
        raise UserError(f"there is no adapter file {text}")  # the = is part of a path
    strength, parts = amounts.parse(told, name)
    return replace(_chosen(name), strength=strength, parts=parts)


def separated(texts: Sequence[str]) -> list[str]:
    """Part texts that name several adapters, with commas between, which strengths have in them too.

    Args:
        texts: One adapter each, or ``A.safetensors=0.7,B.safetensors=0.5,te:0.2``. A comma parts two adapters where a file,
            or what is called as one, follows it.

    Returns:
        A text for each adapter.
    """
    found: list[str] = []
    for text in texts:
        if at_home(Path(text)).exists():
            found.append(text)
            continue
        first, *others = text.split(",")
        parts = [first]
        for part in others:
            name = part.rpartition("=")[0] or part
            if is_there(name) or name.lower().endswith(".safetensors"):
                parts.append(part)
            else:
                parts[-1] += f",{part}"
        found += parts
    return found


def is_there(text: str) -> bool:
    """Tell whether a text is a file, or one with something said of it.

    Args:
        text: ``FILE``, or ``FILE@COMPONENT``.

    Returns:
        Whether it is there.
    """
    while "@" in text and not at_home(Path(text)).exists():
        text = text.rpartition("@")[0]
    return at_home(Path(text)).exists()


def _chosen(text: str) -> Choice:
    """The file, and what stands behind it about component and word. Raises UserError."""
    name, component, word = text, None, None
    while "@" in name and not at_home(Path(name)).exists():
        name, _, told = name.rpartition("@")
        if told.startswith(_WORD.removeprefix("@")):
            word = told.removeprefix(_WORD.removeprefix("@"))
        elif told in families.components():
            component = told
        else:
            return Choice(_existing(text))  # the @ is part of a name
    return Choice(_existing(name), component=component, word=word)


def parse_choices(texts: Sequence[str], plans: "MutableMapping[Key, Plan] | None" = None) -> tuple[Choice, ...]:
    """Read adapters as the command line names them, and parse their files: pickles and pictures, which take torch, later.

    Args:
        texts: ``FILE`` or ``FILE=STRENGTH`` each.
        plans: What was parsed of files before, to be used where they are still the same, and what is parsed now.

    Returns:
        The adapters.

    Raises:
        UserError: A file is missing, is no adapter, or is named twice, or a strength is none.
    """
    known = {} if plans is None else plans
    found = tuple(parse_choice(text) for text in texts)
    for index, choice in enumerate(found):
        if any(choice.is_same(one) for one in found[:index]):
            raise UserError(f"the adapter {choice.path} is named twice; give it once, with the strength you want")
        if not takes_torch(choice.path) and (choice.key not in known or not known[choice.key].is_current()):
            known[choice.key] = plan(choice.path, component=choice.component, word=choice.word)
    return tuple(replace(choice, plan=known.get(choice.key)) for choice in found)


def with_plans(choices: Sequence[Choice]) -> tuple[Choice, ...]:
    """Parse the files of adapters. Pickles and pictures, which take torch, are left for later.

    Args:
        choices: The adapters.

    Returns:
        The same, with what was parsed.

    Raises:
        UserError: A file is no adapter.
    """
    return tuple(choice if takes_torch(choice.path) else replace(choice, plan=choice.parsed()) for choice in choices)


class NamesAdapters:
    """Settings that name adapter files, and keep what was parsed of them for whoever asks next."""

    adapter: tuple[str, ...]

    @cached_property
    def _plans(self) -> "dict[Key, Plan]":
        """By what is meant. A file that changed by its size, time or inode is parsed again: see ``Plan.is_current``."""
        return {}

    def choices(self) -> tuple[Choice, ...]:
        """The adapters, their files parsed once.

        Raises:
            UserError: As `parse_choices` does.
        """
        return parse_choices(self.adapter, self._plans)


def _existing(text: str) -> Path:
    path = adapter_file(at_home(Path(text)))
    if not path.is_file():
        name, _, strength = text.rpartition(":")
        hint = f"; a strength follows an =, as in {name}={strength}" if is_number(strength) and name else ""
        raise UserError(f"there is no adapter file {path}{hint or if_address(path) or _like(path)}")
    return path


def _like(path: Path) -> str:
    """Name the adapter file that one which is not there is nearest to, for the end of a message."""
    with suppress(OSError):
        there = {one.stem: one for one in path.parent.iterdir() if one.suffix.lower() == ".safetensors"}
        near = nearest(path.name.removesuffix(".safetensors"), there)
        return "" if near is None else f"; did you mean {there[near]}?"
    return ""


def is_number(text: str) -> bool:
    """Tell whether a text is a finite number.

    Args:
        text: The text.

    Returns:
        Whether it is.
    """
    found = number_in(text)
    return found is not None and math.isfinite(found)


@settings_class()
class Sampling(NamesAdapters):
    """How pictures are made, the same for every command. None means what the base says."""

    prompts: Texts = setting(
        (), "What the pictures show, each prompt in quotes.", PARAMETERS, flag=Flag(default_shown=False)
    )
    _: KW_ONLY
    adapter: Texts = setting(
        (),
        "An adapter FILE, or FILE=STRENGTH (1 is as trained); give it again for more. A strength also differs between "
        "parts, as =0.8,te:0.2 (te1, te2, unet), blocks, as =mid:1,up.1:0.5 or =MIDD (those not named get 0), and steps, as "
        "=0:1,0.6:0; where several say, they multiply.",
        PARAMETERS,
        flag=Flag(aliases=("-a",), default_shown=False),
    )
    compose: Compose = setting("add", explanation(), PARAMETERS)
    compose_file: OptionalPath = setting(
        None,
        "What compose train wrote: its adapters are found among those given, beside it or in --adapters-dir, and each is "
        "weighed by block, step and prompt as was learned.",
        PARAMETERS,
    )
    adapters_dir: OptionalPath = setting(
        None, "The folder where <lora:NAME:0.8> in a prompt finds NAME.safetensors, also in its subfolders.", PARAMETERS
    )
    wildcards_dir: OptionalPath = setting(
        None,
        "The folder where __NAME__ in a prompt finds NAME.txt, of whose lines the seed draws one.",
        PARAMETERS,
    )
    strict: bool = setting(False, "Refuse an adapter file of which a tensor would be left out.", PARAMETERS)
    negative: str = setting("", "What the pictures should not show.", PARAMETERS)
    prompt_2: str | None = setting(
        None, "What the second text encoder reads (Stable Diffusion XL); by default the same prompt.", PARAMETERS
    )
    prompt_weights: Weights = setting(
        "a1111",
        "Whose arithmetic (word:1.3), (word) and [word] follow in prompts; with none, brackets and BREAK are letters.",
        PARAMETERS,
    )
    clip_skip: int | None = setting(
        None,
        "Which layer of the text encoder is taken, counted from the last, which is 1, as A1111 and kohya count; by default "
        "the one that the base was trained with: 1, and 2 for Stable Diffusion XL.",
        PARAMETERS,
        Range(1, 12),
    )
    zero_negative: bool | None = setting(
        None,
        "Tell an empty negative prompt by zeros; by default what the base says, as that of Stable Diffusion XL does.",
        PARAMETERS,
    )
    steps: int | None = setting(
        None,
        "Denoising steps; by default 25, or what an adapter for few steps needs (LCM, Hyper-SD, Lightning, Turbo, ...).",
        PARAMETERS,
        COUNT,
    )
    guidance: float | None = setting(
        None,
        "How closely to follow the prompt: classifier-free guidance, 1 is none; by default 5, or what an adapter for few "
        "steps needs.",
        PARAMETERS,
        NATURAL,
    )
    guidance_stop: float = setting(
        1.0,
        "Share of the noise levels, from the noisiest, at which guidance acts (0 to 1). Where it stops early, as "
        "at 0.4, the rest takes half the time and keeps closer to surfaces and colours that were taught, and a "
        "little less to the prompt.",
        PARAMETERS,
        WHOLE_SHARE,
    )
    scheduler: str | None = setting(
        None,
        f"The sampler, by the names of A1111 too, as 'DPM++ 2M Karras': {', '.join(SCHEDULERS)}; behind it may stand how "
        f"the noise levels are spaced: {', '.join(f'-{one}' for one in SPACINGS)}. By default the base's own, or what an "
        "adapter for few steps needs.",
        PARAMETERS,
        flag=Flag(aliases=("--sampler",)),
    )
    width: int | None = setting(None, "In pixels; by default the base's resolution.", PARAMETERS, _SIDE, unit="pixels")
    height: int | None = setting(None, "In pixels; by default the base's resolution.", PARAMETERS, _SIDE, unit="pixels")
    batch_size: int = setting(4, "Pictures computed at once; a picture depends on it by rounding alone.", PARAMETERS, COUNT)
    base: str = setting("icons", 'The embedded base "icons", a diffusers folder, a checkpoint file or a hub id.', PARAMETERS)
    prediction: AskedPrediction = setting(
        "auto", "What the base predicts, epsilon or v, where its files do not say it or say it wrongly.", PARAMETERS
    )
    device: str = setting("auto", "Such as cpu, cuda or mps; by default the fastest there is.", PARAMETERS)
    precision: Precision = setting(
        "auto", "Of the base; by default float32 on a CPU and a half precision elsewhere.", PARAMETERS
    )
    quantize: Quantize | None = setting(
        None,
        "Hold the base's linear layers in fewer bits, which saves memory: int8, or nf4 for the least (slightly off).",
        PARAMETERS,
    )
    hires: float | None = setting(
        None,
        "Draw each picture a second time, so many times larger, from what the first pass drew, as A1111's hires fix: 1.5.",
        PARAMETERS,
        Range(1, 8, above=True),
    )
    hires_upscaler: str | None = setting(
        None,
        f"How the second pass's picture is made larger: {', '.join(UPSCALERS)}; also by the names of A1111. By default "
        "latent; lanczos needs less --hires-strength.",
        PARAMETERS,
    )
    hires_strength: float | None = setting(
        None,
        "How far the second pass leaves behind what the first drew (above 0 to 1): the share of the noise levels that it "
        "begins with; by default 0.7.",
        PARAMETERS,
        Range(0, 1, above=True),
    )
    hires_steps: int | None = setting(
        None, "Denoising steps that the second pass takes; by default as many as the first.", PARAMETERS, COUNT
    )
    control: Texts = setting(
        (),
        "A picture that steers, as KIND:MODEL=PICTURE or KIND:MODEL=PICTURE@SCALE; give it again for more. KIND is "
        "controlnet, t2i-adapter or ip-adapter, MODEL a folder of diffusers or a hub id, of a controlnet also its file, and "
        "of an ip-adapter that alone.",
        PARAMETERS,
        flag=Flag(default_shown=False),
    )
    control_scale: float = setting(1.0, "What the scale of every --control is multiplied by.", PARAMETERS, NATURAL)
    tile: Tile | None = setting(
        None,
        "Draw a texture, whose edges meet: left and right (x), upper and lower (y), or both.",
        PARAMETERS,
    )
    format: PictureFormat | None = setting(
        None, "Of the pictures' files; by default what the ending of --output says, and png in a folder.", PARAMETERS
    )
    quality: int | None = setting(
        None,
        "Of JPEG and WebP, from 1 to 100, at which WebP loses nothing; by default 95.",
        PARAMETERS,
        Range(1, 100),
    )
    variation_seed: int | None = setting(
        None, "A second seed, whose noise is mixed into that of the first, as A1111 mixes variations.", PARAMETERS, SEEDS
    )
    variation_strength: float = setting(
        0.0, "How far the noise goes towards that of the variation's seed (0 to 1).", PARAMETERS, WHOLE_SHARE
    )
    offload: Offload | None = setting(
        None,
        "Let the base wait on the CPU and bring it to the device by whole models, by groups of layers, or layer by layer "
        "(sequential): the least memory, and the slowest.",
        PARAMETERS,
    )
    vae_tiling: bool = setting(False, "Decode large pictures in tiles, which saves memory.", PARAMETERS)
    attention_slicing: bool = setting(
        False, "Compute attention in slices, which saves memory where there is no fused attention.", PARAMETERS
    )

    fast: bool | None = setting(
        None,
        "Draw by recorded steps: several times as fast, the same up to rounding. By default on CUDA, and not on a pipeline"
        " that Python hands in; one of which it is asked stays fast, until `Adapters(pipe).fast(False)`.",
        PARAMETERS,
        flag=Flag(negative=True),
    )

    def __post_init__(self) -> None:
        settle(self)
        if self.variation_strength and self.variation_seed is None:
            raise UserError("--variation-strength is for a second seed; name it with --variation-seed")
        if self.offload and self.quantize:
            raise UserError("weights of fewer bits stay on the device; leave --offload or --quantize away")
        if self.tile is not None and self.vae_tiling:
            raise UserError("--vae-tiling decodes in pieces, whose edges would not meet; leave it or --tile away")
        if self.compose_file is not None and self.compose not in ("add", LEARNED):
            raise UserError(f"--compose-file says how adapters meet; leave it or --compose {self.compose} away")
        if self.compose_file is None and self.compose == LEARNED:
            raise UserError(f"--compose {LEARNED} needs what was learned: name it with --compose-file")
        if self.scheduler is not None:
            object.__setattr__(self, "scheduler", canonical(self.scheduler))
        if self.hires_upscaler is not None:
            object.__setattr__(self, "hires_upscaler", upscaler(self.hires_upscaler))
        of_second = self.hires_upscaler, self.hires_strength, self.hires_steps
        if self.hires is None and any(one is not None for one in of_second):
            raise UserError("--hires-upscaler, --hires-strength and --hires-steps are for a second pass; give --hires too")
        if self.negative and self.guided_by <= 1:
            raise UserError(f"a negative prompt has no effect at guidance {self.guided_by:g}; raise it above 1")
        if self.negative and self.guidance_stop == 0:
            raise UserError("a negative prompt has no effect at guidance_stop 0; raise it")

    @property
    def taken_steps(self) -> int:
        """How many denoising steps are taken."""
        return _STEPS if self.steps is None else self.steps

    @property
    def composition(self) -> Compose:
        """How several adapters meet."""
        return self.compose if self.compose_file is None else LEARNED

    def choices(self) -> tuple[Choice, ...]:
        """The adapters that are given, and those that a composition names besides, their files parsed once.

        Raises:
            UserError: As `parse_choices` does, or one of a composition is not there.
        """
        given = super().choices()
        if self.compose_file is None:
            return given
        files = composition.read(self.compose_file).find([choice.path for choice in given], self.adapters_dir)
        there = {choice.path.resolve() for choice in given}
        return (*given, *with_plans([Choice(path) for path in files if path.resolve() not in there]))

    def check_composed(self, adapters: int) -> None:
        """See that there is something to compose.

        Args:
            adapters: How many there are.

        Raises:
            UserError: There are too few or too many.
        """
        COMPOSITIONS[self.composition].check(adapters)

    def controls(self) -> tuple[Control, ...]:
        """The pictures that steer.

        Raises:
            UserError: One cannot be read.
        """
        return tuple(parse_control(text) for text in self.control)

    @property
    def second_pass(self) -> Hires | None:
        """The pass that makes pictures larger; None where there is none."""
        if self.hires is None:
            return None
        steps = self.taken_steps if self.hires_steps is None else self.hires_steps
        return Hires.asked(self.hires, self.hires_upscaler, self.hires_strength, steps)

    @property
    def guided_by(self) -> float:
        """How much guidance there is."""
        return _GUIDANCE if self.guidance is None else self.guidance


@settings_class(kw_only=True)
class DrawingConfig(Sampling):
    """What every command that draws from prompts can be told: adapters of a library, and regions."""

    auto: int | None = setting(
        None,
        "Choose up to so many adapters of the library for each prompt, with a strength of 0.4 to 1 by how much the prompt "
        "asks for them, and put in front of it the triggers that it lacks. Which, and why, is told. None is chosen where "
        "none has to do with the prompt.",
        PARAMETERS,
        COUNT,
    )
    library: OptionalPath = setting(None, LIBRARY_HELP, PARAMETERS)
    region: Regions = setting(
        (),
        "A part of the picture with a prompt and adapters of its own: \"box=0,0,0.5,1 adapter=mira.safetensors prompt='a "
        "portrait of mira'\", with mask=FILE, or painted=FILE color=#ff0000, in place of a box; or [[region]] in TOML. "
        "Give it again for more; see help(pd.Region) for the names.",
        PARAMETERS,
        flag=Flag(default_shown=False),
    )
    region_feather: float = setting(
        FEATHER, "How wide the edges of regions are, as a share of the shorter side.", PARAMETERS, WHOLE_SHARE
    )
    region_isolation: float | None = setting(
        None,
        "Share of the noise levels, from the noisiest, at which regions do not attend to each other (0 to 1): more of it "
        "lets less of one into another, and leaves more of a seam between them; by default 0.3 where regions have adapters "
        "of their own, and 0 where they have not.",
        PARAMETERS,
        WHOLE_SHARE,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.region:
            check_compose(self.composition)

    def check_drawn(self, pictures: "Sequence[GenerateConfig]") -> None:
        """Find out of controls, regions and the library what can be told without the base.

        Args:
            pictures: How all pictures are drawn.

        Raises:
            UserError: A file cannot be read, or something is said that no picture has.
        """
        self.controls()
        for region in self.region:
            region.check()
        of_regions = any(says_of_edges(one.region_feather, one.region_isolation) for one in pictures)
        if of_regions and not any(one.is_divided for one in pictures):
            raise UserError("--region-feather and --region-isolation are of regions; give --region or --regions auto too")
        retrieves = any(one.auto is not None for one in pictures)
        if self.library is not None and not retrieves:
            raise UserError("--library is where --auto finds adapters; give that too, as in --auto 2")
        if retrieves:
            from ..library import Library  # which brings numpy

            Library(self.library, make=False).close()

    def of_generate(self) -> "GenerateConfig":
        """Say how pictures are drawn as ``generate`` is told it, without what is of this command alone."""
        known = {one.name for one in fields(self)}
        return GenerateConfig(**{one.name: getattr(self, one.name) for one in fields(GenerateConfig) if one.name in known})


class WritesFile(Protocol):
    """Settings of a command that writes one picture."""

    @property
    def output(self) -> Path: ...
    @property
    def format(self) -> PictureFormat | None: ...
    @property
    def quality(self) -> int | None: ...


@explained
@settings_class(kw_only=True)
class GenerateConfig(DrawingConfig):
    """Which pictures ``generate`` makes: every prompt with every seed."""

    output: OnePath = setting(
        Path("pictures"),
        "A .png, .jpg or .webp file, which is replaced; several pictures get numbers after its name. Or a folder, whose "
        "files are kept.",
        PARAMETERS,
        flag=Flag(aliases=("-o",)),
    )
    prompts_file: OptionalPath = setting(
        None,
        "A text file with a prompt a line, each with what is said of it alone, as kohya's trainer reads them: --n NEGATIVE, "
        "--w WIDTH, --h HEIGHT, --d SEED, --l GUIDANCE, --s STEPS.",
        PARAMETERS,
    )
    sheet: OptionalPath = setting(None, "Also draw all pictures as one labelled sheet, into this file.", PARAMETERS)
    seed: int = setting(0, "The first seed: it decides the noise that a picture starts from.", PARAMETERS, SEEDS)
    count: int = setting(1, "Pictures of each prompt, with the seeds that follow.", PARAMETERS, COUNT)
    seeds: Numbers = setting(
        (),
        "These seeds instead, one picture each: --seeds 3 7 9.",
        PARAMETERS,
        SEEDS,
        flag=Flag(greedy=True, default_shown=False),
    )
    calibrate: bool = setting(
        False,
        "Make strengths comparable: first measure what each adapter changes of the network's predictions of the prompts, "
        "and scale the strengths so that equal numbers change as much. The recipe holds the scaled ones. Sheets of "
        "blend are calibrated by default.",
        PARAMETERS,
    )
    regions: RegionsFrom = setting(
        "given",
        "Where regions are: where each --region says (given), or where pictures are seen to read the triggers of adapters "
        "(auto): each --adapter whose trigger is in the prompt then acts there alone. A first pass over the noisiest half "
        "of the steps finds that out.",
        PARAMETERS,
    )
    recipe: OptionalPath = setting(
        None,
        "Make this picture again, from the recipe that it carries.",
        PARAMETERS,
        flag=Flag(aliases=("--from",)),
    )
    image: OptionalPath = setting(
        None,
        "A picture to start from, which is made anew as far as --strength says; its size is the size of what is made.",
        PARAMETERS,
    )
    mask: OptionalPath = setting(
        None,
        "A picture of the same size: white is painted anew, and what is black stays. Bases for inpainting need it.",
        PARAMETERS,
    )
    strength: float | None = setting(
        None,
        "How far to leave the picture of --image behind (above 0 to 1); by default 0.8, and 1 with a mask.",
        PARAMETERS,
        Range(0, 1, above=True),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seeds and (self.count != 1 or self.seed != 0):
            raise UserError("give either seeds, or seed and count")
        check_last_seed(self.seed, self.count)
        if self.to_file:
            settle_format(self)
        elif self.quality is not None and self.format in (None, "png"):
            raise UserError("--quality is for JPEG and WebP: take --format jpeg or webp, or leave it away")
        if self.recipe is not None and (self.prompts or self.prompts_file is not None):
            raise UserError("a recipe brings its own prompt; leave the prompt away")
        if self.recipe is not None and self.calibrate:
            raise UserError("a recipe holds the strengths as they were scaled; leave --calibrate away")
        if self.recipe is not None and self.auto is not None:
            raise UserError("a recipe holds the adapters that were chosen; leave --auto away")
        if self.recipe is None:
            if self.prompts_file is None:
                _check_prompts(self.prompts)
            check_text(self.negative)
            self._check_source()
        if self.regions == "auto":
            check_compose(self.composition)
        if self.region and self.regions == "auto":
            raise UserError("--regions auto finds the regions by itself; leave each --region away, or auto")
        if self.calibrate and self.composition == LEARNED:
            raise UserError(
                "--calibrate makes strengths even, and --compose-file weighs them as was learned; leave one away"
            )

    def check_composed(self, adapters: int) -> None:
        """See that there is something to compose, and to compare.

        Args:
            adapters: How many there are.

        Raises:
            UserError: There are too few or too many.
        """
        super().check_composed(adapters)
        if self.calibrate and adapters < 2:
            raise UserError(
                f"--calibrate compares adapters, and there is {adapters or 'none'}; give two or more, or leave it away"
            )

    def _check_source(self) -> None:
        if self.image is not None and self.hires is not None:
            raise UserError("--hires draws pictures from noise twice; with --image give --width and --height instead")
        if self.image is not None and self.variation_seed is not None:
            raise UserError("a variation mixes the noise of pictures that start from noise; leave --image away")
        if self.image is None and (self.mask is not None or self.strength is not None):
            raise UserError("--mask and --strength are for a picture to start from; name it with --image")

    def check(self) -> None:
        """Find out what can be told without the base.

        Raises:
            UserError: Files cannot be read or written.
        """
        self.choices()
        self.check_drawn([self])
        refuse_files(self.prompts, "read it with --prompts-file")
        if self.recipe is not None:
            read(self.recipe)
        if self.prompts_file is not None:
            read_prompts(self.prompts_file)
        for path in (self.image, self.mask):
            if path is not None and not path.is_file():
                raise UserError(f"there is no picture {path}")
        for path in (self.output if self.to_file else None, self.sheet):
            if path is not None:
                check_target(path)
        check_folder(self.output.parent if self.to_file else self.output)

    @property
    def is_divided(self) -> bool:
        """Whether pictures have regions, or may have those of a recipe."""
        return bool(self.region) or self.regions == "auto" or self.recipe is not None

    @property
    def to_file(self) -> bool:
        """Whether ``output`` is meant as a file, not as a folder."""
        return self.output.suffix.lower() in _PICTURES and not self.output.is_dir()

    def all_seeds(self) -> tuple[int, ...]:
        """The seeds of each prompt, in order."""
        return self.seeds or tuple(range(self.seed, self.seed + self.count))


@explained
@settings_class(kw_only=True)
class BlendConfig(DrawingConfig):
    """The sheet that ``blend`` draws: a row for each prompt, a column for each mix."""

    output: OnePath = setting(
        _BLEND,
        "The file of the sheet, .png, .jpg or .webp, which is replaced.",
        PARAMETERS,
        flag=Flag(aliases=("-o",)),
    )
    columns: int = setting(
        5,
        "Mixes, from all of the first adapter to all of the second (and on to a third, where there is one).",
        PARAMETERS,
        COUNT,
    )
    plain: bool = setting(
        False,
        "Mix by the strengths alone: at 50% each adapter has half of its own. By default mixes are calibrated: at 50% "
        "pictures are as far from those of the one alone as from those of the other, which rows of nine pictures of eight "
        "steps measure first.",
        PARAMETERS,
        flag=Flag(contrary_of="calibrate"),
    )
    bare: bool = setting(False, "Begin with a column without any adapter.", PARAMETERS)
    auto: int | None = setting(
        None,
        "Choose up to so many adapters of the library for the sheet, beside those given, the ones that its prompts ask for "
        "most; all rows have them, each at a strength of 0.4 to 1 by how much it is asked for, and every prompt gets the "
        "triggers that it lacks. Which, and why, is told.",
        PARAMETERS,
        COUNT,
    )
    report: OptionalPath = setting(
        None,
        "Also write what adapters change and share, layer by layer, into this file: .json, or .png, .svg or .pdf for heat "
        "maps.",
        PARAMETERS,
    )
    seed: int = setting(0, "The noise that every picture of the sheet starts from.", PARAMETERS, SEEDS)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_prompts(self.prompts)
        check_text(self.negative)
        settle_format(self, _BLEND)
        if len(self.adapter) + (self.auto or 0) < 2:
            more = "; --auto 2 chooses two" if self.auto else ""
            raise UserError(f"a blend needs two adapters, as in --adapter a.safetensors --adapter b.safetensors{more}")
        self.check_columns(len(self.adapter))
        if self.report is not None and self.report.suffix.lower() not in _REPORTS:
            raise UserError(f"--report {self.report}: a report is a file that ends in {', '.join(_REPORTS)}")
        if self.report is not None and self.region:
            raise UserError("--report measures adapters on whole pictures; leave it or --region away")

    def check_columns(self, adapters: int) -> None:
        """See that each adapter has a column.

        Args:
            adapters: How many there are.

        Raises:
            UserError: There are fewer columns.
        """
        if self.columns < adapters:
            raise UserError(f"--columns must be {adapters} or more, one for each adapter, not {self.columns}")

    def check(self) -> None:
        """Find out what can be told without the base.

        Raises:
            UserError: A file cannot be read or written.
        """
        if len(self.choices()) > len(self.adapter):
            raise UserError(
                f"a blend mixes the adapters that are given; give all those of {self.compose_file} with --adapter"
            )
        self.check_drawn([self.of_generate()])
        refuse_files(self.prompts)
        check_target(self.output)
        if self.report is not None:
            check_folder(self.report.parent)
            if self.report.absolute() == self.output.absolute():
                raise UserError(f"--report and --output are both {self.output}; name another file for one")


def settle_format(config: "WritesFile", usual: Path | None = None) -> None:
    """Give a file that is not named the ending of the format that was asked for, and see that a named one has it.

    Args:
        config: Settings of a command that writes one file.
        usual: What the file is called where nothing is said.

    Raises:
        UserError: It has another, or the format has no quality.
    """
    if config.format is not None:
        if config.output == usual:
            object.__setattr__(config, "output", config.output.with_suffix(ending(config.format)))
        elif format_of(config.output) != config.format:
            raise UserError(
                f"{config.output} is no name of a {config.format} file; leave --format away, or end it otherwise"
            )
    if config.quality is not None and format_of(config.output) == "png":
        raise UserError(
            f"--quality is for JPEG and WebP, and {config.output} is neither; leave it away, or take another ending"
        )


def _check_prompts(prompts: tuple[str, ...]) -> None:
    if not prompts:
        raise UserError('there is no prompt; say what the picture shows, as in "a red apple"')
    check_text(*prompts)


def check_text(*texts: str) -> None:
    """Refuse half a character, which a terminal that is not set to UTF-8 can leave in what was typed.

    Args:
        texts: What was typed.

    Raises:
        UserError: There is one.
    """
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"the prompt {text!a} holds {text[error.start]!a} at letter {error.start + 1}, which is no whole"
                " character; type it again, in UTF-8"
            ) from None


def check_last_seed(first: int, count: int) -> None:
    """See that torch takes the last of several seeds, one after the other.

    Args:
        first: The first seed.
        count: How many there are.

    Raises:
        UserError: It does not.
    """
    last = first + count - 1
    if last > MAX_SEED:
        raise UserError(f"a seed is a whole number from 0 to {MAX_SEED}, and the last of --count {count} would be {last}")


@explained
@settings_class()
class InspectConfig:
    """What ``inspect`` tells of files."""

    files: Paths = field(
        metadata=about(
            "Adapter files; of several, it is also told whether they fit together.",
            PARAMETERS,
            flag=Flag(default_shown=False),
        )
    )
    _: KW_ONLY
    json: bool = setting(False, "As JSON, with every site.", PARAMETERS)
    strict: bool = setting(False, "Fail where a tensor makes no part of an adapter, whatever the base.", PARAMETERS)
    norms: bool = setting(False, "Tell the norm of the change at each site, which reads the whole file.", PARAMETERS)
    plot: OptionalPath = setting(
        None, "Draw those norms into this file, .png, .svg or .pdf; of one adapter file.", PARAMETERS
    )
    verify: bool = setting(
        False, "Open the files as other programs do: how much each reads, and how far off its changes are.", PARAMETERS
    )
    base: str | None = setting(
        None,
        "With --verify, --norms or --plot, the base that the files are for, where they do not tell it or its weights count.",
        PARAMETERS,
    )

    def __post_init__(self) -> None:
        settle(self)
        if self.plot is not None and len(self.files) != 1:
            raise UserError(f"--plot draws one adapter file, and {len(self.files)} are named")
        if self.base is not None and not (self.verify or self.norms or self.plot):
            raise UserError("--base is for --verify, --norms and --plot, which alone look at the base")


@explained
@settings_class(kw_only=True)
class DemoConfig:
    """What ``demo`` shows."""

    output: OnePath = setting(
        Path("peft-diffusion-demo"), "The folder for adapters and sheets.", PARAMETERS, flag=Flag(aliases=("-o",))
    )
    steps: int = setting(300, "Training steps of each style.", PARAMETERS, COUNT)
    seed: int = setting(0, "Of training and of the pictures.", PARAMETERS, SEEDS)
    base: str = setting("icons", "The model to teach.", PARAMETERS)
    device: str = setting("auto", "Such as cpu, cuda or mps; by default the fastest there is.", PARAMETERS)

    def __post_init__(self) -> None:
        settle(self)
