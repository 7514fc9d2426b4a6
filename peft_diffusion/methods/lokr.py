"""LoKr: a Kronecker product as the change (KronA, Edalati et al. 2022, https://arxiv.org/abs/2212.10650).

Parametrization and names are those of LyCORIS (Yeh et al. 2023, https://arxiv.org/abs/2309.14859).
"""

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.adapter import Method, Site, float32_parameter
from ..core.errors import UserError
from .shared.affine import (
    ALPHA,
    WeightChange,
    applied,
    check_rank,
    require,
    serves,
    single,
    stored_alpha,
    weight_shape,
)
from .shared.decomposed import MAGNITUDE, Decomposed, decomposed, read_decomposed

_W1, _W1_A, _W1_B = "lokr_w1", "lokr_w1_a", "lokr_w1_b"
_W2, _W2_A, _W2_B, _CORE = "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"
_NAMES = (_W1, _W1_A, _W1_B, _W2, _W2_A, _W2_B, _CORE)


@dataclass(frozen=True)
class Lokr(Method, name="lokr", suffixes=frozenset({*_NAMES, ALPHA, MAGNITUDE})):
    """The weight changes by ``alpha / rank * kron(w1, w2)``.

    Outputs and inputs are each split in two, the first part at most ``factor`` and the second no smaller; ``factor`` -1
    makes both as equal as the number allows, which gives the fewest parameters. ``w1`` maps the first parts and ``w2`` the
    second ones. ``w2`` is a product of two matrices of ``rank`` where that is under half of its larger side, or, with
    ``full``, one matrix; ``decompose_both`` makes the same choice for ``w1``, which is one matrix otherwise.
    Where both are one matrix there is no rank, and alpha has no effect. ``alpha`` None means alpha = rank;
    ``rank_stabilized`` scales by alpha / sqrt(rank). ``weight_decompose`` trains the magnitudes of the outputs apart, as
    DoRA does: see ``Decomposed``.
    """

    rank: int = 16
    alpha: float | None = None
    factor: int = 8
    full: bool = False
    decompose_both: bool = False
    rank_stabilized: bool = False
    weight_decompose: bool = False

    def __post_init__(self) -> None:
        check_rank(self.rank, self.alpha)
        if self.factor != -1 and self.factor < 1:
            raise UserError(f"factor must be at least 1, or -1 for parts as equal as can be, not {self.factor}")
        if self.full and self.decompose_both:
            raise UserError("full keeps w2 one matrix and decompose_both makes w1 two; choose one of them")

    @classmethod
    def recognizes(cls, suffixes: Set[str]) -> bool:
        """By either form of ``w1``, as LyCORIS does."""
        return not suffixes.isdisjoint({_W1, _W1_A})

    def serves(self, site: Site) -> bool:
        """Linear layers and convolutions without groups."""
        return serves(site)

    def build(self, site: Site) -> "LokrAdapter | Decomposed":
        """Everything uniform as a Linear starts (Kaiming, a = sqrt 5), but ``w2``, or its second factor, of zeros."""
        outputs, inputs, *kernel = weight_shape(site)
        (out1, out2), (in1, in2) = split(outputs, self.factor), split(inputs, self.factor)
        columns = in2 * torch.Size(kernel).numel()
        tensors: dict[str, Tensor] = {}
        if self.full or 2 * self.rank >= max(out2, in2):
            tensors[_W2] = torch.zeros(out2, in2, *kernel)
        else:
            tensors[_W2_A], tensors[_W2_B] = _uniform(out2, self.rank), torch.zeros(self.rank, columns)
        if self.decompose_both and 2 * self.rank < max(out1, in1):
            tensors[_W1_A], tensors[_W1_B] = _uniform(out1, self.rank), _uniform(self.rank, in1)
        else:
            tensors[_W1] = _uniform(out1, in1)
        alpha = float(self.rank)  # what LyCORIS writes where there is no rank
        if _W1 not in tensors or _W2 not in tensors:
            alpha = stored_alpha(self.rank, self.alpha, self.rank_stabilized)
        adapter = LokrAdapter(site, tensors, alpha)
        return decomposed(site, adapter) if self.weight_decompose else adapter

    @classmethod
    def read(cls, site: Site, tensors: Mapping[str, Tensor]) -> "LokrAdapter | Decomposed":
        """From the LyCORIS layout, also in the Tucker form of its convolutions (``lokr_t2``)."""
        for whole, a, b in ((_W1, _W1_A, _W1_B), (_W2, _W2_A, _W2_B)):
            if whole not in tensors:
                require(tensors, a, b)
        own = {name: tensors[name] for name in _NAMES if name in tensors}
        try:
            (out1, in1), (out2, in2) = _halves(own, tuple(weight_shape(site)[2:]))[0].shape, _sides(own, site)
        except (RuntimeError, ValueError, IndexError):
            raise UserError(f"the factors do not fit one another: {_shapes(own)}") from None
        if [out1 * out2, in1 * in2] != list(weight_shape(site)[:2]):
            raise UserError(f"{_shapes(own)} do not fit a {type(site).__name__} of {weight_shape(site)}")
        adapter = LokrAdapter(site, own, float(tensors[ALPHA]) if ALPHA in tensors else 0.0)
        return read_decomposed(site, adapter, tensors[MAGNITUDE]) if MAGNITUDE in tensors else adapter


class LokrAdapter(WeightChange):
    """``w1`` (out1, in1) and ``w2`` (out2, in2, ...), each whole or as factors. Parameters have the names of a file."""

    def __init__(self, site: Site, tensors: Mapping[str, Tensor], alpha: float) -> None:
        super().__init__()
        for name in tensors:
            self.register_parameter(name, float32_parameter(tensors[name]))
        factored = [tensors[name] for name in (_W1_B, _W2_B) if name in tensors]
        rank = len(factored[0]) if factored else 0
        self.alpha = single(alpha or rank or 1)
        self.scale = self.alpha / rank if rank else 1.0
        self.shape = weight_shape(site)

    def residual(self, x: Tensor, y: Tensor, base: Tensor) -> Tensor:
        """``w2`` on the second parts of the input and ``w1`` across the first ones; their product is never made."""
        w1, w2 = self._scaled()
        w1, w2 = w1.to(x.dtype), w2.to(x.dtype)
        parts = w1.shape[1]
        if w2.ndim == 2:
            across: Tensor = w1 @ (x.reshape(*x.shape[:-1], parts, -1) @ w2.t())
            return across.flatten(-2)
        hidden = applied(self.site, x.reshape(len(x) * parts, -1, *x.shape[2:]), w2)
        mixed = w1 @ hidden.reshape(len(x), parts, -1)
        return mixed.view(len(x), -1, *hidden.shape[2:])

    def change(self) -> Tensor:
        """The scaled Kronecker product."""
        w1, w2 = self._scaled()
        return torch.kron(w1.view(*w1.shape, *[1] * (w2.ndim - 2)), w2.contiguous())

    def _scaled(self) -> tuple[Tensor, Tensor]:
        w1, w2 = _halves(self._factors(), tuple(self.shape[2:]))
        return w1 * self.scale, w2

    def _factors(self) -> dict[str, Tensor]:
        return dict(self.named_parameters(recurse=False))

    def state(self) -> dict[str, Tensor]:
        """The LyCORIS layout."""
        return {**self._factors(), ALPHA: torch.tensor(self.alpha)}


def split(size: int, factor: int) -> tuple[int, int]:
    """Two factors of ``size``, the smaller first: ``factor`` and the rest where it divides, else the most equal ones
    whose smaller is at most ``factor`` (-1: without a limit), found as LyCORIS' ``factorization`` finds them.
    """
    if factor > 0 and size % factor == 0:
        return min(factor, size // factor), max(factor, size // factor)
    limit = size if factor < 0 else factor
    small = max(n for n in range(1, math.isqrt(size) + 1) if size % n == 0 and n <= limit)
    return small, size // small


def _uniform(rows: int, columns: int) -> Tensor:
    tensor = torch.empty(rows, columns)
    nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))
    return tensor


def _halves(tensors: Mapping[str, Tensor], kernel: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """``w1`` and ``w2``, made of their factors where they have some; ``w2`` has the kernel's sides."""
    w1 = tensors[_W1] if _W1 in tensors else tensors[_W1_A] @ tensors[_W1_B]
    if _W2 in tensors:
        w2 = tensors[_W2]
    elif _CORE in tensors:
        w2 = torch.einsum("ij...,ip,jr->pr...", tensors[_CORE], tensors[_W2_A], tensors[_W2_B])
    else:
        w2 = tensors[_W2_A] @ tensors[_W2_B].flatten(1)
    return w1, w2.reshape(len(w2), -1, *kernel)


def _sides(tensors: Mapping[str, Tensor], site: Site) -> tuple[int, int]:
    """Outputs and inputs of ``w2``."""
    w2 = _halves(tensors, tuple(weight_shape(site)[2:]))[1]
    return w2.shape[0], w2.shape[1]


def _shapes(tensors: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
