"""Timesteps that stay on the host.

A scheduler that looks its noise level up by a timestep that lies on the device makes the host wait for all steps before, so
that the device idles until the next one is issued. On the host the same lookup waits for nothing.
"""

import functools
import inspect
from collections.abc import Hashable
from typing import Any, cast

from ..bases.schedulers import FLOW_SCHEDULERS, SCHEDULERS

_KNOWN = frozenset(name for table in (SCHEDULERS, FLOW_SCHEDULERS) for name, _ in table.values())
"""The classes of diffusers that are known to compute with timesteps of the host."""


class HostSteps:
    """Mixed into the class of a scheduler whose timesteps stay on the host. A copy of the scheduler is a plain one."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _remade, (type(self).__mro__[2],), dict(self.__dict__)


def _remade(cls: type[Any]) -> Any:
    return object.__new__(cls)


@functools.cache
def _on_host(cls: Any) -> type[HostSteps]:
    plain = cls.set_timesteps
    signature = inspect.signature(plain)

    @functools.wraps(plain)  # pipelines look at its parameters
    def set_timesteps(self: Any, *args: Any, **named: Any) -> None:
        bound = signature.bind(self, *args, **named)
        bound.arguments["device"] = "cpu"
        plain(*bound.args, **bound.kwargs)

    # Under the same name, by which pipelines are saved.
    return type(cls.__name__, (HostSteps, cls), {"__module__": cls.__module__, "set_timesteps": set_timesteps})


def keep_on_host(scheduler: Any) -> None:
    """Have a scheduler keep the timesteps that it sets from now on on the host; one that is not known is left alone.

    Args:
        scheduler: One of diffusers.
    """
    if type(scheduler).__name__ in _KNOWN and not isinstance(scheduler, HostSteps):
        scheduler.__class__ = _on_host(cast(Hashable, type(scheduler)))


def release(scheduler: Any) -> None:
    """Give a scheduler its own class back.

    Args:
        scheduler: The same.
    """
    if isinstance(scheduler, HostSteps):
        scheduler.__class__ = type(scheduler).__mro__[2]
