"""The flags of a command from a TOML file (``--config run.toml``), and what cyclopts would let pass."""

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from cyclopts import App, ArgumentCollection, CycloptsError
from cyclopts.argument import Argument
from cyclopts.config import Dict

from ..core.errors import UserError
from .flags import setting_of

_BLOCK = ("component", "target", "method")
_PLUGIN = "plugin"


class RunFile:
    """Fills in, from a file, what the command line left open. A key is a flag without its dashes, with - or _ between words.

    Raises UserError, which names the file and the line or key, where the file is no TOML or has a key of no flag.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def plugins(self) -> list[str]:
        """The modules under the key ``plugin``, which no command knows: they are loaded before it is read."""
        found = self._read().get(_PLUGIN, [])
        modules = found if isinstance(found, list) else [found]
        if not all(isinstance(module, str) for module in modules):
            raise UserError(f"{self.path}: {_PLUGIN!r} takes names of modules, not {found!r}")
        return modules

    def __call__(self, app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
        """Called by cyclopts when the command line is read."""
        values = {key: value for key, value in self._read().items() if key != _PLUGIN}
        flags = [(_key(name), name, a) for a in arguments for name in a.names if name.startswith("--")]
        known = {key: a for key, name, a in flags if name not in a.negatives}
        negative = {key: a for key, name, a in flags if name in a.negatives}
        for key, value in values.items():
            argument = known.get(_key(key))
            if argument is None and _key(key) in negative:
                meant = _positive(negative[_key(key)], value)
                raise UserError(f"{self.path}: there is no setting {key!r} of this command; did you mean {meant}?")
            if argument is None:
                raise UserError(f"{self.path}: there is no setting {key!r} of this command{_nearest(key, known)}")
            if argument.name == "--block" and isinstance(value, list):
                values[key] = value = [_block(self.path, item) if isinstance(item, dict) else item for item in value]
            _check(self.path, key, value, argument)
        values = {key: value for key, value in values.items() if not _given_otherwise(known[_key(key)], known)}
        Dict(values, source=str(self.path), use_commands_as_keys=False)(app, commands, arguments)

    def _read(self) -> dict[str, Any]:
        try:
            return tomllib.loads(self.path.read_text("utf-8-sig"))
        except tomllib.TOMLDecodeError as error:
            raise UserError(f"{self.path} is no valid TOML: {error}") from None
        except UnicodeDecodeError:
            raise UserError(f"{self.path} is no text file in UTF-8") from None
        except OSError as error:
            raise UserError(f"the settings file {self.path} cannot be read: {error.strerror}") from None


def whole_numbers(_: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Refuse 1.5 where a whole number is meant: cyclopts rounds it."""
    for argument in arguments:
        for token in argument.tokens:
            if int in _kinds(argument.hint) and float not in _kinds(argument.hint) and "." in token.value:
                raise CycloptsError(msg=f'Invalid value for {argument.name}: "{token.value}" is no whole number.')


def _given_otherwise(argument: Argument, known: Mapping[str, Argument]) -> bool:
    """Whether the command line has another setting that this one, from the file, would stand in place of."""
    told = setting_of(argument)
    return told is not None and told.setting.instead_of in known and bool(known[told.setting.instead_of].tokens)


def _key(flag: str) -> str:
    """A flag, or a key of the file, in one spelling."""
    return flag.lstrip("-").replace("-", "_")


def _positive(argument: Argument, value: Any) -> str:
    """The line that means what a negative flag of this value does."""
    meant = "[]" if bool not in _kinds(argument.hint) else "true" if value is False else "false"
    return f"{_key(argument.name)} = {meant}"


def _block(path: Path, table: dict[str, Any]) -> str:
    """A ``[[block]]`` table as the flag takes it."""
    missing = [name for name in _BLOCK if not isinstance(table.get(name), str)]
    if missing:
        raise UserError(f"{path}: a [[block]] needs {', '.join(_BLOCK)}; this one lacks {', '.join(missing)}: {table}")
    rest = (f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in table.items())
    return " ".join([*(table[name] for name in _BLOCK), *(text for text in rest if text.split("=")[0] not in _BLOCK)])


def _check(path: Path, key: str, value: Any, argument: Argument) -> None:
    """The type of a value, where turning it into text and back would lose something."""
    kinds = _kinds(argument.hint)
    values = value if isinstance(value, list) else [value]
    if any(isinstance(item, dict) for item in values):
        raise UserError(f"{path}: {key!r} is a table, but the settings of a command stand at the top of the file")
    if isinstance(value, list) and tuple not in kinds:
        raise UserError(f"{path}: {key!r} takes one value, not a list")
    for item in values:
        if isinstance(item, bool) != (bool in kinds):
            wanted = "true or false" if bool in kinds else "a value"
            raise UserError(f"{path}: {key!r} takes {wanted}, not {item!r}")


def _kinds(hint: Any) -> set[Any]:
    """The plain types in an annotation: those of ``tuple[int, ...] | None`` are tuple, int and NoneType."""
    parts = get_args(hint)
    own = {getattr(hint, "__origin__", hint)}
    return own.union(*(_kinds(part) for part in parts)) if parts else own


def _nearest(key: str, known: dict[str, Argument]) -> str:
    near = difflib.get_close_matches(_key(key), known, 1)
    return f"; did you mean {near[0]!r}?" if near else f"; there are: {', '.join(sorted(known))}"
