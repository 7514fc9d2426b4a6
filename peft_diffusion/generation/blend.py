"""``blend``: a sheet from all of one adapter to all of another, every picture from the same noise."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

from PIL import Image

from ..bases import components
from ..bases.pipelines import Pipeline
from ..core.errors import UserError
from ..core.events import Ended, Never, Noted, Observer, Observers, Stop, observed
from ..core.settings import of_kind
from ..core.strength_schedule import ByPart
from . import overlap_drawing, sheet
from . import recipe as recipes
from .adapted import adapted
from .adapters import Adapters
from .amounts import text_of
from .asked import Order, order_of_sheet
from .calibration import Calibration, calibrated
from .distilled import for_few_steps
from .events import SheetMade
from .generate import cell_recipes
from .learned import tell_base
from .memory import loaded, spare
from .overlap import BlendReport, measured
from .overlap_files import write
from .recipe import Recipe
from .retrieval import retrieval
from .sampler import Cell, paint
from .settings import BlendConfig, Choice
from .telling import tell_clip_skip


@dataclass(frozen=True)
class Blend:
    """What was drawn: the sheet, and by row (prompt) and column (mix) the pictures on it and their recipes.

    ``effects`` are what each adapter changes of predictions, as `Calibration.effects`; empty where that was not measured.
    """

    sheet: Image.Image
    pictures: tuple[tuple[Image.Image, ...], ...]
    recipes: tuple[tuple[Recipe, ...], ...]
    effects: Mapping[str, float] = field(default_factory=dict)


def blend(
    config: BlendConfig, *, pipe: Pipeline | None = None, observers: Sequence[Observer] = (), stop: Stop | None = None
) -> Blend:
    """Draw the sheet and write it, with the recipes of its pictures.

    At a share of w the pictures of a few steps are w of the way from those of the other adapter alone to those of this one
    alone, in the mean of the prompts; with ``config.plain`` the adapter has w times its strength.

    Args:
        config: What is drawn, and how.
        pipe: A base that is loaded already, used in place of ``config.base``, which names it in recipes. It is left as it
            was, with the adapters of the configuration taken off again, but stays fast where ``config.fast`` asks for
            that.
        observers: Are told what happens, by the events of `generation.events`.
        stop: Where it is set, nothing is drawn after the present batch, and no sheet is written.

    Returns:
        What was drawn.

    Raises:
        UserError: Before anything is computed, for adapters, prompts, sizes and files that cannot be used.
        Interrupted: It was stopped. It is a KeyboardInterrupt.
    """
    with observed(observers) as tell:
        of_kind(config, BlendConfig)
        config.check()
        config, asked, choices = _asked(config, pipe, tell)
        base = loaded(config, pipe)
        lent, halt = pipe is not None, stop or Never()
        every = [one.prompt for one in asked.pictures]
        prompts = [every if number < len(choices) else own for number, own in enumerate(asked.prompts)]
        with adapted(base, asked.choices, prompts, tell, lent=lent, strict=config.strict, fast=config.fast) as (
            adapters,
            names,
        ):
            tell_clip_skip(adapters.pipe, [choice.plan for choice in asked.choices if choice.plan], config, tell)
            tell_base(adapters, config.compose_file, tell)
            blended = dict(zip(names, choices, strict=False))
            starts = [_beside(asked.cell(one, names, adapters.pipe), blended) for one in asked.pictures]
            written = [one.written for one in asked.pictures]
            drawn = draw(adapters, blended, config, starts, written=written, tell=tell, stop=halt)
            if config.report is not None:
                write(config.report, _report(adapters, blended, config, starts, drawn.effects, tell, halt))
        recipes.write_sheet(config.output, drawn.sheet, drawn.recipes, config.quality)
        tell(SheetMade(config.output))
        tell(Ended("finished"))
    return drawn


def _asked(config: BlendConfig, pipe: Pipeline | None, tell: Observer) -> tuple[BlendConfig, Order, tuple[Choice, ...]]:
    """What is drawn, with what adapters for few steps need; and the adapters of the sheet. Raises UserError for only one."""
    given = config.choices()
    with retrieval(config, pipe, given, tell, used=config.auto is not None) as library:
        asked, choices = order_of_sheet(config, given, library)
        taken = for_few_steps(config, asked.choices, tell)
        if taken is not config:
            config = taken
            asked, choices = order_of_sheet(config, given, library)
    if len(choices) < 2:
        there = f"{choices[0].path} alone" if choices else "none"
        raise UserError(
            f"a blend needs two adapters, and with those of the library there is {there}; name more with --adapter"
        )
    config.check_columns(len(choices))
    return config, asked, choices


def _beside(cell: Cell, blended: Iterable[str]) -> Cell:
    """A picture with the strengths of those adapters alone that are the same in all columns."""
    return replace(cell, strengths={name: one for name, one in (cell.strengths or {}).items() if name not in blended})


def _report(
    adapters: Adapters,
    choices: Mapping[str, Choice],
    config: BlendConfig,
    starts: Sequence[Cell],
    effects: Mapping[str, float],
    tell: Observer,
    stop: Stop,
) -> BlendReport:
    """What the adapters of a sheet change and share, on its prompts with each one's trigger. Tells the best mix."""
    amounts = {name: choice.amount for name, choice in choices.items()}
    own = overlap_drawing.own_prompts(adapters, list(choices), [start.prompt for start in starts])
    seen = overlap_drawing.drawn(
        adapters, own, config.seed, config, stop, amounts=amounts, beside=starts[0].strengths, effects=effects or None
    )
    found = seen.suggestion
    if found.excess_whole:
        told = " ".join(f"--adapter {one.path}={one.strength * found.strengths[name]:.2f}" for name, one in choices.items())
        less = 1 - found.excess / found.excess_whole
        tell(Noted(f"together they cost each other {less:.0%} less, by what they predict, at {told}"))
    return measured(components(adapters.pipe), list(choices), seen)


def draw(
    adapters: Adapters,
    choices: dict[str, Choice],
    config: BlendConfig,
    starts: Sequence[Cell] = (),
    *,
    written: Sequence[str] = (),
    tell: Observer = Observers(),  # noqa: B008 -- has no state
    stop: Stop = Never(),  # noqa: B008 -- has no state
) -> Blend:
    """Draw the sheet of adapters that are loaded already; nothing is written.

    Args:
        adapters: The adapters of the pipeline that draws.
        choices: Those that are blended, by name.
        config: What is drawn, and how.
        starts: The picture of each row, with its regions and how much of other adapters is in it; none for the prompts of
            ``config`` alone.
        written: The prompts of the rows as they were written; none where they are drawn so.
        tell: Is told how far it is.
        stop: Where it is set, nothing is drawn after the present batch.

    Returns:
        What was drawn.

    Raises:
        UserError: Before anything is computed, for sizes and prompts that the base cannot take.
        Interrupted: It was stopped.
    """
    mixes = shares(len(choices), config.columns)
    starts = starts or [Cell(prompt, config.seed, {}) for prompt in config.prompts]
    prompts = [start.prompt for start in starts]
    parts, effects = mixes, {}
    if not config.plain and any(0 < share < 1 for mix in mixes for share in mix):
        amounts, between = {name: choice.amount for name, choice in choices.items()}, list(pairwise(choices))
        found = calibrated(adapters, amounts, starts, config, stop, rows=between)
        _tell_effects(found, tell)
        effects = dict(found.effects)
        parts = [tuple(found.evenly(dict(zip(choices, mix, strict=True))).values()) for mix in mixes]
    if config.bare:
        mixes, parts = ([(0.0,) * len(choices), *one] for one in (mixes, parts))
    columns = [
        {name: choice.scaled(part).amount for part, (name, choice) in zip(mix, choices.items(), strict=True) if part}
        for mix in parts
    ]
    cells = [_mixed(start, mix) for start in starts for mix in columns]
    told = cell_recipes(adapters, cells, config, written=[text for text in written or prompts for _ in columns])
    recipes.check_sheet(config.output, [told])
    spare(adapters, config)
    images = list(paint(adapters, cells, config, tell=tell, stop=stop))
    pictures = sheet.in_rows(images, len(columns))
    names = _distinct([choice.path for choice in choices.values()])
    labels = [_label(mix, list(choices.values()), names) for mix in mixes]
    sheet.tell_missing([*prompts, *labels], tell)
    return Blend(
        sheet=sheet.grid(pictures, prompts, labels),
        pictures=pictures,
        recipes=sheet.in_rows(told, len(columns)),
        effects=effects,
    )


def _mixed(start: Cell, mix: Mapping[str, float | ByPart]) -> Cell:
    """The picture of a row at a mix. What only its regions have there is 0 outside of them."""
    strengths = {**mix, **(start.strengths or {})}
    for name in (name for part in (start.division.parts if start.division else ()) for name in part.strengths):
        strengths.setdefault(name, 0.0)
    return replace(start, strengths=strengths)


def _tell_effects(found: Calibration, tell: Observer) -> None:
    """Tell what each adapter does, as multiples of the one that does the least."""
    if found.silent:
        tell(Noted(f"{', '.join(found.silent)} changes nothing of these prompts, so shares are of strengths alone"))
        return
    least = min(found.effects.values())
    told = ", ".join(f"{name} {effect / least:.2f}" for name, effect in found.effects.items())
    tell(
        Noted(
            f"the adapters change predictions by {told} times the least; columns are placed by how far pictures are from"
            " both ends (--plain: by strengths)"
        )
    )


def shares(adapters: int, columns: int) -> list[tuple[float, ...]]:
    """List the mixes of each column, from all of the first adapter to all of the last, past all of each between them.

    Args:
        adapters: How many there are, at least 2.
        columns: At least as many.

    Returns:
        The share of each adapter by column; every mix sums to 1.
    """
    positions = [column * (adapters - 1) / (columns - 1) for column in range(columns)]
    return [tuple(max(0.0, 1 - abs(position - adapter)) for adapter in range(adapters)) for position in positions]


def _distinct(paths: Sequence[Path]) -> list[str]:
    """What files are called on a sheet: by their names, with as much of their folders as it takes to tell them apart."""
    whole = [path.absolute().with_suffix("").parts for path in paths]
    for depth in range(1, max(map(len, whole))):
        names = ["/".join(parts[-depth:]) for parts in whole]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _label(mix: Sequence[float], choices: Sequence[Choice], names: Sequence[str]) -> str:
    """A mix in words: names with their share, and the strength where it is not 1."""
    named = [_part(name, share, choice) for share, choice, name in zip(mix, choices, names, strict=True) if share]
    return "\n".join(named) or "no adapter"


def _part(name: str, share: float, choice: Choice) -> str:
    strength = ",".join(filter(None, ["" if choice.strength == 1 else f"{choice.strength:g}", text_of(choice.parts)]))
    if share == 1:
        return f"{name} at {strength}" if strength else name
    return f"{name} {share:.0%} of {strength}" if strength else f"{name} {share:.0%}"
