"""What BitFit computes at a site."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...core.adapter import Adapter, Site, float32_parameter
from ...core.errors import DamagedError, UserError
from ..shared.affine import channels
from ..shared.sites import NORMS, channels_of, normalized
from . import LAYER_BIAS, NORM_BIAS, NORM_WEIGHT


def serves(site: Site) -> bool:
    """Tell whether a module is a layer or norm that has a bias.

    Args:
        site: A module of a base.

    Returns:
        Whether it is.
    """
    return isinstance(site, (nn.Linear, nn.Conv2d, *NORMS)) and isinstance(site.bias, Tensor)


def fresh(site: Site) -> "BitFitAdapter":
    """Make an adapter that changes no bias yet.

    Args:
        site: The layer or norm.

    Returns:
        The adapter.
    """
    return BitFitAdapter(site, torch.zeros(channels_of(site)), None)


def read(site: Site, tensors: Mapping[str, Tensor]) -> "BitFitAdapter":
    """Make an adapter from tensors in LyCORIS' layout, or in ComfyUI's, which calls a norm's bias as that of a layer.

    Args:
        site: The layer or norm.
        tensors: By suffix.

    Returns:
        The adapter.

    Raises:
        DamagedError: A tensor is missing.
        UserError: A tensor does not fit the site.
    """
    names = (NORM_BIAS, LAYER_BIAS) if isinstance(site, NORMS) else (LAYER_BIAS,)
    name = next((one for one in names if one in tensors), None)
    if name is None:
        raise DamagedError(f"{names[0]} is missing")
    bias, weight = tensors[name], tensors.get(NORM_WEIGHT)
    for tensor in (bias, weight):
        if tensor is not None and tensor.numel() != channels_of(site):
            raise UserError(f"{tuple(tensor.shape)} does not fit a {type(site).__name__} with {channels_of(site)} channels")
    return BitFitAdapter(site, bias.flatten(), None if weight is None or not weight.any() else weight.flatten())


class BitFitAdapter(Adapter):
    """The change of one bias, (out,). ``weight`` is None, or the fixed change of a norm's weight, of the same shape."""

    weight: Tensor | None

    def __init__(self, site: Site, bias: Tensor, weight: Tensor | None) -> None:
        super().__init__()
        self.bias = float32_parameter(bias)
        self.register_buffer("weight", None if weight is None else weight.detach().to(torch.float32).clone())
        self.is_norm = isinstance(site, NORMS)

    def residual(self, x: Tensor, y: Tensor, base: Tensor) -> Tensor:
        """The bias, along the site's channels."""
        change = channels(self.bias, y, self.site)
        return change if self.weight is None else change + normalized(self.site, x) * channels(self.weight, y, self.site)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The bias as it is."""
        return self.weight, self.bias.detach()

    def state(self) -> dict[str, Tensor]:
        """Programs look for a norm's ``w_norm`` first, so that it is there even where nothing changes the weight."""
        if not self.is_norm:
            return {LAYER_BIAS: self.bias}
        return {NORM_WEIGHT: torch.zeros_like(self.bias) if self.weight is None else self.weight, NORM_BIAS: self.bias}
