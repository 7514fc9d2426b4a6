"""Frozen Linear layers and pairs of low rank as one function, for training where kernels and memory count."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class _Fusing:
    on = False
    working: "Working | None" = None


@contextmanager
def fusing() -> Iterator[None]:
    """The function below in use inside; in every thread, as a backward pass that computes again has one of its own."""
    before, _Fusing.on = _Fusing.on, True
    try:
        yield
    finally:
        _Fusing.on = before


def pays(x: Tensor) -> bool:
    """Whether the function below is to be used: on a GPU. A CPU computes longer than it launches, and keeps its bits."""
    return _Fusing.on and x.is_cuda


class Working:
    """What an arena trains, in the dtype that a base computes in, made anew at once for every pass: else each pair of each
    layer is turned by itself. Gradients are added where the arena has them, inside the product that makes them.

    ``flat`` and ``grad`` are the arena's tensors, which its parameters and their gradients are views of.
    """

    def __init__(self, flat: Tensor, grad: Tensor) -> None:
        self.flat = flat
        self.grad = grad
        self._turned = {flat.dtype: flat}

    @contextmanager
    def passing(self) -> Iterator[None]:
        """One pass forward and backward inside, in which every adapter that is on is so at strength 1."""
        for turned in self._turned.values():
            if turned is not self.flat:
                turned.copy_(self.flat)
        before, _Fusing.working = _Fusing.working, self
        try:
            yield
        finally:
            _Fusing.working = before

    def of(self, parameters: Sequence[nn.Parameter], dtype: torch.dtype) -> "Stack | None":
        """Parameters of one shape that lie one after the other, as one tensor; None where they do not."""
        found = stacked([parameter.detach() for parameter in parameters])
        if found is None or found.untyped_storage().data_ptr() != self.flat.untyped_storage().data_ptr():
            return None
        if dtype not in self._turned:
            self._turned[dtype] = self.flat.to(dtype)
        start = found.storage_offset() - self.flat.storage_offset()
        here = slice(start, start + found.numel())
        return Stack(self._turned[dtype][here].view(found.shape), self.grad[here].view(found.shape))


def stacked(tensors: Sequence[Tensor]) -> Tensor | None:
    """Tensors of one shape that lie one after the other in memory, as one of (count, ...); None where they do not."""
    first = tensors[0]
    storage, start, size = first.untyped_storage().data_ptr(), first.storage_offset(), first.numel()
    for place, one in enumerate(tensors):
        alike = one.shape == first.shape and one.dtype == first.dtype and one.is_contiguous()
        if not alike or one.untyped_storage().data_ptr() != storage or one.storage_offset() != start + place * size:
            return None
    return first.as_strided((len(tensors), *first.shape), (size, *first.stride()), start)


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


def projections(
    weight: Tensor, bias: Tensor | None, pairs: Sequence[tuple[nn.Parameter, nn.Parameter]], scale: float
) -> Projections | None:
    """The layers as one, in a pass of `Working` whose arena has their pairs side by side; None elsewhere."""
    working = _Fusing.working
    if working is None:
        return None
    down, up = (working.of(parameters, weight.dtype) for parameters in zip(*pairs, strict=True))
    return None if down is None or up is None else Projections(weight, bias, down, up, scale, pairs[0][0])


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
            _apart(y, layers).baddbmm_(_apart(hidden, layers), made.up.value.transpose(1, 2), alpha=made.scale)
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
            torch.bmm(_apart(gradient, layers), made.up.value, out=_apart(inner, layers))
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = gradient @ made.weight
            to_x = to_x.addmm_(inner, made.down.value.flatten(0, 1), alpha=made.scale).view(ctx.shape)
        _add_product(made.down.grad.flatten(0, 1), inner.t(), rows, made.scale)
        if layers == 1:
            _add_product(made.up.grad[0], gradient.t(), hidden, made.scale)
        else:
            _add_product(made.up.grad, _apart(gradient, layers).transpose(1, 2), _apart(hidden, layers), made.scale)
        return to_x, None, None


def _apart(x: Tensor, layers: int) -> Tensor:
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
    """``x @ weight.T + bias + scale * strength * (x @ down.T) @ up.T``, (..., out), in the dtype of ``x``.

    ``weight`` (out, in) and ``bias`` are frozen and of that dtype; ``down`` (rank, in), ``up`` (out, rank) and ``strength``
    (1,), which gets no gradient, are float32. Keeps ``x`` once, and its product with ``down``.
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
