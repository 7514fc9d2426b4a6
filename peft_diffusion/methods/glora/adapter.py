"""What a GLoRA computes at a site."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...core.adapter import Site, float32_parameter
from ...core.errors import UserError
from ...core.merge import dense_weight
from ..shared.affine import WeightChange, applied, base_output, read_alpha, single, weight_shape, without_bias
from ..shared.decomposed import Decomposed, read_decomposed
from ..shared.hyper_parameters import ALPHA, MAGNITUDE
from . import A1, A2, B1, B2, CORE

NAMES = (A1, A2, B1, B2)


def fresh(site: Site, rank: int, alpha: float) -> "GloraAdapter":
    """Make matrices that change nothing.

    Args:
        site: The layer.
        rank: Of both pairs.
        alpha: The change is multiplied with alpha / rank.

    Returns:
        The adapter.
    """
    outputs, inputs, *kernel = weight_shape(site)
    first, second = torch.empty(inputs, rank), torch.empty(outputs, rank)
    for tensor in (first, second):
        nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))
    return GloraAdapter(first, torch.zeros(rank, inputs), second, torch.zeros(rank, inputs, *kernel), alpha)


def read(site: Site, tensors: Mapping[str, Tensor]) -> "GloraAdapter | Decomposed":
    """Make an adapter from tensors in LyCORIS' layout.

    Its first version, which A1111 reads, had ``W @ a2 @ a1 + b2 @ b1``, at layers without a kernel.

    Args:
        site: The layer.
        tensors: By suffix.

    Returns:
        The adapter, decomposed where the tensors have magnitudes.

    Raises:
        DamagedError: A matrix is missing.
        UserError: The tensors do not fit the site.
    """
    outputs, inputs, *kernel = weight_shape(site)
    a1, a2, b1, b2 = (tensors[name] for name in NAMES)
    first_version = a1.ndim > 1 and a1.shape[0] != inputs
    if first_version:
        a1, a2, b1, b2 = a2, a1, b2, b1
    a1, a2, b1 = (tensor.flatten(1) for tensor in (a1, a2, b1))
    if CORE in tensors:
        b2 = torch.einsum("ij...,jn->in...", tensors[CORE].float(), b2.flatten(1).float())
    rank, flat = len(a2), b2.flatten(1)
    wanted = [(inputs, rank), (rank, inputs), (outputs, rank), (rank, inputs * torch.Size(kernel).numel())]
    if [tuple(tensor.shape) for tensor in (a1, a2, b1, flat)] != wanted:
        shown = ", ".join(f"{name} {tuple(tensors[name].shape)}" for name in NAMES)
        raise UserError(f"{shown} do not fit a {type(site).__name__} of {(outputs, inputs, *kernel)}")
    adapter = GloraAdapter(a1, a2, b1, flat.view(rank, inputs, *kernel), read_alpha(tensors, rank))
    return read_decomposed(site, adapter, tensors[MAGNITUDE]) if MAGNITUDE in tensors else adapter


class GloraAdapter(WeightChange):
    """``a1`` (in, rank), ``a2`` (rank, in), ``b1`` (out, rank), ``b2`` (rank, in, ...)."""

    def __init__(self, a1: Tensor, a2: Tensor, b1: Tensor, b2: Tensor, alpha: float) -> None:
        super().__init__()
        self.a1 = float32_parameter(a1)
        self.a2 = float32_parameter(a2)
        self.b1 = float32_parameter(b1)
        self.b2 = float32_parameter(b2)
        self.alpha = single(alpha)
        self.scale = self.alpha / len(a2)

    def residual(self, x: Tensor, y: Tensor, base: Tensor) -> Tensor:
        """What the weight makes of the mixed inputs, and the second pair's product; the weight itself is not read."""
        first, second = (self.a1 * self.scale).to(x.dtype), (self.b1 * self.scale).to(x.dtype)
        mixed = _pointwise(_pointwise(x, self.a2.to(x.dtype), self.site), first, self.site)
        product = _pointwise(applied(self.site, x, self.b2.to(x.dtype)), second, self.site)
        return without_bias(self.site, base_output(self.site, mixed)) + product

    def change(self) -> Tensor:
        """Both changes of the base's weight, scaled."""
        own = dense_weight(self.site)
        pair = (self.b1 @ self.b2.flatten(1)).view(own.shape)
        return self.scale * (torch.einsum("oi...,ij->oj...", own, self.a1 @ self.a2) + pair)

    def state(self) -> dict[str, Tensor]:
        """The LyCORIS layout; at a convolution all have four sides."""
        small: list[Tensor] = [self.a1, self.a2, self.b1]
        if self.b2.ndim == 4:
            small = [tensor[:, :, None, None] for tensor in small]
        return {**dict(zip(NAMES, (*small, self.b2), strict=True)), ALPHA: torch.tensor(self.alpha)}


def _pointwise(x: Tensor, matrix: Tensor, site: Site) -> Tensor:
    """A matrix on the channels."""
    if isinstance(site, nn.Conv2d):
        return F.conv2d(x, matrix[:, :, None, None])
    return F.linear(x, matrix)
