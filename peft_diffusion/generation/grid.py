"""``grid``: a sheet of pictures over values of settings, each with its recipe, as A1111's X/Y/Z plot."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import NamedTuple

from PIL import Image

from ..bases.pipelines import Pipeline
from ..core.events import Ended, Event, Never, Observer, Stop, observed
from ..core.settings import of_kind
from . import recipe as recipes
from . import sheet
from .adapted import adapted
from .adapters import Adapters
from .asked import Order, order
from .automatic_regions import located
from .distilled import for_few_steps
from .events import SheetMade
from .generate import cell_recipes
from .grid_settings import Cellwise, GridConfig
from .learned import tell_base
from .memory import loaded, spare
from .recipe import Recipe
from .retrieval import retrieval
from .sampler import Cell, paint
from .settings import Choice, GenerateConfig, Key


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
        pipe: A base that is loaded already, used in place of ``config.base``. It is left as it was,
            but stays fast where ``config.fast`` asks for that.
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
        rows = config.rows(for_few_steps(config.of_generate(), config.choices(), tell))
        orders = _orders(config, [one for row in rows for one in row.cells], pipe, tell)
        for one in orders:
            one.pictures[0].config.check_composed(len(one.choices))
        files, prompts = _files(orders)
        base, lent = loaded(config, pipe), pipe is not None
        with adapted(base, files, prompts, tell, lent=lent, strict=config.strict, fast=config.fast) as (on, names):
            tell_base(on, config.compose_file, tell)
            called = {file.key: name for file, name in zip(files, names, strict=True)}
            halt = stop or Never()
            spare(on, config)
            jobs = _jobs(on, orders, called, tell, halt)
            told = [recipe for job in jobs for recipe in cell_recipes(on, job.cells, job.config, written=job.written)]
            recipes.check_sheet(config.output, [told])
            images = [image for job in jobs for image in paint(on, job.cells, job.config, tell=tell, stop=halt)]
        columns = config.columns
        pictures, kept = sheet.in_rows(images, len(columns)), sheet.in_rows(told, len(columns))
        made = sheet.grid(pictures, [row.label for row in rows], columns)
        sheet.tell_missing([*columns, *(row.label for row in rows)], tell)
        recipes.write_sheet(config.output, made, kept, config.quality)
        tell(SheetMade(config.output))
        tell(Ended("finished"))
    return Grid(made, pictures, kept)


def _orders(config: GridConfig, every: Sequence[Cellwise], pipe: Pipeline | None, tell: Observer) -> list[Order]:
    """What is drawn in each cell, with what adapters for few steps need that its prompt or a side of the sheet names."""
    said: set[Event] = set()

    def once(event: Event) -> None:
        if event not in said:
            said.add(event)
            tell(event)

    found: list[Order] = []
    with retrieval(config, pipe, config.choices(), tell, used=any(one.config.auto for one in every)) as library:
        for one in every:
            areas = found[0].areas if found else None  # regions lie in the same places all over the sheet
            asked = order(one.config, one.choices, literal=False, retrieval=library, areas=areas)
            taken = for_few_steps(one.config, asked.choices, once)
            if taken is not one.config:
                asked = order(taken, one.choices, literal=False, retrieval=library, areas=asked.areas)
            found.append(asked)
    return found


def _files(orders: Sequence[Order]) -> tuple[list[Choice], list[list[str]]]:
    """The adapters of all pictures, each once, and the prompts that are drawn with each."""
    files: dict[Key, Choice] = {}
    prompts: dict[Key, dict[str, None]] = {}
    for one in orders:
        for choice, own in zip(one.choices, one.prompts, strict=True):
            files.setdefault(choice.key, replace(choice, strength=1.0))
            prompts.setdefault(choice.key, {}).update(dict.fromkeys(own))
    return list(files.values()), [list(own) for own in prompts.values()]


class _Job(NamedTuple):
    """Pictures that are drawn in the same way, and their prompts as they were written."""

    config: GenerateConfig
    cells: list[Cell]
    written: list[str]


def _jobs(on: Adapters, orders: Sequence[Order], called: Mapping[Key, str], tell: Observer, stop: Stop) -> list[_Job]:
    """The pictures of the sheet, in order."""
    drawn = []
    for one in orders:
        (picture,) = one.pictures
        drawn.append((picture, one.cell(picture, [called[choice.key] for choice in one.choices], on.pipe)))
    jobs = []
    for _, several in groupby(drawn, key=lambda one: _manner(one[0].config)):
        group = list(several)
        how, cells = group[0][0].config, [cell for _, cell in group]
        if how.regions == "auto":
            cells = located(on, cells, how, None, tell, stop)
        jobs.append(_Job(how, cells, [picture.written for picture, _ in group]))
    return jobs


def _manner(config: GenerateConfig) -> GenerateConfig:
    """How pictures are drawn, without what each has of its own."""
    return replace(config, prompts=("",), seed=0, adapter=())
