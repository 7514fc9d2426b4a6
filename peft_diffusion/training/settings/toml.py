"""Settings as TOML, for `--config`. Imports no torch."""

import json
from collections.abc import Collection
from typing import Any

from ...core.settings import Settings, plain, said, settings_of
from .shared import Resolved


def to_toml(config: Settings, names: Collection[str] | None = None) -> str:
    """Write settings as TOML.

    Args:
        config: Settings as they were asked for, or as a run goes by them.
        names: Those that are written; by default all.

    Returns:
        A line for each setting that is not None. Where the settings are those of a run, the lines have what was chosen, and
        the defaults that are the same for every run; what was derived stands there as comments which say from what, so that
        it is derived anew when the file is used.
    """
    told = [one for one in settings_of(type(config)) if one.setting.kept and (names is None or one.name in names)]
    own = {one.name: getattr(config, one.name) for one in told if one.nested is None}
    lines = []
    for name, value in own.items():
        asked = config.asked.get(name) if isinstance(config, Resolved) else value
        if asked is not None:
            lines.append(_line(name, asked))
        if isinstance(config, Resolved) and name in config.derived and value is not None:
            lines.append(f"# {_line(name, value)}  ({config.derived[name]})")
    # Tables stand at the end: what comes after one is in it.
    for one in told:
        for table in getattr(config, one.name) if one.nested is not None else ():
            lines += ["", f"[[{one.name}]]", *(_line(*pair) for pair in said(table).items())]
    return "\n".join(lines) + "\n"


def _line(name: str, value: Any) -> str:
    # Not ASCII: TOML knows no surrogate pairs, which JSON would write an emoji as.
    text = json.dumps(plain(value), ensure_ascii=False)
    return f"{name} = {text}".replace("\x7f", "\\u007f")  # which JSON leaves as it is, and TOML does not know
