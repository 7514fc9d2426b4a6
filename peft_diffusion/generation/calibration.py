"""How much adapters do: what each changes of the network's predictions, and how pictures go from one to another.

A LoRA at strength 1 may change predictions several times as much as another, so that equal strengths are no equal shares.
Here pictures are begun as the base draws them, and at each step the network also says what it would predict with each
adapter alone. The size of the difference is close to proportional to the strength.

Equal changes of predictions still are no picture halfway: a style that is ahead in the early steps decides the later ones.
So for a row from all of one adapter to all of another, pictures are drawn along it in a few steps, and columns are placed by
how far those are from the pictures of both ends.
"""

import bisect
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..bases import denoiser_of
from ..core.events import Never, Observers, Stop
from ..core.strength_schedule import ByPart
from .sampler import Cell, latents, paint
from .settings import Sampling

if TYPE_CHECKING:
    from .adapters import Adapters

STEPS = 6  # of a calibration: predictions at six noise levels, from pure noise to none
PROMPTS = 4  # the most that are drawn for one
_SWEEPS = 200  # over the shares, which are few
COLUMNS = 9  # of a row that is drawn to place others
ROW_STEPS = 8  # of its pictures
_SAME = 1e-3  # of the size of latents: what differs by less differs by rounding


@dataclass(frozen=True)
class Row:
    """How pictures change along a row from all of one adapter to all of another.

    Attributes:
        parts: How much of the first one's whole strength is in each column, from 0 to 1; the second has the rest of its own.
        places: How far the pictures of a column are from those of the second alone, at 0, on the way to those of the first
            alone, at 1: d2 / (d1 + d2) with the distances of latents to both, in the mean of the prompts. Never falling.
    """

    parts: tuple[float, ...]
    places: tuple[float, ...]

    def at(self, place: float) -> float:
        """Find a column.

        Args:
            place: How far its pictures should be, from 0 to 1.

        Returns:
            How much of the first one's strength it takes, by straight lines between what was measured.
        """
        last = len(self.places) - 1
        after = min(max(1, bisect.bisect_left(self.places, place)), last)
        low, high = self.places[after - 1], self.places[after]
        share = (place - low) / (high - low) if high > low else 1.0
        return self.parts[after - 1] + min(1.0, max(0.0, share)) * (self.parts[after] - self.parts[after - 1])


@dataclass(frozen=True)
class Calibration:
    """What adapters change of the network's predictions.

    Attributes:
        effects: By name, the root mean square of what the adapter changes of the guided prediction, over prompts, steps and
            latents; 0 or more, in the units of the prediction, which are about those of standard normal noise.
        rows: Rows that were drawn, by the two adapters at their ends.
    """

    effects: Mapping[str, float]
    rows: Mapping[tuple[str, str], Row] = field(default_factory=dict)

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
            By name, together 1 too: an adapter alone keeps its whole strength. For two adapters between which a row was
            drawn, by how far its pictures are from both ends; else by what each changes of predictions, and the shares
            themselves where one of the adapters changes nothing.
        """
        acting = tuple(name for name, share in shares.items() if share)
        for (first, second), row in self.rows.items():
            if {first, second} == set(acting):
                part = row.at(shares[first])
                return dict.fromkeys(shares, 0.0) | {first: part, second: 1 - part}
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
    *,
    rows: Sequence[tuple[str, str]] = (),
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
        rows: Two adapters each, between which pictures are drawn to place columns.

    Returns:
        What each does.

    Raises:
        UserError: As `sampler.paint`.
        Interrupted: It was stopped.
    """
    without: dict[str, float | ByPart] = dict.fromkeys(amounts, 0.0)
    columns = [without, *({**without, name: amount} for name, amount in amounts.items())]
    found = _differences(adapters, columns, 0, firsts(cells), sampling, stop)
    means = found.diagonal()[1:].sqrt().tolist()
    known = Calibration(dict(zip(amounts, means, strict=True)))
    longer = replace(few(sampling, COLUMNS), steps=min(sampling.taken_steps, ROW_STEPS))
    drawn = {
        ends: _row(adapters, {name: amounts[name] for name in ends}, known, firsts(cells), longer, stop) for ends in rows
    }
    return replace(known, rows={ends: row for ends, row in drawn.items() if row is not None})


def _row(
    adapters: "Adapters",
    amounts: Mapping[str, float | ByPart],
    known: Calibration,
    starts: Sequence[Cell],
    sampling: Sampling,
    stop: Stop,
) -> Row | None:
    """Draw a row between two adapters; None where both ends are the same, so that nothing lies between."""
    first, second = amounts
    parts = [known.evenly({first: n / (COLUMNS - 1), second: 1 - n / (COLUMNS - 1)})[first] for n in range(COLUMNS)]
    mixes = [{first: times(amounts[first], part), second: times(amounts[second], 1 - part)} for part in parts]
    cells = [replace(cell, strengths={**(cell.strengths or {}), **mix}) for cell in starts for mix in mixes]
    drawn = latents(adapters, cells, sampling, stop=stop).flatten(1).double().unflatten(0, (len(starts), COLUMNS))
    to_second, to_first = ((drawn - drawn[:, [end]]).norm(dim=2) for end in (0, COLUMNS - 1))
    whole = to_first + to_second
    if bool((to_second[:, -1] <= _SAME * drawn[:, 0].norm(dim=1)).any()):
        return None
    places = (to_second / whole).mean(0).cummax(0).values
    return Row(tuple(parts), tuple(places.tolist()))


def firsts(cells: Sequence[Cell]) -> list[Cell]:
    """Choose the pictures that are drawn for a measurement.

    Args:
        cells: All of them.

    Returns:
        The first of each prompt, of the first ``PROMPTS`` prompts.
    """
    return list({cell.prompt: cell for cell in reversed(cells)}.values())[::-1][:PROMPTS]


def few(sampling: Sampling, rows: int) -> Sampling:
    """Say how pictures are drawn for a measurement: in few steps, at once, plainly.

    Args:
        sampling: How they are drawn else.
        rows: How many there are in a batch.

    Returns:
        The same otherwise.
    """
    return replace(
        sampling, steps=min(sampling.taken_steps, STEPS), batch_size=rows, compose="add", compose_file=None,
        hires=None, hires_upscaler=None, hires_strength=None, hires_steps=None,
    )  # fmt: skip


@dataclass(frozen=True)
class Suggestion:
    """Strengths for adapters that are on together, by what that changes of what each predicts alone of its own prompts.

    Attributes:
        strengths: By the name of the adapter, as shares of what it was measured at, from 0 to 1.
        excess: The mean square of the difference between what all together predict and what the adapter alone does, summed
            over adapters, each on its own prompts: the loss that they cost each other. By real pictures, what
            `on_pictures.suggested_on_pictures` says.
        excess_whole: The same at shares of 1.
    """

    strengths: Mapping[str, float]
    excess: float
    excess_whole: float


def suggested(
    adapters: "Adapters",
    amounts: Mapping[str, float | ByPart],
    cells: Mapping[str, Sequence[Cell]],
    sampling: Sampling,
    stop: Stop = Never(),  # noqa: B008 -- has no state
) -> Suggestion:
    """Find strengths at which adapters together predict as nearly as possible what each does alone of its own prompts.

    Let ``D_j`` be what adapter j changes of a prediction, and predictions nearly linear in strengths. Then the sum over
    adapters i of ``|sum_j s_j D_j - D_i|^2`` on the prompts of i is least where ``(sum_i G_i) s = sum_i G_i e_i``, with
    ``G_i`` the products of the ``D_j`` on these prompts. What comes of that, a quarter more and less, equal shares and whole
    strengths are then asked of the network itself, and the best is taken. All are asked about latents of a picture that the
    adapter alone draws.

    Args:
        adapters: Those on the base. They keep the strengths of the last picture.
        amounts: Which are weighed, and at which strength each is alone.
        cells: For each its own pictures, with the strengths of adapters that stand beside. The first prompts count.
        sampling: How pictures are drawn.
        stop: Where it is set, nothing is measured after the present picture.

    Returns:
        The strengths.

    Raises:
        UserError: As `sampler.paint`.
        Interrupted: It was stopped.
    """
    names = list(amounts)
    without: dict[str, float | ByPart] = dict.fromkeys(names, 0.0)
    alone = {name: {**without, name: amounts[name]} for name in names}
    total, wanted = torch.zeros(len(names), len(names)).double(), torch.zeros(len(names)).double()
    for place, name in enumerate(names):
        # The one that leads comes first; what nothing changes is the second, which the others are compared with.
        order = [name, *(other for other in names if other != name)]
        columns = [alone[name], without, *(alone[other] for other in order[1:])]
        products = _differences(adapters, columns, 1, firsts(cells[name]), sampling, stop)
        rows = [0 if other == name else 1 + order.index(other) for other in names]
        own = products[rows][:, rows]
        total += own
        wanted += own[place]
    shares = _least(total, wanted)
    candidates = [torch.ones(len(names)), torch.full((len(names),), 1 / len(names))]
    candidates += [(shares * factor).clamp(0, 1) for factor in (0.75, 1.0, 1.25)]
    mixes = [{n: times(amounts[n], share) for n, share in zip(names, one.tolist(), strict=True)} for one in candidates]
    lost = torch.zeros(len(candidates)).double()
    for name in names:
        columns = [alone[name], *mixes]
        lost += _differences(adapters, columns, 0, firsts(cells[name]), sampling, stop).diagonal()[1:]
    best = int(lost.argmin())
    return Suggestion(dict(zip(names, candidates[best].tolist(), strict=True)), float(lost[best]), float(lost[0]))


def _least(products: Tensor, wanted: Tensor) -> Tensor:
    """The shares from 0 to 1 at which ``s G s - 2 s w`` is least; of several alike the smallest."""
    found: Tensor = torch.linalg.lstsq(products[None], wanted[None, :, None], driver="gelsd").solution.flatten()
    if bool(((found >= 0) & (found <= 1)).all()):
        return found
    found = found.clamp(0, 1)
    for _ in range(_SWEEPS):  # one share after the other: the sum is convex, so that ends at its least
        for place in range(len(found)):
            if products[place, place] > 0:
                rest = wanted[place] - products[place] @ found + products[place, place] * found[place]
                found[place] = (rest / products[place, place]).clamp(0, 1)
    return found


def _differences(
    adapters: "Adapters",
    columns: Sequence[Mapping[str, float | ByPart]],
    beside: int,
    cells: Sequence[Cell],
    sampling: Sampling,
    stop: Stop,
) -> Tensor:
    """The products of what strengths change of predictions against those of one of the columns, as means over latents.

    Each picture is drawn at the strengths of the first column; before each step all others get its latents. Returns float64,
    (columns, columns).
    """
    each = [replace(cell, strengths={**(cell.strengths or {}), **own}) for cell in cells for own in columns]
    drawn = few(sampling, len(columns))
    with _watched(denoiser_of(adapters.pipe).network, len(columns), beside, drawn.guided_by) as found:
        for _ in paint(adapters, each, drawn, tell=Observers(), stop=stop):
            pass
    return torch.stack(found).double().mean(0) if found else torch.zeros(len(columns), len(columns)).double()


@contextmanager
def _watched(network: nn.Module, cells: int, beside: int, guidance: float) -> Iterator[list[Tensor]]:
    """Have all cells of a batch begin each step with the latents of the first, and collect by how much predictions differ.

    Yields a list that grows by the mean products of a step's differences to the cell ``beside``, (cells, cells). Guidance
    repeats the batch, first with what the picture should not show.
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
        moved = (guided - guided[beside]).flatten(1)
        found.append((moved @ moved.T / moved.shape[1]).cpu())

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
