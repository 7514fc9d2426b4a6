"""A frozen Linear and a pair of low rank as one function, for training where kernels and memory count."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class _Fusing:
    on = False


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
