"""Settings that explain themselves: what is to be known of one stands once, in its field. Imports no torch.

A dataclass of settings is written so:

    @explained
    @settings_class(kw_only=True)
    class Drawing:
        steps: int = setting(25, "Denoising steps.", SAMPLING, COUNT)

        def __post_init__(self) -> None:
            settle(self)

From the field are made its check, its flag, its key in a TOML file, its line in ``help(Drawing)`` and its entry in
``describe(Drawing)``. The choices of a setting are those of its annotation, a ``Literal``.
"""

import math
import numbers
import os
import shlex
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import cache, cached_property
from pathlib import Path
from textwrap import TextWrapper
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Generic,
    Literal,
    Protocol,
    TypeAlias,
    TypeVar,
    Union,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

from .errors import UserError, did_you_mean
from .files import at_home
from .other_names import known_here_as, value_here

_KEY = "peft_diffusion.setting"  # in ``field.metadata``
_WIDTH = 110  # letters of a line in a docstring
_KINDS: dict[type, tuple[str, str]] = {
    bool: ("bool", "true or false"),
    int: ("int", "a whole number"),
    float: ("float", "a number"),
    str: ("str", "a text"),
    Path: ("path", "a path"),
}
"""The kinds of values: as ``describe`` and docstrings call them, and in the words of an error."""


class Settings(Protocol):
    """A dataclass of settings, such as `TrainConfig`."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


S = TypeVar("S", bound=Settings)
T = TypeVar("T")
Has = TypeVar("Has", covariant=True)
Given = TypeVar("Given", contravariant=True)

if TYPE_CHECKING:
    _PathGiven: TypeAlias = str | os.PathLike[str]

    class _Taken(Generic[Has, Given]):
        """How type checkers see a setting that has one type, and is given in more: see `settle`."""

        def __get__(self, config: object, kind: type) -> Has: ...
        def __set__(self, config: object, value: Given) -> None: ...

    OnePath: TypeAlias = _Taken[Path, _PathGiven]
    OptionalPath: TypeAlias = _Taken[Path | None, _PathGiven | None]
    Paths: TypeAlias = _Taken[tuple[Path, ...], _PathGiven | Sequence[_PathGiven]]
    Texts: TypeAlias = _Taken[tuple[str, ...], str | Sequence[str]]
    Numbers: TypeAlias = _Taken[tuple[int, ...], int | Sequence[int]]
    OptionalTexts: TypeAlias = _Taken[tuple[str, ...] | None, str | Sequence[str] | None]
    OptionalNumbers: TypeAlias = _Taken[tuple[int, ...] | None, int | Sequence[int] | None]
else:
    OnePath, OptionalPath = Path, Path | None
    Paths, Texts, Numbers = tuple[Path, ...], tuple[str, ...], tuple[int, ...]
    OptionalTexts, OptionalNumbers = tuple[str, ...] | None, tuple[int, ...] | None


@dataclass_transform(field_specifiers=(field,))
def settings_class(*, kw_only: bool = False) -> Callable[[type[T]], type[T]]:
    """Make a frozen dataclass of settings, which type checkers let give a setting in all that `settle` takes.

    They are not told that it is frozen: mypy takes a setting that a frozen class inherits for what it may be given.

    Args:
        kw_only: Every setting is given by its name.

    Returns:
        The decorator.
    """
    return dataclass(frozen=True, kw_only=kw_only)


@dataclass(frozen=True)
class Group:
    """Settings that are shown together, in the order of ``place``."""

    title: str
    place: int


PARAMETERS = Group("Parameters", 0)
"""Of commands whose settings are few."""


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``; ``above`` and ``below`` leave that end itself out."""

    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        low_enough = value < self.high if self.below else value <= self.high
        high_enough = value > self.low if self.above else value >= self.low
        return low_enough and high_enough and _finite(value)

    def __str__(self) -> str:
        low = f"above {self.low:g}" if self.above else f"{self.low:g} or more"
        return low if self.high == math.inf else f"{low}, {'below' if self.below else 'at most'} {self.high}"


POSITIVE, NATURAL, COUNT = Range(0, above=True), Range(0), Range(1)
SHARE, WHOLE_SHARE = Range(0, 1, below=True), Range(0, 1)


@dataclass(frozen=True)
class Flag:
    """What a setting's flag has besides its name.

    Attributes:
        aliases: Other flags for it, with their dashes.
        negative: There is a flag that says the contrary: ``--no-NAME``, and ``--empty-NAME`` for several values.
        greedy: It takes all values that follow; else it is given again for each.
        default_shown: The help tells the default.
        contrary_of: The setting by which another command asks for what is done here unless this one is given; "" for none.
    """

    aliases: tuple[str, ...] = ()
    negative: bool = False
    greedy: bool = False
    default_shown: bool = True
    contrary_of: str = ""


@dataclass(frozen=True)
class Setting:
    """What a field's metadata hold: see `about`."""

    help: str
    group: Group
    range: Range | None
    unit: str
    flag: Flag
    place: bool
    free_on_resume: bool
    kept: bool
    instead_of: str
    table: tuple[str, ...]


def about(
    help: str,
    group: Group,
    range: Range | None = None,
    *,
    unit: str = "",
    flag: Flag = Flag(),
    place: bool = False,
    free_on_resume: bool = False,
    kept: bool = True,
    instead_of: str = "",
    table: tuple[str, ...] = (),
) -> Mapping[str, Setting]:
    """The metadata of a setting without default, for ``dataclasses.field``; `setting` is for all others.

    Args:
        help: What it does, and when one would want it, in one or two sentences.
        group: The settings that it is shown with.
        range: The numbers that it may be; of several values, each.
        unit: What its number counts.
        flag: What its flag has besides its name.
        place: It says where something lies on this machine, which changes nothing of the result and is nobody's business.
        free_on_resume: A run may go on with another value: what is learned does not depend on it, or is compared otherwise.
        kept: It is written into files of settings; False for what is said anew with every command.
        instead_of: Another setting, which it stands in place of where both are given.
        table: The words that its text begins with. A file may have it as a table instead, with a key for each of them.

    Returns:
        The metadata.
    """
    return {_KEY: Setting(help, group, range, unit, flag, place, free_on_resume, kept, instead_of, table)}


def setting(
    default: object,
    help: str,
    group: Group,
    range: Range | None = None,
    *,
    unit: str = "",
    flag: Flag = Flag(),
    place: bool = False,
    free_on_resume: bool = False,
    kept: bool = True,
    instead_of: str = "",
    table: tuple[str, ...] = (),
) -> Any:
    """A field of a dataclass of settings. Its default is checked as every value is, when settings are made.

    Args:
        default: Its value where nothing is said; None where that depends on other things.
        help: See `about`, as for all that follow.
        group: See `about`.
        range: See `about`.
        unit: See `about`.
        flag: See `about`.
        place: See `about`.
        free_on_resume: See `about`.
        kept: See `about`.
        instead_of: See `about`.
        table: See `about`.

    Returns:
        The field, which the dataclass replaces by its default.
    """
    told = about(
        help,
        group,
        range,
        unit=unit,
        flag=flag,
        place=place,
        free_on_resume=free_on_resume,
        kept=kept,
        instead_of=instead_of,
        table=table,
    )
    return field(default=default, metadata=told)


def as_in(kind: type[Settings], name: str) -> Any:
    """A field that another class of settings has too, for one that does not inherit from it.

    Args:
        kind: The other class, which declares it.
        name: The setting.

    Returns:
        A field with its default, and all that is told of it there.
    """
    (found,) = (one for one in fields(kind) if one.name == name)
    return field(default=found.default, metadata=found.metadata)


@dataclass(frozen=True)
class Described:
    """A setting of a class, with all that its field tells.

    Attributes:
        name: Its name.
        hint: Its type.
        default: Its default, ``dataclasses.MISSING`` where it must be given.
        positional: It needs no name when it is given.
        setting: The metadata.
    """

    name: str
    hint: Any
    default: Any
    positional: bool
    setting: Setting

    @property
    def flag(self) -> str:
        """Its flag, which errors call it by, whoever gave the value."""
        return flag(self.name)

    @property
    def flags(self) -> tuple[str, ...]:
        """Its flag, and all others for it."""
        return (self.flag, *self.setting.flag.aliases)

    @cached_property
    def several(self) -> bool:
        """Whether it has any number of values."""
        return get_origin(self._one_of) is tuple

    @cached_property
    def optional(self) -> bool:
        """Whether it may be None."""
        return type(None) in get_args(self.hint)

    @cached_property
    def single(self) -> Any:
        """The type of one value: a plain type or a ``Literal``."""
        return get_args(self._one_of)[0] if self.several else self._one_of

    @cached_property
    def nested(self) -> type[Settings] | None:
        """The class of settings that one value is; None where it is a plain value."""
        found: type[Settings] | None = self.single if hasattr(self.single, "__dataclass_fields__") else None
        return found

    @cached_property
    def choices(self) -> tuple[str, ...]:
        """The values that one may have, where they are few."""
        return get_args(self.single) if get_origin(self.single) is Literal else ()

    @property
    def type_name(self) -> str:
        """The type of one value, as `describe` calls it."""
        return "choice" if self.choices else "table" if self.nested else _KINDS[self.single][0]

    @cached_property
    def _one_of(self) -> Any:
        """The annotation without None."""
        if get_origin(self.hint) not in (Union, types.UnionType):
            return self.hint
        (found,) = (part for part in get_args(self.hint) if part is not type(None))
        return found

    def taken(self, value: object) -> Any:
        """Check a value and bring it to the setting's type: see `settle`.

        Args:
            value: As a person or a file gave it.

        Returns:
            The value as the setting has it.

        Raises:
            UserError: It is of another type, not among the choices or out of the range.
        """
        if value is None and self.optional:
            return None
        if not self.several:
            return self._one(value)
        if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
            return tuple(map(self._one, value))
        return (self._one(value),)

    def _one(self, value: object) -> Any:
        if self.nested is not None:
            return _made(self.nested, value, self.flag)
        if self.choices:
            if value not in self.choices:
                raise UserError(not_among(self.flag, self.choices, value))
            return value
        found = _as(self.single, value)
        if found is None:
            wanted = _KINDS[self.single][1] + (", or several" if self.several else "")
            raise UserError(f"{self.flag} must be {wanted}, not {value!r}")
        if isinstance(found, Path) and "\0" in str(found):
            raise UserError(f"{self.flag} {str(found)!r} holds the character of number 0, which no path has")
        limits = self.setting.range
        if limits is not None and found not in limits:
            finite = "" if _finite(found) else "a finite number, "
            raise UserError(f"{self.flag} must be {finite}{limits}, not {found}")
        return found

    def to_json(self) -> dict[str, Any]:
        """All of it, as JSON values."""
        told, limits = self.setting, self.setting.range
        return {
            "name": self.name,
            "flags": list(self.flags),
            "type": self.type_name,
            "several": self.several,
            "required": self.default is MISSING,
            "default": None if self.default is MISSING else plain(self.default),
            "choices": list(self.choices) or None,
            "range": None if limits is None else _ends(limits),
            "unit": told.unit or None,
            "group": told.group.title,
            "help": told.help,
        }

    def line(self) -> str:
        """All of it in words, for a docstring."""
        kind = " | ".join(map(repr, self.choices)) or self.type_name
        several = f"{kind}, one or several" if self.several else kind
        default = "required" if self.default is MISSING else f"default {plain(self.default)!r}"
        limits = "" if self.setting.range is None else f"; {self.setting.range}"
        return f"{self.name} ({several}; {default}{limits}): {self.setting.help}"


def flag(name: str) -> str:
    """Name the flag of a setting.

    Args:
        name: The name of its field.

    Returns:
        The flag, with its dashes.
    """
    return f"--{name.replace('_', '-')}"


def not_among(flag: str, choices: Sequence[str], value: object) -> str:
    """Say that a value is not among the choices of a setting.

    Args:
        flag: Its flag.
        choices: What may stand there.
        value: What stood there.

    Returns:
        The message of the error.
    """
    hint = value_here(value, choices) or did_you_mean(value, choices)
    return f"{flag} is one of {', '.join(choices)}, not {value!r}{hint}"


@cache
def settings_of(kind: type[Settings]) -> tuple[Described, ...]:
    """List the settings of a class in the order of its fields; fields that are no settings are left out.

    A field that a subclass declares anew, to narrow its type, keeps what is told of it.

    Args:
        kind: The class.

    Returns:
        One entry a setting.
    """
    hints = get_type_hints(kind)
    declared = [vars(base).get("__dataclass_fields__", {}) for base in kind.__mro__]
    found = []
    for one in fields(kind):
        metadata = [names[one.name].metadata for names in declared if one.name in names]
        told = next((known[_KEY] for known in metadata if _KEY in known), None)
        if told is not None:
            found.append(Described(one.name, hints[one.name], one.default, not one.kw_only, told))
    return tuple(found)


def describe(kind: type[Settings]) -> list[dict[str, Any]]:
    """The settings of a class as JSON values, for documents and forms.

    Args:
        kind: The class.

    Returns:
        For each setting its ``name``, ``flags``, ``type`` (bool, int, float, str, path or choice), ``several`` (whether it
        has any number of values), ``required``, ``default``, ``choices`` (or None), ``range`` (or None; ``low`` and
        ``high``, which is None where there is no end, and whether each end ``..._included``), ``unit``, ``group`` and
        ``help``.
    """
    return [one.to_json() for one in settings_of(kind)]


class _Explained:
    """A docstring with the settings of a class, made when somebody reads it, which takes a tenth of the time of a help.

    Args:
        kind: The class, whose own docstring it begins with.
    """

    def __init__(self, kind: type) -> None:
        self._kind = kind
        self._own = (kind.__doc__ or "").rstrip()
        self._made: str | None = None

    def __get__(self, config: object, kind: type | None = None) -> str:
        if self._made is None:
            wrap = TextWrapper(
                _WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 12, break_long_words=False, break_on_hyphens=False
            ).fill
            told: Any = self._kind
            lines = "\n".join(wrap(one.line()) for one in settings_of(told))
            self._made = f"{self._own}\n\n    Args:\n{lines}\n    "
        return self._made


def explained(kind: type[T]) -> type[T]:
    """Write the settings of a class into its docstring, for ``help()``. Stands above `settings_class`.

    Args:
        kind: The class.

    Returns:
        The same class.
    """
    told: Any = kind
    told.__doc__ = _Explained(kind)
    return kind


def settle(config: Settings) -> None:
    """Bring the values of a new dataclass of settings to their types, and check each; for its ``__post_init__``.

    A whole number is taken where a number is meant, a text or any path-like where a path is, a path where a text is, and one
    value or any sequence where a tuple is. Nothing else is turned into another type: the text "8" is no number, and 1 is not
    true.

    Args:
        config: The dataclass; it may be frozen.

    Raises:
        UserError: A value is of another type, not among the choices or out of the range.
    """
    for one in settings_of(type(config)):
        object.__setattr__(config, one.name, one.taken(getattr(config, one.name)))


def of_kind(config: Any, kind: type[Settings]) -> None:
    """See that a function got the settings that it takes, and not what one of them would hold.

    Args:
        config: What it got.
        kind: The class of its settings.

    Raises:
        UserError: It got something else.
    """
    if not isinstance(config, kind):
        name = kind.__name__
        raise UserError(f"the settings are a {name}, not {config!r:.80}; make one, as {name}({config!r:.80}, ...)")


def plain(value: Any) -> Any:
    """Bring a value of a setting to what JSON and TOML have.

    Args:
        value: Any.

    Returns:
        Paths as text, tuples as lists, settings as a mapping of what is said in them, all else as it is.
    """
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    if hasattr(value, "__dataclass_fields__"):
        return said(value)
    return str(value) if isinstance(value, Path) else value


def said(config: Settings) -> dict[str, Any]:
    """Give what settings say beside their defaults, as JSON values.

    Args:
        config: A dataclass of settings, which stands in another.

    Returns:
        Values by the name of the setting.
    """
    values = {one: getattr(config, one.name) for one in settings_of(type(config))}
    return {one.name: plain(value) for one, value in values.items() if value != one.default}


def from_table(kind: type[S], table: Mapping[str, Any], where: str) -> S:
    """Make settings of a mapping, as JSON and TOML have it.

    Args:
        kind: Their class.
        table: Values by the name of the setting, with - or _ between words.
        where: What errors call it.

    Returns:
        The settings.

    Raises:
        UserError: There is no such setting, it cannot have the value, or one that has no default is missing.
    """
    known = {one.name: one for one in settings_of(kind)}
    values = {name.replace("-", "_"): value for name, value in table.items()}
    for name in values:
        if name not in known:
            here, all_of_them = known_here_as(name, known), f"; there are: {', '.join(known)}"
            meant = f"; here it is {' or '.join(here)}" if here else did_you_mean(name, known)
            raise UserError(f"{where}: there is no setting {name!r}{meant or all_of_them}")
    missing = [one.name for one in known.values() if one.default is MISSING and one.name not in values]
    if missing:
        raise UserError(f"{where} lacks {', '.join(missing)}: {dict(table)}")
    try:
        return kind(**values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def from_text(kind: type[S], text: str, where: str) -> S:
    """Make settings of a text, as a flag has it: the values that must be given, and others as NAME=VALUE.

    Args:
        kind: Their class.
        text: ``pictures repeats=2 caption="a cat"``: values with spaces stand in quotes, several have commas between.
        where: What errors call it.

    Returns:
        The settings.

    Raises:
        UserError: See `from_table`; or a quotation mark has no second one.
    """
    reader = shlex.shlex(text, posix=True, punctuation_chars=False)
    reader.whitespace_split, reader.escape, reader.commenters = True, "", ""  # paths have backslashes, and perhaps a #
    try:
        words = list(reader)
    except ValueError:
        raise UserError(f"{where} {text!r}: a quotation mark has no second one") from None
    first = [one for one in settings_of(kind) if one.default is MISSING]
    known = {one.name: one for one in settings_of(kind)}
    table: dict[str, Any] = {one.name: word for one, word in zip(first, words, strict=False)}
    for word in words[len(first) :]:
        name, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"{where} {text!r}: {word!r} is no NAME=VALUE; a text with spaces stands in quotes")
        one = known.get(name := name.replace("-", "_"))
        if one is not None and one.several and one.single is str:  # given again for each, as flags are
            table[name] = [*table.get(name, ()), value]
        else:
            table[name] = value if one is None else _read(one, value)
    return from_table(kind, table, f"{where} {text!r}")


def to_text(config: Settings) -> str:
    """Write settings as `from_text` reads them.

    Args:
        config: The settings.

    Returns:
        The text.
    """
    table, kinds = said(config), settings_of(type(config))
    words = [str(table.pop(one.name)) for one in kinds if one.default is MISSING]
    for name, value in table.items():
        texts = isinstance(value, list) and all(isinstance(one, str) for one in value)
        words += [f"{name}={_written(one)}" for one in (value if texts else [value])]
    return shlex.join(words)


def _written(value: Any) -> str:
    """A value of JSON as a text that `_read` takes."""
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _read(one: Described, text: str) -> Any:
    """A text as a value of a setting; as it is where it is none, which `taken` then tells."""
    if one.several:
        return [_read_one(one.single, part.strip()) for part in text.split(",") if part.strip()]
    return _read_one(one.single, text)


def _read_one(kind: Any, text: str) -> Any:
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    try:
        return int(text) if kind is int else float(text) if kind is float else text
    except ValueError:
        return text


def _made(kind: type[Settings], value: object, flag: str) -> Settings:
    """Settings that stand in others: as they are, or made of a mapping or a text."""
    if isinstance(value, kind):
        return value
    if isinstance(value, Mapping):
        return from_table(kind, value, flag)
    if isinstance(value, str):
        return from_text(kind, value, flag)
    first = [one for one in settings_of(kind) if one.default is MISSING]
    if isinstance(value, os.PathLike) and len(first) == 1 and first[0].single is Path:
        return from_table(kind, {first[0].name: value}, flag)
    raise UserError(f"{flag} takes a {kind.__name__}, a mapping or a text, not {value!r:.80}")


def to_json(config: Settings) -> dict[str, Any]:
    """Give the settings that files keep, as JSON values.

    Args:
        config: A dataclass of settings.

    Returns:
        Values by the name of the setting.
    """
    return {one.name: plain(getattr(config, one.name)) for one in settings_of(type(config)) if one.setting.kept}


def portable(config: Settings) -> dict[str, Any]:
    """Give the settings that files for others tell, as JSON values.

    What lies where on this machine is nobody's business: settings that only say that are left out, and of other paths the
    names alone are told.

    Args:
        config: A dataclass of settings.

    Returns:
        Values by the name of the setting.
    """
    told = [one for one in settings_of(type(config)) if one.setting.kept and not one.setting.place]
    values = {one: getattr(config, one.name) for one in told}
    return {one.name: _portable(one, value) for one, value in values.items()}


def _portable(one: Described, value: Any) -> Any:
    """A value as others are told it."""
    if one.nested is not None and value is not None:
        found = [(portable(item), said(item)) for item in (value if one.several else (value,))]
        return [{name: told[name] for name in spoken if name in told} for told, spoken in found]
    return plain(_names(value) if one.single is Path else value)


def _names(value: Any) -> Any:
    """The names of a path, or of several."""
    return tuple(map(_names, value)) if isinstance(value, tuple) else value and value.name


def pick(kind: type[S], *sources: Settings | Mapping[str, Any]) -> S:
    """A dataclass filled from the fields of others that have the same names, so that no field is copied by hand.

    Args:
        kind: The dataclass to make.
        sources: Dataclasses, and mappings of field names to values; of two with one name, the later one counts.

    Returns:
        The new dataclass. Every field comes from a source, also where the class has a default for it: a field that was
        renamed on one side alone would else fall back to its default without a word.

    Raises:
        TypeError: A field is in no source.
    """
    values: dict[str, Any] = {}
    for source in sources:
        values |= source if isinstance(source, Mapping) else {f.name: getattr(source, f.name) for f in fields(source)}
    names = [one.name for one in fields(kind)]
    absent = [name for name in names if name not in values]
    if absent:
        raise TypeError(f"{kind.__name__} needs {', '.join(absent)}, which none of its sources has")
    return kind(**{name: values[name] for name in names})


def _as(kind: type, value: object) -> Any:
    """A value as a plain type; None where it is of another."""
    if kind is bool or isinstance(value, bool):
        return value if kind is bool and isinstance(value, bool) else None
    if kind is int:
        return int(value) if isinstance(value, numbers.Integral) else None
    if kind is float:
        return _float(value) if isinstance(value, numbers.Real) else None
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str):
        return None
    return at_home(Path(value)) if kind is Path else kind(value)


def _float(value: numbers.Real) -> float:
    """A number as a float; infinite where it is too large."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _ends(limits: Range) -> dict[str, Any]:
    high = None if limits.high == math.inf else limits.high
    return {"low": limits.low, "low_included": not limits.above, "high": high, "high_included": not limits.below}


def _finite(value: float) -> bool:
    return isinstance(value, int) or math.isfinite(value)  # a whole number may be too large for a float
