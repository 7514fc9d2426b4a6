"""What a frozen base computes, as functions that keep for backward only what they cannot make again.

Their base needs no gradients, which is taken for granted: weights and biases get none. Each function has two ways to be
computed: kernels that read memory once, where Triton is and the tensors are on a GPU, and torch.
"""

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Pair = tuple[Tensor, Tensor]
_CHANNELS_LAST = torch.channels_last


_found: dict[torch.device, Any] = {}  # the kernels of each device, where they were looked for
_looking = threading.RLock()
_COUNTED = 2**31 - 1  # numbers of a tensor that kernels reach: they count in 32 bits
_in_torch: ContextVar[bool] = ContextVar("in_torch", default=False)


def kernels_on(device: torch.device) -> Any:
    """Find the kernels of Triton that run on a device.

    Triton's interpreter (TRITON_INTERPRET=1) runs them on a CPU, which is slow but shows that they are right.

    Args:
        device: Where they shall run.

    Returns:
        The module of kernels, once they were seen to run; None where they do not.
    """
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return None
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    with _looking:
        if device not in _found:
            _found[device] = _seen(device)
        return _found[device]


def look_ahead(device: torch.device) -> threading.Thread:
    """Look for the kernels of a device in another thread, so that they are there when a base is loaded.

    Args:
        device: Where they shall run.

    Returns:
        The thread, for which nobody has to wait: `kernels_on` does.
    """
    thread = threading.Thread(target=kernels_on, args=(device,), name="kernels", daemon=True)
    thread.start()
    return thread


@contextmanager
def in_torch() -> Iterator[None]:
    """Compute inside with torch alone, and without a search for the fastest convolutions.

    For a few calls before training, which take less time than compiling the kernels one by one and searching.

    Yields:
        Once; afterwards all is computed as before.
    """
    token = _in_torch.set(True)
    try:
        with searching(False):
            yield
    finally:
        _in_torch.reset(token)


@contextmanager
def searching(wanted: bool) -> Iterator[None]:
    """Let cuDNN search for its fastest convolutions inside, or not.

    Which is fastest is found with a clock, so not where every run shall round alike.

    Args:
        wanted: Whether it shall.

    Yields:
        Once; afterwards it does as before.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = wanted and not torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _seen(device: torch.device) -> Any:
    try:
        from . import kernels

        if device.type == "cuda":
            with suppress(Exception), kernels.compiling(device):  # which a Triton before 3.4 cannot do side by side
                _answers(kernels, device)
        _see(kernels, device)
    except Exception as error:  # no Triton, no compiler for what it launches from, a card that it does not know
        logging.getLogger(__name__).warning("computing without Triton's kernels, which is slower: %s", error)
        return None
    return kernels


def _see(kernels: Any, device: torch.device) -> None:
    """Raise RuntimeError where kernels do not give on a device what torch gives, as of a version that compiles otherwise."""
    for name, (ours, theirs) in _answers(kernels, device).items():
        if not torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4):  # which also waits for what was launched
            raise RuntimeError(f"{name} gives something else than torch")


def _answers(kernels: Any, device: torch.device) -> dict[str, Pair]:
    """What kernels and torch give for the same, by the kernel's name."""
    chance = torch.Generator(device).manual_seed(0)  # of its own, as a run draws from the device's meanwhile
    x, wide, more = (
        torch.randn(*shape, generator=chance, device=device) for shape in ((1, 64, 2, 4), (1, 5, 80), (1, 5, 64))
    )
    x, one = x.to(memory_format=_CHANNELS_LAST), torch.ones(64, device=device)
    y, mean, rstd = kernels.group_norm(x, None, one, one, 8, 1e-5, True)
    total = wide[..., :64] + more
    kernels.gated_back(kernels.gated(one), one)
    return {
        "group_norm": (y, _group_norm_in_torch(x, None, one, one, 8, 1e-5, True)[0]),
        "group_norm_back": (
            kernels.group_norm_back(y, x, None, one, one, mean, rstd, True, None),
            _group_norm_back_in_torch(y, x, None, one, one, mean, rstd, True, None),
        ),
        "layer_norm": (kernels.layer_norm(wide[..., :64], more, one, one, 1e-5)[1], F.layer_norm(total, [64], one, one)),
        "gated": (kernels.gated(more), more[..., :32] * F.gelu(more[..., 32:])),
    }


def _kernels(x: Tensor) -> Any:
    """The kernels for a tensor; for one that has a shape and no memory, as when memory is predicted, what gives as much, or
    compiles them. None for one in which they could not count, as eight pictures of 1024 pixels are in a VAE."""
    there = None if _in_torch.get() or x.numel() > _COUNTED else kernels_on(x.device)
    return _Shapes if there is not None and isinstance(x, FakeTensor) and not there.compiling_ahead() else there


class _Shapes:
    """What the kernels of Triton give, by shape: none of them may be given a tensor without memory."""

    @staticmethod
    def group_norm(
        x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean, rstd = x.new_empty(2, len(x), groups, dtype=torch.float32).unbind()
        return torch.empty_like(x), mean, rstd

    @staticmethod
    def group_norm_back(dy: Tensor, x: Tensor, *_: object) -> Tensor:
        return torch.empty_like(x)

    @staticmethod
    def layer_norm(
        x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, rstd = x.new_empty(2, x.numel() // x.shape[-1], dtype=torch.float32).unbind()
        return x if added is None else torch.empty_like(x), torch.empty_like(x), mean, rstd

    @staticmethod
    def layer_norm_back(dy: Tensor, x: Tensor, *_: object) -> Tensor:
        return torch.empty_like(x)

    @staticmethod
    def gated(x: Tensor) -> Tensor:
        return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)

    @staticmethod
    def gated_back(dy: Tensor, x: Tensor) -> Tensor:
        return torch.empty_like(x)

    @staticmethod
    def sum_with_bias(a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
        return torch.empty_like(a)


def group_norm(x: Tensor, norm: nn.GroupNorm, shift: Tensor | None = None, silu: bool = False) -> Pair:
    """Compute a frozen group norm, keeping for backward ``x`` and two numbers for each group.

    Args:
        x: (images, channels, height, width).
        norm: The frozen module.
        shift: Added to ``x`` first, (images, channels).
        silu: Whether SiLU follows.

    Returns:
        The norm of ``x + shift`` (and its SiLU), and ``x`` itself: who uses this in place of ``x`` has both gradients added
        where the norm's is made.
    """
    x = x.contiguous(memory_format=_CHANNELS_LAST)
    apply: Callable[..., Pair] = _GroupNorm.apply
    return apply(x, shift, norm.weight, norm.bias, norm.num_groups, norm.eps, silu)


def layer_norm(x: Tensor, norm: nn.LayerNorm, added: Tensor | None = None) -> Pair:
    """Compute a frozen layer norm over the last axis.

    Args:
        x: (..., width).
        norm: The frozen module.
        added: Added to ``x`` first, of its shape.

    Returns:
        The norm of ``x + added``, and that sum, whose gradient is added where the norm's is made.
    """
    apply: Callable[..., Pair] = _LayerNorm.apply
    # What is added to may lie in rows apart, as after a product that makes more than them.
    x = x if added is not None and _in_rows(x) else x.contiguous()
    return apply(x, added if added is None else added.contiguous(), norm.weight, norm.bias, norm.eps)


def _in_rows(x: Tensor) -> bool:
    """Whether the rows of (images, places, width) follow one another at one distance."""
    return x.ndim == 3 and x.stride(2) == 1 and x.stride(0) == x.shape[1] * x.stride(1)


def gated(x: Tensor) -> Tensor:
    """Compute GEGLU (Shazeer 2020, https://arxiv.org/abs/2002.05202).

    Args:
        x: (..., 2 * width).

    Returns:
        The first half of the last axis times the GELU of the second, (..., width).
    """
    apply: Callable[..., Tensor] = _Gated.apply
    return apply(x.contiguous())


def conv2d(x: Tensor, conv: nn.Conv2d, biased: bool = True) -> Tensor:
    """Compute a frozen convolution, padded with zeros, which keeps for backward the shape of ``x`` alone.

    Args:
        x: (images, channels, height, width).
        conv: The frozen module.
        biased: Whether its bias is added.

    Returns:
        What the module gives.
    """
    apply: Callable[..., Tensor] = _Conv2d.apply
    return apply(x, conv.weight, conv.bias if biased else None, conv.stride, conv.padding, conv.dilation, conv.groups)


def pointwise(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Compute a 1x1 convolution of a channels-last map as the product that it is, its bias included.

    Args:
        x: (images, channels, height, width), channels-last.
        conv: The frozen module.

    Returns:
        What the module gives.
    """
    rows = x.permute(0, 2, 3, 1)
    return F.linear(rows, conv.weight.flatten(1), conv.bias).permute(0, 3, 1, 2)


def sum_with_bias(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """Add two maps and a number for each channel.

    Args:
        a: (images, channels, height, width).
        b: Of the same shape.
        bias: (channels,).

    Returns:
        The sum.
    """
    if bias is None:
        return a + b
    apply: Callable[..., Tensor] = _SumWithBias.apply
    return apply(a.contiguous(memory_format=_CHANNELS_LAST), b.contiguous(memory_format=_CHANNELS_LAST), bias)


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
    ) -> Pair:
        ctx.set_materialize_grads(False)
        kernels = _kernels(x)
        if kernels is not None:
            shift = shift if shift is None or shift.stride(1) == 1 else shift.contiguous()
            y, mean, rstd = kernels.group_norm(x, shift, weight, bias, groups, eps, silu)
        else:
            y, mean, rstd = _group_norm_in_torch(x, shift, weight, bias, groups, eps, silu)
        ctx.save_for_backward(x, shift, weight, bias, mean, rstd)
        ctx.silu = silu
        return y, x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, shift, weight, bias, mean, rstd = ctx.saved_tensors
        dy, through = gradients
        if dy is None:
            return through, None, None, None, None, None, None
        dy = dy.contiguous(memory_format=_CHANNELS_LAST)
        # A shift gets the gradient of the norm alone, so what passes through is then added apart.
        apart = ctx.needs_input_grad[1]
        passed = None if through is None or apart else through.contiguous(memory_format=_CHANNELS_LAST)
        kernels = _kernels(x)
        back = kernels.group_norm_back if kernels is not None else _group_norm_back_in_torch
        dx = back(dy, x, shift, weight, bias, mean, rstd, ctx.silu, passed)
        moved = dx.float().sum((2, 3)).to(shift.dtype) if apart else None
        if apart and through is not None:
            dx = dx + through
        return dx, moved, None, None, None, None, None


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Pair:
        ctx.set_materialize_grads(False)
        kernels = _kernels(x)
        if kernels is not None:
            total, y, mean, rstd = kernels.layer_norm(x, added, weight, bias, eps)
        else:
            total = x if added is None else x + added
            y, mean, rstd = torch.native_layer_norm(total, [total.shape[-1]], weight, bias, eps)
        ctx.save_for_backward(total, weight, bias, mean, rstd)
        return y, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight, bias, mean, rstd = ctx.saved_tensors
        dy, through = gradients
        kernels = _kernels(total)
        if dy is None:
            dx = through
        elif kernels is not None:
            passed = None if through is None else through.contiguous()
            dx = kernels.layer_norm_back(dy.contiguous(), total, weight, mean, rstd, passed)
        else:
            mask, shape = [True, False, False], [total.shape[-1]]
            found = torch.ops.aten.native_layer_norm_backward(dy.contiguous(), total, shape, mean, rstd, weight, bias, mask)
            dx = found[0] if through is None else found[0] + through
        return dx, dx if ctx.needs_input_grad[1] else None, None, None, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        kernels = _kernels(x)
        if kernels is not None:
            return kernels.gated(x)  # type: ignore[no-any-return]
        value, gate = x.chunk(2, -1)
        return value * F.gelu(gate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        dy = gradients[0].contiguous()
        kernels = _kernels(x)
        if kernels is not None:
            return kernels.gated_back(dy, x)  # type: ignore[no-any-return]
        value, gate = x.chunk(2, -1)
        return torch.cat([dy * F.gelu(gate), torch.ops.aten.gelu_backward(dy * value, gate)], -1)


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
        groups: int,
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.geometry = x.shape, (stride, padding, dilation, groups)
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (weight,), dx = ctx.saved_tensors, None
        stride, padding, dilation, groups = ctx.geometry
        if ctx.needs_input_grad[0]:
            # The general backward pass would copy an input first, of which it needs but the shape.
            sizes = zip(ctx.shape[2:], gradients[0].shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
            rest = [all_ - (out - 1) * step + 2 * pad - wide * (size - 1) - 1 for all_, out, size, step, pad, wide in sizes]
            dx = F.conv_transpose2d(gradients[0], weight, None, stride, padding, rest, groups, dilation)
        return dx, None, None, None, None, None, None


class _SumWithBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
        kernels = _kernels(a)
        if kernels is not None:
            return kernels.sum_with_bias(a, b, bias)  # type: ignore[no-any-return]
        return a + (b + bias[:, None, None])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], gradients[0], None


def _grouped(x: Tensor, groups: int) -> Tensor:
    """(images, groups, channels of a group, places) in float32."""
    return x.float().reshape(len(x), groups, x.shape[1] // groups, -1)


def _normal(x: Tensor, shift: Tensor | None, mean: Tensor, rstd: Tensor) -> Tensor:
    seen = x.float() if shift is None else x.float() + shift.float()[:, :, None, None]
    return ((_grouped(seen, mean.shape[1]) - mean[:, :, None, None]) * rstd[:, :, None, None]).view(x.shape)


def _group_norm_in_torch(
    x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    seen = x.float() if shift is None else x.float() + shift.float()[:, :, None, None]
    variance, mean = torch.var_mean(_grouped(seen, groups).flatten(2), 2, correction=0)
    rstd = (variance + eps).rsqrt()
    z = _normal(x, shift, mean, rstd) * weight.float()[:, None, None] + bias.float()[:, None, None]
    z = F.silu(z) if silu else z
    return z.to(x.dtype).contiguous(memory_format=_CHANNELS_LAST), mean, rstd


def _group_norm_back_in_torch(
    dy: Tensor, x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, silu: bool,
    through: Tensor | None,
) -> Tensor:  # fmt: skip
    normal, dz, groups = _normal(x, shift, mean, rstd), dy.float(), mean.shape[1]
    if silu:
        z = normal * weight.float()[:, None, None] + bias.float()[:, None, None]
        dz = torch.ops.aten.silu_backward(dz, z)
    dz = _grouped(dz * weight.float()[:, None, None], groups)
    normal = _grouped(normal, groups)
    first, second = dz.mean((2, 3), keepdim=True), (dz * normal).mean((2, 3), keepdim=True)
    dx = ((dz - first - normal * second) * rstd[:, :, None, None]).view(x.shape)
    if through is not None:
        dx = dx + through
    return dx.to(x.dtype).contiguous(memory_format=_CHANNELS_LAST)
