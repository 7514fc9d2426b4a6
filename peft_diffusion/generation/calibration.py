"""How much adapters do: what each changes of the network's predictions, by which strengths become comparable.

A LoRA at strength 1 may change predictions several times as much as another, so that equal strengths are no equal shares.
Here pictures are begun as the base draws them, and at each step the network also says what it would predict with each
adapter alone. The size of the difference is close to proportional to the strength.
"""

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..bases import denoiser_of
from ..core.events import Never, Observers, Stop
from ..core.strength_schedule import ByPart
from .sampler import Cell, paint
from .settings import Sampling

if TYPE_CHECKING:
    from .adapters import Adapters

STEPS = 6  # of a calibration: predictions at six noise levels, from pure noise to none
PROMPTS = 4  # the most that are drawn for one


@dataclass(frozen=True)
class Calibration:
    """What adapters change of the network's predictions.

    Attributes:
        effects: By name, the root mean square of what the adapter changes of the guided prediction, over prompts, steps and
            latents; 0 or more, in the units of the prediction, which are about those of standard normal noise.
    """

    effects: Mapping[str, float]

    @property
    def silent(self) -> tuple[str, ...]:
        """The adapters that change nothing, which no factor can bring to do as much as others."""
        return tuple(name for name, effect in self.effects.items() if not effect)

    @property
    def factors(self) -> dict[str, float]:
        """What to multiply each strength by for all adapters to do as much: the geometric mean of the effects over its own.

        The product of all is 1, so none is favoured; adapters that change nothing keep 1.
        """
        known = {name: math.log(effect) for name, effect in self.effects.items() if effect}
        middle = sum(known.values()) / max(1, len(known))
        return {name: math.exp(middle - known[name]) if name in known else 1.0 for name in self.effects}

    def evenly(self, shares: Mapping[str, float]) -> dict[str, float]:
        """Give the strengths at which adapters have some shares of all that is done.

        Args:
            shares: By name, together 1; those of adapters that were measured.

        Returns:
            By name, together 1 too: an adapter alone keeps its whole strength. The shares themselves where one of the
            adapters changes nothing.
        """
        if self.silent:
            return dict(shares)
        parts = {name: share / self.effects[name] for name, share in shares.items()}
        whole = sum(parts.values())
        return {name: part / whole for name, part in parts.items()}


def calibrated(
    adapters: "Adapters",
    amounts: Mapping[str, float | ByPart],
    cells: Sequence[Cell],
    sampling: Sampling,
    stop: Stop = Never(),  # noqa: B008 -- has no state
) -> Calibration:
    """Measure what adapters change of predictions.

    Each picture is drawn in a few steps, beside as many copies as there are adapters. Before each step a copy gets the
    latents of the picture, so that all are asked about the same ones, and its answer is compared.

    Args:
        adapters: Those on the base. They keep the strengths of the last picture.
        amounts: Which are measured, at which strength.
        cells: The pictures, with the strengths of adapters that stand beside those. Few are enough: the first ``PROMPTS``
            prompts count.
        sampling: How pictures are drawn; its steps are at most ``STEPS`` here.
        stop: Where it is set, nothing is measured after the present picture.

    Returns:
        What each does.

    Raises:
        UserError: As `sampler.paint`.
        Interrupted: It was stopped.
    """
    firsts = list({cell.prompt: cell for cell in reversed(cells)}.values())[::-1][:PROMPTS]
    without: dict[str, float | ByPart] = dict.fromkeys(amounts, 0.0)
    columns = [without, *({**without, name: amount} for name, amount in amounts.items())]
    each = [replace(cell, strengths={**(cell.strengths or {}), **own}) for cell in firsts for own in columns]
    few = replace(
        sampling, steps=min(sampling.taken_steps, STEPS), batch_size=1 + len(amounts), compose="add", compose_file=None,
        hires=None, hires_upscaler=None, hires_strength=None, hires_steps=None,
    )  # fmt: skip
    with _watched(denoiser_of(adapters.pipe).network, 1 + len(amounts), few.guided_by) as sums:
        for _ in paint(adapters, each, few, tell=Observers(), stop=stop):
            pass
    means = (torch.stack(sums).double().mean(0) if sums else torch.zeros(len(amounts))).sqrt().tolist()
    return Calibration(dict(zip(amounts, means, strict=True)))


@contextmanager
def _watched(network: nn.Module, cells: int, guidance: float) -> Iterator[list[Tensor]]:
    """Have all cells of a batch begin each step with the latents of the first, and collect by how much predictions differ.

    Yields a list that grows by the mean squares of a step, (cells - 1,). Guidance repeats the batch, first with what the
    picture should not show.
    """
    first, found = next(iter(inspect.signature(network.forward).parameters)), list[Tensor]()

    def before(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        latents = args[0] if args else named[first]
        rows = latents.unflatten(0, (-1, cells))
        same = rows[:, :1].expand_as(rows).reshape(latents.shape)
        return ((same, *args[1:]), named) if args else (args, {**named, first: same})

    def after(_: nn.Module, given: Any, output: Any) -> None:
        answer = output if isinstance(output, Tensor) else output[0]
        rows = answer.detach().float().unflatten(0, (-1, cells))
        guided = rows[-1] if len(rows) == 1 else rows[0] + guidance * (rows[-1] - rows[0])
        found.append((guided[1:] - guided[:1]).square().flatten(1).mean(1).cpu())

    handles = (
        network.register_forward_pre_hook(before, with_kwargs=True),
        network.register_forward_hook(after),
    )
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def times(amount: float | ByPart, factor: float) -> float | ByPart:
    """Multiply a strength.

    Args:
        amount: The strength.
        factor: By how much.

    Returns:
        The product.
    """
    return amount.scaled(factor) if isinstance(amount, ByPart) else amount * factor
