"""What BitFit computes at a site."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...core.adapter import Adapter, Site, float32_parameter
from ...core.errors import UserError
from . import LAYER_BIAS, NORM_BIAS, NORM_WEIGHT

_NORMS = (nn.GroupNorm, nn.LayerNorm)
_CHANNELS_SECOND = (nn.Conv2d, nn.GroupNorm)


def serves(site: Site) -> bool:
    """Tell whether a module is a layer or norm that has a bias.

    Args:
        site: A module of a base.

    Returns:
        Whether it is.
    """
    return isinstance(site, (nn.Linear, nn.Conv2d, *_NORMS)) and isinstance(site.bias, Tensor)


def fresh(site: Site) -> "BitFitAdapter":
    """Make an adapter that changes no bias yet.

    Args:
        site: The layer or norm.

    Returns:
        The adapter.
    """
    return BitFitAdapter(site, torch.zeros(_length(site)), None)


def read(site: Site, tensors: Mapping[str, Tensor]) -> "BitFitAdapter":
    """Make an adapter from tensors in LyCORIS' layout.

    Args:
        site: The layer or norm.
        tensors: By suffix.

    Returns:
        The adapter.

    Raises:
        UserError: A tensor is missing or does not fit the site.
    """
    name = NORM_BIAS if isinstance(site, _NORMS) else LAYER_BIAS
    if name not in tensors:
        raise UserError(f"{name} is missing")
    bias, weight = tensors[name], tensors.get(NORM_WEIGHT)
    for tensor in (bias, weight):
        if tensor is not None and tensor.numel() != _length(site):
            raise UserError(f"{tuple(tensor.shape)} does not fit a {type(site).__name__} with {_length(site)} biases")
    return BitFitAdapter(site, bias.flatten(), None if weight is None or not weight.any() else weight.flatten())


class BitFitAdapter(Adapter):
    """The change of one bias, (out,). ``weight`` is None, or the fixed change of a norm's weight, of the same shape."""

    weight: Tensor | None

    def __init__(self, site: Site, bias: Tensor, weight: Tensor | None) -> None:
        super().__init__()
        self.bias = float32_parameter(bias)
        self.register_buffer("weight", None if weight is None else weight.detach().to(torch.float32).clone())
        self.is_norm = isinstance(site, _NORMS)
        self.channels_second = isinstance(site, _CHANNELS_SECOND)

    def residual(self, x: Tensor, y: Tensor, base: Tensor) -> Tensor:
        """The bias, along the site's channels."""
        change = self._along(self.bias, y)
        return change if self.weight is None else change + self._normalized(x) * self._along(self.weight, y)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The bias as it is."""
        return self.weight, self.bias.detach()

    def state(self) -> dict[str, Tensor]:
        """Programs look for a norm's ``w_norm`` first, so that it is there even where nothing changes the weight."""
        if not self.is_norm:
            return {LAYER_BIAS: self.bias}
        return {NORM_WEIGHT: torch.zeros_like(self.bias) if self.weight is None else self.weight, NORM_BIAS: self.bias}

    def _along(self, values: Tensor, y: Tensor) -> Tensor:
        values = values.to(y.dtype)
        return values.view(-1, *[1] * (y.ndim - 2)) if self.channels_second else values

    def _normalized(self, x: Tensor) -> Tensor:
        """What the norm multiplies by its weight."""
        if isinstance(self.site, nn.GroupNorm):
            return F.group_norm(x, self.site.num_groups, None, None, self.site.eps)
        if isinstance(self.site, nn.LayerNorm):
            return F.layer_norm(x, self.site.normalized_shape, None, None, self.site.eps)
        raise TypeError(f"{type(self.site).__name__} is no norm")


def _length(site: Site) -> int:
    bias = getattr(site, "bias", None)
    if not isinstance(bias, Tensor):
        raise UserError(f"bitfit serves layers and norms with a bias, which this {type(site).__name__} does not have")
    return bias.numel()
