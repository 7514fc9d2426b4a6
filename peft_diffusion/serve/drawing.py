"""From a request to pictures: what A1111's names mean here, and what is drawn for them."""

import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from .. import __version__
from ..bases import denoiser_of
from ..bases.base import BaseInfo, frozen
from ..bases.pipelines import Pipeline
from ..bases.schedulers import label, parted
from ..core.errors import Interrupted, UserError
from ..core.events import Event, Noted, Warned
from ..data.wildcards import Wildcards
from ..formats import Plan
from ..generation.asked import Asked, Order, gathered, picture, with_chosen
from ..generation.distilled import for_few_steps
from ..generation.generate import Part, Session, draw, draw_together
from ..generation.joining import Ticket
from ..generation.kept import Kept
from ..generation.memory import spare
from ..generation.recipe import Recipe, UsedPicture
from ..generation.region_settings import Region, says_of_edges
from ..generation.regions import Area
from ..generation.retrieval import Retrieval, wanted_by
from ..generation.sampler import size
from ..generation.settings import MAX_SEED, Choice, GenerateConfig, Key, with_plans
from ..generation.source import Source, begin
from ..generation.tags import Shelf
from ..library.events import Chosen
from ..library.library import Library
from . import inpainting, names, pictures
from .bodies import Drawing, ImageToImage, RegionBody, TextToImage
from .settings import ServeConfig
from .wording import PLACE, as_request
from .worker import Company, Job

_LONGEST = 10_000  # letters of a prompt
_SEEDS = 2**32  # that are drawn where none is given, as A1111 has them


@dataclass
class Held:
    """A base that is loaded.

    Attributes:
        source: As ``--base`` takes it.
        pipe: The pipeline.
        info: What is known of it.
        sha256: The digest of its file; "" where it is none.
        kept: The adapters that stay with it from one request to the next; None where none do.
    """

    source: str
    pipe: Pipeline
    info: BaseInfo
    sha256: str
    kept: Kept | None = None


class Words(NamedTuple):
    """A folder's learned words, by the names of their files in small letters."""

    by_name: Mapping[str, Choice]

    def in_prompts(self, *prompts: str) -> tuple[Choice, ...]:
        """Find those that prompts call.

        Args:
            prompts: All prompts.

        Returns:
            The files.
        """
        text = " ".join(prompts).casefold()
        return tuple(choice for name, choice in self.by_name.items() if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text))


@dataclass
class Files:
    """What prompts find: adapters, learned words, lists; read again where a folder has changed.

    Attributes:
        config: The settings of the server.
    """

    config: ServeConfig
    _library: Library | None = None
    _shelf: Shelf | None = None
    _plans: dict[Key, Plan] = field(default_factory=dict)

    def shelf(self, *, again: bool = False) -> Shelf:
        """The adapters.

        Args:
            again: Read what their files say of themselves anew.

        Returns:
            Where prompts find them.
        """
        fresh = Shelf((), self.config.adapters_dir)
        if self._shelf is None or again or fresh.files != self._shelf.files:
            self._shelf = fresh
        return self._shelf

    def library(self) -> Library:
        """The library that adapters are chosen from. Raises UserError where there is none."""
        if self._library is None:
            self._library = Library(self.config.library, make=False)
        return self._library

    def close(self) -> None:
        """Close the library, when nothing is drawn any more."""
        if self._library is not None:
            self._library.close()

    def words(self) -> Words:
        """The learned words."""
        if self.config.embeddings_dir is None:
            return Words({})
        files = Shelf((), self.config.embeddings_dir).files
        return Words({path.stem.casefold(): Choice(path, word=path.stem) for path in files})

    def planned(self, choices: Sequence[Choice]) -> tuple[Choice, ...]:
        """Parse the files of adapters, once for all requests.

        Args:
            choices: The adapters.

        Returns:
            The same, with what was parsed.
        """
        known = {key: plan for key, plan in self._plans.items() if key[0].is_file() and plan.is_current()}
        found = with_plans([replace(choice, plan=known.get(choice.key)) for choice in choices])
        self._plans = known | {choice.key: choice.plan for choice in found if choice.plan is not None}
        return found


class Drawn(NamedTuple):
    """A picture that was drawn for a request."""

    image: Image.Image
    recipe: Recipe


@dataclass
class Result:
    """What was drawn for a request.

    Attributes:
        drawn: The pictures.
        config: How they were drawn.
        clip_skip: Which layer of the text encoder was taken, counted from the last.
        notes: What the person should know.
        chosen: The adapters that were chosen, for each prompt.
        base: What is known of the base; itself it is not kept, as it may be let go before the answer is sent.
        sha256: The digest of the base's file; "" where it is none.
    """

    drawn: list[Drawn]
    config: GenerateConfig
    clip_skip: int
    notes: list[str]
    chosen: list[Chosen]
    base: BaseInfo
    sha256: str


@dataclass(frozen=True)
class Seeds:
    """The seeds of a request's pictures, as A1111 counts them: with a variation its seed counts, else the first one.

    Attributes:
        seed: The first.
        subseed: The first of variations.
        share: How much of the variations.
    """

    seed: int
    subseed: int
    share: float

    def of(self, number: int) -> tuple[int, int]:
        """The two seeds of a picture.

        Args:
            number: Which picture, from 0.

        Returns:
            That of its noise, and that of its variation.
        """
        return (self.seed if self.share else self.seed + number), self.subseed + number


def seeds_of(body: Drawing) -> Seeds:
    """Choose seeds, by chance where none are given.

    Args:
        body: The request.

    Returns:
        The seeds.
    """
    seed, subseed = (random.randrange(_SEEDS) if one in (None, -1) else one for one in (body.seed, body.subseed))
    return Seeds(seed or 0, subseed or 0, body.subseed_strength or 0.0)


def config_of(body: Drawing, serving: ServeConfig, held: Held, clip_skip: int | None) -> GenerateConfig:
    """Say in settings how a request is drawn.

    Args:
        body: The request.
        serving: The settings of the server, with its limits.
        held: The base.
        clip_skip: Which layer of the text encoder is taken, counted from the last; None for as the base says.

    Returns:
        The settings, without seeds.

    Raises:
        UserError: They cannot be, or are beyond the limits.
    """
    body.refuse_others()
    _check_limits(body, serving)
    prompt, negative, own = body.prompt or "", body.negative_prompt or "", body.own
    guided = body.cfg_scale is None or body.cfg_scale > 1
    config = replace(
        serving.drawing(held.source),
        prompts=(prompt,),
        negative=negative if guided else "",
        steps=body.steps,
        guidance=None if body.cfg_scale is None else max(body.cfg_scale, 1.0),
        scheduler=names.with_eta(names.scheduler(body.sampler_name or body.sampler_index, body.scheduler), body.eta),
        width=body.width or None,
        height=body.height or None,
        batch_size=1 if body.batch_size is None else body.batch_size,
        clip_skip=clip_skip,
        tile="both" if body.tiling else None,
        auto=own.auto,
        region=[_region(one, number) for number, one in enumerate(own.region)],
        regions=own.regions,
        region_feather=own.region_feather,
        region_isolation=own.region_isolation,
    )
    width, height = size(held.info, config)
    if isinstance(body, TextToImage) and body.enable_hr:
        config = _with_hires(config, body, width, height)
        if (body.hr_second_pass_steps or 0) > serving.max_steps:
            raise UserError(f"hr_second_pass_steps is at most {serving.max_steps} here, not {body.hr_second_pass_steps}")
        size(held.info, config)
        if config.second_pass is not None:
            width, height = config.second_pass.size(width, height, held.info.step)
    _check_pixels(width, height, serving)
    return config


def _check_limits(body: Drawing, serving: ServeConfig) -> None:
    """Raise UserError for more than the server does."""
    own, batch, rounds = body.own, *(1 if one is None else one for one in (body.batch_size, body.n_iter))
    if own.auto is not None and not serving.max_auto:
        raise UserError(
            f"{PLACE}.auto chooses adapters of a library, which this server does not: start serve with --max-auto 2"
        )
    if says_of_edges(own.region_feather, own.region_isolation) and not own.region and own.regions == "given":
        raise UserError(
            f"region_feather and region_isolation of {PLACE} are of regions; send region there, or regions as auto, too"
        )
    for name, value, most in (
        ("prompt", len(body.prompt or ""), _LONGEST),
        ("negative_prompt", len(body.negative_prompt or ""), _LONGEST),
        *((f"{_place(n)}.prompt", len(one.prompt or ""), _LONGEST) for n, one in enumerate(own.region)),
        (f"{PLACE}.auto", own.auto or 0, serving.max_auto),
        ("steps", body.steps or 0, serving.max_steps),
        ("batch_size", batch, serving.max_batch),
        ("batch_size times n_iter", batch * rounds, serving.max_pictures),
    ):
        if value > most:
            raise UserError(f"{name} is at most {most} here, not {value}")
    if rounds < 1:
        raise UserError(f"n_iter must be 1 or more, not {rounds}")


def _place(number: int) -> str:
    """Where a request has a region."""
    return f"{PLACE}.region[{number}]"


def _region(body: RegionBody, number: int) -> Region:
    """A region by the settings of ``generate``; its pictures are named by where the request has them. Raises UserError."""
    where = _place(number)
    mask, painted = (f"{where}.{name}" if getattr(body, name) else None for name in ("mask", "painted"))
    try:
        return Region(box=body.box or (), mask=mask, painted=painted, color=body.color, prompt=body.prompt)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def areas_of(body: Drawing, config: GenerateConfig, serving: ServeConfig) -> tuple[Area, ...]:
    """Read where the regions of a request are.

    Args:
        body: The request.
        config: How it is drawn.
        serving: The settings of the server, with its limits.

    Returns:
        Where each is.

    Raises:
        UserError: A picture cannot be read, or the regions are of a picture of which a part is drawn.
    """
    if config.region and isinstance(body, ImageToImage) and body.mask and body.inpaint_full_res is not False:
        raise UserError(
            f"{PLACE}.region is of the whole picture, and inpaint_full_res draws the part around the mask alone; send that"
            " as false, or leave the regions away"
        )
    sent = {
        f"{_place(number)}.{name}": getattr(one, name)
        for number, one in enumerate(body.own.region)
        for name in ("mask", "painted")
    }

    def read(path: Path, background: str) -> Image.Image:
        return pictures.read(sent[str(path)], str(path), serving.max_given_pixels, background).image

    return tuple(Area.of(one, read) for one in config.region)


def _check_pixels(width: int, height: int, serving: ServeConfig) -> None:
    if width * height > serving.max_pixels:
        raise UserError(f"{width}x{height} is over the limit of {serving.max_pixels:,} pixels here; take smaller sides")


def _with_hires(config: GenerateConfig, body: TextToImage, width: int, height: int) -> GenerateConfig:
    """With a second pass, as A1111's hires fix. Raises UserError for sides that are not in proportion."""
    factors = {(side or 0) / first for side, first in ((body.hr_resize_x, width), (body.hr_resize_y, height)) if side}
    if len(factors) > 1:
        raise UserError(f"hr_resize_x and hr_resize_y must be {width}x{height} times one factor; give one of them alone")
    return replace(
        config,
        hires=next(iter(factors), 2.0 if body.hr_scale is None else body.hr_scale),
        hires_upscaler=body.hr_upscaler or "Latent",
        hires_strength=body.denoising_strength,
        hires_steps=body.hr_second_pass_steps or None,
    )


def order_of(
    config: GenerateConfig,
    seeds: Seeds,
    numbers: Sequence[int],
    files: Files,
    retrieval: Retrieval | None = None,
    areas: tuple[Area, ...] = (),
) -> Order:
    """Read a request's prompt for some of its pictures.

    Args:
        config: How they are drawn.
        seeds: Of all.
        numbers: Which of them.
        files: What prompts find.
        retrieval: Chooses adapters for the prompt; None where none are chosen.
        areas: Where its regions are.

    Returns:
        What is drawn.

    Raises:
        UserError: A prompt, a list or an adapter cannot be read.
    """
    shelf, wildcards = files.shelf(), Wildcards(config.wildcards_dir)
    (written,) = config.prompts
    row: list[Asked] = []
    for number in numbers:
        seed, subseed = seeds.of(number)
        one = replace(config, seed=seed)
        if seeds.share:
            one = replace(one, variation_seed=subseed, variation_strength=seeds.share)
        row.append(picture(one, written, seed, wildcards))
    if retrieval is not None:
        (row,), shelf = with_chosen([row], retrieval, shelf)
    words = files.words().in_prompts(*(text for one in row for text in one.texts))
    chosen = {one.path.resolve() for one in shelf.chosen}
    given = files.planned([one for one in words if one.path.resolve() not in chosen])
    return gathered([row], shelf.holding(given=given), areas=areas, parsed=files.planned)


class Beginning(NamedTuple):
    """What pictures start from, and where what is drawn belongs.

    Attributes:
        given: The picture, brought to size.
        strength: How far it is left behind, above 0 and up to 1.
        ready: Puts what is drawn where it belongs.
    """

    given: Source
    strength: float
    ready: inpainting.Prepared

    def source(self, steps: int) -> Source:
        """Say how a round starts from it.

        Args:
            steps: The denoising steps of the round.

        Returns:
            The picture.

        Raises:
            UserError: The mask is black, or no step would be left.
        """
        return begin(self.given, self.strength, steps)


def source_of(body: ImageToImage, config: GenerateConfig, serving: ServeConfig, info: BaseInfo) -> Beginning:
    """Read what pictures of ``img2img`` start from, the same in every round.

    Args:
        body: The request.
        config: How they are drawn.
        serving: The settings of the server.
        info: The base.

    Returns:
        The picture, and where what is drawn from it belongs.

    Raises:
        UserError: They are no pictures, or cannot be drawn from.
    """
    if not body.init_images or len(body.init_images) != 1:
        raise UserError(f"img2img starts from one picture in init_images, and there are {len(body.init_images or ())}")
    if body.subseed_strength:
        raise UserError("subseed_strength mixes the noise of pictures that start from noise; leave it away in img2img")
    if body.denoising_strength is not None and not 0 < body.denoising_strength <= 1:
        raise UserError(f"denoising_strength must be above 0, at most 1, not {body.denoising_strength}")
    given = pictures.read(body.init_images[0], "init_images[0]", serving.max_given_pixels)
    masked = pictures.read(body.mask, "mask", serving.max_given_pixels, "black") if body.mask else None
    blur = next((one for one in (body.mask_blur, body.mask_blur_x, body.mask_blur_y) if one is not None), 4)
    # Where no size is asked for, its own, as near as the base can: `ready` brings it there.
    near = [max(info.step, round(side / info.step) * info.step) for side in given.image.size]
    sides = (config.width or near[0], config.height or near[1])
    size(info, replace(config, width=sides[0], height=sides[1]))
    _check_pixels(*sides, serving)
    ready = inpainting.prepared(
        given.image,
        None if masked is None else masked.image.convert("L"),
        sides,
        mode=body.resize_mode or inpainting.RESIZE,
        blur=min(max(blur, 0), max(given.image.size)),
        invert=bool(body.inpainting_mask_invert),
        fill=inpainting.FILL if body.inpainting_fill is None else body.inpainting_fill,
        only_masked=body.inpaint_full_res is not False,
        padding=min(max(body.inpaint_full_res_padding or 0, 0), max(given.image.size)),
    )
    # A recipe names a picture by its bytes where `generate --image` would start from the same.
    used = UsedPicture("init_images[0]", "" if ready.changed else given.sha256)
    used_mask = None if masked is None else UsedPicture("mask", "" if ready.changed else masked.sha256)
    strength = 0.75 if body.denoising_strength is None else body.denoising_strength
    return Beginning(Source(ready.image, used, ready.mask, used_mask, beneath=ready.beneath), strength, ready)


@dataclass
class _Read:
    """A request that was read: how it is drawn, and what the person should know."""

    config: GenerateConfig
    seeds: Seeds
    notes: list[str]
    areas: tuple[Area, ...]
    retrieval: Retrieval | None = None
    chosen: list[Chosen] = field(default_factory=list)

    def tell(self, event: Event) -> None:
        """Note what a person should know; an observer."""
        if isinstance(event, Chosen):
            self.chosen.append(event)
        if isinstance(event, (Warned, Noted)) and (note := as_request(event.message)) not in self.notes:
            self.notes.append(note)

    def result(self, drawn: list[Drawn], clip_skip: int | None, held: Held) -> Result:
        """What came of it."""
        return Result(drawn, self.config, clip_skip or 1, self.notes, self.chosen, held.info, held.sha256)

    def order(self, numbers: Sequence[int], files: Files) -> Order:
        """What is drawn for some of its pictures, by what their adapters need. Raises UserError as `order_of` does."""
        asked = order_of(self.config, self.seeds, numbers, files, self.retrieval, self.areas)
        taken = for_few_steps(self.config, asked.choices, self.tell)
        if taken is not self.config:
            self.config = taken
            asked = order_of(taken, self.seeds, numbers, files, self.retrieval, self.areas)
        return asked


def _read(body: Drawing, serving: ServeConfig, held: Held, files: Files, clip_skip: int | None) -> _Read:
    """Read a request. Raises UserError for one that cannot be drawn."""
    # As in A1111, where Stable Diffusion XL always reads the layer that it was trained with.
    fixed = denoiser_of(held.pipe).text.usual_clip_skip
    skip = clip_skip if fixed == 1 else None
    config, seeds = config_of(body, serving, held, skip), seeds_of(body)
    notes = [f"not read: {', '.join(sorted(body.model_extra))}"] if body.model_extra else []
    if skip != clip_skip and clip_skip not in (1, fixed):
        notes.append(f"CLIP_stop_at_last_layers {clip_skip} has no effect on {held.info.name}, as in A1111")
    if body.eta == 1 and (config.scheduler or "").startswith("ddim"):
        notes.append("DDIM is drawn with eta 0; the sampler DDPM adds the noise of eta 1")
    if body.negative_prompt and not config.negative:
        notes.append("the negative prompt has no effect at cfg_scale 1 or less")
    _check_seeds(seeds, config.batch_size * (1 if body.n_iter is None else body.n_iter))
    read = _Read(config, seeds, notes, areas_of(body, config, serving))
    if config.auto is not None:
        read.retrieval = Retrieval(files.library(), wanted_by(config, held.info), (), read.tell)
    return read


def run(body: Drawing, serving: ServeConfig, held: Held, files: Files, clip_skip: int | None, job: Job[Any]) -> Result:
    """Draw a request's pictures, a batch after the other.

    Args:
        body: The request.
        serving: The settings of the server.
        held: The base.
        files: What prompts find.
        clip_skip: As of `config_of`.
        job: Is told how far it is, and tells where to end.

    Returns:
        What was drawn: all, or what was there when somebody interrupted.

    Raises:
        UserError: The request cannot be drawn.
    """
    read = _read(body, serving, held, files, clip_skip)
    job.rounds = 1 if body.n_iter is None else body.n_iter

    def tell(event: Event) -> None:
        read.tell(event)
        job.heed(event)

    drawn: list[Drawn] = []
    begun: Beginning | None = None
    for number in range(job.rounds):
        if job.interrupted:
            break
        job.round, job.done, job.total, job.skipped = number, 0, 0, False
        size_of = read.config.batch_size
        asked = read.order(range(number * size_of, (number + 1) * size_of), files)
        if begun is None and isinstance(body, ImageToImage):
            begun = source_of(body, read.config, serving, held.info)
        source = None if begun is None else begun.source(read.config.taken_steps)
        try:
            with closing(draw(held.pipe, asked, read.config, source, tell=tell, stop=job, kept=held.kept)) as coming:
                for image, recipe in coming:
                    drawn.append(Drawn(image if begun is None else begun.ready.finished(image), recipe))
        except Interrupted:
            continue
    job.round = job.rounds
    return read.result(drawn, clip_skip, held)


class Asking(NamedTuple):
    """A request among several that are drawn together.

    Attributes:
        body: The request.
        clip_skip: As of `config_of`.
        job: Is told how far it is.
    """

    body: Drawing
    clip_skip: int | None
    job: Job[Result]


def can_share(body: Drawing) -> bool:
    """Tell whether pictures of a request may be drawn with those of others: those from noise, in one batch, whose regions
    need not be found first.

    Args:
        body: The request.

    Returns:
        Whether they may.
    """
    return isinstance(body, TextToImage) and body.n_iter in (None, 1) and body.own.regions == "given"


def can_join(body: Drawing) -> bool:
    """Tell whether pictures of a request, which `can_share`, may join others at any of their steps: those of one pass, and
    without regions.

    Args:
        body: The request.

    Returns:
        Whether they may.
    """
    return isinstance(body, TextToImage) and not body.enable_hr and not body.own.region


def run_joining(
    asking: Sequence[Asking],
    serving: ServeConfig,
    held: Held,
    files: Files,
    kept: Kept,
    more: Callable[[int], Sequence[Asking]],
) -> Iterator[tuple[Job[Result], Result]]:
    """Draw the pictures of several requests at once, and of those that come meanwhile from their next step on.

    Args:
        asking: The requests, of the kind that `can_join`, on a base whose steps are alike.
        serving: The settings of the server.
        held: The base, all of which is on its device.
        files: What prompts find.
        kept: The adapters of the base.
        more: Gives requests that have come, for so many pictures at most.

    Yields:
        Each request, when its pictures are drawn, with what was drawn: nothing where it was interrupted. Not those of which
        one cannot be drawn with others; after one of them no more join, so that its turn comes.
    """
    spare(kept.adapters, serving.drawing(held.source))
    coming, left_out = _parts(asking, serving, held, files)
    drawing: dict[Part, tuple[Asking, _Read]] = {}
    choices = [choice for part in coming for choice in part.asked.choices]
    with frozen(held.pipe), closing(Session(kept, choices, at_most=serving.max_batch, strict=serving.strict)) as session:
        while coming or session.busy:
            for part, own in coming.items():
                try:
                    session.join(part)
                    drawing[part] = own
                except UserError:
                    left_out = True
            for part, (one, _) in drawing.items():
                _follow(one.job, session.tickets(part))
            for part, drawn in session.step().items():
                one, read = drawing.pop(part)
                if drawn is None:
                    left_out = True
                    continue
                one.job.round = one.job.rounds
                found = [Drawn(*picture) for picture in drawn]
                yield one.job, read.result(found, one.clip_skip, held)
            coming, wrong = ({}, False) if left_out else _parts(more(session.room), serving, held, files)
            left_out |= wrong


def _parts(
    asking: Sequence[Asking], serving: ServeConfig, held: Held, files: Files
) -> "tuple[dict[Part, tuple[Asking, _Read]], bool]":
    """Read requests. Returns what they ask for, and whether one was left out, which cannot be read."""
    found: dict[Part, tuple[Asking, _Read]] = {}
    for one in asking:
        one.job.rounds = 1
        try:
            read = _read(one.body, serving, held, files, one.clip_skip)
            found[Part(read.order(range(read.config.batch_size), files), read.config, read.tell)] = one, read
        except UserError:
            continue
    return found, len(found) < len(asking)


def _follow(job: Job[Result], tickets: Sequence[Ticket]) -> None:
    """Tell a job how far its pictures are, and give them up where it is to end."""
    job.done, job.total = min(ticket.step for ticket in tickets), max(ticket.steps for ticket in tickets)
    for ticket in tickets if job.is_set() else ():
        ticket.cancel()


def run_together(
    asking: Sequence[Asking], serving: ServeConfig, held: Held, files: Files
) -> Iterator[tuple[Job[Result], Result]]:
    """Draw the pictures of several requests at once, as far as they can be.

    Args:
        asking: The requests, of the kind that `can_share`.
        serving: The settings of the server.
        held: The base.
        files: What prompts find.

    Yields:
        Each request, when its pictures are drawn, with what was drawn: nothing where all were interrupted.

    Raises:
        UserError: One of them cannot be drawn.
    """
    read = [_read(one.body, serving, held, files, one.clip_skip) for one in asking]
    orders = [one.order(range(one.config.batch_size), files) for one in read]
    parts = [Part(order, one.config, one.tell) for one, order in zip(read, orders, strict=True)]
    company = Company([one.job for one in asking])
    found: dict[int, list[Drawn]] = {}

    def result(number: int) -> tuple[Job[Result], Result]:
        one, told = asking[number], read[number]
        one.job.round = one.job.rounds
        return one.job, told.result(found.get(number, []), one.clip_skip, held)

    for one in asking:
        one.job.rounds = 1
    most = serving.max_batch
    try:
        drawn = draw_together(
            held.pipe, parts, at_most=most, strict=serving.strict, tell=company.heed, stop=company, kept=held.kept
        )
        with closing(drawn) as coming:
            for number, pictures_of in coming:
                found[number] = [Drawn(*picture) for picture in pictures_of]
                yield result(number)
    except Interrupted:
        yield from (result(number) for number in range(len(asking)) if number not in found)


def _check_seeds(seeds: Seeds, count: int) -> None:
    for name, last in (("seed", seeds.of(count - 1)[0]), ("subseed", seeds.of(count - 1)[1])):
        if last > MAX_SEED or last - count + 1 < 0:
            raise UserError(f"{name} must be -1, or from 0 to {MAX_SEED}")
    if not 0 <= seeds.share <= 1:
        raise UserError(f"subseed_strength must be from 0 to 1, not {seeds.share:g}")


def _told_of(chosen: Chosen) -> dict[str, Any]:
    """What was chosen for a prompt, as JSON."""
    found = [
        {"name": one.entry.name, "strength": one.strength, "score": round(one.score, 4), "because": list(one.because)}
        for one in chosen.found
    ]
    return {"prompt": chosen.written, "drawn": chosen.prompt, "added": list(chosen.added), "adapters": found}


def info_of(body: Drawing, result: Result, timestamp: str) -> str:
    """Tell of pictures in JSON as A1111's ``Processed.js`` does, with ``comments`` besides, and what ``auto`` chose.

    Args:
        body: The request.
        result: What was drawn.
        timestamp: When it began.

    Returns:
        The JSON.
    """
    recipes = [one.recipe for one in result.drawn]
    first = recipes[0] if recipes else None
    subseeds = [recipe.variation_seed or 0 for recipe in recipes]
    asked = body.sampler_name or body.sampler_index
    kind = asked if first is None else label(parted(first.scheduler)[0]) if first.scheduler else first.sampled_by
    told: dict[str, Any] = {
        "prompt": body.prompt or "",
        "all_prompts": [recipe.written or recipe.prompt for recipe in recipes],
        "negative_prompt": body.negative_prompt or "",
        "all_negative_prompts": [recipe.negative for recipe in recipes],
        "seed": first.seed if first else body.seed,
        "all_seeds": [recipe.seed for recipe in recipes],
        "subseed": subseeds[0] if subseeds else body.subseed,
        "all_subseeds": subseeds,
        "subseed_strength": body.subseed_strength or 0,
        "width": first.width if first else body.width,
        "height": first.height if first else body.height,
        "sampler_name": kind,
        "cfg_scale": result.config.guided_by,
        "steps": result.config.taken_steps,
        "batch_size": result.config.batch_size,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": Path(result.base.name).stem,
        "sd_model_hash": result.sha256[:10] or None,
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": first.strength if first else body.denoising_strength,
        "extra_generation_params": {},
        "index_of_first_image": 0,
        "infotexts": [recipe.parameters() for recipe in recipes],
        "styles": [],
        "job_timestamp": timestamp,
        "clip_skip": result.clip_skip,
        "is_using_inpainting_conditioning": False,
        "version": f"peft_diffusion {__version__}",
        "comments": result.notes,
        "auto": [_told_of(one) for one in result.chosen],
    }
    return json.dumps(told, ensure_ascii=False)
