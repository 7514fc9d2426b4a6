"""What of a run's settings may be otherwise when it goes on."""

from collections.abc import Collection, Mapping
from dataclasses import MISSING
from typing import Any

from ...core.settings import Settings, flag, plain, settings_of, to_json
from .placements import ranked
from .shared import AskedSettings, MethodSettings, RunSettings

DERIVED = "derived"
"""Where checkpoints hold which settings were derived, beside the settings themselves."""


PROCESSES = "processes"
"""Where they hold how many processes trained together."""


FILES = "files"
"""Where they hold which adapter files the run depends on, by what for: `INIT`, `BESIDE` and `WEIGHED`."""


INIT, BESIDE, WEIGHED = "init_from", "beside", "weighed"
"""What the file is called that a run begins from, those that it is trained beside, and those that it learns to weigh; the
first two also in the spec of its own file."""


def derived_before(before: Mapping[str, Any] | None, name: str) -> Any:
    """Read a setting of the run that goes on.

    Args:
        before: What that run had; None where there is none.
        name: The setting.

    Returns:
        The value, where that run had derived it; else None.
    """
    return None if before is None or name not in before.get(DERIVED, ()) else before[name]


def free_on_resume(kind: type[Settings]) -> frozenset[str]:
    """List the settings that a run may have otherwise when it goes on.

    They change where things go and how often one looks, not what is learned. The pictures and captions themselves are
    compared apart, so folders may have moved.

    Args:
        kind: The class of settings.

    Returns:
        Their names.
    """
    return frozenset(one.name for one in settings_of(kind) if one.setting.free_on_resume)


def _without(value: Any, free: Collection[str] | None) -> Any:
    """A value without what of the settings in it may be otherwise."""
    if free is None or not isinstance(value, list):
        return value
    return [{name: told for name, told in item.items() if name not in free} for item in value]


def changes(before: Mapping[str, Any], now: AskedSettings | RunSettings, open: Collection[str] = ()) -> list[str]:
    """Compare a configuration with the one that a run was started with, in what the result depends on.

    Args:
        before: What the run had.
        now: The configuration.
        open: Settings that are not compared, as they may come to another value yet.

    Returns:
        A line for each difference.
    """
    current = to_json(now)
    inner = {one.name: free_on_resume(one.nested) for one in settings_of(type(now)) if one.nested is not None}
    before, current = ({name: _without(value, inner.get(name)) for name, value in one.items()} for one in (before, current))
    # A run of an older version was told nothing of what came later, and went by what is the default now.
    defaults = {one.name: plain(one.default) for one in settings_of(type(now)) if one.default is not MISSING}
    unknown = {name for name, default in defaults.items() if default is None and name not in before}  # derived now
    before = defaults | dict(before)
    if isinstance(now, MethodSettings) and not ranked(now):  # an older version wrote down a rank that said nothing
        before["rank"] = current["rank"]
    free = free_on_resume(type(now)) | set(open) | unknown
    names = [name for name in current if name not in free and before.get(name) != current[name]]
    return [f"{flag(name)} was {before.get(name)}, now {current[name]}" for name in names]
