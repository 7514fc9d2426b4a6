"""Pictures as they were asked for: each prompt with what it leaves open, which adapters it names, and what its line says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby
from typing import Any, NamedTuple, TypeVar

from ..bases import components
from ..bases import family as families
from ..bases.base import Base
from ..core.errors import UserError
from ..core.shortening import brief
from ..core.strength_schedule import ByPart
from ..data.prompt_lines import PromptLine, parse_line, read_prompts
from ..data.wildcards import Wildcards
from .settings import Choice, GenerateConfig, Key, Sampling, with_plans
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
    """

    prompt: str
    negative: str
    seed: int
    tags: tuple[Tag, ...]
    written: str
    config: GenerateConfig


@dataclass(frozen=True)
class Order:
    """All pictures of a call.

    Attributes:
        rows: By prompt, a picture for each seed.
        choices: The adapters: those given, then those that only prompts name.
        shelf: Where prompts find adapters.
    """

    rows: tuple[tuple[Asked, ...], ...]
    choices: tuple[Choice, ...]
    shelf: Shelf

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
        return [list(dict.fromkeys(one.prompt for one in self.pictures if self._in(choice, one))) for choice in self.choices]

    def _in(self, choice: Choice, one: Asked) -> bool:
        return choice in self.shelf.given or any(self.shelf.find(tag.name).path == choice.path for tag in one.tags)

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


def order(config: GenerateConfig, choices: Sequence[Choice], *, literal: bool) -> Order:
    """Read all prompts.

    Args:
        config: What was asked for.
        choices: The adapters that were given.
        literal: Whether the prompts are those of a recipe, which leave nothing open.

    Returns:
        What is drawn.

    Raises:
        UserError: A prompt, a list or an adapter cannot be read.
    """
    shelf, wildcards = Shelf(tuple(choices), config.adapters_dir), Wildcards(config.wildcards_dir)
    rows = []
    lines = (*config.prompts, *(read_prompts(config.prompts_file) if config.prompts_file is not None else ()))
    for line in lines:
        read = PromptLine(line, {}) if literal else parse_line(line)
        one = _of_line(config, read.prompt, read.told)
        rows.append(tuple(_picture(one, read.prompt, seed, wildcards, literal) for seed in one.all_seeds()))
    named = shelf.all_of(tag for row in rows for one in row for tag in one.tags)
    return Order(tuple(rows), (*choices, *with_plans(named)), shelf)


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


def _picture(config: GenerateConfig, prompt: str, seed: int, wildcards: Wildcards, literal: bool) -> Asked:
    if literal:
        return Asked(prompt, config.negative, seed, (), prompt, config)
    read = read_prompt(prompt, seed, wildcards)
    return Asked(read.prompt, wildcards.draw(config.negative, seed), seed, read.tags, prompt, replace(config, negative=""))


def read_all(config: Sampling, choices: Sequence[Choice], seed: int) -> tuple[list[Read], tuple[Choice, ...], Shelf]:
    """Read the prompts of a sheet, all of one seed.

    Args:
        config: What was asked for.
        choices: The adapters that were given.
        seed: The seed.

    Returns:
        The prompts, the adapters that they name beside those given, and where they were found.

    Raises:
        UserError: A prompt, a list or an adapter cannot be read, or a prompt names one that was given.
    """
    shelf, wildcards = Shelf(tuple(choices), config.adapters_dir), Wildcards(config.wildcards_dir)
    read = [read_prompt(prompt, seed, wildcards) for prompt in config.prompts]
    for tag in (tag for one in read for tag in one.tags):
        if shelf.find(tag.name) in choices:
            raise UserError(f"<lora:{tag.name}> in the prompt is one of the adapters that are blended; leave it away")
    return read, with_plans(shelf.all_of(tag for one in read for tag in one.tags)), shelf
