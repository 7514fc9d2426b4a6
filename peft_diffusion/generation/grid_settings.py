"""What ``grid`` is told: settings, and the values that they take over the sheet. Imports no torch."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from decimal import ROUND_DOWN, Decimal
from pathlib import Path
from typing import Any

from ..core.errors import UserError, did_you_mean
from ..core.other_names import known_here_as
from ..core.settings import COUNT, PARAMETERS, Flag, OnePath, as_in, explained, setting, settings_class, settings_of
from ..data.prompts import refuse_files
from . import amounts
from .recipe import check_target
from .settings import SEEDS, Choice, DrawingConfig, GenerateConfig, RegionsFrom, settle_format

_REPLACE = "replace"
_NONE = "none"
_GRID = Path("grid.png")
_SETTINGS = ("steps", "guidance", "guidance_stop", "scheduler", "seed", "width", "height", "negative", "prompt_2",
             "prompt_weights", "clip_skip", "zero_negative", "variation_seed", "variation_strength", "hires",
             "hires_upscaler", "hires_strength", "hires_steps", "tile",
             "control_scale", "compose", "auto", "regions", "region_feather", "region_isolation")  # fmt: skip
_AXIS = (
    "NAME=VALUE,VALUE (or | between): steps, guidance, scheduler, seed, ..., the name of an adapter file for its strength, "
    "or replace=WORD,OTHER,... for words of the prompt. Numbers also as A1111 has them: 1-5, 1-10 (+3), 0-1 [5]."
)
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)"
# As A1111's scripts/xyz_grid.py reads them: first to last by a step, 1 where none is told; or so many between both.
_RANGE = re.compile(rf"({_NUMBER})\s*-\s*({_NUMBER})(?:\s*\(\s*({_NUMBER})\s*\)|\s*\[\s*(\d+)\s*\])?")
_LONGEST = 1000  # values of a range, far more than a sheet holds
_DIGITS = 6  # behind the point, of a number in a range
_DESCRIBED = {one.name: one for one in settings_of(GenerateConfig)}


@dataclass(frozen=True)
class Axis:
    """Values along one side of a sheet.

    Attributes:
        name: A setting, an adapter, or ``replace``.
        values: As they were typed.
    """

    name: str
    values: tuple[str, ...]

    def label(self, value: str) -> str:
        """Say a value in words.

        Args:
            value: As it was typed.

        Returns:
            What stands above its column, or beside its row.
        """
        return value if self.name == _REPLACE else f"{self.name} {value}"


@dataclass(frozen=True)
class Cellwise:
    """How one picture is drawn."""

    config: GenerateConfig
    choices: tuple[Choice, ...]


@dataclass(frozen=True)
class Row:
    """The pictures of a row, and what stands beside them."""

    label: str
    cells: tuple[Cellwise, ...]


@explained
@settings_class(kw_only=True)
class GridConfig(DrawingConfig):
    """The sheet that ``grid`` draws: columns over one setting, rows over up to two more and over prompts."""

    x: str = setting("seed=0,1,2", f"Columns, as {_AXIS}", PARAMETERS)
    y: str | None = setting(None, "Rows, in the same way.", PARAMETERS)
    z: str | None = setting(None, "Rows around those rows, in the same way.", PARAMETERS)
    output: OnePath = setting(
        _GRID,
        "The file of the sheet, .png, .jpg or .webp, which is replaced.",
        PARAMETERS,
        flag=Flag(aliases=("-o",)),
    )
    seed: int = setting(0, "The noise that pictures start from.", PARAMETERS, SEEDS)
    auto: int | None = setting(
        None,
        "Choose up to so many adapters of the library for the prompt of each picture, as generate does for a call of its "
        "own: all that share a prompt have the same, and where replace= changes it others may be chosen. Which, and why, is "
        "told.",
        PARAMETERS,
        COUNT,
    )
    regions: RegionsFrom = as_in(GenerateConfig, "regions")

    def __post_init__(self) -> None:
        super().__post_init__()
        settle_format(self, _GRID)

    def _axis(self, text: str) -> Axis:
        return _axis(text, [choice.name for choice in self.choices()])

    @property
    def columns(self) -> list[str]:
        """What stands above each column."""
        axis = self._axis(self.x)
        return [axis.label(value) for value in axis.values]

    def rows(self, plain: GenerateConfig) -> list[Row]:
        """Say how every picture is drawn.

        Args:
            plain: What they share.

        Returns:
            Row by row.

        Raises:
            UserError: There is no such setting or value.
        """
        across, down = self._axis(self.x), [self._axis(text) for text in (self.z, self.y) if text is not None]
        places: list[list[tuple[Axis, str]]] = [[]]
        for axis in down:
            places = [[*place, (axis, value)] for place in places for value in axis.values]
        rows = []
        for prompt in plain.prompts:
            for place in places:
                one = Cellwise(replace(plain, prompts=(prompt,)), self.choices())
                told = [axis.label(value) for axis, value in place]
                cells = tuple(_changed(one, [*place, (across, value)]) for value in across.values)
                rows.append(Row("\n".join([*told, *([prompt] if len(plain.prompts) > 1 or not told else [])]), cells))
        return rows

    def check(self) -> None:
        """Find out what can be told without the base.

        Raises:
            UserError: A value, an adapter or a file cannot be used.
        """
        refuse_files(self.prompts)
        check_target(self.output)
        self.check_drawn([one.config for row in self.rows(self.of_generate()) for one in row.cells])


def _axis(text: str, adapters: Sequence[str]) -> Axis:
    """Read an axis; the names of adapters go before those that other programs have for settings. Raises UserError."""
    name, equals, told = text.partition("=")
    values = tuple(value.strip() for value in told.split("|" if "|" in told else ","))
    if not equals or not all(values):
        raise UserError(f"a side of the sheet is {_AXIS} {text!r} is none")
    key = name.strip()
    spelled, sides = key.lower().replace("-", "_").replace(" ", "_"), (*_SETTINGS, _REPLACE)
    others = [] if key in adapters else known_here_as(key, sides)
    called = spelled if spelled in sides else next(iter(others), key)
    kind = float if called not in sides else _DESCRIBED[called].single if called in _SETTINGS else str
    if kind in (int, float):
        values = tuple(one for value in values for one in _expanded(value, called, whole=kind is int))
    return Axis(called, values)


def _expanded(value: str, name: str, *, whole: bool) -> list[str]:
    """The numbers of a range, or the value itself. Raises UserError for a range of none, or of more than a sheet holds."""
    found = _RANGE.fullmatch(value)
    if found is None:
        return [value]
    first, last = Decimal(found[1]), Decimal(found[2])
    if found[4] is not None:
        count = int(found[4])
        step = (last - first) / (count - 1) if count > 1 else Decimal(0)
    else:
        step = Decimal(found[3]) if found[3] is not None else Decimal(1 if last >= first else -1)
        count = int((last - first) / step) + 1 if step and (last - first) / step >= 0 else 0
    if not 1 <= count <= _LONGEST:
        raise UserError(f"{name}={value} is {count or 'no'} values; write a range as 1-5, 1-10 (+3), 10-1 (-3) or 0-1 [5]")
    numbers = [first + step * place for place in range(count)]
    if whole and found[4] is not None:
        numbers = [number.to_integral_value(ROUND_DOWN) for number in numbers]
    return [f"{round(number, _DIGITS).normalize():f}" for number in numbers]


def _changed(one: Cellwise, place: Sequence[tuple[Axis, str]]) -> Cellwise:
    """How a picture is drawn at a place of the sheet. Raises UserError."""
    for axis, value in place:
        named = [choice for choice in one.choices if choice.name == axis.name]
        if axis.name == _REPLACE:
            one = replace(one, config=_reworded(one.config, axis.values[0], value))
        elif axis.name in _SETTINGS:
            one = replace(one, config=_set(one.config, axis.name, value))
        elif len(named) == 1:
            strength, parts = amounts.parse(value, axis.name)
            found = replace(named[0], strength=strength, parts=parts)
            one = replace(one, choices=tuple(found if choice is named[0] else choice for choice in one.choices))
        else:
            there = [*_SETTINGS, _REPLACE, *(choice.name for choice in one.choices)]
            raise UserError(
                f"a sheet has no side {axis.name!r}; there are: {', '.join(there)}{did_you_mean(axis.name, there)}"
            )
    return one


def _reworded(config: GenerateConfig, word: str, other: str) -> GenerateConfig:
    parts = [one.prompt for one in config.region if one.prompt is not None]
    if not any(word in text for text in (*config.prompts, config.negative, *parts)):
        raise UserError(f"no prompt holds {word!r}, which is to be replaced")
    prompts = tuple(prompt.replace(word, other) for prompt in config.prompts)
    region = [one if one.prompt is None else replace(one, prompt=one.prompt.replace(word, other)) for one in config.region]
    return replace(config, prompts=prompts, negative=config.negative.replace(word, other), region=region)


def _set(config: GenerateConfig, name: str, value: str) -> GenerateConfig:
    described = _DESCRIBED[name]
    kinds: dict[object, Callable[[str], object]] = {int: int, float: float, bool: {"true": True, "false": False}.__getitem__}
    try:
        # What has no value by default can have none at a place of the sheet too.
        found = None if described.default is None and value.lower() == _NONE else kinds.get(described.single, str)(value)
    except (ValueError, KeyError):
        raise UserError(f"{name} cannot be {value!r} on a side of the sheet") from None
    changes: dict[str, Any] = {name: found}
    return replace(config, **changes)
