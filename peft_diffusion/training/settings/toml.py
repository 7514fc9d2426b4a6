"""Settings as JSON and TOML. Imports no torch."""

import json

from ...core.settings import Settings, to_json


def to_toml(config: Settings) -> str:
    """The fields as TOML, for `--config`; those at None are left out."""
    known = to_json(config)
    # Not ASCII: TOML knows no surrogate pairs, which JSON would write an emoji as.
    lines = [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in known.items() if value is not None]
    return "\n".join(lines) + "\n"
