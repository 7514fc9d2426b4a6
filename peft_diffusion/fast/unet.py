"""A frozen UNet made ready for training on a GPU, and afterwards as it was.

Its modules change their class, as sites do, for one that computes the same by the functions of ``frozen_ops.py``: norms,
activations, biases and sums are one pass over memory each, and nothing is kept for backward that is not needed there.
Weights lie in channels-last order, in which pictures are rows for attention without a copy. A module that carries an
adapter, or is not of the usual kind, is called as before.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..bases.regional_attention import MASKED, RegionalAttention, across, is_usual, unwrapped, within
from ..core import regions
from ..core.errors import UserError
from ..core.regions import Layout, RegionalNorm
from ..core.site import base_class, is_plain_linear, rebase
from . import frozen_ops
from .low_rank import fused_projections, fusing, joined
from .operands import present

CUDNN_FIRST = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)


@contextmanager
def fused(component: nn.Module, *, cudnn_attention: bool = True) -> Iterator[None]:
    """Make a component train faster inside, on CUDA; on any other device nothing changes, not a bit of what it computes.

    Args:
        component: The network that denoises.
        cudnn_attention: False leaves the choice of attention's kernels to torch, which prefers flash attention.

    Yields:
        Once; afterwards the component is what it was.
    """
    parameter = next(component.parameters())
    if not parameter.is_cuda:
        yield
        return
    frozen_ops.kernels_on(parameter.device)  # now, as their first run cannot be recorded
    with frozen_ops.searching(True):
        cudnn = cudnn_attention and cudnn_attends(component, parameter)
        with channels_last(component), side_by_side(component), swapped(component, CUDNN_FIRST if cudnn else ()), fusing():
            yield


@contextmanager
def channels_last(component: nn.Module) -> Iterator[None]:
    """Bring the weights of a component's convolutions to channels-last order inside; adapters keep theirs.

    Args:
        component: The module.

    Yields:
        Once; afterwards they are contiguous.
    """
    turned = []
    for module in component.modules():
        if isinstance(module, nn.Conv2d) and not module.weight.is_contiguous(memory_format=torch.channels_last):
            turned.append(module.weight)
    try:
        for weight in turned:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
        yield
    finally:
        for weight in turned:
            weight.data = weight.data.contiguous()


@contextmanager
def side_by_side(component: nn.Module) -> Iterator[None]:
    """Lay weights that read the same input one after the other in memory inside.

    These are the weights of queries, keys and values, and those by which the blocks of a network read the timestep.

    Args:
        component: The module.

    Yields:
        Once; afterwards each weight is a tensor of its own.
    """
    moved: list[Tensor] = []
    try:
        for attention in [module for module in component.modules() if isinstance(module, Attention)]:
            layers = [attention.to_q, attention.to_k, attention.to_v]
            weights = [layer.weight for layer in layers if is_plain_linear(layer) and _frozen(layer)]
            alike = [weight for weight in weights if weight.shape == weights[-1].shape]
            if len(weights) == len(layers) and len(alike) > 1:
                moved += _laid(alike)
        weights = [block.time_emb_proj.weight for block in _told_the_time(component)]
        if len(weights) > 1:
            moved += _laid(weights)
        yield
    finally:
        for weight in moved:
            weight.data = weight.data.clone()


def _laid(weights: list[Tensor]) -> list[Tensor]:
    """The weights, which now lie one after the other."""
    together = torch.cat([weight.data for weight in weights])
    for weight, own in zip(weights, together.split([len(weight) for weight in weights]), strict=True):
        weight.data = own
    return weights


def _told_the_time(component: nn.Module) -> list[Any]:
    """The residual blocks that read the timestep, from an embedding of one width, by a frozen layer each."""
    blocks: list[Any] = [one for one in component.modules() if base_class(one) is ResnetBlock2D and _suits(one)]
    known = [one for one in blocks if one.time_emb_proj is not None and is_plain_linear(one.time_emb_proj)]
    known = [one for one in known if _frozen(one.time_emb_proj) and one.time_emb_proj.bias is not None]
    return [one for one in known if one.time_emb_proj.in_features == known[0].time_emb_proj.in_features]


@contextmanager
def swapped(component: nn.Module, backends: Sequence[SDPBackend] = ()) -> Iterator[None]:
    """Give the modules of a component their fused classes inside, with adapters or without, on any device.

    Args:
        component: The module.
        backends: Those of attention, in the order to try; without any, torch chooses.

    Yields:
        Once; afterwards they have their own classes.
    """
    changed: list[tuple[nn.Module, type[nn.Module]]] = []
    processors: list[tuple[Any, Any]] = []
    told = _told_the_time(component)
    times = TimeShifts(told)
    for module in list(component.modules()):
        own = base_class(module)
        fast = _FUSED.get(own)
        if fast is not None and _suits(module):
            rebase(module, fast)
            changed.append((module, own))
        if isinstance(module, Attention) and _attends_plainly(module):
            processors.append((module, module.processor))
            module.processor = FusedAttention(backends, regional=isinstance(module.processor, RegionalAttention))
    for block in told:
        block.times = times
    try:
        yield
    finally:
        for block in told:
            del block.times
        for attention, processor in processors:
            attention.processor = processor
        for module, own in changed:
            rebase(module, own)


def _suits(module: Any) -> bool:
    """Whether a module is of the usual kind: of the many that a class may be, one is fused."""
    if isinstance(module, ResnetBlock2D):
        whole = module.upsample is None and module.downsample is None and not module.dropout.p and not module.skip_time_act
        plain = module.time_embedding_norm == "default" and module.output_scale_factor == 1
        return bool(whole and plain and isinstance(module.nonlinearity, nn.SiLU))
    if isinstance(module, BasicTransformerBlock):
        own = getattr(module, "fuser", None) is None and module.pos_embed is None and module._chunk_size is None
        return bool(own and module.norm_type == "layer_norm" and module.attn2 is not None)
    if isinstance(module, Transformer2DModel):
        return bool(module.is_input_continuous)
    if isinstance(module, nn.Conv2d):
        return module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return not isinstance(module, nn.GroupNorm) or module.affine


def _attends_plainly(attention: Any) -> bool:
    """Whether an attention has no norms, factors or masks of its own."""
    return is_usual(attention) and type(unwrapped(attention.processor)) is AttnProcessor2_0


def _frozen(module: nn.Module) -> bool:
    return not any(own.requires_grad for own in module.parameters(recurse=False))


def _is_plain_frozen(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether a module is of this very class, so carries no adapter, and is frozen."""
    return type(module) is cls and _frozen(module) and not torch.compiler.is_compiling()


class FrozenConv(nn.Conv2d):
    """A convolution that keeps no input, as its weight has no gradient that would need it; one of 1x1 is a product."""

    def forward(self, input: Tensor) -> Tensor:
        """As before."""
        if not _frozen(self) or torch.compiler.is_compiling():
            return super().forward(input)
        plain = self.stride == (1, 1) and self.padding == (0, 0) and self.groups == 1
        if self.kernel_size == (1, 1) and plain and input.is_contiguous(memory_format=torch.channels_last):
            return frozen_ops.pointwise(input, self)
        return frozen_ops.conv2d(input, self)


class FusedNorm(RegionalNorm):
    """A group norm that is one with a SiLU after it, if there is one."""

    def forward(self, input: Tensor) -> Tensor:
        """As before."""
        return self.normed(input, silu=False)

    def normed(self, x: Tensor, *, silu: bool) -> Tensor:
        """Compute the norm.

        Args:
            x: (images, channels, height, width).
            silu: Whether SiLU follows.

        Returns:
            Of the same shape.
        """
        if x.ndim != 4 or not _frozen(self) or torch.compiler.is_compiling():
            y = super().forward(x)
            return F.silu(y) if silu else y
        return self.frozen(x, silu=silu)[0]

    def frozen(self, x: Tensor, shift: Tensor | None = None, *, silu: bool) -> tuple[Tensor, Tensor]:
        """Compute the norm where its weight has no gradient; see `frozen_ops.group_norm`.

        Args:
            x: (images, channels, height, width).
            shift: Added to ``x`` first, (images, channels).
            silu: Whether SiLU follows.

        Returns:
            What is computed, and ``x``.
        """
        y = self.by_region(x, shift)
        if y is None:
            return frozen_ops.group_norm(x, self, shift, silu)
        y = y.contiguous(memory_format=torch.channels_last)
        return F.silu(y) if silu else y, x


class FusedGeglu(GEGLU):  # type: ignore[misc]
    """A gated unit that keeps the projection alone."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """As before."""
        return frozen_ops.gated(self.proj(hidden_states))


class FusedResnet(ResnetBlock2D):  # type: ignore[misc]
    """A block that keeps two maps: norms take in the bias and timestep before them and the SiLU after them."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None) -> Tensor:
        """As before, where the block neither samples up nor down."""
        if not (_is_plain_frozen(self.norm1, FusedNorm) and _is_plain_frozen(self.norm2, FusedNorm)):
            result: Tensor = super().forward(input_tensor, temb)
            return result
        hidden, passed = self.norm1.frozen(input_tensor, silu=True)
        plain = _is_plain_frozen(self.conv1, FrozenConv)
        hidden = frozen_ops.conv2d(hidden, self.conv1, biased=False) if plain else self.conv1(hidden)
        shift = self._shift(temb, len(hidden))
        hidden, _ = self.norm2.frozen(hidden, shift, silu=True)
        if self.conv_shortcut is not None:
            passed = self.conv_shortcut(passed)
        if _is_plain_frozen(self.conv2, FrozenConv):
            return frozen_ops.sum_with_bias(passed, frozen_ops.conv2d(hidden, self.conv2, biased=False), self.conv2.bias)
        total: Tensor = passed + self.conv2(hidden)
        return total

    def left_out(self) -> Tensor | None:
        """The bias that the first convolution leaves to the norm after it, (channels,)."""
        return self.conv1.bias if _is_plain_frozen(self.conv1, FrozenConv) else None

    def _shift(self, temb: Tensor | None, images: int) -> Tensor | None:
        """What is added before the second norm, (images, channels)."""
        times: TimeShifts | None = vars(self).get("times")
        if temb is not None and times is not None and (found := times.of(self, temb)) is not None:
            return found
        bias = self.left_out()
        shift = None if bias is None else bias.expand(images, -1)
        if temb is None:
            return shift
        told: Tensor = temb if self.time_emb_proj is None else self.time_emb_proj(F.silu(temb))
        return told if shift is None else told + shift


class TimeShifts:
    """What a timestep adds in each block of a network, by one product: one for each block would hardly fill a card.

    Args:
        blocks: Those that read the timestep by a frozen layer, from one embedding.
    """

    def __init__(self, blocks: Sequence[Any]) -> None:
        self.blocks = blocks
        self._told: tuple[Tensor, int | None] | None = None
        self._found: dict[nn.Module, Tensor] = {}

    def of(self, block: Any, temb: Tensor) -> Tensor | None:
        """Tell what is added in a block before its second norm.

        Args:
            block: The block.
            temb: The embedding of the timestep, (images, width).

        Returns:
            (images, channels), with the bias that the first convolution leaves out; None where its layer carries an adapter,
            where weights do not lie one after the other, or where the embedding has a gradient.
        """
        if type(block.time_emb_proj) is not nn.Linear or (temb.requires_grad and torch.is_grad_enabled()):
            return None  # blocks that are run again for backward would find another graph than the first time
        now = temb, None if temb.is_inference() else temb._version
        if self._told is None or self._told[0] is not now[0] or self._told[1] != now[1]:
            self._told, self._found = now, self._computed(temb)
        return self._found.get(block)

    def _computed(self, temb: Tensor) -> dict[nn.Module, Tensor]:
        weight = joined([block.time_emb_proj.weight for block in self.blocks])
        if weight is None or temb.ndim != 2 or torch.compiler.is_compiling():
            return {}
        biases = [block.time_emb_proj.bias for block in self.blocks]
        left = [block.left_out() for block in self.blocks]
        left = [torch.zeros_like(own) if one is None else one for one, own in zip(left, biases, strict=True)]
        told = F.linear(F.silu(temb), weight, torch.cat(biases) + torch.cat(left))
        return dict(zip(self.blocks, told.split([len(one) for one in biases], 1), strict=True))


class FusedBlock(BasicTransformerBlock):  # type: ignore[misc]
    """Attention to itself, to the text, and feed-forward; each norm is one with the sum before it."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """As before."""
        norms = self.norm1, self.norm2, self.norm3
        plain = all(_is_plain_frozen(norm, nn.LayerNorm) and norm.bias is not None for norm in norms)
        if cross_attention_kwargs or not plain:
            result: Tensor = super().forward(
                hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep,
                cross_attention_kwargs, class_labels, added_cond_kwargs,
            )  # fmt: skip
            return result
        told = encoder_hidden_states
        normed, total = frozen_ops.layer_norm(hidden_states, self.norm1)
        found = self.attn1(normed, told if self.only_cross_attention else None, attention_mask=attention_mask)
        normed, total = frozen_ops.layer_norm(found, self.norm2, total)
        found = self.attn2(normed, told, attention_mask=encoder_attention_mask)
        normed, total = frozen_ops.layer_norm(found, self.norm3, total)
        fed: Tensor = self.ff(normed)
        return fed + total


class FusedTransformer(Transformer2DModel):  # type: ignore[misc]
    """Takes rows back to maps without a copy."""

    def _get_output_for_continuous_inputs(
        self, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
    ) -> Tensor:
        if self.use_linear_projection:
            hidden_states = self.proj_out(hidden_states)
        hidden_states = hidden_states.reshape(batch_size, height, width, -1).permute(0, 3, 1, 2)
        if not self.use_linear_projection:
            hidden_states = self.proj_out(hidden_states)
        return hidden_states + residual


class FusedAttention:
    """Attention without what a UNet's does not have: each part of it would be a pass over memory."""

    def __init__(self, backends: Sequence[SDPBackend] = (), *, regional: bool = False) -> None:
        self.backends = list(backends)
        self.regional = regional

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """(images, positions, channels), attending to ``encoder_hidden_states`` or to themselves."""
        layout = regions.present() if self.regional else None
        if attention_mask is not None and layout is not None:
            raise UserError(MASKED)
        if attention_mask is not None or hidden_states.ndim != 3:
            result: Tensor = AttnProcessor2_0()(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
            return result
        if encoder_hidden_states is None:
            query, key, value = projected((attn.to_q, attn.to_k, attn.to_v), hidden_states)
        else:
            operands = present()
            known = None if operands is None else operands.knows(attn, encoder_hidden_states)
            query, (key, value) = attn.to_q(hidden_states), known or told(attn, encoder_hidden_states, layout)
        with sdpa_kernel(self.backends, set_priority=True) if self.backends else nullcontext():
            if layout is None or (encoder_hidden_states is None and not any(layout.isolated)):
                found = self._attended(query, key, value, attn.heads)
            elif encoder_hidden_states is None:
                found = within(query, key, value, attn.heads, layout)
            else:
                found = across(query, key, value, attn.heads, layout)
        for part in attn.to_out:
            found = part(found)
        return found

    def _attended(self, query: Tensor, key: Tensor, value: Tensor, count: int) -> Tensor:
        """(images, positions, channels) by so many heads."""

        def heads(x: Tensor) -> Tensor:
            return x.view(len(x), -1, count, x.shape[-1] // count).transpose(1, 2)

        found = F.scaled_dot_product_attention(heads(query), heads(key), heads(value))
        return found.transpose(1, 2).reshape(*query.shape[:2], -1)


def told(attention: Any, prompts: Tensor, layout: Layout | None) -> Sequence[Tensor]:
    """Compute the keys and values of what attention is told.

    Args:
        attention: The attention.
        prompts: (images, tokens, width); where pictures have regions, the prompts of these one after the other.
        layout: The regions; None without any.

    Returns:
        Keys and values, (images, tokens, channels), or (images * regions, tokens, channels).
    """
    if layout is None:
        return projected((attention.to_k, attention.to_v), prompts)
    with layout.reading_text():
        return projected((attention.to_k, attention.to_v), layout.by_region(prompts))


def projected(layers: Sequence[nn.Module], x: Tensor) -> Sequence[Tensor]:
    """Compute several layers of one input: by one product, where they can be one.

    Args:
        layers: The layers.
        x: (..., in).

    Returns:
        What each gives, (..., out).
    """
    operands = present()
    if operands is not None and (drawn := operands.computed(layers, x)) is not None:
        return drawn
    together = fused_projections(layers, x)
    if together is None:
        return [layer(x) for layer in layers]
    return together(x).chunk(len(layers), -1)


_FUSED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: FrozenConv,
    nn.GroupNorm: FusedNorm,
    RegionalNorm: FusedNorm,
    GEGLU: FusedGeglu,
    ResnetBlock2D: FusedResnet,
    BasicTransformerBlock: FusedBlock,
    Transformer2DModel: FusedTransformer,
}


def cudnn_attends(component: nn.Module, like: Tensor) -> bool:
    """Tell whether cuDNN computes attention forward and backward at each of a component's widths that it says it serves.

    Args:
        component: The network that denoises.
        like: A tensor of its dtype and device.

    Returns:
        Whether it does, at any width.
    """
    attentions = [module for module in component.modules() if isinstance(module, Attention)]
    served = False
    for size in sorted({one.to_q.out_features // one.heads for one in attentions if isinstance(one.to_q, nn.Linear)}):
        rows = [torch.zeros(1, length, 2, size, dtype=like.dtype, device=like.device) for length in (64, 77)]
        query, key = (one.transpose(1, 2).requires_grad_(True) for one in rows)
        call = torch.backends.cuda.SDPAParams(query, key, key, None, 0.0, False, False)
        if not torch.backends.cuda.can_use_cudnn_attention(call):
            continue
        try:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION), torch.enable_grad():
                torch.autograd.grad(F.scaled_dot_product_attention(query, key, key).sum(), (query, key))
        except RuntimeError:  # no plan of this version fits
            return False
        served = True
    return served
