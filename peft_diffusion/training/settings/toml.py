"""Settings as JSON and TOML. Imports no torch."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from ...core.settings import Settings

_OF_THE_COMMAND = ("resume", "overwrite")  # said anew with every command, so in no file


def to_json(config: Settings) -> dict[str, Any]:
    """The fields as JSON values; paths as text."""
    values = ((field.name, getattr(config, field.name)) for field in fields(config))
    return {name: plain(value) for name, value in values if name not in _OF_THE_COMMAND}


def to_toml(config: Settings) -> str:
    """The fields as TOML, for `--config`; those at None are left out."""
    known = to_json(config)
    # Not ASCII: TOML knows no surrogate pairs, which JSON would write an emoji as.
    lines = [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in known.items() if value is not None]
    return "\n".join(lines) + "\n"


def plain(value: Any) -> Any:
    """A value as JSON and TOML have it."""
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
