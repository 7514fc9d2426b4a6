"""What the methods that change the weight of a Linear or Conv2d share.

Each of them is a change of the base's own weight, whatever other adapters the site carries: several add up, in any order.
"""

from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...core.adapter import Adapter, Site
from ...core.site import base_class
from ...core.weight_change import serves as serves
from ...core.weight_change import weight_shape as weight_shape
from .hyper_parameters import ALPHA


def applied(site: Site, x: Tensor, weight: Tensor) -> Tensor:
    """Apply a weight as the site applies its own, without a bias.

    Args:
        site: A Linear or Conv2d.
        x: Its input.
        weight: Of the shape of its own.

    Returns:
        The product.
    """
    if isinstance(site, nn.Conv2d):
        product: Tensor = site._conv_forward(x, weight, None)
        return product
    return F.linear(x, weight)


def base_output(site: Site, x: Tensor) -> Tensor:
    """Compute what the base's own forward makes of an input, bias and all, also where its weight is quantized.

    Args:
        site: A module that carries adapters.
        x: Its input.

    Returns:
        Its output without any adapter.
    """
    output: Tensor = base_class(site).forward(site, x)
    return output


def channels(values: Tensor, y: Tensor, site: Site) -> Tensor:
    """Shape one value a channel so that it adds to or multiplies an output.

    Args:
        values: (channels,), in any shape.
        y: The output.
        site: A Linear, Conv2d or norm.

    Returns:
        The values in the dtype of ``y``.
    """
    flat = values.reshape(-1).to(y.dtype)
    if isinstance(site, nn.GroupNorm):  # which takes any number of axes behind the channels
        return flat.view(-1, *[1] * (y.ndim - 2))
    return flat[:, None, None] if isinstance(site, nn.Conv2d) else flat


def without_bias(site: Site, base: Tensor) -> Tensor:
    """Take the bias of a site from its output.

    Args:
        site: A Linear or Conv2d.
        base: Its output.

    Returns:
        What its weight alone gave.
    """
    bias = site.bias
    return base - channels(bias.detach(), base, site) if isinstance(bias, Tensor) else base


@lru_cache(maxsize=4096)
def single(value: float) -> float:
    """Round a number to float32, so that a scale made of it is the same after loading.

    Args:
        value: Any.

    Returns:
        The number that a file will hold.
    """
    return torch.tensor(value, dtype=torch.float32).item()


def read_alpha(tensors: Mapping[str, Tensor], rank: int) -> float:
    """Read the alpha of a site.

    Args:
        tensors: Those of the site, by suffix.
        rank: What no alpha, and an alpha of 0, mean.

    Returns:
        The alpha.
    """
    return (float(tensors[ALPHA]) if ALPHA in tensors else 0.0) or float(rank)


class WeightChange(Adapter):
    """Adds ``change()`` to the weight, by the product with the input, so that the base's weight is never read."""

    def change(self) -> Tensor:
        """Compute the change of the weight at strength 1.

        Returns:
            Of the weight's shape, float32.

        Raises:
            NotImplementedError: The method does not say.
        """
        raise NotImplementedError

    def residual(self, x: Tensor, y: Tensor, base: Tensor) -> Tensor:
        """The product of the change and ``x``."""
        return applied(self.site, x, self.change().to(x.dtype))

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The change; no bias."""
        return self.change(), None
