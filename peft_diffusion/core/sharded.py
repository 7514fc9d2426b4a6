"""Weights that are sharded over processes, each of which holds a part."""

from torch import Tensor


def whole(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor from all processes, which have to ask together.

    Args:
        tensor: Sharded or not.

    Returns:
        The whole tensor; one that is not sharded as it is.
    """
    return _given(tensor, "full_tensor")


def local_part(tensor: Tensor) -> Tensor:
    """Give the part of a sharded tensor that this process holds.

    Args:
        tensor: Sharded or not.

    Returns:
        The part; one that is not sharded as it is.
    """
    return _given(tensor, "to_local")


def _given(tensor: Tensor, ability: str) -> Tensor:
    """What a DTensor gives when it is asked so; any other tensor itself."""
    # Told by what it can do: who has a DTensor has imported its module, and nobody else needs it.
    ask = getattr(tensor, ability, None)
    given: Tensor = tensor if ask is None else ask()
    return given
