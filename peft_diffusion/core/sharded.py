"""Weights that are sharded over processes, each of which holds a part."""

from torch import Tensor


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor as one, gathered from all processes, which have to ask together; any other as it is."""
    return _given(tensor, "full_tensor")


def here(tensor: Tensor) -> Tensor:
    """What of a sharded tensor this process holds; any other as it is."""
    return _given(tensor, "to_local")


def _given(tensor: Tensor, ability: str) -> Tensor:
    """What a DTensor gives when it is asked so; any other tensor itself."""
    # Told by what it can do: who has a DTensor has imported its module, and nobody else needs it.
    ask = getattr(tensor, ability, None)
    given: Tensor = tensor if ask is None else ask()
    return given
