"""Weights that are sharded over processes, each of which holds a part."""

from torch import Tensor


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor as one, gathered from all processes, which have to ask together; any other as it is."""
    # Told by what it can do: who has a DTensor has imported its module, and nobody else needs it.
    gather = getattr(tensor, "full_tensor", None)
    if gather is None:
        return tensor
    gathered: Tensor = gather()
    return gathered


def here(tensor: Tensor) -> Tensor:
    """What of a sharded tensor this process holds; any other as it is."""
    local = getattr(tensor, "to_local", None)
    if local is None:
        return tensor
    own: Tensor = local()
    return own
