"""What the attention of a causal language model computes with rows of keys and values before its own."""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...core.errors import UserError
from ...core.site import base_class

# Attention with rotary positions as transformers has it, by the class; and the class of its rotation, in the same module.
_ROTATIONS = {
    "LlamaAttention": "LlamaRotaryEmbedding",
    "MistralAttention": "MistralRotaryEmbedding",
    "Qwen2Attention": "Qwen2RotaryEmbedding",
    "Qwen3Attention": "Qwen3RotaryEmbedding",
    "GemmaAttention": "GemmaRotaryEmbedding",
}
_STEADY = ("default", "linear", "llama3", "yarn")  # kinds of rotation that depend on the position alone


def known(site: nn.Module) -> bool:
    """Tell whether an attention's formula is known here.

    Args:
        site: Any module.

    Returns:
        Whether it has rotary positions of a steady kind.
    """
    return base_class(site).__name__ in _ROTATIONS and _rotation_kind(site) in _STEADY


def width(site: Any) -> int:
    """Tell the width of the keys of all heads; several heads of queries may share one of keys.

    Args:
        site: The attention.

    Returns:
        The width.
    """
    return int(site.k_proj.out_features)


@torch.no_grad()
def turned_back(site: Any, count: int) -> Tensor:
    """Make the matrix that turns keys back by some positions.

    Rows in a cache stand as they are, and the text begins at position ``count`` after them. Here it begins at 0, and the
    rows are turned back instead: positions are relative, so both are the same.

    Args:
        site: The attention.
        count: How many positions.

    Returns:
        (head, head).
    """
    cls = base_class(site)
    rotation = getattr(_module(site), _ROTATIONS[cls.__name__])(site.config)
    places = torch.tensor([[count]])
    unit = torch.eye(int(site.head_dim))[None, None]
    cos, sin = rotation(unit, places)
    turn: Tensor = _module(site).apply_rotary_pos_emb(unit, unit, cos, -sin)[0][0, 0]
    return turn / float(rotation.attention_scaling)


def extended(site: Any, x: Tensor, call: Mapping[str, Any], keys: Tensor, values: Tensor) -> Tensor:
    """Compute an attention whose softmax runs over some more rows, before the output projection.

    Args:
        site: The attention.
        x: What it was given, (batch, positions, width), after it ran: a cache holds the present keys already.
        call: What else it was given, by name.
        keys: (rows, width of the keys).
        values: (rows, width of the keys).

    Returns:
        (batch, positions, width).

    Raises:
        UserError: Its mask is of another kind.
    """
    batch, positions = x.shape[:2]
    shape = (batch, positions, -1, int(site.head_dim))
    query = _normed(site, "q_norm", site.q_proj(x).view(shape)).transpose(1, 2)
    key = _normed(site, "k_norm", site.k_proj(x).view(shape)).transpose(1, 2)
    query, key = _module(site).apply_rotary_pos_emb(query, key, *call["position_embeddings"])
    cache = call.get("past_key_values")
    if cache is None:
        value = site.v_proj(x).view(shape).transpose(1, 2)
    else:
        key, value = cache.layers[site.layer_idx].keys, cache.layers[site.layer_idx].values
    mask = _mask(call.get("attention_mask"), query, key.shape[2], len(keys))
    groups = query.shape[1] // key.shape[1]
    every_key = torch.cat([_rows(keys, key), key.to(query.dtype)], 2).repeat_interleave(groups, 1)
    every_value = torch.cat([_rows(values, value), value.to(query.dtype)], 2).repeat_interleave(groups, 1)
    found = F.scaled_dot_product_attention(query, every_key, every_value, mask, scale=float(site.scaling))
    return found.transpose(1, 2).reshape(batch, positions, -1)


def _module(site: nn.Module) -> Any:
    return sys.modules[base_class(site).__module__]


def _rotation_kind(site: Any) -> str:
    known: Mapping[str, Any] = getattr(site.config, "rope_parameters", None) or {}
    return str(known.get("rope_type", "default"))


def _normed(site: nn.Module, name: str, heads: Tensor) -> Tensor:
    """(batch, positions, heads, head), through a norm of each head where there is one."""
    norm = getattr(site, name, None)
    normed: Tensor = heads if norm is None else norm(heads)
    return normed


def _rows(rows: Tensor, like: Tensor) -> Tensor:
    """(rows, width) as (batch, heads, rows, head)."""
    batch, heads, _, size = like.shape
    return rows.to(like.dtype).view(len(rows), heads, size).transpose(0, 1).expand(batch, -1, -1, -1)


def _mask(given: Any, query: Tensor, length: int, more: int) -> Tensor:
    """What each position may look at, of ``more`` rows and ``length`` keys, as transformers says it: bool, or added."""
    positions = query.shape[2]
    if given is None:
        free = torch.ones(positions, more + length, dtype=torch.bool, device=query.device)
        return free.tril(more + length - positions)
    if not isinstance(given, Tensor) or given.ndim != 4:
        raise UserError("prefix needs attn_implementation 'sdpa' or 'eager'; load the base with one of them")
    return F.pad(given[..., :length], (more, 0), value=given.dtype == torch.bool)
