"""What of a run's settings may be otherwise when it goes on."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from .blocks import ranked
from .checks import flag
from .shared import RunSettings
from .toml import plain, to_json

# Fields that a resumed run may have otherwise: they change where things go and how often one looks, not what is learned.
# The pictures and captions themselves are compared apart, so folders may have moved.
_SOURCES = ("folder", "regularisation", "texts", "held_out_text", "missing_captions")
_PLACES = ("output", "run_dir", "cache", "device", "cuda_graph", "memory", "shard_base", "preset", "resume", "overwrite")
_LENGTHS = ("steps", "epochs", "save_every", "log_every", "preview_prompts", "preview_every", "preview_steps")
_ENDS = ("keep", "keep_checkpoints", "patience", "log_with")
FREE_ON_RESUME = frozenset((*_SOURCES, *_PLACES, *_LENGTHS, *_ENDS))


def changes(before: Mapping[str, Any], now: RunSettings) -> list[str]:
    """How a configuration differs from the one that a run was started with, in what the result depends on."""
    current = to_json(now)
    # A run of an older version was told nothing of what came later, and went by what is the default now.
    before = {field.name: plain(field.default) for field in fields(now) if field.default is not MISSING} | dict(before)
    if not ranked(now):  # an older version wrote down a rank that said nothing
        before["rank"] = current["rank"]
    names = [name for name in current if name not in FREE_ON_RESUME and before.get(name) != current[name]]
    return [f"{flag(name)} was {before.get(name)}, now {current[name]}" for name in names]
