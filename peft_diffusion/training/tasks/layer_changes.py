"""How far an adapter moved each layer."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...core import site
from ...core.adapter import Adapter, parts_of
from ...core.errors import FoldError, UserError
from ...core.merge import dense_weight
from ...core.sharded import whole


@torch.no_grad()
def layer_changes(parts: Mapping[str, nn.Module], name: str) -> dict[str, float]:
    """Measure how far each layer moved.

    Args:
        parts: Components by name.
        name: The adapter.

    Returns:
        By component and path, to five digits: the Frobenius norm of the change over that of the weight (of the bias, where
        only that changes); for a method that does not fold, the root mean square of its parameters.
    """
    return {
        f"{component}.{path}": float(f"{_change(adapter):.5g}")
        for component, part in parts.items()
        for path, adapter in site.adapters(part, name).items()
    }


def _change(adapter: Adapter) -> float:
    try:
        weight, bias = _weight_and_bias(adapter.site)
        folded = [part.fold(weight, bias) for part in parts_of(adapter)]
    except (FoldError, UserError):
        return _size(adapter)
    weights = [change for change, _ in folded if change is not None]
    biases = [change for _, change in folded if change is not None]
    if weights:
        return _ratio(sum(weights[1:], weights[0]), weight)
    return _ratio(sum(biases[1:], biases[0]), bias) if biases and bias is not None else _size(adapter)


def _weight_and_bias(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """In float32. Raises FoldError for what has no weight, such as a whole sublayer."""
    if getattr(module, "weight", None) is None:
        raise FoldError("there is no weight to change")
    bias = getattr(module, "bias", None)
    return dense_weight(module), whole(bias).detach().float() if isinstance(bias, Tensor) else None


def _size(adapter: Adapter) -> float:
    values = [parameter.detach().float() for parameter in adapter.parameters()]
    count = sum(value.numel() for value in values)
    return math.sqrt(sum(float(value.square().sum()) for value in values) / max(1, count))


def _ratio(change: Tensor, of: Tensor) -> float:
    return float(change.float().norm() / of.norm().clamp(min=1e-12))
