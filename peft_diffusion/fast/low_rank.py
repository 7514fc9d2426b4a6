"""Frozen Linear layers and pairs of low rank as one function, for training where kernels and memory count."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..core.adapter import Factors
from ..core.site import is_plain_linear
from ..core.slot import Slot, Sole, slot_of, using
from ..core.strength import Strengths


class _Fusing:
    working: "Working | None" = None


@contextmanager
def fusing() -> Iterator[None]:
    """Frozen Linear layers and their pairs of low rank as one function inside, where that pays.

    Yields:
        Once, while the function is in use, in every thread.
    """
    with using(LowRankPath()):
        yield


def pays(x: Tensor) -> bool:
    """Tell whether the function is to be used: on a GPU. A CPU computes longer than it launches, and keeps its bits.

    Args:
        x: The input of a site.

    Returns:
        Whether it lies on a GPU.
    """
    return x.is_cuda


class LowRankPath:
    """Computes a frozen Linear and the pair of its only adapter in one: see `slot.FastPath`."""

    def output(self, site: nn.Module, slot: Slot, x: Tensor) -> Tensor | None:
        """Compute the site with its change.

        Args:
            site: A module that carries adapters.
            slot: Its slot.
            x: (..., in).

        Returns:
            (..., out), saving ``x`` once and making no second output; None for sites that are not frozen, not plain
            Linear layers, or whose change is no pair.
        """
        found = _pair(site, slot, x)
        if found is None or not isinstance(site, nn.Linear):
            return None
        sole, pair = found
        quick = _projections(site.weight, site.bias, [found]) if in_pass() else None
        if quick is None:
            return low_rank_linear(x, site.weight, site.bias, pair.down, pair.up, sole.strength, pair.scale)
        return quick(x)


def _pair(site: nn.Module, slot: Slot | None, x: Tensor) -> tuple[Sole, Factors] | None:
    """The only adapter of a frozen plain Linear with its pair, where one function is the faster."""
    sole = None if slot is None else slot.sole_adapter()
    if sole is None or not pays(x) or not is_plain_linear(site):
        return None
    if site.weight.dtype != x.dtype or any(own.requires_grad for own in site.parameters(recurse=False)):
        return None
    pair = sole.adapter.low_rank_factors()
    return None if pair is None else (sole, pair)


class Working:
    """What an arena trains, in the dtype that a base computes in, made anew at once for every pass: else each pair of each
    layer is turned by itself. Gradients are added where the arena has them, inside the product that makes them.

    ``flat`` and ``grad`` are the arena's tensors, which its parameters and their gradients are views of. Its products know
    no strength: adapters whose strength is not 1 are computed as ever.
    """

    def __init__(self, flat: Tensor, grad: Tensor) -> None:
        self.flat = flat
        self.grad = grad
        self._turned = {flat.dtype: flat}
        self._relied: set[tuple[Strengths, str]] = set()

    @contextmanager
    def passing(self) -> Iterator[None]:
        """One pass forward and backward inside.

        Yields:
            Once, while adapters at strength 1 are computed from what was made for this pass.
        """
        for turned in self._turned.values():
            if turned is not self.flat:
                turned.copy_(self.flat)
        before, _Fusing.working = _Fusing.working, self
        try:
            yield
        finally:
            _Fusing.working = before

    @property
    def full(self) -> bool:
        """Whether every strength that a pass took for 1 still is: a recording of that pass holds no longer where not."""
        return all(name in strengths.full for strengths, name in self._relied)

    def rely(self, sole: Sole) -> bool:
        """Take the strength of an adapter for 1 in this pass and in recordings of it.

        Args:
            sole: The adapter.

        Returns:
            Whether it is 1.
        """
        if sole.full:
            self._relied.add((sole.strengths, sole.name))
        return sole.full

    def of(self, parameters: Sequence[nn.Parameter], dtype: torch.dtype) -> "Stack | None":
        """View parameters of one shape that lie one after the other as one tensor.

        Args:
            parameters: The parameters.
            dtype: The dtype to compute in.

        Returns:
            The tensor and its gradient; None where they do not lie so, or not in this arena.
        """
        found = stacked([parameter.detach() for parameter in parameters])
        if found is None or found.untyped_storage().data_ptr() != self.flat.untyped_storage().data_ptr():
            return None
        if dtype not in self._turned:
            self._turned[dtype] = self.flat.to(dtype)
        start = found.storage_offset() - self.flat.storage_offset()
        here = slice(start, start + found.numel())
        return Stack(self._turned[dtype][here].view(found.shape), self.grad[here].view(found.shape))


def fused_projections(layers: Sequence[nn.Module], x: Tensor) -> "Projections | None":
    """View several layers of one input as one.

    Args:
        layers: Linear layers without biases.
        x: Their input.

    Returns:
        The one layer; None outside of a pass of `Working`, where their weights do not lie one after the other, or where not
        each has one pair of low rank and nothing else.
    """
    if not in_pass():
        return None
    found = [_pair(layer, slot_of(layer), x) for layer in layers]
    pairs = [one for one in found if one is not None]
    if len(pairs) < len(layers) or any(layer.bias is not None for layer in layers):
        return None
    weight = stacked([layer.weight.detach() for layer in layers if isinstance(layer, nn.Linear)])
    return None if weight is None else _projections(weight.flatten(0, 1), None, pairs)


def stacked(tensors: Sequence[Tensor]) -> Tensor | None:
    """View tensors of one shape that lie one after the other in memory as one.

    Args:
        tensors: At least one.

    Returns:
        (count, ...); None where they do not lie so.
    """
    first = tensors[0]
    if any(one.shape != first.shape for one in tensors) or not _follow(tensors):
        return None
    return first.as_strided((len(tensors), *first.shape), (first.numel(), *first.stride()), first.storage_offset())


def joined(tensors: Sequence[Tensor]) -> Tensor | None:
    """View tensors that lie one after the other in memory as one along their first axis.

    Args:
        tensors: At least one, not empty; they may differ along the first axis.

    Returns:
        (sum, ...); None where they do not lie so.
    """
    first = tensors[0]
    if any(one.shape[1:] != first.shape[1:] for one in tensors) or not _follow(tensors):
        return None
    shape, steps = (sum(len(one) for one in tensors), *first.shape[1:]), (first.numel() // len(first), *first.stride()[1:])
    return first.as_strided(shape, steps, first.storage_offset())


def _follow(tensors: Sequence[Tensor]) -> bool:
    """Whether contiguous tensors of one dtype lie one after the other."""
    # Without any operation of torch's: where a step is tried out without memory, that would give tensors that have none.
    first = tensors[0]
    storage, place = first.untyped_storage().data_ptr(), first.storage_offset()
    for one in tensors:
        if one.dtype != first.dtype or not one.is_contiguous():
            return False
        if one.untyped_storage().data_ptr() != storage or one.storage_offset() != place:
            return False
        place += one.numel()
    return True


@dataclass(frozen=True)
class Stack:
    """Parameters of one shape: ``value`` (count, ...) as the base computes with them, and ``grad`` in float32."""

    value: Tensor
    grad: Tensor


@dataclass(frozen=True)
class Projections:
    """Frozen Linear layers of one input with a pair of low rank each, as one layer.

    ``weight`` (layers * out, in) holds their weights one below the other, ``bias`` (layers * out,) too; ``down`` is a stack
    of (layers, rank, in), ``up`` of (layers, out, rank). ``first`` is any of their parameters, through which backward comes.
    """

    weight: Tensor
    bias: Tensor | None
    down: Stack
    up: Stack
    scale: float
    first: nn.Parameter

    def __call__(self, x: Tensor) -> Tensor:
        """(..., layers * out) of ``x`` (..., in), which has the dtype of the weight."""
        apply: Callable[..., Tensor] = _Projections.apply
        return apply(x, self.first, self)


def in_pass() -> bool:
    """Whether a pass of `Working` is under way."""
    return _Fusing.working is not None


def _projections(weight: Tensor, bias: Tensor | None, pairs: Sequence[tuple[Sole, Factors]]) -> Projections | None:
    """The layers as one, in a pass of `Working` whose arena has their pairs side by side at strength 1; None elsewhere."""
    working, scales = _Fusing.working, {pair.scale for _, pair in pairs}
    if working is None or len(scales) > 1 or not all(sole.full for sole, _ in pairs):
        return None
    sides = [[side for side in (pair.down, pair.up) if isinstance(side, nn.Parameter)] for _, pair in pairs]
    if any(len(side) < 2 for side in sides):  # made of other tensors, whose gradients autograd has to find
        return None
    down, up = (working.of(parameters, weight.dtype) for parameters in zip(*sides, strict=True))
    if down is None or up is None:
        return None
    for sole, _ in pairs:
        working.rely(sole)
    return Projections(weight, bias, down, up, scales.pop(), sides[0][0])


class _Projections(torch.autograd.Function):
    """Sums are made inside the products, forward and backward, and gradients of the pairs where the arena has them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, first: Tensor, made: Projections) -> Tensor:
        rows, layers = x.reshape(-1, x.shape[-1]), len(made.down.value)
        hidden = rows @ made.down.value.flatten(0, 1).t()
        y = F.linear(rows, made.weight, made.bias)
        if layers == 1:
            y.addmm_(hidden, made.up.value[0].t(), alpha=made.scale)
        else:
            _by_layer(y, layers).baddbmm_(_by_layer(hidden, layers), made.up.value.transpose(1, 2), alpha=made.scale)
        ctx.save_for_backward(rows, hidden)
        ctx.made, ctx.shape = made, x.shape
        return y.view(*x.shape[:-1], len(made.weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (rows, hidden), made = ctx.saved_tensors, ctx.made
        layers, gradient = len(made.down.value), gradients[0].reshape(-1, len(made.weight))
        inner = torch.empty_like(hidden)
        if layers == 1:
            torch.mm(gradient, made.up.value[0], out=inner)
        else:
            torch.bmm(_by_layer(gradient, layers), made.up.value, out=_by_layer(inner, layers))
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = gradient @ made.weight
            to_x = to_x.addmm_(inner, made.down.value.flatten(0, 1), alpha=made.scale).view(ctx.shape)
        _add_product(made.down.grad.flatten(0, 1), inner.t(), rows, made.scale)
        if layers == 1:
            _add_product(made.up.grad[0], gradient.t(), hidden, made.scale)
        else:
            _add_product(made.up.grad, _by_layer(gradient, layers).transpose(1, 2), _by_layer(hidden, layers), made.scale)
        return to_x, None, None


def _by_layer(x: Tensor, layers: int) -> Tensor:
    """(rows, layers * width) as (layers, rows, width), without a copy."""
    return x.view(len(x), layers, -1).transpose(0, 1)


def _add_product(total: Tensor, a: Tensor, b: Tensor, factor: float) -> None:
    """``total += factor * a @ b``, of matrices or stacks of them; ``total`` is float32."""
    add = torch.addmm if total.ndim == 2 else torch.baddbmm
    if a.dtype == total.dtype:
        add(total, a, b, alpha=factor, out=total)
    elif a.is_cuda:
        add(total, a, b, out_dtype=total.dtype, alpha=factor, out=total)
    else:
        total.add_((a @ b).float(), alpha=factor)


def low_rank_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, strength: Tensor, scale: float
) -> Tensor:
    """Compute ``x @ weight.T + bias + scale * strength * (x @ down.T) @ up.T``.

    Keeps ``x`` for backward once, and its product with ``down``.

    Args:
        x: (..., in).
        weight: (out, in), frozen, of the dtype of ``x``.
        bias: (out,), likewise.
        down: (rank, in), float32.
        up: (out, rank), float32.
        strength: (1,), float32; gets no gradient.
        scale: alpha / rank.

    Returns:
        (..., out), in the dtype of ``x``.
    """
    apply: Callable[..., Tensor] = _LowRankLinear.apply
    return apply(x, weight, bias, down, up, strength, scale)


class _LowRankLinear(torch.autograd.Function):
    """The change is added inside the product that makes it, forward and backward, so that no sum is a pass of its own."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, strength: Tensor, scale: float
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        down = down.to(x.dtype)
        up = torch.mul(up, strength, out=torch.empty_like(up, dtype=x.dtype))
        hidden = rows @ down.t()
        y = F.linear(rows, weight, bias).addmm_(hidden, up.t(), alpha=scale)
        ctx.save_for_backward(rows, hidden, weight, down, up, strength)
        ctx.scale, ctx.shape = scale, x.shape
        return y.view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, hidden, weight, down, up, strength = ctx.saved_tensors
        gradient = gradients[0].reshape(-1, len(weight))
        inner = gradient @ up
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = (gradient @ weight).addmm_(inner, down, alpha=ctx.scale).view(ctx.shape)
        to_down, to_up = _in_float32(inner.t(), rows), _in_float32(gradient.t(), hidden).mul_(strength)
        if ctx.scale != 1:
            to_down, to_up = to_down.mul_(ctx.scale), to_up.mul_(ctx.scale)
        return to_x, None, None, to_down, to_up, None, None


def _in_float32(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` with a float32 result, which a GPU writes at once."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()
