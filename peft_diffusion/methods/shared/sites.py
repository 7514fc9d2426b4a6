"""What the methods share that change norms and embeddings as well as layers."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...core.adapter import Site
from ...core.regions import RegionalNorm
from ...core.site import base_class
from . import affine

NORMS = (nn.GroupNorm, nn.LayerNorm)
# Norms of language models that divide by the root of the mean square, and multiply by their weight, by class.
_ROOT_MEAN_SQUARE = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")


def is_embedding(site: Site) -> bool:
    """Tell whether a module looks up rows of a matrix and does nothing else, as that of Gemma does, which scales them.

    Args:
        site: A module of a base.

    Returns:
        Whether it does.
    """
    return base_class(site) is nn.Embedding


def is_norm(site: Site) -> bool:
    """Tell whether a module is a GroupNorm, a LayerNorm over one axis, or an RMSNorm of a language model, with a weight.

    Args:
        site: A module of a base.

    Returns:
        Whether it is.
    """
    known = isinstance(site, NORMS) or _is_root_mean_square(site)
    return known and isinstance(site.weight, Tensor) and site.weight.ndim == 1


def _is_root_mean_square(site: Site) -> bool:
    return base_class(site).__name__ in _ROOT_MEAN_SQUARE


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
    if _is_root_mean_square(site):
        return tuple(site.get_parameter("weight").shape)
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
    if _is_root_mean_square(site):
        return len(site.get_parameter("weight"))
    return affine.weight_shape(site)[0]


def normalized(site: Site, x: Tensor) -> Tensor:
    """Compute what a norm multiplies by its weight.

    Args:
        site: One of which ``is_norm`` is true.
        x: Its input.

    Returns:
        The input, normalized.

    Raises:
        TypeError: It is no norm.
    """
    if isinstance(site, nn.GroupNorm):
        apart = site.by_region(x, plain=True) if isinstance(site, RegionalNorm) else None
        return F.group_norm(x, site.num_groups, None, None, site.eps) if apart is None else apart
    if isinstance(site, nn.LayerNorm):
        return F.layer_norm(x, site.normalized_shape, None, None, site.eps)
    if _is_root_mean_square(site):
        exact, own = x.float(), vars(site)["variance_epsilon"]
        return (exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + own)).to(x.dtype)
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
