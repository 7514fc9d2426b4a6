"""LoHa: the Hadamard product of two low-rank changes (FedPara, Hyeon-Woo et al. 2021, https://arxiv.org/abs/2108.06098).

Parametrization and names are those of LyCORIS (Yeh et al. 2023, https://arxiv.org/abs/2309.14859).
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.adapter import LowRank, Method, Site, float32_parameter
from ..core.errors import UserError
from .shared.affine import (
    ALPHA,
    WeightChange,
    applied,
    check_rank,
    read_alpha,
    require,
    serves,
    single,
    stored_alpha,
    weight_shape,
)
from .shared.decomposed import MAGNITUDE, Decomposed, decomposed, read_decomposed

_FACTORS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_CORES = ("hada_t1", "hada_t2")


@dataclass(frozen=True)
class Loha(Method, name="loha", suffixes=frozenset({*_FACTORS, *_CORES, ALPHA, MAGNITUDE})):
    """The weight changes by ``alpha / rank * (w1_a @ w1_b) * (w2_a @ w2_b)``, of a rank up to rank squared.

    ``alpha`` None means alpha = rank; ``rank_stabilized`` scales by alpha / sqrt(rank). ``weight_decompose`` trains the
    magnitudes of the outputs apart, as DoRA does: see ``Decomposed``.
    """

    rank: int = 8
    alpha: float | None = None
    rank_stabilized: bool = False
    weight_decompose: bool = False

    def __post_init__(self) -> None:
        check_rank(self.rank, self.alpha)

    @classmethod
    def recognizes(cls, suffixes: Set[str]) -> bool:
        """By the first factor, as LyCORIS does."""
        return _FACTORS[0] in suffixes

    def serves(self, site: Site) -> bool:
        """Linear layers and convolutions without groups."""
        return serves(site)

    def build(self, site: Site) -> "LohaAdapter | Decomposed":
        """Factors as LyCORIS starts them: normal with deviations 0.1, 1 and 1, and one of zeros."""
        outputs, *rest = weight_shape(site)
        inputs = torch.Size(rest).numel()
        factors = [
            nn.init.normal_(torch.empty(outputs, self.rank), std=0.1),
            nn.init.normal_(torch.empty(self.rank, inputs), std=1.0),
            torch.zeros(outputs, self.rank),
            nn.init.normal_(torch.empty(self.rank, inputs), std=1.0),
        ]
        adapter = LohaAdapter(site, factors, [], stored_alpha(self.rank, self.alpha, self.rank_stabilized))
        return decomposed(site, adapter) if self.weight_decompose else adapter

    @classmethod
    def read(cls, site: Site, tensors: Mapping[str, Tensor]) -> "LohaAdapter | Decomposed":
        """From the LyCORIS layout, also in the Tucker form of its convolutions (``hada_t1``, ``hada_t2``)."""
        require(tensors, *_FACTORS)
        factors = [tensors[name] for name in _FACTORS]
        cores = [tensors[name] for name in _CORES if name in tensors]
        rank = len(factors[1])
        outputs, inputs, *kernel = weight_shape(site)
        if cores:
            require(tensors, *_CORES)
            wanted = [(rank, outputs), (rank, inputs)] * 2 + [(rank, rank, *kernel)] * 2
        else:
            wanted = [(outputs, rank), (rank, inputs * torch.Size(kernel).numel())] * 2
        for name, tensor, shape in zip(_FACTORS + _CORES, factors + cores, wanted, strict=False):
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
        found = {name: t for name, t in zip(_FACTORS + _CORES, tensors, strict=True) if t is not None}
        return {**found, ALPHA: torch.tensor(self.alpha)}
