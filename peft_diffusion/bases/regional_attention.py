"""Attention and norms of a UNet in pictures with regions: each reads its own prompt, and perhaps only itself.

What is read of each prompt is computed by itself and mixed by the masks of the regions, as the "attention" mode of A1111's
Regional Prompter and ComfyUI's couples of prompts do.
"""

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..core import regions
from ..core.errors import UserError
from ..core.regions import Layout, RegionalNorm
from ..core.site import AdaptedSite, base_class, rebase
from ..core.slot import walk
from .pipelines import uncompiled

_KNOWN = (AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor)
_PARTS = ("spatial_norm", "group_norm", "norm_q", "norm_k", "norm_cross")
COMPILED = "a network that torch.compile compiled knows no regions; draw them with the plain one"
MASKED = "attention has a mask of its own, which regions know nothing of; leave regions away"
_lock = threading.Lock()
_norms: "weakref.WeakKeyDictionary[nn.Module, int]" = weakref.WeakKeyDictionary()  # how many draw with each by region


class Maps:
    """How much each position of pictures reads of some tokens of their prompts, summed over heads, layers and steps.

    Args:
        tokens: For each picture its concepts, each the places of its tokens in the prompt.

    Attributes:
        found: For each picture by the number of positions of a layer (concepts, positions).
    """

    def __init__(self, tokens: Sequence[Sequence[Sequence[int]]]) -> None:
        self.tokens = tokens
        self.found: list[dict[int, Tensor]] = [{} for _ in tokens]

    def add(self, query: Tensor, key: Tensor, heads: int) -> None:
        """Add what a layer reads.

        Args:
            query: (batch, positions, width); the last rows are those of the pictures with their prompts.
            key: (batch, tokens, width).
            heads: How many there are.
        """
        for number, concepts in enumerate(self.tokens):
            row = number - len(self.tokens)
            asked, told = (one[row].unflatten(-1, (heads, -1)).transpose(0, 1).float() for one in (query, key))
            read = (asked @ told.transpose(1, 2) * asked.shape[-1] ** -0.5).softmax(-1).mean(0)
            each = torch.stack([read[:, list(places)].sum(-1) for places in concepts])
            self.found[number][len(read)] = self.found[number].get(len(read), 0) + each


class _Watching(threading.local):
    maps: Maps | None = None


_watching = _Watching()


def watched() -> bool:
    """Tell whether the present thread looks at what attention reads.

    Returns:
        Whether it does.
    """
    return _watching.maps is not None


@contextmanager
def watching(
    network: nn.Module, maps: Maps, changing: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> Iterator[None]:
    """Look at what attention reads of prompts inside, in this thread.

    Args:
        network: The network that denoises.
        maps: Where it is added.
        changing: As of `attending`.

    Yields:
        Once.

    Raises:
        UserError: As `attending`.
    """
    with attending([network], changing):
        _watching.maps = maps
        try:
            yield
        finally:
            _watching.maps = None


class RegionalAttention:
    """Attends by regions in a thread that draws pictures with regions, and as before in every other.

    Args:
        plain: What attended before.

    Attributes:
        users: How many draw with it at present.
    """

    def __init__(self, plain: Any) -> None:
        self.plain = plain
        self.users = 0

    def __reduce__(self) -> Any:
        # A copy, or a file, that is made while pictures are drawn attends as without regions.
        return _itself, (self.plain,)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """(batch, positions, channels), attending to ``encoder_hidden_states`` or to themselves."""
        if _watching.maps is not None and encoder_hidden_states is not None:
            _watching.maps.add(attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.heads)
        layout = regions.present()
        if layout is None or (encoder_hidden_states is None and not any(layout.isolated)):
            result: Tensor = self.plain(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
            return result
        if attention_mask is not None:
            raise UserError(MASKED)
        query = attn.to_q(hidden_states)
        if encoder_hidden_states is None:
            found = within(query, attn.to_k(hidden_states), attn.to_v(hidden_states), attn.heads, layout)
        else:
            told = layout.by_region(encoder_hidden_states)
            with layout.reading_text():
                key, value = attn.to_k(told), attn.to_v(told)
            found = across(query, key, value, attn.heads, layout)
        for part in attn.to_out:
            found = part(found)
        return found


def _itself(processor: Any) -> Any:
    return processor


def unwrapped(processor: Any) -> Any:
    """Give what attends where pictures have no regions.

    Args:
        processor: That of an attention.

    Returns:
        The same, or what it stands for.
    """
    return processor.plain if isinstance(processor, RegionalAttention) else processor


def usual_class(module: nn.Module) -> tuple[type[nn.Module], bool]:
    """Tell the class that a module has where pictures have no regions.

    Args:
        module: Of a network.

    Returns:
        The class, without what adapters made of it, and whether it carries any.
    """
    own = base_class(module)
    return nn.GroupNorm if own is RegionalNorm else own, isinstance(module, AdaptedSite)


def is_usual(attention: Any) -> bool:
    """Tell whether an attention has no norms and factors of its own.

    Args:
        attention: One of diffusers.

    Returns:
        Whether it has none.
    """
    plain = not any(getattr(attention, part, None) for part in _PARTS) and not attention.residual_connection
    return bool(plain and attention.rescale_output_factor == 1)


def across(query: Tensor, key: Tensor, value: Tensor, heads: int, layout: Layout) -> Tensor:
    """Attend to the prompt of each region, and mix what is found by the masks.

    Args:
        query: (batch, positions, width).
        key: (batch * regions, tokens, width).
        value: As ``key``.
        heads: How many there are.
        layout: The regions.

    Returns:
        (batch, positions, width).
    """
    shares = _shares(layout, query)
    asked = _parted(query, heads)
    keys, values = (_parted(one, heads).unflatten(0, (len(query), layout.count)) for one in (key, value))
    found = {r: F.scaled_dot_product_attention(asked, keys[:, r], values[:, r]) for r in layout.shown}
    return _mixed(found, shares)


def within(query: Tensor, key: Tensor, value: Tensor, heads: int, layout: Layout) -> Tensor:
    """Attend to the positions of each region alone, at feathered edges by their share in it, and mix by the masks.

    Args:
        query: (batch, positions, width).
        key: As ``query``.
        value: As ``query``.
        heads: How many there are.
        layout: The regions.

    Returns:
        (batch, positions, width).
    """
    asked, keys, values = (_parted(one, heads) for one in (query, key, value))
    scores = layout.scores(query.shape[1]).to(query.dtype).repeat(layout.repeats(len(query)), 1, 1)
    # On a GPU a kernel that takes one row of scores for all positions, without a table of positions by positions.
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]) if query.is_cuda else nullcontext():
        found = {
            r: F.scaled_dot_product_attention(
                asked, keys, values, attn_mask=scores[:, r, None, None].expand(-1, -1, query.shape[1], -1)
            )
            for r in layout.shown
        }
    return _mixed(found, _shares(layout, query))


def _shares(layout: Layout, query: Tensor) -> Tensor:
    """(batch, positions, regions)."""
    return layout.on_tokens(query.shape[1]).to(query.dtype).repeat(layout.repeats(len(query)), 1, 1)


def _parted(x: Tensor, heads: int) -> Tensor:
    """(rows, positions, width) by heads."""
    return x.view(len(x), -1, heads, x.shape[-1] // heads).transpose(1, 2)


def _mixed(found: Mapping[int, Tensor], shares: Tensor) -> Tensor:
    """What was found in regions by their numbers, (batch, heads, positions, width of a head), as one."""
    total: Tensor | None = None
    for number, one in found.items():
        part = one.transpose(1, 2).flatten(2) * shares[..., number : number + 1]
        total = part if total is None else total + part
    if total is None:
        raise AssertionError("a picture has a region")
    return total


@contextmanager
def attending(
    networks: Sequence[nn.Module],
    changing: Callable[[], AbstractContextManager[Any]] = nullcontext,
    *,
    norms_apart: bool = False,
) -> Iterator[None]:
    """Have the attention and the group norms of networks know regions inside.

    Args:
        networks: The network that denoises, and those beside it.
        changing: Keeps others from changing how the networks attend meanwhile.
        norms_apart: Whether regions are normalized each by itself.

    Yields:
        Once; afterwards they attend as before.

    Raises:
        UserError: They attend, or where it matters normalize, in a way that knows no regions, or are compiled.
    """
    with changing(), _lock:  # in which no norm is fused with what follows it
        attentions, norms = _parts(networks, norms_apart)
        for attention in attentions:
            if not isinstance(attention.processor, RegionalAttention):
                attention.processor = RegionalAttention(attention.processor)
            attention.processor.users += 1
        for norm in norms:
            _norms[norm] = users = _norms.get(norm, 0) + 1
            if users == 1:
                rebase(norm, RegionalNorm)
    try:
        yield
    finally:
        with changing(), _lock:
            for attention in attentions:
                attention.processor.users -= 1
                if not attention.processor.users:
                    attention.processor = attention.processor.plain
            for norm in norms:
                _norms[norm] -= 1
                if not _norms[norm]:
                    rebase(norm, nn.GroupNorm)
                    del _norms[norm]


def _parts(networks: Sequence[nn.Module], norms_apart: bool) -> tuple[list[Any], list[nn.Module]]:
    """The attentions and the plain group norms of networks. Raises UserError for what knows no regions."""
    attentions: list[Any] = []
    norms: list[nn.Module] = []
    for path, module in (found for network in networks for found in walk(network)):
        if module._compiled_call_impl is not None or uncompiled(module) is not module:
            raise UserError(COMPILED)
        if isinstance(module, Attention):
            _refuse_unusual(module)
            attentions.append(module)
        elif isinstance(module, nn.GroupNorm):
            if norms_apart:
                _refuse_unusual_norm(path, module)
            if usual_class(module)[0] is nn.GroupNorm:
                norms.append(module)
    return attentions, norms


def _refuse_unusual(attention: Any) -> None:
    """Raise UserError where an attention is not that of a UNet as diffusers makes it."""
    kind = type(unwrapped(attention.processor))
    if kind not in _KNOWN or not is_usual(attention):
        raise UserError(
            f"attention is computed by {kind.__name__}, which knows no regions: leave regions away, or IP-Adapters,"
            " xFormers and fused projections"
        )


def _refuse_unusual_norm(path: str, norm: nn.GroupNorm) -> None:
    """Raise UserError where a norm is computed otherwise than by its class."""
    moved = "forward" in vars(norm)
    if moved or usual_class(norm)[0] is not nn.GroupNorm:
        how = "moved from call to call, as --offload sequential does" if moved else f"a {base_class(norm).__name__}"
        raise UserError(
            f"the norm {path} is {how}, so regions cannot be normalized each by itself; leave their adapters away"
        )
