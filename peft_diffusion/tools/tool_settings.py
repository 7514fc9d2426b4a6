"""What the tools for adapter files can be told: flags, TOML keys and Python arguments in one place. Imports no torch."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, field
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeAlias

from ..core.errors import UserError
from ..core.files import at_home, refuse_overlaps
from ..core.settings import (
    COUNT,
    PARAMETERS,
    WHOLE_SHARE,
    Flag,
    OnePath,
    OptionalPath,
    Range,
    Texts,
    about,
    explained,
    setting,
    settings_class,
    settle,
)
from ..formats import Plan, plan
from ..formats.layout import SaveDtype, find
from ..generation.settings import Choice, Key, parse_choices

How: TypeAlias = Literal[
    "linear", "svd", "ties", "dare-ties", "dare-linear", "magnitude", "knots", "core-space", "regmean", "ziplora"
]
Rule: TypeAlias = Literal["ties", "dare-ties", "dare-linear", "magnitude"]
MOST = 1000.0
"""The strongest that an adapter is made."""

MATCHING = ("regmean", "ziplora")
"""Ways that match what layers make of their inputs, for which pictures are drawn."""

ALIGNED = ("knots", "core-space")
"""Ways that bring the changes into a common basis, and merge by a rule there."""

_PART, _ABOVE_1 = Range(0, 1, above=True), Range(1, above=True)
_OUTPUT = Flag(aliases=("-o",))
_DTYPE = "The precision of the file; by default that of what it is made of."
_TO = "The layout of the file, such as kohya, original, diffusers or peft; by default that of the input."
_BASE = (
    "The base: a folder, a checkpoint file, a hub id, icons, or an architecture (sd1, sd2, sdxl). By default it is told by"
    " the file. Its weights are needed for methods that depend on them, such as DoRA and OFT."
)


_FILE = about("The adapter file.", PARAMETERS, flag=Flag(default_shown=False))


def _rank(help: str) -> int | None:
    rank: int | None = setting(None, help, PARAMETERS, COUNT)
    return rank


def refuse_same(output: Path, inputs: Sequence[Path], layout: str | None = None) -> None:
    """Refuse to write onto what is read, or in a layout that is not known, before anything is computed.

    Args:
        output: The file or folder to make.
        inputs: What it is made of.
        layout: What the layout of the output was called; None where it was not.

    Raises:
        UserError: It is one of these, or lies in one, or there is no such layout.
    """
    if layout is not None:
        find(layout)
    refuse_overlaps([("--output", at_home(output))], [("the input", at_home(path)) for path in inputs])


class OfOneFile:
    """Settings that name one adapter file, and keep what was parsed of it."""

    file: Path
    output: Path
    to: str | None = None

    @cached_property
    def plan(self) -> Plan:
        """What the file holds."""
        return plan(self.file)

    def check(self) -> None:
        """Find out what can be told without torch.

        Raises:
            UserError: The file cannot be read, or would be written onto itself.
        """
        refuse_same(self.output, [self.plan.path], self.to)


@explained
@settings_class()
class MergeConfig:
    """Which adapters ``merge`` makes one of, or folds into a base."""

    files: Texts = field(
        metadata=about(
            "Adapter files, each FILE or FILE=STRENGTH (1 is as trained).", PARAMETERS, flag=Flag(default_shown=False)
        )
    )
    _: KW_ONLY
    output: OnePath = field(
        metadata=about(
            "The adapter file to write; with --into the checkpoint, a .safetensors file or a folder.",
            PARAMETERS,
            flag=_OUTPUT,
        )
    )
    how: How = setting(
        "linear",
        "How changes become one: linear adds them, and is exact without --rank; svd adds them and keeps the largest rank of"
        " the files; ties, dare-ties, dare-linear and magnitude drop a part of each and add or elect; knots and core-space"
        " do so in a basis that all share; regmean finds the change that comes nearest to what each one makes of its own"
        " prompts, and ziplora the coefficients of its columns that do, for which pictures are drawn with --base.",
        PARAMETERS,
    )
    rank: int | None = _rank("The most ranks of a site; what that leaves out is told.")
    density: float = setting(
        0.5, "The share of numbers that ties, dare and magnitude keep of each change.", PARAMETERS, _PART
    )
    within: Rule = setting("ties", "The rule that knots and core-space apply in their basis.", PARAMETERS)
    seed: int = setting(0, "Of what DARE drops.", PARAMETERS, Range(0))
    prompts: Texts = setting(
        (),
        "NAME=PROMPT: what regmean and ziplora draw with the adapter whose file is called NAME, without its ending; give it"
        " again for more. The last of an adapter is kept apart to tell the error. By default what its file tells of its"
        " captions, and common subjects.",
        PARAMETERS,
        flag=Flag(default_shown=False),
    )
    off_diagonal: float = setting(
        0.9,
        "What regmean and ziplora multiply the products of different inputs of a layer with (0 to 1): lower where few"
        " prompts tell little of them.",
        PARAMETERS,
        WHOLE_SHARE,
    )
    into: str | None = setting(
        None, "Fold the adapters into this base, a folder or a checkpoint file, and write a checkpoint.", PARAMETERS
    )
    skip: bool = setting(
        False, "With --into: leave out what cannot be folded, such as learned words, and tell it.", PARAMETERS
    )
    to: str = setting("kohya", "The layout of the adapter file: kohya, original, diffusers, peft or embedding.", PARAMETERS)
    dtype: SaveDtype | None = setting(None, _DTYPE, PARAMETERS)
    base: str | None = setting(None, _BASE, PARAMETERS)
    errors: bool = setting(False, "Tell the error of every site, not of the worst alone.", PARAMETERS)

    def __post_init__(self) -> None:
        settle(self)
        if not self.files:
            raise UserError("name the adapter files to merge, each FILE or FILE=STRENGTH")
        if self.into is not None and (self.how != "linear" or self.rank is not None):
            raise UserError(
                "--into adds changes as they are; merge the files with --how and --rank first, and fold the result"
            )
        if self.skip and self.into is None:
            raise UserError("--skip is for --into alone")
        self._refuse_idle()

    def _refuse_idle(self) -> None:
        """Raise UserError for a setting that does nothing beside the others."""
        rule, aligned, files = self.within if self.how in ALIGNED else self.how, self.how in ALIGNED, self.into is None
        needs = {
            "density": ("--how ties, dare-ties, dare-linear or magnitude", rule not in ("linear", "svd", *MATCHING)),
            "within": (f"--how {' or '.join(ALIGNED)}", aligned),
            "seed": ("DARE, as --how dare-ties", rule in ("dare-ties", "dare-linear")),
            "prompts": (f"--how {' or '.join(MATCHING)}", self.how in MATCHING),
            "off_diagonal": (f"--how {' or '.join(MATCHING)}", self.how in MATCHING),
            "to": ("an adapter file to write, and --into makes a checkpoint", files),
            "base": ("an adapter file to write, and --into names the base", files),
        }
        for name, (needed, used) in needs.items():
            if not used and getattr(self, name) != getattr(type(self), name):
                raise UserError(f"--{name.replace('_', '-')} does nothing without {needed}")
        if self.how == "regmean" and self.base is None:
            raise UserError(
                "--how regmean draws pictures to see what goes into layers; name the base, with its weights: --base"
            )

    def prompts_by_name(self) -> dict[str, list[str]]:
        """What is drawn with each adapter, by its name.

        Raises:
            UserError: A text is no NAME=PROMPT, or no adapter has the name.
        """
        names = [one.name for one in self.choices()]
        found: dict[str, list[str]] = {}
        for text in self.prompts:
            name, equals, prompt = text.partition("=")
            if not equals or not prompt.strip():
                raise UserError(f"--prompts {text!r}: name an adapter and what is drawn with it, as in ink='a cat in ink'")
            if name not in names:
                raise UserError(f"--prompts {text!r}: no adapter is called {name!r}; there are: {', '.join(names)}")
            found.setdefault(name, []).append(prompt.strip())
        return found

    @cached_property
    def _plans(self) -> dict[Key, Plan]:
        return {}

    def choices(self) -> tuple[Choice, ...]:
        """The adapters, their files parsed once.

        Raises:
            UserError: One is missing or no adapter, a strength differs between parts, or all are 0.
        """
        found = parse_choices(self.files, self._plans)
        for one in found:
            if one.parts is not None:
                raise UserError(f"{one.path} is merged at one strength; first split it, and merge its parts at theirs")
        if not any(one.strength for one in found):
            raise UserError("at strength 0 no adapter changes anything; give one of them another")
        return found

    def check(self) -> None:
        """Find out what can be told without torch.

        Raises:
            UserError: Files cannot be read or written.
        """
        refuse_same(self.output, [one.path for one in self.choices()], self.to)
        if self.into is not None:
            refuse_same(self.output, [Path(self.into)])
        self.prompts_by_name()


class Reducing:
    """Settings that say how many ranks are kept."""

    rank: int | None
    energy: float | None
    frobenius: float | None
    ratio: float | None

    def refuse_unlimited(self) -> None:
        """Refuse where no number of ranks follows.

        Raises:
            UserError: It does not.
        """
        if self.rank is None and self.energy is None and self.frobenius is None and self.ratio is None:
            raise UserError("say how many ranks to keep: --rank N, --energy E, --frobenius F or --ratio R")


_ENERGY = "Keep the largest singular values whose sum is this share of the sum of all, as 0.9 (kohya's sv_cumulative)."
_FROBENIUS = "Keep those whose Frobenius norm is this share of that of all, as 0.9 (kohya's sv_fro)."
_RATIO = "Keep those above the largest divided by this, as 20 (kohya's sv_ratio)."


@explained
@settings_class()
class ResizeConfig(OfOneFile, Reducing):
    """How ``resize`` changes the ranks of an adapter."""

    file: OnePath = field(metadata=_FILE)
    _: KW_ONLY
    output: OnePath = field(metadata=about("The file to write.", PARAMETERS, flag=_OUTPUT))
    rank: int | None = _rank("The rank; beside another condition the most of a site.")
    energy: float | None = setting(None, _ENERGY, PARAMETERS, _PART)
    frobenius: float | None = setting(None, _FROBENIUS, PARAMETERS, _PART)
    ratio: float | None = setting(None, _RATIO, PARAMETERS, _ABOVE_1)
    conv_rank: int | None = _rank("The same as --rank for convolutions with a kernel; by default --rank.")
    to: str | None = setting(None, _TO, PARAMETERS)
    dtype: SaveDtype | None = setting(None, _DTYPE, PARAMETERS)
    base: str | None = setting(None, _BASE, PARAMETERS)
    errors: bool = setting(False, "Tell the error of every site, not of the worst alone.", PARAMETERS)

    def __post_init__(self) -> None:
        settle(self)
        self.refuse_unlimited()


@explained
@settings_class()
class ExtractConfig(Reducing):
    """Of which two checkpoints ``extract`` makes an adapter, and of which rank."""

    tuned: str = field(
        metadata=about("The checkpoint that was trained: a folder or a file.", PARAMETERS, flag=Flag(default_shown=False))
    )
    original: str = field(
        metadata=about("The base that it was trained from: a folder or a file.", PARAMETERS, flag=Flag(default_shown=False))
    )
    _: KW_ONLY
    output: OnePath = field(metadata=about("The adapter file to write.", PARAMETERS, flag=_OUTPUT))
    rank: int | None = _rank("The rank; beside another condition the most of a site.")
    energy: float | None = setting(None, _ENERGY, PARAMETERS, _PART)
    frobenius: float | None = setting(None, _FROBENIUS, PARAMETERS, _PART)
    ratio: float | None = setting(None, _RATIO, PARAMETERS, _ABOVE_1)
    conv_rank: int | None = _rank("Take convolutions with a kernel too (LoCon), of at most this rank.")
    text_encoders: bool = setting(
        True, "Take the text encoders too, where they differ.", PARAMETERS, flag=Flag(negative=True)
    )
    smallest: float = setting(
        1e-4,
        "Leave out a site whose weight differs by less than this share of its own norm: rounding differs by as much.",
        PARAMETERS,
        Range(0),
    )
    to: str = setting("kohya", "The layout of the file: kohya, original, diffusers or peft.", PARAMETERS)
    dtype: SaveDtype = setting("fp16", "The precision of the file.", PARAMETERS)
    errors: bool = setting(False, "Tell the error of every site, not of the worst alone.", PARAMETERS)

    def __post_init__(self) -> None:
        settle(self)
        self.refuse_unlimited()

    def check(self) -> None:
        """Find out what can be told without torch.

        Raises:
            UserError: It would be written onto what is read.
        """
        refuse_same(self.output, [Path(self.tuned), Path(self.original)], self.to)


@explained
@settings_class()
class StrengthConfig(OfOneFile):
    """How ``strength`` scales an adapter."""

    file: OnePath = field(metadata=_FILE)
    strength: float = field(
        metadata=about(
            "What its effect is multiplied with: 0.8 is as --adapter FILE=0.8 draws.", PARAMETERS, Range(-MOST, MOST)
        )
    )
    _: KW_ONLY
    output: OnePath = field(metadata=about("The file to write.", PARAMETERS, flag=_OUTPUT))
    to: str | None = setting(None, _TO, PARAMETERS)
    dtype: SaveDtype | None = setting(None, _DTYPE, PARAMETERS)
    base: str | None = setting(None, _BASE, PARAMETERS)

    def __post_init__(self) -> None:
        settle(self)
        if self.strength == 0:
            raise UserError("at strength 0 the file would change nothing")


@explained
@settings_class()
class SplitConfig(OfOneFile):
    """How ``split`` parts an adapter."""

    file: OnePath = field(metadata=_FILE)
    _: KW_ONLY
    output: OnePath = field(
        metadata=about("The folder to write the parts to, as NAME-PART.safetensors.", PARAMETERS, flag=_OUTPUT)
    )
    by: Literal["component", "block"] = setting(
        "component", "A file for each component (unet, text_encoder), or for each block of each component.", PARAMETERS
    )
    parts: Texts = setting(
        (),
        "Only these parts, such as unet or unet.down_blocks.1; by default all.",
        PARAMETERS,
        flag=Flag(greedy=True, default_shown=False),
    )
    to: str | None = setting(None, _TO, PARAMETERS)
    base: str | None = setting(None, _BASE, PARAMETERS)

    def __post_init__(self) -> None:
        settle(self)

    def check(self) -> None:
        """Find out what can be told without torch.

        Raises:
            UserError: The file cannot be read, or the output is no folder.
        """
        refuse_same(self.output, [], self.to)
        _ = self.plan
        if at_home(self.output).is_file():
            raise UserError(f"--output {self.output} is a file; name a folder for the parts")


@explained
@settings_class()
class JoinConfig:
    """Which files ``join`` puts into one."""

    files: Texts = field(
        metadata=about("Adapter files that change different sites.", PARAMETERS, flag=Flag(default_shown=False))
    )
    _: KW_ONLY
    output: OnePath = field(metadata=about("The file to write.", PARAMETERS, flag=_OUTPUT))
    to: str | None = setting(None, _TO, PARAMETERS)
    dtype: SaveDtype | None = setting(None, _DTYPE, PARAMETERS)
    base: str | None = setting(None, _BASE, PARAMETERS)

    def __post_init__(self) -> None:
        settle(self)
        if len(self.files) < 2:
            raise UserError("name at least two files to join")

    @cached_property
    def plans(self) -> tuple[Plan, ...]:
        """What the files hold."""
        return tuple(plan(one) for one in self.files)

    def check(self) -> None:
        """Find out what can be told without torch.

        Raises:
            UserError: A file cannot be read, or would be written onto.
        """
        refuse_same(self.output, [one.path for one in self.plans], self.to)


@explained
@settings_class()
class RenameTriggerConfig(OfOneFile):
    """Which word ``rename-trigger`` gives another name."""

    file: OnePath = field(metadata=_FILE)
    old: str = field(metadata=about("The word as the file has it.", PARAMETERS))
    new: str = field(metadata=about("The word that it becomes.", PARAMETERS))
    _: KW_ONLY
    output: OnePath = field(metadata=about("The file to write.", PARAMETERS, flag=_OUTPUT))
    base: str | None = setting(None, _BASE, PARAMETERS)

    def __post_init__(self) -> None:
        settle(self)
        if not self.new.strip():
            raise UserError("the new word is empty")


_ANY_FILE = about("A safetensors file, or a folder of peft or diffusers.", PARAMETERS, flag=Flag(default_shown=False))
_OUTPUT_INSTEAD = "Write to this file instead of the same one."


@explained
@settings_class()
class MetadataGetConfig:
    """Which metadata ``metadata get`` shows."""

    file: OnePath = field(metadata=_ANY_FILE)
    keys: Texts = setting((), "Only these entries, as bare values.", PARAMETERS, flag=Flag(default_shown=False))
    _: KW_ONLY
    json: bool = setting(False, "As JSON.", PARAMETERS)

    def __post_init__(self) -> None:
        settle(self)


@explained
@settings_class()
class MetadataSetConfig:
    """Which metadata ``metadata set`` writes."""

    file: OnePath = field(metadata=_ANY_FILE)
    entries: Texts = field(metadata=about("KEY=VALUE, any number.", PARAMETERS, flag=Flag(default_shown=False)))
    _: KW_ONLY
    output: OptionalPath = setting(None, _OUTPUT_INSTEAD, PARAMETERS, flag=_OUTPUT)

    def __post_init__(self) -> None:
        settle(self)
        self.told()

    def told(self) -> dict[str, str]:
        """The entries by key.

        Raises:
            UserError: One has no =, or there is none.
        """
        if not self.entries:
            raise UserError("name what is set, as KEY=VALUE")
        pairs = {}
        for entry in self.entries:
            key, equals, value = entry.partition("=")
            if not equals or not key:
                raise UserError(f"{entry!r} is no KEY=VALUE")
            pairs[key] = value
        return pairs


@explained
@settings_class()
class MetadataRemoveConfig:
    """Which metadata ``metadata remove`` takes away."""

    file: OnePath = field(metadata=_ANY_FILE)
    keys: Texts = field(
        metadata=about(
            "Entries; one that ends in * is all that begin so, as ss_*.", PARAMETERS, flag=Flag(default_shown=False)
        )
    )
    _: KW_ONLY
    output: OptionalPath = setting(None, _OUTPUT_INSTEAD, PARAMETERS, flag=_OUTPUT)

    def __post_init__(self) -> None:
        settle(self)
        if not self.keys:
            raise UserError("name the entries to remove")
