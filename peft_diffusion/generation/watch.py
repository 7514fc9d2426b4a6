"""Hooks that run before each call of a network that denoises, while a pipeline has something to watch there."""

import weakref
from collections.abc import Callable
from typing import Any, Self

from torch import nn

from ..bases.base import Base, network_of
from ..bases.pipelines import Pipeline


class Watch:
    """A hook that serves every pipeline that shares its network.

    Args:
        pipe: The pipeline that it was made for; it is not kept alive.
    """

    def __init__(self, pipe: Pipeline | None) -> None:
        self._pipe = None if pipe is None else weakref.ref(pipe)

    @property
    def pipe(self) -> Pipeline | None:
        """The pipeline that it was made for; None where that is gone."""
        return None if self._pipe is None else self._pipe()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)(memo.get(id(self.pipe)))  # a pipeline that is copied is under way when its network is

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (None,)

    def __call__(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at a call of the network, which is about to begin. Raises UserError for one that cannot be served."""
        raise NotImplementedError


def keep(kind: type[Watch], pipe: Base, needs: Callable[[Base], bool]) -> None:
    """Watch the network of a pipeline while, and only while, a pipeline needs it.

    What ``torch.compile`` returned is watched itself: it would not see a hook that comes to the module inside of it later.

    Args:
        kind: The class of the watch.
        pipe: The pipeline; of a base without a network that denoises, nothing is watched.
        needs: Whether a pipeline needs it.
    """
    name, _ = network_of(pipe) or ("", None)
    network: Any = getattr(pipe, name, None)
    if network is None:
        return
    hooks = network._forward_pre_hooks
    watches = {key: hook for key, hook in hooks.items() if isinstance(hook, kind)}
    wanted = needs(pipe)
    for key, watch in list(watches.items()):
        if watch.pipe is None or not (wanted or needs(watch.pipe)):
            del hooks[key], network._forward_pre_hooks_with_kwargs[key], watches[key]
    if wanted and not watches:
        owner: Any = pipe
        network.register_forward_pre_hook(kind(owner), with_kwargs=True)
