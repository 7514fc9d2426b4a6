"""Adapters that are weighed as was learned from pictures. Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ...core.errors import UserError
from ...core.shortening import brief
from ...core.strength_schedule import ByPart, Schedule
from .declared import Composition, Drawing, used

if TYPE_CHECKING:
    from ...core.learned_strengths import LearnedStrengths
    from ...formats.composition import CompositionSpec
    from ..sampler import Cell


class Learned(Composition):
    """What `compose train` learned: a strength for each block of the network and each noise level.

    Gates are asked once for all steps before these begin, so that steps can be recorded, and each picture by its own prompt.
    What is learned multiplies the strengths in the network alone; text encoders keep those that are given.
    """

    name = "learned"
    words = "weighed by block and step as `compose train` learned it, of a --compose-file"
    fewest = 1

    def strengths(self, cell: "Cell", drawing: Drawing) -> "Mapping[str, float | ByPart] | None":
        """Multiply each strength by what was learned.

        Args:
            cell: The row.
            drawing: What it is drawn with.

        Returns:
            The strengths, with schedules over the steps for each block.

        Raises:
            UserError: An adapter of the file is not on the base, or the file is for another base.
        """
        if cell.strengths is None:
            return None
        file, learned = drawing.learned
        names = members(file, cell.strengths, drawing)
        values = _over_steps(file, learned, cell, drawing)
        acting, found = used(cell), dict(cell.strengths)
        for place, name in enumerate(names):
            if name in acting:
                tables = {block: Schedule(values[place][number]) for number, block in enumerate(file.blocks)}
                found[name] = replace(acting[name], block_steps=tables)
        return found


def members(file: "CompositionSpec", names: "Mapping[str, float | ByPart]", drawing: Drawing) -> list[str]:
    """Find the adapters of a composition among those on a base, by the digests of their files.

    Args:
        file: The composition.
        names: What adapters of the row are called, which are looked at first; one that it leaves out is off.
        drawing: What is drawn with.

    Returns:
        The name of each, in the order of the composition.

    Raises:
        UserError: One is not there.
    """
    there = (*drawing.adapters.names, *drawing.adapters.waiting, *names)
    by_digest = {drawing.adapters[name].sha256: name for name in there}
    for member in file.adapters:
        if member.sha256 not in by_digest:
            raise UserError(f"{file.path} composes {member.file}, which is not loaded, or another file of that name is")
    return [by_digest[member.sha256] for member in file.adapters]


def _over_steps(
    file: "CompositionSpec", learned: "LearnedStrengths", cell: "Cell", drawing: Drawing
) -> Sequence[Sequence[Sequence[float]]]:
    """What was learned, by adapter, block and step."""
    import torch

    from ...bases import denoiser_of
    from ...core import targets
    from ...core.learned_strengths import pooled

    there = targets.blocks(denoiser_of(drawing.adapters.pipe).network, parts=True).names
    lost = [block for block in file.blocks if block not in there]
    prompts = None
    if learned.reads_prompts and drawing.reads is not None:
        prompts = pooled([part.cpu() for part in drawing.reads(cell)])
    if lost or not (prompts is None or learned.fits(prompts)):
        why = f"there is no block {lost[0]}" if lost else "its text encoder is of another width"
        raise UserError(f"{file.path} was learned on another base ({brief(str(file.base.get('name')))}): here {why}")
    count = drawing.scheduler.config.num_train_timesteps - 1
    levels = torch.tensor([min(1.0, max(0.0, time / count)) for time in drawing.timesteps])
    with torch.no_grad():
        values = learned(None if prompts is None else prompts.expand(len(levels), -1), levels)
    found: list[list[list[float]]] = values.permute(1, 2, 0).tolist()
    return found
