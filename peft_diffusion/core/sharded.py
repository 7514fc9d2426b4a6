"""Weights that are sharded over processes, each of which holds a part."""

from torch import Tensor


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor as one, gathered from all processes, which have to ask together; any other as it is."""
    # Told by what it can do: DTensor's own module takes long to import, and who has one has imported it.
    gather = getattr(tensor, "full_tensor", None)
    if gather is None:
        return tensor
    gathered: Tensor = gather()
    return gathered
