"""What a LoKr computes at a site."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...core.adapter import Site, float32_parameter
from ...core.errors import UserError
from ..shared.affine import WeightChange, applied, single, weight_shape
from ..shared.decomposed import Decomposed, decomposed, read_decomposed
from ..shared.divisors import split
from ..shared.hyper_parameters import ALPHA, MAGNITUDE, stored_alpha
from . import CORE, NAMES, W1, W1_A, W1_B, W2, W2_A, W2_B, Lokr


def fresh(site: Site, method: Lokr) -> "LokrAdapter | Decomposed":
    """Make factors that change nothing: uniform (Kaiming, a = sqrt 5), but ``w2``, or its second factor, of zeros.

    Args:
        site: The layer.
        method: How it is split, and at which rank.

    Returns:
        The adapter, decomposed where the method says so.
    """
    outputs, inputs, *kernel = weight_shape(site)
    (out1, out2), (in1, in2) = split(outputs, method.factor), split(inputs, method.factor)
    columns = in2 * torch.Size(kernel).numel()
    tensors: dict[str, Tensor] = {}
    if method.full or 2 * method.rank >= max(out2, in2):
        tensors[W2] = torch.zeros(out2, in2, *kernel)
    else:
        tensors[W2_A], tensors[W2_B] = _uniform(out2, method.rank), torch.zeros(method.rank, columns)
    if method.decompose_both and 2 * method.rank < max(out1, in1):
        tensors[W1_A], tensors[W1_B] = _uniform(out1, method.rank), _uniform(method.rank, in1)
    else:
        tensors[W1] = _uniform(out1, in1)
    alpha = float(method.rank)  # what LyCORIS writes where there is no rank
    if W1 not in tensors or W2 not in tensors:
        alpha = stored_alpha(method.rank, method.alpha, method.rank_stabilized)
    adapter = LokrAdapter(site, tensors, alpha)
    return decomposed(site, adapter) if method.weight_decompose else adapter


def read(site: Site, tensors: Mapping[str, Tensor]) -> "LokrAdapter | Decomposed":
    """Make an adapter from tensors in LyCORIS' layout.

    Args:
        site: The layer.
        tensors: By suffix.

    Returns:
        The adapter, decomposed where the tensors have magnitudes.

    Raises:
        UserError: The tensors do not fit one another, or the site.
    """
    own = {name: tensors[name] for name in NAMES if name in tensors}
    try:
        (out1, in1), (out2, in2) = _halves(own, tuple(weight_shape(site)[2:]))[0].shape, _sides(own, site)
    except (RuntimeError, ValueError, IndexError):
        raise UserError(f"the factors do not fit one another: {_shapes(own)}") from None
    if [out1 * out2, in1 * in2] != list(weight_shape(site)[:2]):
        raise UserError(f"{_shapes(own)} do not fit a {type(site).__name__} of {weight_shape(site)}")
    alpha = float(tensors[ALPHA]) if ALPHA in tensors else 0.0
    if W1 in own and W2 in own and not math.isfinite(alpha):
        alpha = 0.0  # the rank that was asked for, as 100000, is beyond 16 bits, and here no rank scales
    adapter = LokrAdapter(site, own, alpha)
    return read_decomposed(site, adapter, tensors[MAGNITUDE]) if MAGNITUDE in tensors else adapter


class LokrAdapter(WeightChange):
    """``w1`` (out1, in1) and ``w2`` (out2, in2, ...), each whole or as factors. Parameters have the names of a file."""

    def __init__(self, site: Site, tensors: Mapping[str, Tensor], alpha: float) -> None:
        super().__init__()
        for name in tensors:
            self.register_parameter(name, float32_parameter(tensors[name]))
        factored = [tensors[name] for name in (W1_B, W2_B) if name in tensors]
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


def _uniform(rows: int, columns: int) -> Tensor:
    tensor = torch.empty(rows, columns)
    nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))
    return tensor


def _halves(tensors: Mapping[str, Tensor], kernel: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """``w1`` and ``w2``, made of their factors where they have some; ``w2`` has the kernel's sides."""
    w1 = tensors[W1] if W1 in tensors else tensors[W1_A] @ tensors[W1_B]
    if W2 in tensors:
        w2 = tensors[W2]
    elif CORE in tensors:
        w2 = torch.einsum("ij...,ip,jr->pr...", tensors[CORE], tensors[W2_A], tensors[W2_B])
    else:
        w2 = tensors[W2_A] @ tensors[W2_B].flatten(1)
    return w1, w2.reshape(len(w2), -1, *kernel)


def _sides(tensors: Mapping[str, Tensor], site: Site) -> tuple[int, int]:
    """Outputs and inputs of ``w2``."""
    w2 = _halves(tensors, tuple(weight_shape(site)[2:]))[1]
    return w2.shape[0], w2.shape[1]


def _shapes(tensors: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
