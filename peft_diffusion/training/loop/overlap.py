"""What keeps an adapter apart from others that it is trained beside: a penalty on reading the same of a layer's inputs."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ...core import site
from ...core.adapter import Adapter, parts_of
from ...core.errors import FoldError, UserError
from ...core.reduction import spanned
from ...core.weight_change import change_of


class Overlap:
    """How much of what an adapter reads is read by others too, from 0 to 1: a mean over layers.

    At a layer let ``A`` (rank, inputs) be the adapter's ``down``, and the columns of ``Q`` (inputs, n) an orthonormal basis
    of all that the others' ``down`` read there. The share is ``|A Q|^2 / |A|^2`` with Frobenius norms: 0 where both are
    orthogonal, 1 where the adapter reads nothing else, about n / inputs by chance. O-LoRA (Wang et al. 2023,
    https://arxiv.org/abs/2310.14152) has ``|A A_other^T|`` for this, whose size also depends on those of both.

    Args:
        parts: The components, which carry all of them.
        name: The adapter that is trained.
        others: Those that it shall be orthogonal to.

    Attributes:
        layers: How many layers are compared.
        left_out: How many layers the adapter shares with others that are no pairs of low rank there, or is none itself.

    Raises:
        UserError: There is no layer that could be compared.
    """

    def __init__(self, parts: Mapping[str, nn.Module], name: str, others: Sequence[str]) -> None:
        self._pairs: list[tuple[Adapter, Tensor]] = []
        self.left_out = 0
        for component, part in parts.items():
            given = [site.adapters(part, other) for other in others if other in site.names(part)]
            for path, own in site.adapters(part, name).items():
                module, there = part.get_submodule(path), [one[path] for one in given if path in one]
                if there:
                    self._add(own, module, there, f"{component}.{path}")
        if not self._pairs:
            raise UserError(
                "--orthogonal: there is no layer at which what is trained and what it is trained beside are both pairs of"
                " low rank, as those of a lora; leave it away, or train --method lora on layers that the others change"
            )

    @property
    def layers(self) -> int:
        """How many layers are compared."""
        return len({id(basis) for _, basis in self._pairs})

    def _add(self, own: Adapter, module: nn.Module, others: Sequence[Adapter], where: str) -> None:
        """Compare at a layer, where that can be done."""
        trained = [one for one in parts_of(own) if one.low_rank() is not None]
        read = [rows for other in others if (rows := _read(other, module, where)) is not None]
        if len(read) < len(others) or not trained:
            self.left_out += 1
        if read and trained:
            basis = spanned(torch.cat(read).T).float().contiguous()
            self._pairs += [(one, basis) for one in trained]

    def __call__(self) -> Tensor:
        """Compute the mean share.

        Returns:
            A float32 scalar with gradients to the adapter.
        """
        shares = []
        for adapter, basis in self._pairs:
            pair = adapter.low_rank()
            if pair is not None:
                down = pair.down.flatten(1).float()
                shares.append((down @ basis).square().sum() / down.square().sum().clamp(min=torch.finfo(torch.float32).tiny))
        return torch.stack(shares).mean()


def _read(adapter: Adapter, module: nn.Module, where: str) -> Tensor | None:
    """The ``down`` (rank, inputs) of an adapter; None where it is no pair."""
    try:
        pair = change_of(adapter, module, where).pair
    except (FoldError, UserError):
        return None
    return None if pair is None else pair.down.float()
