"""``grid``: a sheet of pictures over values of settings, each with its recipe, as A1111's X/Y/Z plot."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from PIL import Image

from ..bases.pipelines import Pipeline
from ..core.events import Ended, Event, Never, Observer, Stop, observed
from ..core.settings import of_kind
from . import recipe as recipes
from . import sheet
from .adapted import adapted
from .asked import Order, order
from .distilled import for_few_steps
from .events import SheetMade
from .generate import cell_recipes
from .grid_settings import Cellwise, GridConfig
from .learned import tell_base
from .memory import loaded, spare
from .recipe import Recipe
from .sampler import Cell, paint
from .settings import GenerateConfig


@dataclass(frozen=True)
class Grid:
    """What was drawn: the sheet, and by row and column the pictures on it and their recipes."""

    sheet: Image.Image
    pictures: tuple[tuple[Image.Image, ...], ...]
    recipes: tuple[tuple[Recipe, ...], ...]


def grid(
    config: GridConfig, *, pipe: Pipeline | None = None, observers: Sequence[Observer] = (), stop: Stop | None = None
) -> Grid:
    """Draw the sheet and write it, with the recipes of its pictures.

    Args:
        config: What is drawn, and over which values.
        pipe: A base that is loaded already, used in place of ``config.base``. It is left as it was.
        observers: Are told what happens, by the events of `generation.events`.
        stop: Where it is set, nothing is drawn after the present batch, and no sheet is written.

    Returns:
        What was drawn.

    Raises:
        UserError: Before anything is computed, for values, adapters, prompts and files that cannot be used.
        Interrupted: It was stopped. It is a KeyboardInterrupt.
    """
    with observed(observers) as tell:
        of_kind(config, GridConfig)
        config.check()
        rows = config.rows(for_few_steps(config.plain(), config.choices(), tell))
        every = [one for row in rows for one in row.cells]
        said: set[Event] = set()
        orders = [_ordered(one, said, tell) for one in every]
        files = list({choice.key: replace(choice, strength=1.0) for one in orders for choice in one.choices}.values())
        for one in orders:
            one.pictures[0].config.check_composed(len(one.choices))
        prompts = list(dict.fromkeys(one.pictures[0].prompt for one in orders))
        lent = pipe is not None
        with adapted(
            loaded(config, pipe), files, [prompts] * len(files), tell, lent=lent, strict=config.strict, fast=config.fast
        ) as (
            on,
            names,
        ):
            tell_base(on, config.compose_file, tell)
            called = {file.key: name for file, name in zip(files, names, strict=True)}
            drawn: list[tuple[GenerateConfig, Cell]] = []
            for one in orders:
                (picture,) = one.pictures
                strengths = one.strengths(picture, [called[choice.key] for choice in one.choices], on.pipe)
                drawn.append((picture.config, Cell(picture.prompt, picture.seed, strengths, picture.negative)))
            groups = [list(group) for _, group in groupby(drawn, key=lambda one: _manner(one[0]))]
            jobs = [(group[0][0], [cell for _, cell in group]) for group in groups]
            told = [recipe for how, cells in jobs for recipe in cell_recipes(on, cells, how)]
            recipes.check_sheet(config.output, [told])
            spare(on, config)
            halt = stop or Never()
            images = [image for how, cells in jobs for image in paint(on, cells, how, tell=tell, stop=halt)]
        columns = config.columns
        pictures, kept = sheet.in_rows(images, len(columns)), sheet.in_rows(told, len(columns))
        made = sheet.grid(pictures, [row.label for row in rows], columns)
        sheet.tell_missing([*columns, *(row.label for row in rows)], tell)
        recipes.write_sheet(config.output, made, kept, config.quality)
        tell(SheetMade(config.output))
        tell(Ended("finished"))
    return Grid(made, pictures, kept)


def _ordered(one: Cellwise, said: set[Event], tell: Observer) -> Order:
    """What is drawn in a cell, with what adapters for few steps need that its prompt or a side of the sheet names.

    What is told of them is in ``said`` then, and told once.
    """

    def once(event: Event) -> None:
        if event not in said:
            said.add(event)
            tell(event)

    asked = order(one.config, one.choices, literal=False)
    taken = for_few_steps(one.config, asked.choices, once)
    return asked if taken is one.config else order(taken, one.choices, literal=False)


def _manner(config: GenerateConfig) -> GenerateConfig:
    """How pictures are drawn, without what each has of its own."""
    return replace(config, prompts=("",), seed=0, adapter=())
