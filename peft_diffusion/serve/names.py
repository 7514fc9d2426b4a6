"""Samplers and schedulers by the names of A1111. Imports no torch."""

from collections.abc import Mapping
from types import MappingProxyType

from ..bases.schedulers import SCHEDULERS, canonical, label, parted
from ..core.errors import UserError, did_you_mean

# The schedule that A1111 takes for a sampler where it is told "Automatic" (its modules/sd_samplers_kdiffusion.py).
AUTOMATIC: Mapping[str, str] = MappingProxyType(
    {
        "dpm2": "karras",
        "dpm2-a": "karras",
        "dpm++": "karras",
        "dpm++-sde": "karras",
        "dpm++-2m-sde": "exponential",
        "dpm++-3m-sde": "exponential",
    }
)
# By the names of A1111's modules/sd_schedulers.py.
_SCHEDULES: Mapping[str, str] = MappingProxyType(
    {"uniform": "uniform", "karras": "karras", "exponential": "exponential", "sgm_uniform": "trailing", "beta": "beta"}
)
_LABELS = {"automatic": "Automatic", "sgm_uniform": "SGM Uniform"}


def scheduler(sampler: str | None, schedule: str | None) -> str | None:
    """Choose a scheduler by what A1111 calls sampler and schedule.

    Args:
        sampler: Such as "Euler a", "DPM++ 2M Karras" or "k_dpmpp_2m"; None or "" for the base's own.
        schedule: Such as "karras", "SGM Uniform" or "automatic"; None or "" is automatic.

    Returns:
        The name here; None for the base's own.

    Raises:
        UserError: There is no such sampler or schedule.
    """
    if not sampler:
        if schedule and schedule.lower() != "automatic":
            raise UserError(f"the scheduler {schedule!r} is for a sampler; give sampler_name too")
        return None
    kind, spacing = parted(canonical(sampler.removeprefix("k_")))
    known = {name.casefold(): name for name in _SCHEDULES} | {title(name).casefold(): name for name in _SCHEDULES}
    asked = (schedule or "automatic").casefold()
    if asked == "automatic":
        spacing = spacing or AUTOMATIC.get(kind, "")
    elif asked in known:
        spacing = _SCHEDULES[known[asked]]
    else:
        there = ["automatic", *_SCHEDULES]
        raise UserError(f"there is no scheduler {schedule!r}; there are: {', '.join(there)}{did_you_mean(schedule, there)}")
    return f"{kind}-{spacing}" if spacing else kind


def title(schedule: str) -> str:
    """Say what A1111 shows for a schedule.

    Args:
        schedule: Its name there.

    Returns:
        Its label.
    """
    return _LABELS.get(schedule, schedule.title())


def samplers() -> list[dict[str, object]]:
    """List the samplers as ``/sdapi/v1/samplers`` does.

    Returns:
        One entry a sampler.
    """
    found: list[dict[str, object]] = []
    for name in SCHEDULERS:
        options = {"scheduler": AUTOMATIC[name]} if name in AUTOMATIC else {}
        found.append({"name": label(name), "aliases": [name], "options": options})
    return found


def schedulers() -> list[dict[str, object]]:
    """List the schedules as ``/sdapi/v1/schedulers`` does.

    Returns:
        One entry a schedule.
    """
    return [
        {"name": name, "label": title(name), "aliases": None, "default_rho": -1.0, "need_inner_model": False}
        for name in ("automatic", *_SCHEDULES)
    ]
