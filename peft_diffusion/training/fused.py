"""A frozen UNet made ready for training on a GPU, and afterwards as it was.

Its modules change their class, as sites do: a group norm and the SiLU after it become one operation, as a gated unit does,
and each keeps its input alone; a convolution, whose weight needs no gradient, keeps nothing. Weights lie in channels-last
order.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..core.site import AdaptedSite, base_class, rebase
from ..methods.product import fusing


@contextmanager
def fused(component: nn.Module) -> Iterator[None]:
    """On CUDA, a component that trains faster inside; on any other device nothing changes, not a bit of what it computes."""
    parameter = next(component.parameters())
    if not parameter.is_cuda:
        yield
        return
    chosen = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    component.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    _kernels(parameter.device)  # now, as their first run cannot be recorded
    try:
        with swapped(component), fusing():
            yield
    finally:
        component.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        torch.backends.cudnn.benchmark = chosen


@contextmanager
def swapped(component: nn.Module) -> Iterator[None]:
    """The modules of a component in their fused classes, with adapters or without; on any device."""
    changed: list[tuple[nn.Module, type[nn.Module]]] = []
    for module in list(component.modules()):
        own = base_class(module) if isinstance(module, AdaptedSite) else type(module)
        fast = _FUSED.get(own)
        if fast is not None and _suits(module):
            rebase(module, fast)
            changed.append((module, own))
    try:
        yield
    finally:
        for module, own in changed:
            rebase(module, own)


def _suits(module: nn.Module) -> bool:
    """Whether a module is of the usual kind: of the many that a class may be, one is fused."""
    if isinstance(module, ResnetBlock2D):
        plain = module.upsample is None and module.downsample is None and module.time_embedding_norm == "default"
        return plain and isinstance(module.nonlinearity, nn.SiLU)
    if isinstance(module, nn.Conv2d):
        return module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return not isinstance(module, nn.GroupNorm) or module.affine


def _frozen(module: nn.Module) -> bool:
    return not any(own.requires_grad for own in module.parameters(recurse=False))


class FrozenConv(nn.Conv2d):
    """A convolution that keeps no input, as its weight has no gradient that would need it."""

    def forward(self, input: Tensor) -> Tensor:
        """As before."""
        if not torch.is_grad_enabled() or not _frozen(self) or torch.compiler.is_compiling():
            return super().forward(input)
        apply: Callable[..., Tensor] = _Convolution.apply
        return apply(input, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class FusedNorm(nn.GroupNorm):
    """A group norm that is one with a SiLU after it, if there is one."""

    def forward(self, input: Tensor) -> Tensor:
        """As before."""
        return self.normed(input, silu=False)

    def normed(self, x: Tensor, *, silu: bool) -> Tensor:
        """The norm, or SiLU of it."""
        if x.ndim != 4 or not _frozen(self) or torch.compiler.is_compiling():
            y = super().forward(x)
            return F.silu(y) if silu else y
        apply: Callable[..., Tensor] = _Norm.apply
        return apply(x, self.weight, self.bias, self.num_groups, self.eps, silu)


class FusedGeglu(GEGLU):  # type: ignore[misc]
    """A gated unit that keeps the projection alone."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """As before."""
        projected: Tensor = self.proj(hidden_states)
        apply: Callable[..., Tensor] = _Geglu.apply
        return apply(projected)


class FusedResnet(ResnetBlock2D):  # type: ignore[misc]
    """A block whose norms and SiLUs are one."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None) -> Tensor:
        """As before, where the block neither samples up nor down."""
        hidden: Tensor = self.conv1(_norm_silu(self.norm1, input_tensor))
        if self.time_emb_proj is not None and temb is not None:
            temb = self.time_emb_proj(temb if self.skip_time_act else F.silu(temb))[:, :, None, None]
        if temb is not None:
            hidden = hidden + temb
        hidden = self.conv2(self.dropout(_norm_silu(self.norm2, hidden)))
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        result: Tensor = (input_tensor + hidden) / self.output_scale_factor
        return result


def _norm_silu(norm: nn.Module, x: Tensor) -> Tensor:
    if type(norm) is FusedNorm:
        return norm.normed(x, silu=True)
    return F.silu(norm(x))  # it carries an adapter


_FUSED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: FrozenConv,
    nn.GroupNorm: FusedNorm,
    GEGLU: FusedGeglu,
    ResnetBlock2D: FusedResnet,
}


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.how = x.shape, (list(stride), list(padding), list(dilation), groups)
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (weight,), (stride, padding, dilation, groups) = ctx.saved_tensors, ctx.how
        if not ctx.needs_input_grad[0]:
            return (None,) * 7
        (gradient,) = gradients
        like = gradient.new_empty(1).expand(ctx.shape)  # the gradient to the input asks for its shape, never for its numbers
        to_x, *_ = torch.ops.aten.convolution_backward(
            gradient, like, weight, None, stride, padding, dilation, False, [0, 0], groups, [True, False, False]
        )
        return to_x, None, None, None, None, None, None


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
        ctx.how = groups, silu
        if _kernels(x.device) is not None and x.is_contiguous(memory_format=torch.channels_last):
            y, stats = _kernels(x.device).group_norm(x, weight, bias, groups, eps, silu)
            ctx.save_for_backward(x, weight, bias, stats)
            return y  # type: ignore[no-any-return]
        images, channels, *sides = x.shape
        y, mean, inverse = torch.native_group_norm(x, weight, bias, images, channels, sides[0] * sides[1], groups, eps)
        ctx.save_for_backward(x, weight, bias, mean, inverse)
        return F.silu(y) if silu else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (groups, silu) = gradients, ctx.how
        x, weight, bias, *stats = ctx.saved_tensors
        if len(stats) == 1:
            gradient = gradient.contiguous(memory_format=torch.channels_last)
            to_x = _kernels(x.device).group_norm_backward(gradient, x, weight, bias, stats[0], silu)
            return to_x, None, None, None, None, None
        mean, inverse = stats
        images, channels, *sides = x.shape
        if silu:
            spread = x.reshape(images, groups, -1)
            hat = ((spread - mean[..., None]) * inverse[..., None]).view(x.shape)
            z = (hat * weight[:, None, None] + bias[:, None, None]).to(x.dtype)
            gradient = torch.ops.aten.silu_backward(gradient, z)
        sizes = images, channels, sides[0] * sides[1], groups
        plain = gradient.contiguous(), x.contiguous()
        to_x, *_ = torch.ops.aten.native_group_norm_backward(*plain, mean, inverse, weight, *sizes, [True, False, False])
        return to_x, None, None, None, None, None


class _Geglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        if _kernels(x.device) is not None and x.is_contiguous():
            return _kernels(x.device).geglu(x)  # type: ignore[no-any-return]
        value, gate = x.chunk(2, -1)
        return value * F.gelu(gate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,), (gradient,) = ctx.saved_tensors, gradients
        if _kernels(x.device) is not None and x.is_contiguous():
            return _kernels(x.device).geglu_backward(gradient.contiguous(), x)  # type: ignore[no-any-return]
        value, gate = x.chunk(2, -1)
        return torch.cat([gradient * F.gelu(gate), torch.ops.aten.gelu_backward(gradient * value, gate)], -1)


@functools.cache
def _kernels(device: torch.device) -> Any:
    """The kernels of Triton, once they were seen to run on a device; None where they do not."""
    if device.type != "cuda":
        return None
    try:
        from . import kernels

        x = torch.randn(1, 64, 2, 4, device=device).to(memory_format=torch.channels_last)
        one = torch.ones(64, device=device)
        y, stats = kernels.group_norm(x, one, one, 8, 1e-5, True)
        kernels.group_norm_backward(y, x, one, one, stats, True)
        kernels.geglu_backward(kernels.geglu(one), one)
        torch.cuda.synchronize(device)
    except Exception as error:  # no Triton, no compiler for what it launches from, a card that it does not know
        import logging

        logging.getLogger(__name__).warning("training without Triton's kernels, which is slower: %s", error)
        return None
    return kernels
