"""Requests of several people in one batch: each with its own prompt, adapters, strengths and seed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from PIL import Image

from ..bases import denoiser_of
from ..bases.base import text_encoders
from ..bases.prompt_syntax import is_plain
from ..bases.taught import teacher_of
from ..core.errors import UserError
from ..core.events import Noted, Observer, Observers, Stop
from ..core.strength_schedule import ByPart, Schedule
from ..data.prompts import in_words
from . import amounts
from .asked import manner
from .region_settings import FEATHER, Region, says_of_edges
from .regions import Area, Division, DrawnRegion, columns
from .sampler import Cell, paint, set_strengths
from .settings import Sampling
from .telling import Telling, triggers

if TYPE_CHECKING:
    from .adapters import Adapters

S = TypeVar("S", bound=Sampling)


@dataclass(frozen=True)
class Request:
    """A picture that is wanted, among others that may be drawn with it: see `Adapters.batch`.

    Attributes:
        prompt: What it shows.
        adapters: How much of which adapters, by the names that they are loaded under: a number, a `ByPart` for strengths
            that differ between components, blocks and steps, or a `Schedule`. Those not named have no part in it.
        seed: That of its noise.
        negative: What it should not show; None is what ``sampling`` says.
        sampling: How it is drawn, as ``pd.GenerateConfig(steps=20)``; its prompts, adapters and batch size are not read.
        regions: Parts of the picture with prompts and adapters of their own, which name these as ``adapters`` does:
            ``pd.Region(box=(0, 0, 0.5, 1), prompt="a cat", adapter="ink=0.8")``.
        region_feather: How wide their edges are, as a share of the shorter side.
        region_isolation: The share of the noise levels, from the noisiest, at which they do not attend to each other; None
            for 0.3 where regions have adapters of their own, and 0 where they have not.

    Raises:
        UserError: It says something of the edges of regions and has none.
    """

    prompt: str
    adapters: Mapping[str, float | ByPart | Schedule] = field(default_factory=dict)
    seed: int = 0
    negative: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    regions: Sequence[Region] = ()
    region_feather: float = FEATHER
    region_isolation: float | None = None

    def __post_init__(self) -> None:
        if not self.regions and says_of_edges(self.region_feather, self.region_isolation):
            raise UserError("region_feather and region_isolation are of regions; give regions too")

    def cell(self) -> Cell:
        """Give the picture as the sampler takes it."""
        strengths = {name: ByPart(steps=one) if isinstance(one, Schedule) else one for name, one in self.adapters.items()}
        negative = self.sampling.negative if self.negative is None else self.negative
        parts = tuple(DrawnRegion(Area.of(one), one.prompt, _all_named(one.adapter)) for one in self.regions)
        division = Division(parts, self.region_feather, self.region_isolation) if parts else None
        return Cell(self.prompt, self.seed, strengths, negative, division)


def _all_named(texts: Sequence[str]) -> dict[str, float | ByPart]:
    """The adapters of a region by their names. Raises UserError for one that is named twice."""
    found: dict[str, float | ByPart] = {}
    for name, amount in map(_named, texts):
        if name in found:
            raise UserError(f"a region names the adapter {name!r} twice; give it once, with the strength you want")
        found[name] = amount
    return found


def _named(text: str) -> tuple[str, float | ByPart]:
    """An adapter by its name, and how much of it. Raises UserError."""
    name, equals, told = text.partition("=")
    strength, parts = amounts.parse(told, name) if equals else (1.0, None)
    return name, strength if parts is None else parts.scaled(strength)


@dataclass(frozen=True)
class Group(Generic[S]):
    """Pictures that can share batches.

    Attributes:
        numbers: Which of all pictures they are.
        sampling: How they are drawn.
    """

    numbers: tuple[int, ...]
    sampling: S


def grouped(adapters: "Adapters", cells: Sequence[Cell], samplings: Sequence[S], tell: Observer) -> list[Group[S]]:
    """Sort pictures by what must be equal within a batch: size, steps, scheduler, guidance and all else that is set for the
    whole of a call; whether drawing begins with pure noise; and how long prompts are, as shorter ones would be filled up.

    Args:
        adapters: Those on the base.
        cells: The pictures, each with its own negative prompt.
        samplings: How each is drawn.
        tell: Is told where there is more than one group, and in what they differ.

    Returns:
        The groups, in the order of their first pictures.
    """
    alike: dict[tuple[Any, ...], list[int]] = {}
    for number, (cell, sampling) in enumerate(zip(cells, samplings, strict=True)):
        used = [adapters[name].spec for name, amount in cell.amounts.items() if amount != 0]
        of_noise = any(spec.training.get("zero_terminal_snr") for spec in used)
        letters = frozenset(one for one in triggers(adapters, [cell]) if not is_plain(one, sampling.prompt_weights))
        alike.setdefault((replace(manner(sampling), batch_size=1, adapter=()), of_noise, letters), []).append(number)
    keyed: dict[tuple[Any, ...], list[int]] = {}
    for same, numbers in alike.items():
        for number, length in zip(numbers, _lengths(adapters, [cells[one] for one in numbers], same[0]), strict=True):
            keyed.setdefault((*same, length), []).append(number)
    if len(keyed) > 1:
        tell(Noted(f"{len(cells)} pictures are drawn in {len(keyed)} groups, as they differ in {_differences(list(keyed))}"))
    found = sorted(keyed.items(), key=lambda one: one[1][0])
    return [Group(tuple(numbers), samplings[numbers[0]]) for _, numbers in found]


def _lengths(adapters: "Adapters", cells: Sequence[Cell], sampling: Sampling) -> list[tuple[int, ...]]:
    """The chunks of each prompt and of its negative one, and of those of its regions."""
    pipe = adapters.pipe
    if any(teacher_of(getattr(pipe, name)) for name in text_encoders(pipe).values()):
        set_strengths(adapters, cells)  # on which it depends what soft prompts take
    text = Telling(pipe, sampling, triggers(adapters, cells)).text
    every = columns(cells)
    prompts, against = ([*map(str, one)] for one in zip(*((c.prompt, c.against(sampling)) for c in every), strict=True))
    counts = [text.chunks(in_words(texts, Observers())) for texts in (prompts, against)]
    pairs, each = list(zip(*counts, strict=True)), len(every) // len(cells)
    return [tuple(n for pair in pairs[start : start + each] for n in pair) for start in range(0, len(pairs), each)]


def _differences(keys: Sequence[tuple[Any, ...]]) -> str:
    """What groups differ in."""
    manners = [key[0] for key in keys]
    names = [one.name for one in fields(manners[0]) if len({getattr(manner, one.name) for manner in manners}) > 1]
    others = ("noise at the beginning", "words with brackets that call adapters", "length of prompts")
    more = [what for number, what in enumerate(others, 1) if len({key[number] for key in keys}) > 1]
    return ", ".join([*names, *more])


def as_drawn(adapters: "Adapters", request: Request) -> tuple[Cell, Sampling]:
    """Say a request as the sampler takes it.

    Args:
        adapters: Those on the base.
        request: The request.

    Returns:
        The picture, and how it is drawn.

    Raises:
        UserError: It is no request, names an adapter that is not there, or has a negative prompt without guidance.
    """
    if not isinstance(request, Request):
        raise UserError(
            f"a picture is asked for by a Request, not by {request!r:.80}; make one, as Request({request!r:.80})"
        )
    cell = request.cell()
    for name in cell.amounts:
        _ = adapters[name]
    return cell, replace(request.sampling, negative=cell.negative or "")  # which refuses the negative prompt


def drawn(adapters: "Adapters", requests: Sequence[Request], at_most: int, tell: Observer, stop: Stop) -> list[Image.Image]:
    """Draw what requests ask for; see `Adapters.batch`. Strengths are afterwards those of the last batch.

    Args:
        adapters: Those on the base.
        requests: The requests.
        at_most: Pictures computed at once.
        tell: Is told how far it is.
        stop: Where it is set, nothing is drawn after the present batch.

    Returns:
        A picture for each.

    Raises:
        UserError: A request names an adapter that is not there, or cannot be drawn.
        Interrupted: It was stopped.
    """
    denoiser_of(adapters.pipe)
    asked = [as_drawn(adapters, request) for request in requests]
    cells, samplings = [cell for cell, _ in asked], [sampling for _, sampling in asked]
    found: dict[int, Image.Image] = {}
    for group in grouped(adapters, cells, samplings, tell):
        sampling = replace(group.sampling, negative="", batch_size=at_most)
        images = paint(adapters, [cells[number] for number in group.numbers], sampling, tell=tell, stop=stop)
        found |= zip(group.numbers, images, strict=True)
    return [found[number] for number in range(len(requests))]
