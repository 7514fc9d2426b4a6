"""What the methods share that change norms and embeddings as well as layers."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...core.adapter import Site
from ...core.site import base_class
from . import affine

NORMS = (nn.GroupNorm, nn.LayerNorm)
_CHANNELS_SECOND = (nn.Conv2d, nn.GroupNorm)


def is_embedding(site: Site) -> bool:
    """Tell whether a module looks up rows of a matrix and does nothing else, as that of Gemma does, which scales them.

    Args:
        site: A module of a base.

    Returns:
        Whether it does.
    """
    return base_class(site) is nn.Embedding


def is_norm(site: Site) -> bool:
    """Tell whether a module is a GroupNorm or a LayerNorm over one axis, with a weight.

    Args:
        site: A module of a base.

    Returns:
        Whether it is.
    """
    return isinstance(site, NORMS) and isinstance(site.weight, Tensor) and site.weight.ndim == 1


def weight_shape(site: Site) -> tuple[int, ...]:
    """Tell the shape of a weight, even where it is stored packed.

    Args:
        site: A Linear, Conv2d, norm or Embedding.

    Returns:
        (out, in), (out, in, height, width), (channels,) or (rows, width).

    Raises:
        UserError: It is another module.
    """
    if isinstance(site, nn.Embedding):
        return (site.num_embeddings, site.embedding_dim)
    if isinstance(site, NORMS):
        return tuple(site.weight.shape) if isinstance(site.weight, Tensor) else (channels_of(site),)
    return affine.weight_shape(site)


def channels_of(site: Site) -> int:
    """Count what a bias of a site has or would have.

    Args:
        site: A Linear, Conv2d or norm.

    Returns:
        The number of channels that it gives.

    Raises:
        UserError: It is another module.
    """
    if isinstance(site, nn.GroupNorm):
        return site.num_channels
    if isinstance(site, nn.LayerNorm):
        return torch.Size(site.normalized_shape).numel()
    return affine.weight_shape(site)[0]


def along(values: Tensor, y: Tensor, site: Site) -> Tensor:
    """Shape one value a channel so that it adds to or multiplies an output.

    Args:
        values: (channels,).
        y: The output of the site.
        site: A Linear, Conv2d or norm.

    Returns:
        The values in the dtype of ``y``.
    """
    values = values.to(y.dtype)
    return values.view(-1, *[1] * (y.ndim - 2)) if isinstance(site, _CHANNELS_SECOND) else values


def normalized(site: Site, x: Tensor) -> Tensor:
    """Compute what a norm multiplies by its weight.

    Args:
        site: A GroupNorm or LayerNorm.
        x: Its input.

    Returns:
        The input, normalized.

    Raises:
        TypeError: It is no norm.
    """
    if isinstance(site, nn.GroupNorm):
        return F.group_norm(x, site.num_groups, None, None, site.eps)
    if isinstance(site, nn.LayerNorm):
        return F.layer_norm(x, site.normalized_shape, None, None, site.eps)
    raise TypeError(f"{type(site).__name__} is no norm")


def looked_up(site: Site, ids: Tensor, rows: Tensor) -> Tensor:
    """Look up rows of a matrix beside an embedding's own. Ids beyond it are those of learned words, which have none.

    Args:
        site: The embedding.
        ids: Its input.
        rows: (rows, ...), one for each row of the embedding.

    Returns:
        The rows, 0 for ids beyond.
    """
    known = ids < weight_shape(site)[0]
    return F.embedding(torch.where(known, ids, 0), rows) * known[..., None].to(rows.dtype)
