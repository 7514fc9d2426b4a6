"""What a whole change of weight and bias computes at a site."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...core.adapter import Adapter, Site, float32_parameter
from ...core.errors import UserError
from ..shared import affine
from ..shared.affine import channels
from ..shared.sites import channels_of, is_embedding, is_norm, looked_up, normalized, weight_shape
from . import BIAS, NORM_WEIGHT, WEIGHT


def serves(site: Site) -> bool:
    """Tell whether a module has a weight that a change can be added to.

    Args:
        site: A module of a base.

    Returns:
        Whether it has.
    """
    return affine.serves(site) or is_norm(site) or is_embedding(site)


def fresh(site: Site) -> "FullAdapter":
    """Make an adapter that changes nothing yet.

    Args:
        site: The module.

    Returns:
        The adapter.
    """
    bias = getattr(site, "bias", None)
    return FullAdapter(torch.zeros(weight_shape(site)), torch.zeros(bias.shape) if isinstance(bias, Tensor) else None)


def read(site: Site, tensors: Mapping[str, Tensor]) -> "FullAdapter":
    """Make an adapter from tensors in LyCORIS' layout.

    Args:
        site: The module.
        tensors: By suffix.

    Returns:
        The adapter.

    Raises:
        UserError: A tensor does not fit the site.
    """
    name = WEIGHT if WEIGHT in tensors else NORM_WEIGHT
    weight, bias, shape = tensors[name], tensors.get(BIAS), weight_shape(site)
    if _without_ones(weight.shape) != _without_ones(shape):
        raise UserError(f"{name} {tuple(weight.shape)} does not fit a {type(site).__name__} of {shape}")
    if bias is not None and (isinstance(site, nn.Embedding) or bias.numel() != channels_of(site)):
        raise UserError(f"{BIAS} {tuple(bias.shape)} does not fit a {type(site).__name__} of {shape}")
    return FullAdapter(weight.reshape(shape), None if bias is None else bias.flatten())


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A 1x1 convolution elsewhere is a Linear here, and the other way round; the first two sides stay as they are."""
    return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) else tuple(shape)


class FullAdapter(Adapter):
    """``weight`` of the shape of the site's own; ``bias`` (out,) or None."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = float32_parameter(weight)
        self.bias = None if bias is None else float32_parameter(bias)

    def residual(self, x: Tensor, y: Tensor, base: Tensor) -> Tensor:
        """What the site would make of ``x`` with the changes as its weight and bias."""
        if isinstance(self.site, nn.Embedding):
            return looked_up(self.site, x, self.weight).to(y.dtype)
        if is_norm(self.site):
            change = normalized(self.site, x) * channels(self.weight, y, self.site)
        else:
            change = affine.applied(self.site, x, self.weight.to(x.dtype))
        return change if self.bias is None else change + channels(self.bias, y, self.site)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Both as they are."""
        return self.weight.detach(), None if self.bias is None else self.bias.detach()

    def state(self) -> dict[str, Tensor]:
        """The names of layers also at norms: with LyCORIS' own for norms the file would be read as BitFit's."""
        return {WEIGHT: self.weight} if self.bias is None else {WEIGHT: self.weight, BIAS: self.bias}
