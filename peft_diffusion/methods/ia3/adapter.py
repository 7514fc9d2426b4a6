"""What an (IA)3 computes at a site."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...core.adapter import Adapter, Site, float32_parameter
from ...core.errors import UserError
from ...core.merge import dense_weight
from ..shared.affine import base_output, channels, weight_shape, without_bias
from . import ON_BIAS, ON_INPUT, WEIGHT


def fresh(site: Site, on_input: bool) -> "Ia3Adapter":
    """Make an adapter whose factors are 1; they are kept as their distance from 1.

    Args:
        site: The layer.
        on_input: Whether the inputs are scaled, not the outputs.

    Returns:
        The adapter.
    """
    return Ia3Adapter(site, torch.zeros(weight_shape(site)[on_input]), on_input)


def read(site: Site, tensors: Mapping[str, Tensor]) -> "Ia3Adapter":
    """Make an adapter from tensors in LyCORIS' layout.

    Args:
        site: The layer.
        tensors: By suffix.

    Returns:
        The adapter.

    Raises:
        UserError: The tensors do not fit the site.
    """
    weight, on_input = tensors[WEIGHT], bool(tensors[ON_INPUT])
    wanted, side = weight_shape(site)[on_input], "inputs" if on_input else "outputs"
    if weight.numel() != wanted:
        raise UserError(f"{WEIGHT} {tuple(weight.shape)} does not fit the {wanted} {side} of the site")
    multiplied = not on_input and bool(tensors.get(ON_BIAS, 0)) and site.bias is not None
    return BiasedIa3Adapter(site, weight, on_input) if multiplied else Ia3Adapter(site, weight, on_input)


class Ia3Adapter(Adapter):
    """``scale``, the factors less 1: (channels) at a Linear, (1, channels, 1, 1) at a Conv2d."""

    def __init__(self, site: Site, scale: Tensor, on_input: bool) -> None:
        super().__init__()
        shape = (1, -1, 1, 1) if isinstance(site, nn.Conv2d) else (-1,)
        self.scale = float32_parameter(scale.reshape(shape))
        self.on_input = on_input

    def residual(self, x: Tensor, y: Tensor, base: Tensor) -> Tensor:
        """The scaled output of the weight, or the weight's output for the scaled input."""
        if self.on_input:
            return without_bias(self.site, base_output(self.site, x * channels(self.scale, x, self.site)))
        return channels(self.scale, base, self.site) * without_bias(self.site, base)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The change of the base's own weight, whatever others added to it; no bias."""
        own = dense_weight(self.site)
        return own.transpose(0, 1).mul(self.scale).transpose(0, 1) if not self.on_input else own * self.scale, None

    def state(self) -> dict[str, Tensor]:
        """The LyCORIS layout."""
        return {WEIGHT: self.scale, ON_INPUT: torch.tensor(int(self.on_input))}


class BiasedIa3Adapter(Ia3Adapter):
    """Factors of the whole output, bias and all, as peft has them. LyCORIS has none, so files hold them under own keys."""

    own_layout = True

    def residual(self, x: Tensor, y: Tensor, base: Tensor) -> Tensor:
        """The scaled output."""
        return channels(self.scale, base, self.site) * base

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The change of the base's own weight and bias."""
        change, _ = super().fold(weight, bias)
        own = self.site.get_parameter("bias").detach()
        return change, own * self.scale.reshape(own.shape).to(own.dtype)

    def state(self) -> dict[str, Tensor]:
        """The LyCORIS layout, with a mark."""
        return {**super().state(), ON_BIAS: torch.tensor(1)}
