"""Fold adapters into the weights of their sites, and restore the very bytes."""

import torch
from torch import Tensor, nn

from . import site as sites_of
from .adapter import parts_of
from .errors import FoldError, UserError


def dense_weight(site: nn.Module) -> Tensor:
    """The weight of a site in float32. Raises UserError for a site without one."""
    weight = site.weight
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise UserError(f"the weight of a {type(site).__name__} is quantized and cannot be read as numbers")
    return weight.detach().to(torch.float32)


def merge(component: nn.Module) -> None:
    """Fold every adapter, at its present strength, into the weights; forward then costs what the base costs.

    The change is added in float32 and rounded once. Raises UserError where images have different strengths, and FoldError,
    which names site and adapter, where a method is no change of weight and bias; the component is then as it was.
    """
    found = sites_of.strengths(component)
    if found is None or found.merged:
        raise UserError("there is nothing to merge: no adapter is attached, or they are merged already")
    scalars = {name: found.scalar(name).tolist() for name in found.names}
    carriers = sites_of.sites(component)
    folded: dict[str, tuple[Tensor, Tensor | None]] = {}
    for path, site in carriers.items():
        try:
            folded[path] = _folded(site, scalars)
        except FoldError as error:
            raise FoldError(f"{path}: {error}") from None
    for path, (weight, bias) in folded.items():
        changed = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        carriers[path].unmerged = {name: carriers[path].get_parameter(name).detach().clone() for name in changed}
        _write(carriers[path], changed)
    found.merged = True


def unmerge(component: nn.Module) -> None:
    """Write back the bytes that the weights had before ``merge``. Raises UserError where nothing is merged."""
    found = sites_of.strengths(component)
    if found is None or not found.merged:
        raise UserError("nothing is merged")
    for site in sites_of.sites(component).values():
        _write(site, site.unmerged)
        site.unmerged = {}
    found.merged = False


@torch.no_grad()
def _write(site: nn.Module, tensors: dict[str, Tensor]) -> None:
    # In place: compiled and captured models, and weights tied elsewhere, see it.
    for name, tensor in tensors.items():
        site.get_parameter(name).copy_(tensor)


@torch.no_grad()
def _folded(site: sites_of.AdaptedSite, scalars: dict[str, list[float]]) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a site with its adapters in them, one after the other, in float32."""
    # A whole sublayer has no weight of its own; what sits there says so itself when it is asked to fold.
    weight = dense_weight(site) if hasattr(site, "weight") else torch.zeros(0)
    own_bias = getattr(site, "bias", None)
    bias = own_bias.detach().to(torch.float32) if isinstance(own_bias, Tensor) else None
    changed_bias = False
    for name, adapter in site.adapters.items():
        strength = scalars[name][site.block]
        if strength == 0:
            continue
        for part in parts_of(adapter):
            weight_change, bias_change = part.fold(weight, bias)
            if weight_change is not None:
                weight = weight + strength * weight_change
            if bias_change is not None:
                if bias is None:
                    raise FoldError(f"adapter {name!r} adds a bias, but the site has none to hold it")
                bias, changed_bias = bias + strength * bias_change, True
    return weight, bias if changed_bias else None
