"""LoRA: a change of low rank (Hu et al. 2021, https://arxiv.org/abs/2106.09685)."""

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.adapter import Adapter, LowRank, Method, Site, float32_parameter
from ..core.errors import UserError

_DOWN, _UP, _ALPHA = "lora_down.weight", "lora_up.weight", "alpha"


@dataclass(frozen=True)
class Lora(Method, name="lora", suffixes=frozenset({_DOWN, _UP, _ALPHA})):
    """``y + alpha / rank * up(down(x))`` at a Linear or Conv2d; a convolution goes down with its own kernel, up with 1x1.

    ``alpha`` None means alpha = rank, a scale of 1. ``dropout`` drops inputs of ``down`` while training.
    """

    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"rank must be at least 1, not {self.rank}")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise UserError(f"alpha must be above 0, not {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout must be from 0 to below 1, not {self.dropout}")

    @classmethod
    def recognizes(cls, suffixes: Set[str]) -> bool:
        """A pair without the magnitude that would make it DoRA."""
        return _DOWN in suffixes and "dora_scale" not in suffixes

    def serves(self, site: Site) -> bool:
        """Linear layers and convolutions without groups."""
        return isinstance(site, nn.Linear) or (isinstance(site, nn.Conv2d) and site.groups == 1)

    def build(self, site: Site) -> "LoraAdapter":
        """Down uniform as a Linear starts (Kaiming, a = sqrt 5), up zero, as in the paper's code."""
        if isinstance(site, nn.Conv2d):
            down = torch.empty(self.rank, site.in_channels, *site.kernel_size)
            up = torch.zeros(site.out_channels, self.rank)
        elif isinstance(site, nn.Linear):
            down = torch.empty(self.rank, site.in_features)
            up = torch.zeros(site.out_features, self.rank)
        else:
            raise UserError(f"lora serves Linear and Conv2d, not {type(site).__name__}")
        nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        return LoraAdapter(site, down, up, self.alpha or self.rank, self.dropout)

    @classmethod
    def read(cls, site: Site, tensors: Mapping[str, Tensor]) -> "LoraAdapter":
        """From the kohya layout. No alpha, and alpha 0, mean alpha = rank."""
        missing = [name for name in (_DOWN, _UP) if name not in tensors]
        if missing:
            raise UserError(f"{missing[0]} is missing")
        down, up = tensors[_DOWN], tensors[_UP].flatten(1)
        rank = len(down)
        alpha = float(tensors[_ALPHA]) if _ALPHA in tensors else 0.0
        shape = _down_shape(site)
        if down.ndim == 4 and len(shape) == 1 and down.shape[2:] == (1, 1):
            down = down.flatten(1)  # a 1x1 convolution elsewhere is a Linear here
        if len(shape) == 3 and down.ndim == 2:
            down = down[:, :, None, None]
        if tuple(down.shape[1:]) != shape or tuple(up.shape) != (_outputs(site), rank):
            raise UserError(
                f"down {tuple(down.shape)} and up {tuple(up.shape)} do not fit a {type(site).__name__} of"
                f" {(_outputs(site), *shape)}"
            )
        return LoraAdapter(site, down, up, alpha or rank, 0.0)


class LoraAdapter(Adapter):
    """The pair of one site: ``down`` (rank, in, ...), ``up`` (out, rank)."""

    def __init__(self, site: Site, down: Tensor, up: Tensor, alpha: float, dropout: float) -> None:
        super().__init__()
        self.down = float32_parameter(down)
        self.up = float32_parameter(up)
        self.alpha = alpha
        self.scale = alpha / len(down)
        self.dropout = dropout
        conv = isinstance(site, nn.Conv2d)
        self.geometry = (site.stride, site.padding, site.dilation) if isinstance(site, nn.Conv2d) else None
        if conv and site.padding_mode != "zeros":
            raise UserError(f"lora serves convolutions padded with zeros, not {site.padding_mode}")

    def forward(self, x: Tensor, y: Tensor, strength: Tensor, base: Tensor) -> Tensor:
        """``y + strength * scale * up(down(x))``; strength and scale go to the small tensors, the sum into the product."""
        hidden = self._hidden(x) * strength
        up = (self.up * self.scale).to(x.dtype)
        if self.geometry is not None:
            return y + F.conv2d(hidden, up[:, :, None, None])
        return torch.addmm(y.reshape(-1, len(up)), hidden.reshape(-1, up.shape[1]), up.t()).view(y.shape)

    def _hidden(self, x: Tensor) -> Tensor:
        """``down(x)``, of the rank's width, in the dtype of ``x``."""
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        down = self.down.to(x.dtype)
        if self.geometry is None:
            return F.linear(x, down)
        stride, padding, dilation = self.geometry
        return F.conv2d(x, down, None, stride, padding, dilation)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """``scale * up @ down``; no bias."""
        return (self.up * self.scale @ self.down.flatten(1)).view_as(weight), None

    def low_rank(self) -> LowRank:
        """The pair, with the scale in ``up``."""
        return LowRank(self.down, self.up * self.scale)

    def state(self) -> dict[str, Tensor]:
        """The kohya layout; a convolution's ``up`` is 1x1."""
        up = self.up if self.geometry is None else self.up[:, :, None, None]
        return {_DOWN: self.down, _UP: up, _ALPHA: torch.tensor(float(self.alpha))}


def _down_shape(site: Site) -> tuple[int, ...]:
    if isinstance(site, nn.Conv2d):
        return (site.in_channels, *site.kernel_size)
    return (site.in_features,) if isinstance(site, nn.Linear) else ()


def _outputs(site: Site) -> int:
    if isinstance(site, nn.Conv2d):
        return site.out_channels
    return site.out_features if isinstance(site, nn.Linear) else 0
