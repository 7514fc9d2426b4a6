"""Settings in a TOML file, as ``--config`` takes it. Imports no torch.

A key is the name of a setting or one of its flags without dashes, with - or _ between words.
"""

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

from .encodings import unicode_text
from .errors import UserError, did_you_mean
from .files import at_home, regular
from .other_names import known_here_as
from .parsing import refuse_halves, refusing
from .settings import Described, Settings, from_table, settings_of, to_text

S = TypeVar("S", bound=Settings)
_OTHERS = (".yaml", ".yml", ".json")
_DATASETS = ("general", "datasets")  # the tables of a dataset file of sd-scripts
_PLUGIN = "plugin"  # the key of modules with methods of others


def load(kind: type[S], path: str | Path) -> S:
    """Make settings of a class from a file.

    Args:
        kind: The class, such as `TrainConfig`.
        path: The file; the ``config.toml`` of a run is one.

    Returns:
        The settings. ``dataclasses.replace`` changes what shall be otherwise. Modules with methods of others, which the
        file may name, are not imported: see `plugins`.

    Raises:
        UserError: The file cannot be read, has a key of no setting, a value that a setting cannot have, or lacks one.
    """
    found = read(Path(path), settings_of(kind))
    missing = [one.name for one in fields(kind) if one.default is MISSING and one.default_factory is MISSING and one.init]
    if lacking := [name for name in missing if name not in found]:
        raise UserError(f"{path} does not say {', '.join(lacking)}, which has no default")
    return kind(**found)


def read(path: Path, settings: Iterable[Described]) -> dict[str, Any]:
    """Read a file of settings.

    Args:
        path: The file.
        settings: Those that may stand in it.

    Returns:
        The values by the name of their setting, as TOML has them; a table that stands for a text is that text.

    Raises:
        UserError: The file is no TOML, or has a key of no setting or a value of another kind. It names file and line or key.
    """
    known = {_key(flag): one for one in settings for flag in one.flags if flag.startswith("--")}
    found: dict[str, Any] = {}
    for key, value in parsed(path).items():
        if key == _PLUGIN:
            continue
        one = known.get(_key(key))
        if one is None:
            raise UserError(f"{path}: there is no setting {key!r} of this command{_meant(key, value, known)}")
        if one.setting.table and isinstance(value, list):
            value = [_text(path, one, item) if isinstance(item, dict) else item for item in value]
        if one.nested is not None:
            name, items = f"{path}: [[{one.name}]]", value if isinstance(value, list) else [value]
            value = [to_text(from_table(one.nested, item, name)) if isinstance(item, dict) else item for item in items]
        _check(path, key, value, one)
        found[one.name] = value
    return found


def plugins(path: Path) -> list[str]:
    """The modules under the key ``plugin``, which is no setting: they are loaded before any is read.

    Args:
        path: The file.

    Returns:
        Their names.

    Raises:
        UserError: The file cannot be read, or names something else.
    """
    found = parsed(path).get(_PLUGIN, [])
    modules = found if isinstance(found, list) else [found]
    if not all(isinstance(module, str) for module in modules):
        raise UserError(f"{path}: {_PLUGIN!r} takes names of modules, not {found!r}")
    return modules


def parsed(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Args:
        path: The file.

    Returns:
        What is in it.

    Raises:
        UserError: It cannot be read, or is no TOML.
    """
    path = at_home(path)
    try:
        text = unicode_text(regular(path).read_bytes())
    except ValueError as error:
        raise UserError(f"{path} {error}; save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"the settings file {path} cannot be read: {error.strerror}") from None
    try:
        with refusing(f"{path} is no valid TOML"):
            found = tomllib.loads(text)
            refuse_halves(text, found)
            return found
    except UserError as error:
        if path.suffix.lower() in _OTHERS:
            raise UserError(f"{error}; settings are written as TOML here: steps = 500") from None
        if "\\" not in text:
            raise
        raise UserError(f"{error}; a path with backslashes takes single quotes: folder = 'C:\\Users\\me'") from None


def _key(flag: str) -> str:
    """A flag, or a key of the file, in one spelling."""
    return flag.lstrip("-").replace("-", "_")


def _meant(key: str, value: object, known: Mapping[str, Described]) -> str:
    """What a key that is no setting may have been meant as."""
    for name, one in known.items():
        if one.setting.flag.negative and _key(key) == f"{'empty' if one.several else 'no'}_{name}":
            return f"; did you mean {name} = {'[]' if one.several else 'true' if value is False else 'false'}?"
    if key in _DATASETS and isinstance(value, (dict, list)) and "folder" in known:
        return "; a dataset file of sd-scripts is given as --dataset-config"
    here = known_here_as(key, known)
    if here:
        return f"; here it is {' or '.join(here)}"
    for name, one in known.items():
        if key and one.setting.flag.contrary_of == _key(key):
            return f"; that is the default here: leave it away, or take {name} = true for the contrary"
    return did_you_mean(_key(key), known) or f"; there are: {', '.join(sorted(known))}"


def _text(path: Path, one: Described, table: Mapping[str, Any]) -> str:
    """A table as the text that the setting takes: the words that it begins with, and the rest as NAME=VALUE."""
    first = one.setting.table
    missing = [name for name in first if not isinstance(table.get(name), str)]
    if missing:
        needs = ", ".join(first)
        raise UserError(f"{path}: a [[{one.name}]] needs {needs}; this one lacks {', '.join(missing)}: {table}")
    rest = {name: value for name, value in table.items() if name not in first}
    values = (f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in rest.items())
    return " ".join([*(table[name] for name in first), *values])


def _check(path: Path, key: str, value: object, one: Described) -> None:
    """Raise UserError for a value of a kind that would be another one as the text of a flag."""
    values = value if isinstance(value, list) else [value]
    if any(isinstance(item, dict) for item in values):
        raise UserError(f"{path}: {key!r} is a table, but the settings of a command stand at the top of the file")
    if isinstance(value, list) and not one.several:
        raise UserError(f"{path}: {key!r} takes one value, not a list")
    for item in values:
        if isinstance(item, bool) != (one.single is bool):
            wanted = "true or false" if one.single is bool else "a value"
            raise UserError(f"{path}: {key!r} takes {wanted}, not {item!r}")
