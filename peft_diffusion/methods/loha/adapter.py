"""What a LoHa computes at a site."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...core.adapter import LowRank, Site, float32_parameter
from ...core.errors import UserError
from ..shared.affine import WeightChange, applied, read_alpha, single, weight_shape
from ..shared.decomposed import Decomposed, read_decomposed
from ..shared.hyper_parameters import ALPHA, MAGNITUDE
from . import CORES, FACTORS


def fresh(site: Site, rank: int, alpha: float) -> "LohaAdapter":
    """Make factors as LyCORIS starts them: normal with deviations 0.1, 1 and 1, and one of zeros.

    Args:
        site: The layer.
        rank: Of both products.
        alpha: The scale is alpha / rank.

    Returns:
        The adapter, which changes nothing yet.
    """
    outputs, *rest = weight_shape(site)
    inputs = torch.Size(rest).numel()
    factors = [
        nn.init.normal_(torch.empty(outputs, rank), std=0.1),
        nn.init.normal_(torch.empty(rank, inputs), std=1.0),
        torch.zeros(outputs, rank),
        nn.init.normal_(torch.empty(rank, inputs), std=1.0),
    ]
    return LohaAdapter(site, factors, [], alpha)


def read(site: Site, tensors: Mapping[str, Tensor]) -> "LohaAdapter | Decomposed":
    """Make an adapter from tensors in LyCORIS' layout.

    Args:
        site: The layer.
        tensors: By suffix.

    Returns:
        The adapter, decomposed where the tensors have magnitudes.

    Raises:
        UserError: The tensors do not fit the site.
    """
    factors = [tensors[name] for name in FACTORS]
    cores = [tensors[name] for name in CORES if name in tensors]
    rank = len(factors[1])
    outputs, inputs, *kernel = weight_shape(site)
    if cores:
        wanted = [(rank, outputs), (rank, inputs)] * 2 + [(rank, rank, *kernel)] * 2
    else:
        wanted = [(outputs, rank), (rank, inputs * torch.Size(kernel).numel())] * 2
    for name, tensor, shape in zip(FACTORS + CORES, factors + cores, wanted, strict=False):
        if tuple(tensor.shape) != shape:
            raise UserError(f"{name} {tuple(tensor.shape)} does not fit the site, which takes {shape}")
    adapter = LohaAdapter(site, factors, cores, read_alpha(tensors, rank))
    return read_decomposed(site, adapter, tensors[MAGNITUDE]) if MAGNITUDE in tensors else adapter


class LohaAdapter(WeightChange):
    """``w1_a``, ``w2_a`` (out, rank), ``w1_b``, ``w2_b`` (rank, in * kernel).

    In the Tucker form ``a`` is (rank, out), ``b`` (rank, in), and the cores are (rank, rank, height, width).
    """

    def __init__(self, site: Site, factors: list[Tensor], cores: list[Tensor], alpha: float) -> None:
        super().__init__()
        self.w1_a, self.w1_b, self.w2_a, self.w2_b = map(float32_parameter, factors)
        self.t1 = float32_parameter(cores[0]) if cores else None
        self.t2 = float32_parameter(cores[1]) if cores else None
        self.alpha = single(alpha)
        self.rank = len(self.w1_b)
        self.scale = self.alpha / self.rank
        self.shape = weight_shape(site)

    def residual(self, x: Tensor, y: Tensor, base: Tensor) -> Tensor:
        """Through the pair where that is small, so that the change of the whole weight is never made."""
        pair = self.low_rank()
        if pair is None:
            return super().residual(x, y, base)
        up = pair.up.to(x.dtype).view(*pair.up.shape, *[1] * (len(self.shape) - 2))
        hidden = applied(self.site, x, pair.down.to(x.dtype))
        return hidden @ up.t() if up.ndim == 2 else nn.functional.conv2d(hidden, up)

    def change(self) -> Tensor:
        """The scaled product of both halves."""
        if self.t1 is None or self.t2 is None:
            product = (self.w1_a @ self.w1_b) * (self.w2_a @ self.w2_b)
        else:
            halves = ((self.t1, self.w1_a, self.w1_b), (self.t2, self.w2_a, self.w2_b))
            first, second = (torch.einsum("ij...,ip,jr->pr...", *half) for half in halves)
            product = first * second
        return (product * self.scale).view(self.shape)

    def low_rank(self) -> LowRank | None:
        """One pair whose rank is rank squared: each product of two columns, and of two rows. None where that is large."""
        if self.t1 is not None or 2 * self.rank**2 > min(self.w1_a.shape[0], self.w1_b.shape[1]):
            return None
        up = (self.w1_a[:, :, None] * self.w2_a[:, None]).flatten(1)
        down = (self.w1_b[:, None] * self.w2_b[None]).flatten(0, 1)
        return LowRank(down.view(-1, *self.shape[1:]), up * self.scale)

    def state(self) -> dict[str, Tensor]:
        """The LyCORIS layout."""
        tensors = (self.w1_a, self.w1_b, self.w2_a, self.w2_b, self.t1, self.t2)
        found = {name: t for name, t in zip(FACTORS + CORES, tensors, strict=True) if t is not None}
        return {**found, ALPHA: torch.tensor(self.alpha)}
