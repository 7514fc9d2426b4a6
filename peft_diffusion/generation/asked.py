"""Pictures as they were asked for: each prompt with what it leaves open, which adapters it names, and what its line says."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain, groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

from ..bases import components
from ..bases import family as families
from ..bases.base import Base
from ..core.errors import UserError
from ..core.shortening import brief
from ..core.strength_schedule import ByPart
from ..data.prompt_lines import PromptLine, parse_line, read_prompts
from ..data.wildcards import Wildcards
from . import amounts
from .calibration import times
from .recipe import UsedRegion
from .regions import Area, Division, DrawnRegion, parse_area
from .retrieval import Retrieval
from .sampler import Cell
from .settings import BlendConfig, Choice, GenerateConfig, Key, Sampling, is_there, parse_choice, with_plans
from .tags import Shelf, Tag, take

S = TypeVar("S", bound=Sampling)
# Settings that each picture has for itself.
_OF_A_PICTURE: Mapping[str, Any] = {"prompts": ("",), "negative": "", "seed": 0, "seeds": (), "count": 1}


class Read(NamedTuple):
    """A prompt that was read.

    Attributes:
        prompt: What is drawn: words, and what weighs them.
        tags: The adapters that it names.
    """

    prompt: str
    tags: tuple[Tag, ...]


def read_prompt(written: str, seed: int, wildcards: Wildcards) -> Read:
    """Draw what a prompt leaves open, and take the adapters out that it names.

    Args:
        written: The prompt.
        seed: That of the picture.
        wildcards: The lists.

    Returns:
        The prompt as it is drawn.

    Raises:
        UserError: A list or a strength cannot be read.
    """
    return Read(*take(wildcards.draw(written, seed)))


@dataclass(frozen=True)
class Asked:
    """A picture that was asked for.

    Attributes:
        prompt: What is drawn.
        negative: What it should not show.
        seed: That of its noise.
        tags: The adapters that its prompt names.
        written: The prompt as it was written.
        config: How it is drawn.
        regions: What its regions show; None for one that shows what the whole picture does.
    """

    prompt: str
    negative: str
    seed: int
    tags: tuple[Tag, ...]
    written: str
    config: GenerateConfig
    regions: tuple[Read | None, ...] = ()

    @property
    def texts(self) -> list[str]:
        """All that is read for it: its prompt, the negative one, and those of its regions."""
        return [self.prompt, self.negative, *(read.prompt for read in self.regions if read is not None)]

    @property
    def all_tags(self) -> list[Tag]:
        """The adapters that its prompt, and those of its regions name."""
        return [*self.tags, *(tag for read in self.regions if read is not None for tag in read.tags)]


@dataclass(frozen=True)
class Order:
    """All pictures of a call.

    Attributes:
        rows: By prompt, a picture for each seed.
        choices: The adapters: those given, then those that only regions and prompts name.
        shelf: Where prompts find adapters.
        in_regions: The adapters that each region names, with their strengths there.
        areas: Where each region is.
        divided: The regions of a recipe, in place of those.
    """

    rows: tuple[tuple[Asked, ...], ...]
    choices: tuple[Choice, ...]
    shelf: Shelf
    in_regions: tuple[tuple[Choice, ...], ...] = ()
    areas: tuple[Area, ...] = ()
    divided: tuple[UsedRegion, ...] = ()

    @property
    def pictures(self) -> list[Asked]:
        """Row by row."""
        return [one for row in self.rows for one in row]

    @property
    def groups(self) -> list[list[Asked]]:
        """Pictures that are drawn in the same way, in order."""
        return [list(group) for _, group in groupby(self.pictures, key=lambda one: manner(one.config))]

    @property
    def prompts(self) -> list[list[str]]:
        """For each adapter the prompts that are drawn with it."""
        return [
            list(dict.fromkeys(text for one in self.pictures for text in self._called(choice, one)))
            for choice in self.choices
        ]

    def _called(self, choice: Choice, one: Asked) -> list[str]:
        """The prompts of a picture and its regions that an adapter acts on."""
        found = [one.prompt] if self._in(choice, one) else []
        for said, read in zip(self.in_regions, one.regions, strict=True):
            tags = () if read is None else read.tags
            if any(choice.key == other.key for other in (*said, *(self.shelf.find(tag.name) for tag in tags))):
                found.append(one.prompt if read is None else read.prompt)
        return found

    def _in(self, choice: Choice, one: Asked) -> bool:
        given = choice in self.shelf.given and choice.strength != 0
        return given or any(self.shelf.find(tag.name).path == choice.path for tag in one.tags)

    def parts(self, one: Asked, names: Sequence[str], base: Base) -> list[tuple[str | None, dict[str, float | ByPart]]]:
        """Tell what the regions of a picture show, and with how much of which adapters.

        Args:
            one: The picture.
            names: What the adapters are called on the base, in the order of `choices`.
            base: The base.

        Returns:
            For each region its prompt, None for that of the whole picture, and the strengths that it says itself.
        """
        found = []
        for said, read in zip(self.in_regions, one.regions, strict=True):
            amounts: dict[str, float | ByPart] = {}
            for choice in said:
                amounts[names[[one.key for one in self.choices].index(choice.key)]] = choice.amount
            for key, tag in _by_file(() if read is None else read.tags, self.shelf).items():
                place = [choice.key for choice in self.choices].index(key)
                amounts[names[place]] = _amount(self.choices[place], tag, base)
            found.append((None if read is None else read.prompt, amounts))
        return found

    def strengths(self, one: Asked, names: Sequence[str], base: Base) -> dict[str, float | ByPart]:
        """Tell how much of each adapter a picture is drawn with.

        Args:
            one: The picture.
            names: What the adapters are called on the base, in the order of `choices`.
            base: The base.

        Returns:
            By name: what the prompt says; else what was given, and 0 of those that other prompts name.
        """
        return strengths(self.choices, names, one.tags, self.shelf, base)

    def cell(
        self,
        one: Asked,
        names: Sequence[str],
        base: Base,
        factors: Mapping[str, float] = MappingProxyType({}),
    ) -> Cell:
        """Say a picture as the sampler takes it.

        Args:
            one: The picture.
            names: What the adapters are called on the base, in the order of `choices`.
            base: The base.
            factors: What the strengths of adapters are multiplied by.

        Returns:
            The picture, with its regions.

        Raises:
            UserError: A region of a recipe cannot be read.
        """

        def scaled(amounts: Mapping[str, float | ByPart]) -> dict[str, float | ByPart]:
            return {name: times(amount, factors.get(name, 1.0)) for name, amount in amounts.items()}

        parts = [
            DrawnRegion(area, prompt, scaled(own))
            for area, (prompt, own) in zip(self.areas, self.parts(one, names, base), strict=True)
        ]
        for said in self.divided:
            own = {names[number]: amount for number, amount in said.amounts().items() if number < len(names)}
            parts.append(DrawnRegion(parse_area(said.area), said.prompt, own))
        how = one.config
        whole = scaled(self.strengths(one, names, base))
        division = Division(tuple(parts), how.region_feather, how.region_isolation) if parts else None
        return Cell(one.prompt, one.seed, whole, one.negative, division)


def manner(sampling: S) -> S:
    """Tell how a picture is drawn, without what each has for itself.

    Args:
        sampling: How it is drawn.

    Returns:
        The same for all pictures that are drawn alike.
    """
    known = {one.name for one in fields(sampling)}
    return replace(sampling, **{name: value for name, value in _OF_A_PICTURE.items() if name in known})


def strengths(
    choices: Sequence[Choice], names: Sequence[str], tags: Sequence[Tag], shelf: Shelf, base: Base
) -> dict[str, float | ByPart]:
    """Tell how much of each adapter a prompt is drawn with.

    Args:
        choices: The adapters.
        names: What they are called on the base, in that order.
        tags: Those that the prompt names.
        shelf: Where they are found.
        base: The base.

    Returns:
        By name: what the prompt says; else what was given, and 0 of those that other prompts name.
    """
    said = _by_file(tags, shelf)
    found: dict[str, float | ByPart] = {}
    for name, choice in zip(names, choices, strict=True):
        given = choice.amount if choice in shelf.given else 0.0
        found[name] = _amount(choice, said[choice.key], base) if choice.key in said else given
    return found


def _by_file(tags: Sequence[Tag], shelf: Shelf) -> dict[Key, Tag]:
    """What is said of each file; of one that is named by several names, the sum, as where it is named twice by one."""
    found: dict[Key, Tag] = {}
    for tag in tags:
        key = shelf.find(tag.name).key
        before = found.get(key, Tag(tag.name, 0.0, 0.0))
        found[key] = Tag(before.name, before.te + tag.te, before.denoiser + tag.denoiser)
    return found


def _amount(choice: Choice, tag: Tag, base: Base) -> float | ByPart:
    """The strength that a prompt says, in the parts and over the steps that were said where the adapter was given."""
    if tag.te == tag.denoiser:
        return replace(choice, strength=tag.te).amount
    parts = choice.parts or ByPart()
    told = {name: tag.te if families.role_of(name) == "text encoder" else tag.denoiser for name in components(base)}
    return replace(parts, components={name: value * parts.components.get(name, 1.0) for name, value in told.items()})


def order(
    config: GenerateConfig,
    choices: Sequence[Choice],
    *,
    literal: bool,
    retrieval: Retrieval | None = None,
    areas: tuple[Area, ...] | None = None,
) -> Order:
    """Read all prompts.

    Args:
        config: What was asked for.
        choices: The adapters that were given.
        literal: Whether the prompts are those of a recipe, which leave nothing open.
        retrieval: Chooses further adapters for each prompt; None where none are chosen.
        areas: Where the regions are; None where that is read from the settings.

    Returns:
        What is drawn.

    Raises:
        UserError: A prompt, a list, an adapter or the picture of a region cannot be read.
    """
    shelf, wildcards = Shelf(tuple(choices), config.adapters_dir), Wildcards(config.wildcards_dir)
    in_regions = _of_regions(config, shelf)
    rows = []
    lines = (*config.prompts, *(read_prompts(config.prompts_file) if config.prompts_file is not None else ()))
    for line in lines:
        read = PromptLine(line, {}) if literal else parse_line(line)
        one = _of_line(config, read.prompt, read.told)
        rows.append([picture(one, read.prompt, seed, wildcards, literal=literal) for seed in one.all_seeds()])
    if retrieval is not None:
        rows, shelf = with_chosen(rows, retrieval, shelf, in_regions)
    areas = tuple(map(Area.of, config.region)) if areas is None else areas
    return gathered(rows, shelf, in_regions=in_regions, areas=areas)


def order_of_sheet(
    config: BlendConfig, choices: Sequence[Choice], retrieval: Retrieval | None = None
) -> tuple[Order, tuple[Choice, ...]]:
    """Read the prompts of a sheet, all of one seed, on which all have the same adapters.

    Args:
        config: What was asked for.
        choices: The adapters that were given.
        retrieval: Chooses further adapters, for all prompts together; None where none are chosen.

    Returns:
        What is drawn, a row for each prompt; and the adapters of the sheet, which stand first among all.

    Raises:
        UserError: A prompt, a list, an adapter or the picture of a region cannot be read, or a prompt names an adapter that
            was given.
    """
    how = config.of_generate()
    shelf, wildcards = Shelf(tuple(choices), how.adapters_dir), Wildcards(how.wildcards_dir)
    in_regions = _of_regions(how, shelf)
    row = [picture(replace(how, prompts=(prompt,)), prompt, how.seed, wildcards) for prompt in config.prompts]
    for tag in (tag for one in row for tag in one.tags):
        if shelf.find(tag.name) in choices:
            raise UserError(f"<lora:{tag.name}> in the prompt is one of the adapters that are blended; leave it away")
    chosen: tuple[Choice, ...] = ()
    if retrieval is not None and config.auto is not None:
        used = list(dict.fromkeys(path for one in row for path in _used(one, shelf, in_regions)))
        made = retrieval.choose_together([one.prompt for one in row], config.auto, used)
        row = [replace(one, prompt=found.prompt) for one, found in zip(row, made, strict=True)]
        chosen = with_plans(made[0].choices)
    areas = tuple(map(Area.of, how.region))
    return gathered([[one] for one in row], shelf, blended=chosen, in_regions=in_regions, areas=areas), (*choices, *chosen)


def with_chosen(
    rows: Sequence[Sequence[Asked]],
    retrieval: Retrieval,
    shelf: Shelf,
    in_regions: Sequence[Sequence[Choice]] = (),
) -> tuple[list[list[Asked]], Shelf]:
    """Choose adapters of a library for the prompts of pictures, beside those that these and their regions name.

    Args:
        rows: The pictures; for those whose settings say no number none are chosen.
        retrieval: What chooses.
        shelf: Where prompts find adapters.
        in_regions: The adapters that each region names.

    Returns:
        The pictures with what was chosen, and a shelf that has it.

    Raises:
        UserError: The library cannot be read.
    """
    chosen: dict[Path, Choice] = {}

    def one_with(asked: Asked) -> Asked:
        if asked.config.auto is None:
            return asked
        found = retrieval.choose(asked.prompt, asked.config.auto, _used(asked, shelf, in_regions))
        chosen.update({one.path: replace(one, strength=1.0) for one in found.choices})
        tags = [Tag(str(one.path), one.strength, one.strength) for one in found.choices]
        how = replace(asked.config, auto=None)
        return replace(asked, prompt=found.prompt, tags=(*asked.tags, *tags), config=how)

    made = [[one_with(asked) for asked in row] for row in rows]
    return made, shelf.holding(chosen=chosen.values())


def _used(asked: Asked, shelf: Shelf, in_regions: Sequence[Sequence[Choice]]) -> list[Path]:
    """The files of adapters that a picture and its regions name."""
    named = [shelf.find(tag.name) for tag in asked.all_tags]
    return [one.path for one in chain(named, *in_regions)]


def gathered(
    rows: Sequence[Sequence[Asked]],
    shelf: Shelf,
    *,
    blended: Sequence[Choice] = (),
    in_regions: tuple[tuple[Choice, ...], ...] = (),
    areas: tuple[Area, ...] = (),
    parsed: Callable[[Sequence[Choice]], tuple[Choice, ...]] = with_plans,
) -> Order:
    """Find all adapters of pictures whose prompts were read.

    Args:
        rows: The pictures.
        shelf: Where prompts find adapters.
        blended: Adapters that all pictures have beside those that are given.
        in_regions: The adapters that each region names, with their strengths there.
        areas: Where each region is.
        parsed: Parses the files of adapters.

    Returns:
        What is drawn.

    Raises:
        UserError: An adapter cannot be read.
    """
    every = (*shelf.given, *blended)
    of_regions = {one.key: replace(one, strength=1.0, parts=None) for said in in_regions for one in said}
    only_there = [one for key, one in of_regions.items() if key not in {choice.key for choice in every}]
    tags = [tag for row in rows for one in row for tag in one.all_tags]
    named = [one for one in shelf.all_of(tags) if one.key not in of_regions]
    made = tuple(tuple(row) for row in rows)
    return Order(made, (*every, *parsed([*only_there, *named])), shelf, in_regions or ((),) * len(areas), areas)


def _of_regions(config: GenerateConfig, shelf: Shelf) -> tuple[tuple[Choice, ...], ...]:
    """The adapters of each region. Raises UserError for one that a region names twice: which strength is meant?"""
    known, found = list(shelf.given), list[tuple[Choice, ...]]()
    for number, region in enumerate(config.region, 1):
        own: dict[Key, Choice] = {}
        for text in region.adapter:
            one = _alike(_in_region(text, shelf), known)
            if one.key in own:
                raise UserError(f"region {number} names the adapter {one.path} twice; give it once, with its strength")
            own[one.key] = one
            known.append(one)
        found.append(tuple(own.values()))
    return tuple(found)


def _alike(choice: Choice, known: Sequence[Choice]) -> Choice:
    """The choice by the path by which the same file is known already: by another it would be loaded, and act, twice."""
    return replace(choice, path=next((one.path for one in known if choice.is_same(one)), choice.path))


def _in_region(text: str, shelf: Shelf) -> Choice:
    """An adapter of a region: a file, or the name of one given or of the folder. Raises UserError."""
    ends = [len(text), *(match.start() for match in reversed(list(re.finditer("=", text))))]  # names have = in them too
    name = next((text[:end] for end in ends if shelf.is_given(text[:end])), None)
    if name is None and shelf.folder is not None and not any(is_there(text[:end]) for end in ends):
        name = next((text[:end] for end in ends if shelf.holds(text[:end])), text.rpartition("=")[0] or text)
    if name is None:
        return parse_choice(text)
    found, told = shelf.find(name, f"adapter={brief(name)} of a region"), text[len(name) + 1 :]
    strength, parts = amounts.parse(told, name) if told else (1.0, None)
    return replace(found, strength=strength, parts=parts)


def _of_line(config: GenerateConfig, prompt: str, told: Mapping[str, Any]) -> GenerateConfig:
    """What a line says in place of what is said for all. Raises UserError for what no picture can have."""
    changes = {name: value for name, value in told.items() if name != "seed"}
    changes |= {"seed": told["seed"], "seeds": ()} if "seed" in told else {}
    if not prompt and told:
        raise UserError("a line of prompts has no words before its first --")
    try:
        return replace(config, prompts=(prompt,), prompts_file=None, **changes)
    except UserError as error:
        raise UserError(f'the prompt "{brief(prompt)}" cannot be drawn: {error}') from None


def picture(config: GenerateConfig, prompt: str, seed: int, wildcards: Wildcards, *, literal: bool = False) -> Asked:
    """Read a prompt, and those of the regions.

    Args:
        config: How the picture is drawn.
        prompt: The prompt as it was written.
        seed: That of its noise.
        wildcards: The lists.
        literal: Whether the prompts are those of a recipe, which leave nothing open.

    Returns:
        The picture. Its settings have neither the negative prompt nor the regions, which it has of its own.

    Raises:
        UserError: A list or a strength cannot be read.
    """
    own = replace(config, negative="", region=())
    if literal:
        return Asked(prompt, config.negative, seed, (), prompt, own)
    read = read_prompt(prompt, seed, wildcards)
    regions = tuple(None if one.prompt is None else read_prompt(one.prompt, seed, wildcards) for one in config.region)
    return Asked(read.prompt, wildcards.draw(config.negative, seed), seed, read.tags, prompt, own, regions)
