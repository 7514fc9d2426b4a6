"""``generate``: pictures from prompts, seeds and adapters, written with their recipes."""

import json
import logging
import re
import shlex
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

from PIL import Image

from .. import __version__
from ..bases import denoiser_of, fingerprint
from ..bases.base import checkpoint_sha256, dtype_of
from ..bases.embedded import ICONS
from ..bases.loading import is_cached, is_hub_id
from ..bases.pipelines import Pipeline, free_u
from ..core import plugins
from ..core.errors import UserError
from ..core.events import Ended, Never, Noted, Observer, Observers, Stop, Warned, observed
from ..core.settings import of_kind, pick, settings_of
from ..core.strength_schedule import ByPart
from ..data.picture_formats import ending
from ..formats import Plan, plan
from ..formats.container import sha256
from . import amounts, sheet
from . import recipe as recipes
from .adapted import adapted, tell_of_adapters
from .adapters import Adapters
from .asked import Asked, Order, order
from .automatic_regions import located
from .batching import grouped
from .calibration import calibrated
from .control import used as used_controls
from .distilled import for_few_steps
from .events import PictureMade, SheetMade
from .joining import Queue, Ticket
from .kept import Kept
from .learned import tell_base
from .memory import device_of, loaded, spared
from .recipe import Recipe, UsedAdapter, UsedPicture, UsedRegion
from .retrieval import retrieval
from .sampler import Cell, gives_way, paint, scheduler_of, size
from .settings import Choice, GenerateConfig, Precision, Sampling
from .source import Source, check_mask, read_source
from .telling import tell_clip_skip

logger = logging.getLogger(__name__)

# What a recipe leaves to the person who makes its picture again.
_FREE = frozenset(
    {
        "recipe",
        "offload",
        "vae_tiling",
        "attention_slicing",
        "fast",
        "prompts_file",
        "adapters_dir",
        "wildcards_dir",
        "output",
        "format",
        "control",
        "control_scale",
        "quality",
        "sheet",
        "strict",
        "batch_size",
        "device",
        "precision",
        "base",
        "adapter",
        "calibrate",
        "auto",
        "library",
        "image",
        "mask",
        "compose_file",
    }
)
_SLUG = 48  # letters of a prompt in a file's name


@dataclass(frozen=True)
class Picture:
    """A picture that was made: its pixels, what it was made from, and its file."""

    image: Image.Image
    recipe: Recipe
    path: Path


def generate(
    config: GenerateConfig, *, pipe: Pipeline | None = None, observers: Sequence[Observer] = (), stop: Stop | None = None
) -> list[Picture]:
    """Make every prompt with every seed and write each picture, with its recipe, as soon as its batch is done.

    Args:
        config: What is drawn, and how.
        pipe: A base that is loaded already, used in place of ``config.base``, which names it in recipes. It is left as it
            was, with the adapters of the configuration taken off again, but stays fast where ``config.fast`` asks for
            that.
        observers: Are told what happens, by the events of `generation.events`.
        stop: Where it is set, such as a ``threading.Event`` by another thread, nothing is drawn after the present batch;
            the pictures before it are written.

    Returns:
        The pictures, prompt by prompt.

    Raises:
        UserError: Before anything is computed, for adapters, prompts, sizes and files that cannot be used.
        Interrupted: It was stopped. It is a KeyboardInterrupt.
    """
    with observed(observers) as tell:
        of_kind(config, GenerateConfig)
        config.check()
        named = config.recipe is None or config.base != GenerateConfig.base  # by the person, not by a picture
        choices, again, expected = config.choices(), config.recipe, None
        if again is not None:
            expected = recipes.read(again)
            _refuse_missing(expected, again)
            config, choices = _again(config, expected, lent=pipe is not None)
        with retrieval(config, pipe, choices, tell, used=config.auto is not None) as library:
            asked = order(config, choices, literal=again is not None, retrieval=library)
            if expected is not None:
                asked = replace(asked, divided=expected.divided)
            taken = config if again is not None else for_few_steps(config, asked.choices, tell)
            if taken is not config:
                config, asked = taken, order(taken, choices, literal=False, retrieval=library)
        config.check_composed(len(asked.choices))
        paths = _plan(config, [(one.prompt, one.seed) for one in asked.pictures])
        _check_kept(config, paths, again)
        source = None
        if config.image is not None:
            source = read_source(config.image, config.mask, config.strength, config.taken_steps)
        base = loaded(config, pipe, download=named)

        def check(told: Recipe) -> None:
            if again is not None and expected is not None:
                _check_base(config, again, expected, told)
                _tell_machine(expected, told, tell)

        lent = pipe is not None
        with closing(draw(base, asked, config, source, tell=tell, stop=stop or Never(), lent=lent, check=check)) as drawn:
            pictures = _written(drawn, paths, tell, config.quality)
        if config.sheet is not None:
            _write_sheet(config.sheet, pictures, asked, config.quality)
            sheet.tell_missing((row[0].written for row in asked.rows), tell)
            tell(SheetMade(config.sheet))
        tell(Ended("finished"))
    return pictures


def draw(
    base: Pipeline,
    asked: Order,
    config: GenerateConfig,
    source: Source | None = None,
    *,
    tell: Observer,
    stop: Stop,
    lent: bool = True,
    check: Callable[[Recipe], None] | None = None,
    kept: Kept | None = None,
) -> Generator[tuple[Image.Image, Recipe]]:
    """Draw pictures that were asked for, and write nothing: what `generate` and the server share.

    Close what is returned where it is left before its end: only then are the adapters off the base.

    Args:
        base: The base.
        asked: The pictures, and their adapters.
        config: What is the same for all of them.
        source: A picture to start from, of any size.
        tell: Is told how far it is, and what the person should know.
        stop: Where it is set, nothing is drawn after the present batch.
        lent: Whether the base goes on without the adapters afterwards; it carries none then.
        check: Is given the recipe of the first picture before anything is drawn.
        kept: The adapters that stay with a lent base; None where none do.

    Yields:
        Each picture with its recipe, in order.

    Raises:
        UserError: Before anything is computed, for adapters, prompts and sizes that cannot be used.
        Interrupted: It was stopped.
    """
    with adapted(base, asked.choices, asked.prompts, tell, lent=lent, strict=config.strict, fast=config.fast, kept=kept) as (
        adapters,
        names,
    ):
        tell_clip_skip(adapters.pipe, [choice.plan for choice in asked.choices if choice.plan], config, tell)
        check_mask(adapters.pipe, source, adapters.base.name)
        tell_base(adapters, config.compose_file, tell)
        factors = _factors(adapters, names, asked, config, tell, stop) if config.calibrate else {}
        with spared(adapters, config):
            jobs = [_job(adapters, names, asked, group, source, factors, tell, stop) for group in asked.groups]
            if check is not None:
                check(jobs[0].recipes[0])
            for job in jobs:
                yield from zip(job.paint(adapters, tell, stop), job.recipes, strict=True)


@dataclass(frozen=True, eq=False)
class Part:
    """What one of several asks for who share a base.

    Attributes:
        asked: The pictures, and their adapters.
        config: What is the same for all of them.
        tell: Is told what that one should know.
    """

    asked: Order
    config: GenerateConfig
    tell: Observer


def draw_together(
    base: Pipeline,
    parts: Sequence[Part],
    *,
    at_most: int,
    strict: bool,
    tell: Observer,
    stop: Stop,
    kept: Kept | None = None,
) -> Generator[tuple[int, list[tuple[Image.Image, Recipe]]]]:
    """Draw what several ask for in common batches, as far as their pictures can share these; the others after each other.

    Close what is returned where it is left before its end: only then are the adapters off the base.

    Args:
        base: The base, which carries no adapters but those that are kept.
        parts: What they ask for, all of it from noise, with one way to save memory.
        at_most: Pictures computed at once.
        strict: Whether to refuse a file of which a tensor is left out.
        tell: Is told how far it is.
        stop: Where it is set, nothing is drawn after the present batch.
        kept: The adapters that stay with the base; None where none do.

    Yields:
        Which part is done, and its pictures with their recipes.

    Raises:
        UserError: One cannot be drawn; or adapters teach words, which all prompts would be read with.
        Interrupted: It was stopped.
    """
    choices = {choice.key: choice for part in parts for choice in part.asked.choices}
    untold: list[list[str]] = [[] for _ in choices]
    with adapted(base, list(choices.values()), untold, Observers(), lent=True, strict=strict, kept=kept) as (
        adapters,
        names,
    ):
        called = dict(zip(choices, names, strict=True))
        by_part = [_pictures_of(adapters, part, [called[choice.key] for choice in part.asked.choices]) for part in parts]
        jobs = [job for own in by_part for job in own]
        whose = [number for number, own in enumerate(by_part) for _ in own]
        missing = Counter(whose)
        done: dict[int, tuple[Image.Image, Recipe]] = {}
        cells = [cell for job in jobs for cell in job.cells]
        groups = grouped(adapters, cells, [job.config for job in jobs], Observers())
        with spared(adapters, parts[0].config):
            for one in groups:
                config = replace(one.sampling, batch_size=at_most)
                coming = paint(adapters, [cells[number] for number in one.numbers], config, tell=tell, stop=stop)
                for number, image in zip(one.numbers, coming, strict=True):
                    done[number] = image, jobs[number].recipes[0]
                    missing[whose[number]] -= 1
                    if not missing[whose[number]]:
                        yield whose[number], [done[which] for which, of in enumerate(whose) if of == whose[number]]


class Session:
    """Draws what several ask for who share a base, each of whom may come while pictures of others are drawn.

    Args:
        kept: The adapters that stay with the base. Until `close` it carries those of the parts that are drawn.
        choices: The adapters of the first part, or of several that come at once.
        at_most: Pictures computed at once.
        strict: Whether to refuse a file of which a tensor is left out.

    Raises:
        UserError: A file is gone.
    """

    def __init__(self, kept: Kept, choices: Sequence[Choice], *, at_most: int, strict: bool) -> None:
        self._kept = kept
        self._strict = strict
        self._queue = Queue(kept.adapters, at_most=at_most)
        self._parts: dict[Part, list[tuple[Ticket, Recipe]]] = {}
        kept.begin(list({choice.key: choice for choice in choices}.values()))

    @property
    def busy(self) -> bool:
        """Whether any part is not drawn yet."""
        return bool(self._parts)

    @property
    def room(self) -> int:
        """How many more pictures could join at the next step; none where one of those under way waits to be drawn."""
        return self._queue.room

    def join(self, part: Part) -> None:
        """Draw a part too, from the next step on.

        Args:
            part: What is asked for, from noise.

        Raises:
            UserError: It cannot be drawn; or adapters teach words, which other prompts would be read with. Nothing of it is
                drawn then.
        """
        adapters, choices = self._kept.adapters, part.asked.choices
        names = self._kept.join(choices, strict=self._strict, warn=lambda _: None)
        tickets: list[tuple[Ticket, Recipe]] = []
        try:
            for job in _pictures_of(adapters, part, names):
                tickets.append((self._queue.put(job.cells[0], job.config, part.tell), job.recipes[0]))
        except BaseException:
            for ticket, _ in tickets:
                ticket.cancel()
            self._kept.leave(choices)
            raise
        self._parts[part] = tickets

    def tickets(self, part: Part) -> list[Ticket]:
        """The pictures of a part that is being drawn.

        Args:
            part: The part.

        Returns:
            They, in order.
        """
        return [ticket for ticket, _ in self._parts[part]]

    def step(self) -> dict[Part, list[tuple[Image.Image, Recipe]] | None]:
        """Take a step.

        Returns:
            The parts that are done now, with their pictures and recipes, without those that were given up; None for a part
            of which a picture could not be drawn.
        """
        try:
            self._queue.step()
        except Exception:
            logger.debug("pictures could not be drawn together", exc_info=True)  # they have failed, which is told below
        done = {part: tickets for part, tickets in self._parts.items() if all(ticket.done for ticket, _ in tickets)}
        for part in done:
            del self._parts[part]
            self._kept.leave(part.asked.choices)
        return {part: _of_tickets(tickets) for part, tickets in done.items()}

    def close(self) -> None:
        """Draw no more, and leave the base without adapters in use."""
        self._kept.end()


def _of_tickets(tickets: Sequence[tuple[Ticket, Recipe]]) -> list[tuple[Image.Image, Recipe]] | None:
    if any(ticket.failed for ticket, _ in tickets):
        return None
    return [(ticket.image, told) for ticket, told in tickets if not ticket.given_up]


def _pictures_of(adapters: Adapters, part: Part, own: Sequence[str]) -> "list[_Job]":
    """The pictures of one who asks, a job each; tells what that one should know of adapters."""
    _refuse_words(adapters, own)
    tell_of_adapters(adapters, own, part.asked.prompts, part.tell)
    plans = [choice.plan for choice in part.asked.choices if choice.plan]
    tell_clip_skip(adapters.pipe, plans, part.config, part.tell)
    jobs = [_job(adapters, own, part.asked, group, None) for group in part.asked.groups]
    return [
        replace(job, cells=[cell], recipes=[told]) for job in jobs for cell, told in zip(job.cells, job.recipes, strict=True)
    ]


def _refuse_words(adapters: Adapters, own: Sequence[str]) -> None:
    """Raise UserError where adapters that are not one's own teach words, or stand before every prompt."""
    others = adapters.teachers - set(own)
    if others:
        raise UserError(f"{', '.join(sorted(others))} would teach words that this prompt is not read with")


@dataclass(frozen=True)
class _Job:
    """Pictures that are drawn in the same way."""

    cells: list[Cell]
    config: GenerateConfig
    source: Source | None
    recipes: list[Recipe]

    def paint(self, adapters: Adapters, tell: Observer, stop: Stop) -> Iterator[Image.Image]:
        return paint(adapters, self.cells, self.config, self.source, tell=tell, stop=stop)


def _factors(
    adapters: Adapters, names: Sequence[str], asked: Order, config: GenerateConfig, tell: Observer, stop: Stop
) -> dict[str, float]:
    """What strengths are multiplied by for equal ones, in the parts and over the steps that are said, to do as much."""
    cells = [Cell(one.prompt, one.seed, None, one.negative) for one in asked.pictures]
    amounts = {name: replace(choice, strength=1.0).amount for name, choice in zip(names, asked.choices, strict=True)}
    found = calibrated(adapters, amounts, cells, config, stop)
    if found.silent:
        tell(Noted(f"{', '.join(found.silent)} changes nothing of these prompts, so its strength is left as it is"))
    return found.factors


def _job(
    adapters: Adapters,
    names: Sequence[str],
    asked: Order,
    group: Sequence[Asked],
    source: Source | None,
    factors: Mapping[str, float] = MappingProxyType({}),
    tell: Observer = Observers(),  # noqa: B008 -- has no state
    stop: Stop = Never(),  # noqa: B008 -- has no state
) -> _Job:
    config = group[0].config
    cells = [asked.cell(one, names, adapters.pipe, factors) for one in group]
    source = None if source is None else source.fitted(adapters.base, config.width, config.height)
    if config.regions == "auto" and not asked.divided:
        cells = located(adapters, cells, config, source, tell, stop)
    told = cell_recipes(adapters, cells, config, source, written=[one.written for one in group])
    return _Job(cells, config, source, told)


def _check_base(config: GenerateConfig, again: Path, expected: Recipe, recipe: Recipe) -> None:
    """Raise UserError where a recipe that was given is of another base, scheduler or VAE than what would draw."""
    if recipe.fingerprint != expected.fingerprint:
        raise UserError(
            f"{again} was made with base {expected.base_name!r} ({expected.fingerprint}), and {config.base!r} has"
            f" other weights ({recipe.fingerprint}); name the right one with --base"
        )
    other = expected.other_tools(recipe)
    if other:
        raise UserError(
            f"{again} was drawn with {'; '.join(other)}, as the base here has it; hand in a pipeline with what drew it, as"
            " in generate(config, pipe=pipe)"
        )


def _tell_machine(expected: Recipe, recipe: Recipe, tell: Observer) -> None:
    """Tell where another kind of device or dtype draws than drew: the picture is alike, and not the same to the bit."""
    before, now = (f"{one.dtype} on {one.device.partition(':')[0]}" for one in (expected, recipe))
    if before != now:
        tell(Warned(f"the picture was drawn in {before} and is drawn in {now} now, so it will differ a little"))


def _written(
    drawn: Iterable[tuple[Image.Image, Recipe]], paths: Sequence[Path], tell: Observer, quality: int | None
) -> list[Picture]:
    """Write pictures as they come, with their recipes."""
    pictures = []
    for (image, recipe), path in zip(drawn, paths, strict=True):
        recipes.write(path, image, recipe, quality)
        pictures.append(Picture(image, recipe, path))
        tell(PictureMade(pictures[-1]))
    return pictures


def cell_recipes(
    adapters: Adapters,
    cells: Sequence[Cell],
    sampling: Sampling,
    source: Source | None = None,
    *,
    written: Sequence[str] | None = None,
) -> list[Recipe]:
    """Tell in full what each picture is made from, also adapters of strength 0, whose words the prompts are read with.

    Args:
        adapters: Those on the base.
        cells: The pictures.
        sampling: How they are drawn.
        source: What they start from.
        written: Their prompts as they were written; None where they are drawn so.

    Returns:
        One recipe a picture.

    Raises:
        UserError: There are more steps than noise levels.
    """
    pipe = adapters.pipe
    info = adapters.base
    width, height = size(info, sampling, source)
    scheduler = scheduler_of(adapters, cells, sampling)
    hires = sampling.second_pass
    found = {
        "prompt": "",
        "seed": 0,
        "width": width,
        "height": height,
        "steps": sampling.taken_steps,
        "guidance": sampling.guided_by,
        "scheduler": "ddim" if gives_way(adapters.pipe, scheduler, sampling) else sampling.scheduler,
        "sampler": type(scheduler).__name__,
        "base_name": info.name,
        "base_family": info.family,
        "fingerprint": info.fingerprint,
        "base_sha256": checkpoint_sha256(pipe),
        "device": str(device_of(pipe, sampling)),
        "dtype": str(dtype_of(pipe)).removeprefix("torch."),
        "sampler_options": _options(scheduler) | {"freeu": free_u(denoiser_of(pipe).network)},
        "vae": _fingerprint(pipe.vae),
        "versions": _versions(),
        **({} if hires is None else {"hires_upscaler": hires.upscaler, "hires_strength": hires.strength}),
        **({} if hires is None else {"hires_steps": hires.steps}),
    }
    begun = {} if source is None else {"image": source.of, "mask": source.mask_of, "strength": source.strength}
    found["compose"] = None if sampling.composition == "add" else sampling.composition
    file = sampling.compose_file
    found["compose_file"] = None if file is None else UsedPicture(str(file), sha256(file))
    found["controls"] = used_controls(sampling.controls(), sampling.control_scale)
    of_regions = {"divided": (), "region_feather": None, "region_isolation": None}
    of_a_picture = {"adapters": (), "plugins": (), "image": None, "mask": None, "strength": None, "written": None, **begun}
    common = pick(Recipe, sampling, found, of_regions, of_a_picture)
    texts = [cell.prompt for cell in cells] if written is None else written
    return [replace(common, **_own(adapters, cell, text, sampling)) for cell, text in zip(cells, texts, strict=True)]


def _own(adapters: Adapters, cell: Cell, written: str, sampling: Sampling) -> dict[str, Any]:
    """What a recipe has that other pictures of a call do not share."""
    found: dict[str, Any] = {"prompt": cell.prompt, "negative": cell.against(sampling), "seed": cell.seed}
    found["written"] = written if written != cell.prompt else None
    strengths, division = cell.strengths or {}, cell.division
    found |= {"adapters": _used(adapters, strengths), "plugins": _plugins(adapters, strengths)}
    if division is not None:
        found |= {"divided": _divided(cell), "region_feather": division.feather}
        found["region_isolation"] = division.isolated(strengths)
    return found


def _options(scheduler: Any) -> dict[str, Any]:
    """What a scheduler was made with, as JSON has it."""
    told = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    options: dict[str, Any] = json.loads(json.dumps(told, default=str))
    return options


def _fingerprint(vae: Any) -> str | None:
    """Which VAE it is; None where its weights are not there between calls, as under sequential offloading."""
    return None if any(own.is_meta for own in vae.parameters()) else fingerprint({"vae": vae})


def _used(adapters: Adapters, strengths: Mapping[str, float | ByPart]) -> tuple[UsedAdapter, ...]:
    """What a recipe says of adapters. Raises UserError for one that no file holds."""
    used = []
    for name, strength in strengths.items():
        loaded = adapters[name]
        if loaded.path is None or loaded.sha256 is None:
            raise UserError(f"the adapter {name!r} was attached without a file, so no recipe can name it; save and load it")
        said = loaded.component or "", loaded.word or ""
        whole = strength.strength if isinstance(strength, ByPart) else strength
        parts = amounts.text_of(strength) if isinstance(strength, ByPart) else ""
        used.append(UsedAdapter(str(loaded.path), loaded.sha256, float(whole), loaded.data_sha256, *said, parts))
    return tuple(used)


def _divided(cell: Cell) -> tuple[UsedRegion, ...]:
    """What a recipe says of the regions of a picture."""
    order, found = list(cell.strengths or {}), []
    for part in () if cell.division is None else cell.division.parts:
        said = {}
        for name, amount in part.strengths.items():
            whole, parts = (amount.strength, amount) if isinstance(amount, ByPart) else (amount, None)
            said[str(order.index(name))] = ",".join(filter(None, (repr(float(whole)), amounts.text_of(parts))))
        prompt = cell.prompt if part.prompt is None else part.prompt
        found.append(UsedRegion(part.area.text(), prompt, json.dumps(said)))
    return tuple(found)


def _plugins(adapters: Adapters, names: Iterable[str]) -> tuple[str, ...]:
    """The modules that the methods of adapters come from."""
    told = [one.get("plugin") for name in names for several in adapters[name].spec.methods.values() for one in several]
    return tuple(dict.fromkeys(str(module) for module in told if module))


def _refuse_missing(recipe: Recipe, path: Path) -> None:
    """Raise UserError where the plug-ins that a picture was made with were not loaded."""
    missing = [module for module in recipe.plugins if not plugins.imported(module)]
    if missing:
        flags = " ".join(f"--plugin {module}" for module in missing)
        raise UserError(f"{path} was made with {flags}: give that too")


def _again(config: GenerateConfig, recipe: Recipe, lent: bool) -> tuple[GenerateConfig, tuple[Choice, ...]]:
    """The configuration that makes a recipe's picture, and its adapters. Raises UserError for flags that it overrides."""
    changed = [f.name for f in fields(config) if f.name not in _FREE and getattr(config, f.name) != f.default]
    if changed:
        raise UserError(f"the recipe of {config.recipe} says {', '.join(changed)}; leave that away, or the recipe")
    _check_controls(config, recipe)
    given = _given(config, recipe)
    choices = tuple(_find(one, given) for one in recipe.adapters)
    told = {one.name for one in settings_of(GenerateConfig)} - _FREE
    # A recipe of an older version does not know all settings.
    same = {one.name: getattr(recipe, one.name) for one in fields(recipe) if one.name in told}
    same = {name: value for name, value in same.items() if value is not None}
    if config.precision == "auto" and recipe.dtype in get_args(Precision):
        same["precision"] = recipe.dtype
    same["adapter"] = tuple(choice.text for choice in choices)
    for name in recipes.USED_FILES:
        same[name] = _picture(getattr(recipe, name), getattr(config, name), config.recipe, name.replace("_", "-"))
    base = config.base
    if base == GenerateConfig.base:
        base = recipe.base if lent else _trusted(recipe.base, config.recipe)
    try:
        return replace(config, recipe=None, prompts=(recipe.prompt,), base=base, **same), choices
    except UserError as error:
        raise UserError(f"{config.recipe} has a recipe that cannot be drawn here: {error}") from None


def _check_controls(config: GenerateConfig, recipe: Recipe) -> None:
    """Raise UserError where what is given with --control is not what steered the picture of a recipe.

    A picture does not choose which models are loaded from this machine, so they are named again.
    """
    told = [(one.kind, one.sha256, one.picture_sha256, one.scale) for one in recipe.controls]
    given = used_controls(config.controls(), config.control_scale)
    if told != [(one.kind, one.sha256, one.picture_sha256, one.scale) for one in given]:
        flags = [f"--control {shlex.quote(f'{o.kind}:{o.model}={o.picture}@{o.scale:g}')}" for o in recipe.controls]
        raise UserError(
            f"{config.recipe} was drawn with {' '.join(flags) or 'no --control'}; give exactly that, with the same files"
        )


def _trusted(base: str, picture: Path | None) -> str:
    """The base that a recipe names, where it is embedded or a cached one of the hub. Raises UserError for another.

    A picture comes from anywhere, and what it names is a person's own choice only if the person says so.
    """
    if base == ICONS:
        return base
    if is_hub_id(base) and not Path(base).exists():
        if is_cached(base):
            return base
        raise UserError(
            f"{picture} was made with the base {base!r} of the hub, which is not here; fetch it with --base {base}"
        )
    raise UserError(
        f"{picture} names the base {base!r}, and a picture does not choose what is loaded from this machine; say that it is"
        f" the right one with --base {shlex.quote(base)}"
    )


def _picture(used: UsedPicture | None, given: Path | None, recipe: Path | None, flag: str) -> Path | None:
    """The file with the bytes that a recipe's picture was made from: the one given, or where it was. Raises UserError."""
    if used is None:
        if given is not None:
            raise UserError(f"the recipe of {recipe} has no --{flag}; leave that away, or the recipe")
        return None
    candidates = [path for path in (given, Path(used.path)) if path is not None and path.is_file()]
    found = next((path for path in candidates if sha256(path) == used.sha256), None)
    if found is None:
        raise UserError(
            f"the file {used.path} of the recipe (SHA-256 {used.sha256[:12]}...) is not there any more, or is another"
            f" now; say where it is with --{flag}"
        )
    return found


def _given(config: GenerateConfig, recipe: Recipe) -> dict[str, Plan]:
    """The adapter files that are named beside a recipe, to say where its own are now, by SHA-256. Raises UserError for
    others, and for strengths that are not the recipe's."""
    files: dict[str, Plan] = {}
    for text, choice in zip(config.adapter, config.choices(), strict=False):
        found = choice.parsed()
        strengths = [(used.strength, used.parts) for used in recipe.adapters if used.sha256 == found.sha256]
        if not strengths:
            raise UserError(f"the recipe of {config.recipe} has no adapter {choice.path}; leave that away, or the recipe")
        if Path(text) != choice.path and (choice.strength, amounts.text_of(choice.parts)) not in strengths:
            (strength, parts), asked = strengths[0], amounts.text_of(choice.parts)
            raise UserError(
                f"the recipe of {config.recipe} has {choice.path} at strength {strength:g}{parts and ','}{parts}, not"
                f" {choice.strength:g}{asked and ','}{asked}; leave the strength away, or the recipe"
            )
        files.setdefault(found.sha256, found)
    return files


def _find(used: UsedAdapter, files: Mapping[str, Plan]) -> Choice:
    """The file that holds the bytes of an adapter of a recipe, among those given and where it was. Raises UserError."""
    found = files.get(used.sha256) or _there(used)
    if found is None or found.sha256 != used.sha256:
        raise UserError(
            f"the adapter {used.path} of the recipe (SHA-256 {used.sha256[:12]}...) is not there any more, or is another"
            " now; say where it is with --adapter"
        )
    component, word = used.component or None, used.word or None
    if (found.component, found.word) != (component, word):
        found = plan(found.path, component=component, word=word)
    return Choice(found.path, used.strength, found, component, word, used.by_part)


def _there(used: UsedAdapter) -> Plan | None:
    """What the file holds where it was; None where there is no adapter any more."""
    try:
        return plan(Path(used.path), component=used.component or None, word=used.word or None)
    except UserError:
        return None


def _plan(config: GenerateConfig, wanted: Sequence[tuple[str, int]]) -> list[Path]:
    """A file for each picture. Only a single picture for a named file replaces one."""
    output, suffix = config.output, ending(config.format)
    if config.to_file:
        suffix = output.suffix
        if len(wanted) == 1:
            return [output]
        stems = [f"{output.stem}-{number}" for number in range(1, len(wanted) + 1)]
        folder = output.parent
    else:
        stems = [f"{_slug(prompt)}-{seed}" for prompt, seed in wanted]
        folder = output
    paths: list[Path] = []
    taken = {path.name.casefold() for path in folder.iterdir()} if folder.is_dir() else set()
    for stem in stems:
        name, number = f"{stem}{suffix}", 2
        while name.casefold() in taken:
            name, number = f"{stem}-{number}{suffix}", number + 1
        taken.add(name.casefold())
        paths.append(folder / name)
    return paths


def _check_kept(config: GenerateConfig, paths: Sequence[Path], recipe: Path | None) -> None:
    """Raise UserError where a file would be written over another of this run, or over what it is made from."""
    if config.sheet is not None and any(_same(config.sheet, path) for path in paths):
        raise UserError(f"the sheet {config.sheet} would replace a picture of the same name; give --sheet another name")
    for flag, source in (("image", config.image), ("mask", config.mask), ("recipe", recipe)):
        for target in (*paths, *([] if config.sheet is None else [config.sheet])):
            if source is not None and _same(source, target):
                raise UserError(f"{target} is the picture of --{flag}, and would be replaced; give the output another name")


def _same(one: Path, other: Path) -> bool:
    """Whether two names are of one file, which need not exist yet."""
    return one.samefile(other) if one.exists() and other.exists() else one.resolve() == other.resolve()


def _slug(prompt: str) -> str:
    """A prompt as part of a file's name."""
    return re.sub(r"[\W_]+", "-", prompt.casefold())[:_SLUG].strip("-") or "picture"


def _write_sheet(path: Path, pictures: Sequence[Picture], asked: Order, quality: int | None) -> None:
    """Rows of prompts, columns of seeds."""
    remaining = iter(pictures)
    rows = [[next(remaining) for _ in row] for row in asked.rows]
    seeds = {tuple(one.seed for one in row) for row in asked.rows}
    columns = max(len(row) for row in rows)
    labels = [f"seed {seed}" for seed in next(iter(seeds))] if len(seeds) == 1 else [str(n + 1) for n in range(columns)]
    drawn = sheet.grid([[p.image for p in row] for row in rows], [row[0].written for row in asked.rows], labels)
    recipes.write_sheet(path, drawn, [[picture.recipe for picture in row] for row in rows], quality)


def _versions() -> dict[str, str]:
    return {"peft_diffusion": __version__, **{name: _version(name) for name in ("torch", "diffusers", "transformers")}}


@cache
def _version(package: str) -> str:
    """What is installed, which is looked up among all packages: once, as what was imported stays."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
