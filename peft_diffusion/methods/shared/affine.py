"""What the methods that change the weight of a Linear or Conv2d share.

Each of them is a change of the base's own weight, whatever other adapters the site carries: several add up, in any order.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...core.adapter import Adapter, Site
from ...core.errors import DamagedError, UserError
from ...core.site import base_class
from .hyper_parameters import ALPHA


def serves(site: Site) -> bool:
    """Linear layers, and convolutions without groups."""
    return isinstance(site, nn.Linear) or (isinstance(site, nn.Conv2d) and site.groups == 1)


def weight_shape(site: Site) -> tuple[int, ...]:
    """The shape of the weight, (out, in) or (out, in, height, width), even where it is stored packed."""
    if isinstance(site, nn.Conv2d):
        return (site.out_channels, site.in_channels, *site.kernel_size)
    if isinstance(site, nn.Linear):
        return (site.out_features, site.in_features)
    raise UserError(f"this method serves Linear and Conv2d, not {type(site).__name__}")


def applied(site: Site, x: Tensor, weight: Tensor) -> Tensor:
    """``x`` through the site with this weight in place of its own, and no bias."""
    if isinstance(site, nn.Conv2d):
        product: Tensor = site._conv_forward(x, weight, None)
        return product
    return F.linear(x, weight)


def base_output(site: Site, x: Tensor) -> Tensor:
    """What the base's own forward makes of ``x``, bias and all, also where its weight is quantized."""
    output: Tensor = base_class(site).forward(site, x)
    return output


def channels(values: Tensor, y: Tensor, site: Site) -> Tensor:
    """One value per channel, in the dtype of ``y`` and in a shape that multiplies it."""
    flat = values.reshape(-1).to(y.dtype)
    return flat[:, None, None] if isinstance(site, nn.Conv2d) else flat


def without_bias(site: Site, base: Tensor) -> Tensor:
    """What the weight of the site alone gave."""
    bias = site.bias
    return base - channels(bias.detach(), base, site) if isinstance(bias, Tensor) else base


def single(value: float) -> float:
    """The number that a float32 of a file holds, so that a scale made of it is the same after loading."""
    return torch.tensor(value, dtype=torch.float32).item()


def read_alpha(tensors: Mapping[str, Tensor], rank: int) -> float:
    """The stored alpha. None, and 0, mean the rank."""
    return (float(tensors[ALPHA]) if ALPHA in tensors else 0.0) or float(rank)


def require(tensors: Mapping[str, Tensor], *names: str) -> None:
    """Raises DamagedError that names the first tensor that is missing."""
    for name in names:
        if name not in tensors:
            raise DamagedError(f"{name} is missing")


class WeightChange(Adapter):
    """Adds ``change()`` to the weight, by the product with the input, so that the base's weight is never read."""

    def change(self) -> Tensor:
        """The change of the weight at strength 1 in float32, of the weight's shape."""
        raise NotImplementedError

    def residual(self, x: Tensor, y: Tensor, base: Tensor) -> Tensor:
        """The product of the change and ``x``."""
        return applied(self.site, x, self.change().to(x.dtype))

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The change; no bias."""
        return self.change(), None
