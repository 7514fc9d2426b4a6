"""Regions that are found by where a picture attends to the triggers of its adapters.

The idea is of FreeFuse (Liu et al. 2025, https://arxiv.org/abs/2510.23515): one early pass tells where each trigger is read,
and each adapter then acts there alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..bases import denoiser_of
from ..bases.prompt_syntax import broken
from ..bases.regional_attention import Maps
from ..bases.taught import units
from ..core.errors import UserError
from ..core.events import Noted, Observer, Stop, check_stop
from ..core.strength_schedule import ByPart
from ..data.prompts import words_of
from .adapted import contains
from .regions import Area, Division, DrawnRegion
from .sampler import Cell, probed, set_strengths, size
from .settings import GenerateConfig
from .source import Source
from .telling import Telling, triggers

if TYPE_CHECKING:
    from .adapters import Adapters

_UNTIL = 0.5  # the share of the noise levels, from the noisiest, that the first pass goes through
_SIDES = (8, 32)  # the shorter side of the maps that are looked at: coarser ones blur, finer ones follow texture
_SMOOTH = 1 / 16  # of the shorter side: the standard deviation of what maps are smoothed with
_ALIKE = 0.95  # the correlation of two maps from which on what they differ in is chance
_ROOMY = 0.6  # the side of the square that a region has room for, as a share of that which its part of the picture has


@dataclass(frozen=True)
class Concept:
    """An adapter that a prompt calls.

    Attributes:
        name: That of the adapter.
        tokens: The places of its triggers among the tokens of the prompt.
    """

    name: str
    tokens: tuple[int, ...]


def located(
    adapters: "Adapters", cells: Sequence[Cell], config: GenerateConfig, source: Source | None, tell: Observer, stop: Stop
) -> list[Cell]:
    """Give each adapter that a prompt calls the region in which the picture reads its trigger.

    Args:
        adapters: Those on the base.
        cells: The pictures.
        config: How they are drawn.
        source: What they start from.
        tell: Is told what the person should know.
        stop: Where it is set, nothing is drawn after the present batch.

    Returns:
        The pictures with regions.

    Raises:
        UserError: A prompt does not call two adapters.
        Interrupted: It was stopped.
    """
    telling = Telling(adapters.pipe, config, triggers(adapters, cells))
    width, height = size(adapters.base, config, source)
    found: list[Cell] = []
    for start in range(0, len(cells), config.batch_size):
        check_stop(stop, f"stopped after the regions of {start} of {len(cells)} pictures")
        batch = cells[start : start + config.batch_size]
        concepts = [concepts_of(adapters, cell, telling) for cell in batch]
        maps = Maps([[one.tokens for one in own] for own in concepts])
        probed(adapters, batch, config, source, maps, _UNTIL)
        for number, (cell, own) in enumerate(zip(batch, concepts, strict=True)):
            masks = _masks(adapters, maps.found[number], width, height)
            areas = [Area(None, Image.fromarray(one.numpy().astype(np.uint8) * 255)) for one in masks]
            if not all(_is_roomy(one, len(own)) for one in masks):
                own = sorted(own, key=lambda one: one.tokens[0])
                areas = side_by_side(len(own), upright=height > width)
                where = "one below the other" if height > width else "side by side"
                tell(Noted(f"seed {cell.seed} reads its triggers in one place, so {len(own)} regions lie {where}, in order"))
            prompts = [_prompt_of(adapters, cell.prompt, one, own, config) for one in own]
            found.append(replace(cell, division=_division(own, areas, prompts, config)))
    return found


def _prompt_of(
    adapters: "Adapters", prompt: str, one: Concept, concepts: Sequence[Concept], config: GenerateConfig
) -> str | None:
    """What stands between ``BREAK`` and calls no other concept than one; None for a prompt without."""
    parts = broken(prompt, config.prompt_weights)
    if len(parts) < 2:
        return None

    def calls(part: str, concept: Concept) -> bool:
        return any(contains(part, trigger) for trigger in adapters[concept.name].spec.triggers)

    return ", ".join(part for part in parts if calls(part, one) or not any(calls(part, other) for other in concepts))


def concepts_of(adapters: "Adapters", cell: Cell, telling: Telling) -> list[Concept]:
    """Find the adapters that a prompt calls, and where; the words of a trigger in a longer one of another adapter call that.

    Args:
        adapters: Those on the base. They have the strengths of the picture afterwards.
        cell: The picture.
        telling: How its prompt is read.

    Returns:
        Those of a strength other than 0, in order.

    Raises:
        UserError: They are not two or more.
    """
    (tokenizer, _), *_ = telling.text.pairs
    set_strengths(adapters, [cell])  # on which it depends which soft prompts stand before the words
    read = telling.text.tokenized([words_of(cell.prompt).text])["ids_0"][0].tolist()
    spans: dict[str, set[range]] = {}
    for name, amount in (cell.strengths or {}).items():
        for trigger in adapters[name].spec.triggers if amount != 0 else ():
            wanted = [one for ids in units(tokenizer, [trigger])[0] for one in ids]
            starts = [start for start in range(len(read)) if wanted and read[start : start + len(wanted)] == wanted]
            spans.setdefault(name, set()).update(range(start, start + len(wanted)) for start in starts)
    found = []
    for name, own in spans.items():
        longer = [set(one) for other, theirs in spans.items() if other != name for one in theirs]
        places = {place for span in own if not any(set(span) < one for one in longer) for place in span}
        if places:
            found.append(Concept(name, tuple(sorted(places))))
    if len(found) < 2:
        called = f"only that of {found[0].name}" if found else "none"
        raise UserError(
            f'regions are found by the triggers of two adapters or more, and "{cell.prompt}" has {called}; write them into'
            " the prompt, or say where regions are with --region"
        )
    return found


def _masks(adapters: "Adapters", maps: dict[int, Tensor], width: int, height: int) -> Tensor:
    """Where each concept is read more than the others, (concepts, height, width) of 0 and 1; 0 where all are read alike."""
    factor = denoiser_of(adapters.pipe).factor
    grid, grids = (height // factor, width // factor), dict[int, tuple[int, int]]()
    while grid not in grids.values():
        grids.setdefault(grid[0] * grid[1], grid)
        grid = -(-grid[0] // 2), -(-grid[1] // 2)
    seen = {grids[positions]: one for positions, one in maps.items() if positions in grids}
    chosen = [grid for grid in seen if _SIDES[0] <= min(grid) <= _SIDES[1]] or [max(seen)]
    total = torch.zeros(len(seen[chosen[0]]), height, width)
    for grid in chosen:
        one = seen[grid].float().cpu()
        one = (one - one.mean(1, keepdim=True)) / one.std(1, keepdim=True).clamp(min=1e-12)
        total += F.interpolate(one.unflatten(1, grid)[None], (height, width), mode="bilinear")[0]
    if torch.corrcoef(total.flatten(1)).fill_diagonal_(-1).max() > _ALIKE:
        return torch.zeros_like(total)
    smooth = _smoothed(total, _SMOOTH * min(width, height))
    return F.one_hot(smooth.argmax(0), len(smooth)).permute(2, 0, 1)


def _smoothed(maps: Tensor, sigma: float) -> Tensor:
    """(maps, height, width) with a Gaussian."""
    reach = min(round(2 * sigma), min(maps.shape[1:]) - 1)
    places = torch.arange(-reach, reach + 1, dtype=torch.float32)
    weights = torch.exp(-(places**2) / (2 * sigma**2))
    weights = weights / weights.sum()
    padded = F.pad(maps[:, None], [reach] * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))[:, 0]


def _is_roomy(mask: Tensor, count: int) -> bool:
    """Whether one of so many regions has room for a subject: a square of a share of the side that its part would have."""
    height, width = mask.shape
    side = max(1, round(_ROOMY * min(height, width, (height * width / count) ** 0.5)))
    return bool(F.avg_pool2d(mask[None].float(), side, stride=1).max() > 0.95)


def side_by_side(count: int, *, upright: bool) -> list[Area]:
    """Divide a picture evenly.

    Args:
        count: Into how many regions.
        upright: Whether one is below the other.

    Returns:
        From left to right, or from top to bottom.
    """
    edges = [number / count for number in range(count + 1)]
    pairs = list(pairwise(edges))
    return [Area((0.0, low, 1.0, high) if upright else (low, 0.0, high, 1.0)) for low, high in pairs]


def _division(
    concepts: Sequence[Concept], areas: Sequence[Area], prompts: Sequence[str | None], config: GenerateConfig
) -> Division:
    """A region for each concept, in which the adapters of the others are off."""
    parts = []
    for number, one in enumerate(concepts):
        off: dict[str, float | ByPart] = {other.name: 0.0 for other in concepts if other is not one}
        parts.append(DrawnRegion(areas[number], prompts[number], off))
    return Division(tuple(parts), config.region_feather, config.region_isolation)
