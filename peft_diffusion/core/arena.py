"""One flat buffer for everything an adapter trains: optimizer, clipping and averaging are one operation each."""

import itertools
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

ALIGNMENT = 64
"""Elements: every parameter begins at a multiple of 256 bytes, as one allocated by itself does. Kernels read several numbers
at once and take that for granted."""


class Arena:
    """The parameters of adapters as views of one flat float32 tensor, their gradients as views of another.

    ``groups`` maps a name, such as a component's, to its parameters. Each group is one contiguous slice, a Parameter that
    an optimizer takes as it would take any; its ``grad`` is filled by backward in place.
    Make it when the model is on its device: moving the parameters afterwards breaks the views.
    """

    def __init__(self, groups: Mapping[str, Sequence[nn.Parameter]]) -> None:
        everything = [p for parameters in groups.values() for p in parameters]
        if not everything:
            raise ValueError("an arena needs at least one parameter")
        self.count = sum(p.numel() for p in everything)  # without the gaps that alignment leaves, which stay 0
        self.flat = torch.zeros(sum(_room(p) for p in everything), device=everything[0].device)
        # Gradients and a few numbers beside them are one tensor, which several processes add up in one operation.
        self.shared = torch.zeros(len(self.flat) + ALIGNMENT, device=self.flat.device)
        self.grad, self.beside = self.shared[: len(self.flat)], self.shared[len(self.flat) :]
        self.groups: dict[str, nn.Parameter] = {}
        self.members = {name: tuple(parameters) for name, parameters in groups.items()}  # in the order in which they lie
        start = 0
        for name, parameters in groups.items():
            first = start
            for parameter in parameters:
                start = self._place(parameter, start)
            self.groups[name] = nn.Parameter(self.flat[first:start])
            self.groups[name].grad = self.grad[first:start]

    def view_in(self, flat: Tensor, parameter: nn.Parameter) -> Tensor:
        """Find what lies in another flat tensor where a parameter lies in the arena.

        Args:
            flat: Of the shape of the arena's.
            parameter: One of `members`, or of `groups`.

        Returns:
            A view of the parameter's shape.
        """
        start = parameter.storage_offset() - self.flat.storage_offset()
        return flat[start : start + parameter.numel()].view(parameter.shape)

    def zero_grad(self) -> None:
        """Forget the gradients; they stay where they are in memory."""
        self.grad.zero_()

    @torch.no_grad()
    def forget_gradients(self, names: Iterable[str]) -> None:
        """Forget the gradients of groups that learn nothing: no norm and no overflow of theirs counts for the others.

        Args:
            names: Those groups.
        """
        for name in names:
            self.view_in(self.grad, self.groups[name]).zero_()

    @torch.no_grad()
    def clip(self, limit: float) -> Tensor:
        """Scale the gradients so that their norm has a limit.

        Args:
            limit: The largest norm.

        Returns:
            The norm before, a scalar on the device; nothing waits for it.
        """
        norm: Tensor = torch.linalg.vector_norm(self.grad)
        self.grad.mul_((limit / (norm + 1e-6)).clamp(max=1.0))
        return norm

    @torch.no_grad()
    def load(self, values: Tensor) -> None:
        """Write all parameters.

        Args:
            values: Of the shape of ``flat``.
        """
        self.flat.copy_(values)

    def _place(self, parameter: nn.Parameter, start: int) -> int:
        end = start + parameter.numel()
        view = self.flat[start:end].view(parameter.shape)
        view.copy_(parameter.detach())
        parameter.data = view
        parameter.grad = self.grad[start:end].view(parameter.shape)
        return start + _room(parameter)


def side_by_side(sites: Iterable[tuple[str, Sequence[nn.Parameter]]]) -> list[nn.Parameter]:
    """Order the parameters of sites for an arena.

    Sites of one parent with parameters of the same shapes, as an attention's queries, keys and values, have their first ones
    beside each other, then their second ones. So several are one matrix of more rows.

    Args:
        sites: The parameters of each site, by its path.

    Returns:
        All of them, ordered.
    """

    def kind(site: tuple[str, Sequence[nn.Parameter]]) -> tuple[str, list[torch.Size]]:
        path, parameters = site
        return path.rpartition(".")[0], [parameter.shape for parameter in parameters]

    found: list[nn.Parameter] = []
    for _, alike in itertools.groupby(sites, kind):
        for same in zip(*(parameters for _, parameters in alike), strict=True):
            found.extend(same)
    return found


def _room(parameter: nn.Parameter) -> int:
    return -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
