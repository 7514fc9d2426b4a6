"""Linear layers whose weight is held in 4 or 8 bits, and never changes in training (QLoRA, Dettmers et al. 2023,
https://arxiv.org/abs/2305.14314).

Not the modules of bitsandbytes: its Linear4bit repacks its weight in place when it first runs on a CPU, and its Linear8bitLt
rounds the inputs as well. Here the bytes stay, the product is that of the dequantized weight, and everything is an ordinary
tensor of an ordinary module, which copies, pickles, moves and compiles as any other.
"""

import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .errors import UserError, did_you_mean
from .site import AdaptedSite
from .targets import HEADS

NF4, INT8 = "nf4", "int8"
BLOCK = 64  # weights that share a scale in nf4


class QuantizedLinear(nn.Linear):
    """A Linear whose ``weight`` holds codes, with their ``weight_scale`` in float32; the bias is as it was."""

    kind: ClassVar[str]
    weight_scale: Tensor

    def dense(self, codes: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        """Compute the weight that the layer computes with.

        Args:
            codes: Other codes than its own.
            scale: Other scales than its own.

        Returns:
            (out, in), float32.
        """
        codes = self.weight if codes is None else codes
        scale = self.weight_scale if scale is None else scale
        return _expand(self.kind, codes.detach(), scale, self.out_features, self.in_features, torch.float32)

    @classmethod
    def codes(cls, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Quantize a weight.

        Args:
            weight: (out, in), float32.

        Returns:
            The codes and scales that say it best.

        Raises:
            NotImplementedError: The kind does not say.
        """
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        """``input @ weight.T + bias``, in the dtype of ``input``."""
        sizes = self.out_features, self.in_features
        apply: Callable[..., Tensor] = _Product.apply
        return apply(input, self.weight, self.weight_scale, self.bias, self.kind, *sizes)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        scale = self.weight_scale
        moved: Self = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        moved.weight_scale = scale.to(moved.weight.device)  # a half base has float32 scales all the same
        return moved

    def extra_repr(self) -> str:
        """As of a Linear, with the kind."""
        return f"{super().extra_repr()}, {self.kind}"


class Nf4Linear(QuantizedLinear):
    """Two weights a byte, each one of 16 quantiles of a normal distribution; each 64 share a scale. 4.5 bits a weight."""

    kind = NF4

    @classmethod
    def codes(cls, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Quantize a weight to 4 bits, in groups of 64 (QLoRA, Dettmers et al. 2023, https://arxiv.org/abs/2305.14314).

        Args:
            weight: (out, in), float32.

        Returns:
            Codes (out * in / 2, 1) and scales (out * in / 64), with zeros after the weights to fill the last group.
        """
        quantize = needed().functional.quantize_4bit
        blocks = F.pad(weight.flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
        packed, state = quantize(blocks, blocksize=BLOCK, compress_statistics=False, quant_type=NF4)
        return packed, state.absmax

    def __setstate__(self, state: Any) -> None:
        needed()  # a copy may be made where the operators are not there yet
        super().__setstate__(state)  # type: ignore[no-untyped-call]


class Int8Linear(QuantizedLinear):
    """A byte a weight, and a scale for each output. 8 bits a weight."""

    kind = INT8

    @classmethod
    def codes(cls, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Quantize a weight to 8 bits, with a scale an output.

        Args:
            weight: (out, in), float32.

        Returns:
            Codes (out, in) and scales (out,).
        """
        scale = weight.abs().amax(1) / 127
        scale = torch.where(scale > 0, scale, 1.0)
        return (weight / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale


KINDS: dict[str, type[QuantizedLinear]] = {NF4: Nf4Linear, INT8: Int8Linear}


def check(kind: str) -> None:
    """Check that a kind of quantization can be used.

    Args:
        kind: ``nf4`` or ``int8``.

    Raises:
        UserError: There is no such kind, or its package is not installed.
    """
    if kind not in KINDS:
        raise UserError(f"a base cannot be quantized as {kind!r}; there are: {', '.join(KINDS)}{did_you_mean(kind, KINDS)}")
    if kind == NF4:
        needed()


def kind_of(component: nn.Module) -> str | None:
    """Tell how `quantize` quantized a component.

    Args:
        component: The module.

    Returns:
        The kind; None where it did not.
    """
    return next((module.kind for module in component.modules() if isinstance(module, QuantizedLinear)), None)


def count(component: nn.Module) -> int:
    """Count the parameters of a component.

    Args:
        component: The module.

    Returns:
        Each weight for one, however many of them are packed into a byte.
    """
    packed = (module for module in component.modules() if isinstance(module, Nf4Linear))
    hidden = sum(module.out_features * module.in_features - module.weight.numel() for module in packed)
    return sum(parameter.numel() for parameter in component.parameters()) + hidden


@torch.no_grad()
def quantize(component: nn.Module, kind: str, device: torch.device | None = None) -> int:
    """Quantize the weight of every Linear of a component, in place.

    Weights that are shared with another module, and output layers over a vocabulary, stay as they are.

    Args:
        component: The module.
        kind: ``nf4`` or ``int8``.
        device: Where to compute; None for where the weights are.

    Returns:
        How many layers were quantized.

    Raises:
        UserError: The component carries adapters or is quantized already, or the kind cannot be used.
    """
    check(kind)
    if any(isinstance(module, (AdaptedSite, QuantizedLinear)) for module in component.modules()):
        raise UserError("only a base without adapters that is not quantized yet can be quantized")
    owners = Counter(id(p) for module in component.modules() for p in module.parameters(recurse=False))
    chosen = [
        module
        for path, module in component.named_modules()
        if type(module) is nn.Linear and path not in HEADS and owners[id(module.weight)] == 1
    ]
    for module in chosen:
        home = module.weight.device
        codes, scale = KINDS[kind].codes(module.weight.to(device or home, torch.float32))
        module.__class__ = KINDS[kind]
        module.weight = nn.Parameter(codes.to(home), requires_grad=False)
        module.register_buffer("weight_scale", scale.to(home))
    return len(chosen)


def torchao_kind(weight: object) -> str | None:
    """Tell how torchao quantized a weight.

    Args:
        weight: Anything.

    Returns:
        The name of torchao's class of tensors; None where torchao did not quantize it.
    """
    utils = sys.modules.get("torchao.utils")  # not imported here: who has such a weight has imported it
    return type(weight).__name__ if utils is not None and isinstance(weight, utils.TorchAOBaseTensor) else None


def torchao_codes(weight: Tensor, wanted: Tensor) -> Tensor:
    """Quantize a weight as torchao quantized another: int8 weight-only, a scale an output.

    Args:
        weight: The one that torchao quantized.
        wanted: (out, in), float32.

    Returns:
        The quantized tensor.

    Raises:
        UserError: torchao quantized it in another way, on which adapters run and train but are not merged.
    """
    from torchao.quantization import Int8Tensor, PerRow

    same = isinstance(weight, Int8Tensor) and weight.act_quant_kwargs is None and weight.block_size == [1, weight.shape[1]]
    if not same:
        raise UserError(
            f"a weight that torchao holds as {type(weight).__name__} cannot be merged into, only its int8 weight-only with a"
            " scale an output; leave the adapters unmerged"
        )
    again: Tensor = Int8Tensor.from_hp(wanted, PerRow())
    return again


def plain_parts(tensor: Tensor) -> dict[str, Tensor]:
    """List the tensors that a wrapping tensor, such as torchao's, is made of.

    Args:
        tensor: Any.

    Returns:
        Tensors by name; of one that wraps nothing, itself under ''.
    """
    if not is_traceable_wrapper_subclass(tensor):
        return {"": tensor}
    names, _ = tensor.__tensor_flatten__()
    return {name: part for name in names if isinstance(part := getattr(tensor, name), Tensor)}


def rebuilt(tensor: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
    """Exchange some of the tensors that a wrapping tensor is made of.

    Args:
        tensor: The wrapping tensor.
        parts: The new ones, named as by `plain_parts`.

    Returns:
        A tensor with them.
    """
    if not is_traceable_wrapper_subclass(tensor):
        return parts[""]
    names, context = tensor.__tensor_flatten__()
    inner = {name: parts.get(name, getattr(tensor, name)) for name in names}
    made: Tensor = type(tensor).__tensor_unflatten__(inner, context, tensor.shape, tensor.stride())
    return made


def needed() -> Any:
    """Import bitsandbytes.

    Returns:
        The package.

    Raises:
        UserError: It is not installed.
    """
    try:
        # This is asked for each layer, and a level that is set empties the caches of all loggers.
        if "bitsandbytes" not in sys.modules:
            with _quiet("bitsandbytes"):  # which misses faster kernels for a path that is not taken here
                import bitsandbytes
        import bitsandbytes
    except ImportError:
        raise UserError(
            "nf4 needs the package bitsandbytes, which is not installed; install it with"
            " pip install 'peft_diffusion[quantize]', or take int8, which needs nothing"
        ) from None
    return bitsandbytes


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _expand(kind: str, codes: Tensor, scale: Tensor, outputs: int, inputs: int, dtype: torch.dtype) -> Tensor:
    """The weight, (out, in)."""
    if kind == INT8:
        return (codes * scale[:, None]).to(dtype)
    # As rows of one block each: for rows that are no multiple of it, the kernel for CPUs (0.50) takes the wrong scales.
    blocks: Tensor = torch.ops.bitsandbytes.dequantize_4bit(codes, scale, BLOCK, NF4, [len(scale), BLOCK], dtype)
    return blocks.flatten()[: outputs * inputs].view(outputs, inputs)


class _Product(torch.autograd.Function):
    """The product keeps the codes for backward, not the weight that they stand for."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, kind: str, outputs: int, inputs: int
    ) -> Tensor:
        ctx.save_for_backward(codes, scale)
        ctx.kind, ctx.sizes = kind, (outputs, inputs)
        return F.linear(x, _expand(kind, codes, scale, outputs, inputs, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        codes, scale = ctx.saved_tensors
        outputs, inputs = ctx.sizes
        gradient = gradients[0] @ _expand(ctx.kind, codes, scale, outputs, inputs, gradients[0].dtype)
        return gradient, None, None, None, None, None, None
