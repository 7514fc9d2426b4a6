"""What an adapter adds to weight and bias of its site, whatever its method is."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .adapter import Adapter, LowRank, Site, method_of, parts_of
from .errors import FoldError, UserError
from .reduction import summed


def serves(site: Site) -> bool:
    """Tell whether a module is a Linear, or a convolution without groups.

    Args:
        site: A module of a base.

    Returns:
        Whether it is.
    """
    return isinstance(site, nn.Linear) or (isinstance(site, nn.Conv2d) and site.groups == 1)


def has_kernel(site: Site) -> bool:
    """Tell whether a module is a convolution that looks at more than one place of its input.

    Args:
        site: A module of a base.

    Returns:
        Whether it is.
    """
    return isinstance(site, nn.Conv2d) and tuple(site.kernel_size) != (1, 1)


def weight_shape(site: Site) -> tuple[int, ...]:
    """Tell the shape of a weight, even where it is stored packed.

    Args:
        site: A Linear or Conv2d.

    Returns:
        (out, in) or (out, in, height, width).

    Raises:
        UserError: It is another module.
    """
    if isinstance(site, nn.Conv2d):
        return (site.out_channels, site.in_channels, *site.kernel_size)
    if isinstance(site, nn.Linear):
        return (site.out_features, site.in_features)
    raise UserError(f"this method serves Linear and Conv2d, not {type(site).__name__}")


@dataclass(frozen=True)
class Change:
    """A change of a site at strength 1. What it does not change is None.

    Attributes:
        pair: The change of a Linear's or a convolution's weight, where it is one of low rank: ``down`` (rank, inputs) and
            ``up`` (outputs, rank), with the scale in them.
        weight: The change of the weight where it is none, of the weight's shape.
        bias: The change of the bias.
    """

    pair: LowRank | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None

    @property
    def changes_weight(self) -> bool:
        """Whether it changes the weight."""
        return self.pair is not None or self.weight is not None

    def matrix(self) -> Tensor | None:
        """The change of the weight as (outputs, inputs), multiplied out."""
        if self.pair is not None:
            return self.pair.up @ self.pair.down
        return None if self.weight is None else self.weight.reshape(len(self.weight), -1)


def with_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """Make a module that stands in for one on the meta device, and has weights.

    Args:
        module: The module, which stays as it is.
        weights: Its parameters by name.

    Returns:
        Another module of the same class and settings.
    """
    made = copy.copy(module)
    made._parameters = dict(module._parameters)
    for name, tensor in weights.items():
        made._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    return made


@torch.no_grad()
def change_of(adapter: Adapter, site: nn.Module, where: str) -> Change:
    """Tell what an adapter adds to weight and bias.

    Args:
        adapter: Of a site.
        site: The module. On the meta device only methods can be asked that do not look at the weight.
        where: What errors call the site.

    Returns:
        The change.

    Raises:
        FoldError: The adapter is no change of weight and bias.
        UserError: The change depends on the weight, and the module has none.
    """
    adapter.bind(site)
    pairs: list[LowRank] = []
    weight: Tensor | None = None
    bias: Tensor | None = None
    for part in parts_of(adapter):
        pair = part.low_rank() if serves(site) else None
        if pair is not None:
            pairs.append(LowRank(pair.down.detach().flatten(1), pair.up.detach()))
            continue
        of_weight, of_bias = _folded(part, site, where)
        weight = of_weight if weight is None else weight if of_weight is None else weight + of_weight
        bias = of_bias if bias is None else bias if of_bias is None else bias + of_bias
    if pairs and weight is not None:
        for pair in pairs:
            weight = weight + (pair.up @ pair.down).view_as(weight)
        pairs = []
    return Change(summed(pairs) if pairs else None, weight, bias)


def _folded(part: Adapter, site: nn.Module, where: str) -> tuple[Tensor | None, Tensor | None]:
    """What one part adds. Raises UserError where it looks at a weight that is not there."""
    own = {name: value for name in ("weight", "bias") if isinstance(value := getattr(site, name, None), Tensor)}
    there = all(not tensor.is_meta for tensor in own.values())
    floats = {name: tensor.float() for name, tensor in own.items()}
    try:
        changes = part.fold(floats.get("weight", torch.zeros(0)), floats.get("bias"))
    except FoldError:
        raise
    except Exception:
        if there:
            raise
        raise _needs_weight(part, where) from None
    if any(one is not None and one.is_meta for one in changes):
        raise _needs_weight(part, where)
    weight, bias = (None if one is None else one.detach().float() for one in changes)
    return weight, bias


def _needs_weight(part: Adapter, where: str) -> UserError:
    return UserError(
        f"{where}: what {method_of(part)} changes depends on the weight of the base; name the base with --base, a folder or"
        " a checkpoint that holds its weights"
    )
