"""From a configuration to what a run works on: checked places, base, pictures, captions, latents."""

import math
import os
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from ...bases import BaseInfo, denoiser_of, describe, load_base
from ...bases.loading import pick_device
from ...bases.pipelines import Pipeline
from ...bases.prompt_syntax import from_letters
from ...bases.prompts import CHUNK, Reading, TextSide
from ...core.errors import UserError
from ...core.events import Observer, Warned, progress
from ...core.files import at_home, refuse_overlaps
from ...core.shortening import brief, shortened
from ...core.wording import number_of
from ...data import subfolders
from ...data.arrangement import KEPT, alone, cropped
from ...data.buckets import (
    Bucket,
    ResizeCrop,
    describe_buckets,
    group,
    repeated,
    resize_crop,
    share_out,
    steps_per_epoch,
)
from ...data.captions import CaptionRules, has_place, with_trigger
from ...data.folder import TrainingImage
from ...data.images import parse_colour
from ...data.latents import cache_latents
from ...data.prompt_lines import read_prompts
from ...data.prompts import instructions, refuse_files
from ...fast import frozen_ops
from ..attachment import check_placements, selected_components, with_words
from ..beginning import with_rank_of_file
from ..drawing import Drawing, PreviewPrompt
from ..events import COLD, IMPATIENT, Arranged, BaseLoaded, HeldOut, LatentsCached, PromptsMade
from ..loop.seeds import seed_of
from ..machine.low_memory import small_vae
from ..machine.precision import pick_precision
from ..machine.processes import Processes
from ..machine.sharding import shard
from ..record.run_folder import RunFolder, check_run, check_writable
from ..settings.derive import adapted_components, resolution_of, resolve
from ..settings.idle import idle
from ..settings.pictures import ResolvedConfig, TrainConfig, output_path, run_path
from ..settings.placements import blocks
from ..settings.presets import FEW_FROM, SEEN_LEAST
from . import class_images
from .datasets import Arrangement, Parts, class_parts, parts_of
from .diffusion import Examples, noise_schedule
from .unseen import unseen

PREVIEWS = 4
"""How many pictures previews have where none were asked for."""
_PROMPT = 200  # characters of a prompt that is proposed
_SHOWN, _LINE = 5, 600  # lines of a list, characters of a line


@dataclass(frozen=True)
class Pictures:
    """Those of a run: all of its own, of which it learns from ``kept`` and measures on ``apart``, and of the class."""

    all: tuple[TrainingImage, ...]
    kept: tuple[TrainingImage, ...]
    apart: tuple[TrainingImage, ...]
    of_class: tuple[TrainingImage, ...] = ()


@dataclass(frozen=True)
class Prepared:
    """What a run works on."""

    config: ResolvedConfig
    pipe: Pipeline
    info: BaseInfo
    of_run: Pictures
    train: Examples
    held_out: Examples | None
    prior: Examples | None
    rules: CaptionRules
    asked: tuple[PreviewPrompt, ...] = ()

    @property
    def prompts(self) -> list[PreviewPrompt]:
        """The prompts of the previews: those asked for, or captions, of pictures kept apart first, and `others`."""
        if self.asked:
            return list(self.asked)
        plain = [*(self.held_out.plain(self.rules) if self.held_out else ()), *self.train.plain(self.rules)]
        captions = list(dict.fromkeys(plain))
        captions = [*captions[: PREVIEWS - len(self.others)], *self.others]
        return [PreviewPrompt(self.drawn(caption)) for caption in captions]

    def drawn(self, caption: str) -> str:
        """Write a caption as the prompt that is read as the caption is learned.

        Args:
            caption: By the run's rules.

        Returns:
            A prompt of A1111.
        """
        return caption if self.config.weighted_captions else from_letters(caption)

    def proposed(self, triggers: Sequence[str]) -> str:
        """Propose a prompt that calls what was learned.

        Args:
            triggers: The words that call it.

        Returns:
            A caption that is not long, of a picture kept apart where there is one, with the triggers that it lacks; where
            there is none, the triggers, or the beginning of a long one. It reads as it was learned.
        """
        plain = [*(self.held_out.plain(self.rules) if self.held_out else ()), *self.train.plain(self.rules)]
        captions = [caption for caption in plain if caption]
        words = next((caption for caption in captions if len(caption) <= _PROMPT), "")
        for trigger in reversed(triggers):
            words = with_trigger(words, re.sub("[{}]+", " ", trigger))
        words = words or " ".join(captions[0][:_PROMPT].split()[:-1] if captions else ()) or "a picture"
        return re.sub("[{}]", r"\\\g<0>", self.drawn(words))  # in prompts, braces are alternatives

    @cached_property
    def others(self) -> list[str]:
        """Prompts of what the pictures do not show: what is drawn well there was learned and not copied."""
        plain = self.rules.of_class()
        captions = [plain.plain(picture.caption) for picture in self.of_run.all]
        return [self.rules.plain(caption) for caption in unseen(captions, self.config.preset)]


def _asked_previews(config: TrainConfig) -> list[PreviewPrompt]:
    """Read the prompts of previews that were asked for.

    Args:
        config: The settings of the run.

    Returns:
        The prompts; none where captions are drawn.

    Raises:
        UserError: The file, or what a line says, cannot be read.
    """
    of_file = () if config.preview_prompts_file is None else read_prompts(config.preview_prompts_file)
    return [PreviewPrompt.of_line(line, number) for number, line in enumerate((*config.preview_prompts, *of_file))]


def _check_previews(asked: Sequence[PreviewPrompt], info: BaseInfo) -> None:
    """Raise UserError for sizes of previews that the base cannot draw."""
    for one in asked:
        for side in (one.width, one.height):
            if side is not None and (side < 1 or side % info.step):
                raise UserError(f'the preview "{brief(one.written)}" has a side of {side}, no multiple of {info.step}')


def reading_of(config: TrainConfig | ResolvedConfig) -> Reading:
    """Tell how the captions of a run are read.

    Args:
        config: Its settings.

    Returns:
        How they are.
    """
    chunks = None if config.max_tokens == "none" else int(config.max_tokens) // CHUNK
    return Reading("a1111" if config.weighted_captions else "none", chunks, config.clip_skip)


def check_places(config: TrainConfig) -> RunFolder:
    """See that everything can be written where it shall go.

    Args:
        config: What was asked for.

    Returns:
        The run folder.

    Raises:
        UserError: Something cannot.
    """
    run = RunFolder(run_path(config))
    check_apart(config, (("--output", output_path(config)),))
    check_run(run, output_path(config), resume=config.resume, overwrite=config.overwrite)
    if config.cache is not None:
        check_writable(config.cache)
    return run


def check_apart(config: TrainConfig, files: Sequence[tuple[str, Path]] = ()) -> None:
    """See that a run writes nothing among the pictures or into the base that it reads.

    Args:
        config: What was asked for.
        files: Files that it writes beside its folders, by their flags.

    Raises:
        UserError: It would.
    """
    read = [("pictures", folder) for folder in (*config.folder, *(one.folder for one in config.dataset))]
    read += [("--regularisation", folder) for folder in config.regularisation]
    read += [] if config.base == TrainConfig.base else [("--base", at_home(Path(config.base)))]
    refuse_overlaps([*_written_folders(config), *files], read)


def _written_folders(config: TrainConfig) -> list[tuple[str, Path]]:
    """The folders that a run writes, by their flags."""
    return [("--run-dir", run_path(config)), *([] if config.cache is None else [("--cache", config.cache)])]


def _check_none_written(config: TrainConfig, pictures: Sequence[TrainingImage]) -> None:
    """Raise UserError where a link in a folder of pictures leads to what a run writes."""
    real = [(flag, Path(os.path.realpath(place))) for flag, place in _written_folders(config)]
    for picture in pictures:
        above = Path(os.path.realpath(picture.path)).parents
        for flag, place in real:
            if place in above:
                raise UserError(f"{picture.path} leads into {flag} {place}, where the run writes its own; take it out")


def prepare(
    config: TrainConfig,
    pipe: Pipeline | None,
    tell: Observer,
    drawing: Drawing,
    processes: Processes = Processes(),  # noqa: B008 -- frozen
    run: RunFolder | None = None,
    each: Sequence[str] = (),
) -> Prepared:
    """Load the base, read and check the folder, and encode the pictures.

    Args:
        config: The settings as they were given.
        pipe: A base that is loaded already, used in place of ``config.base``; or None.
        tell: Is told what is found and chosen.
        drawing: Draws pictures of the class.
        processes: Those that train together.
        run: The run folder; by default that of the settings.
        each: What each data set is called, where a share of each is kept apart; else it is of all pictures together.

    Returns:
        What a run on pictures works on.

    Raises:
        UserError: A base, folder or picture cannot be used.
    """
    rules, asked = _checked(config)
    config = with_rank_of_file(config)
    device = pick_device(config.device)
    precision = pick_precision(config.precision, device)
    pipe = _loaded(replace(config, precision=precision), pipe, device, tell, processes)
    info, text = describe(pipe), denoiser_of(pipe).text.read_as(reading_of(config))
    tell(BaseLoaded(info.name, info.family, info.prediction_type, info.resolution, config.quantize))
    run = RunFolder(run_path(config)) if run is None else run
    going_on = run.newest() if config.resume else None
    if going_on is not None:
        run.check_base(going_on.origin, info.fingerprint)
    parts = parts_of(config, resolution_of(config, info)[0])
    pictures = _read_pictures(config, parts, tell)
    earlier = going_on.origin.config if going_on is not None else {} if config.resume else None
    resolved = resolve(config, info, len(pictures), device.type, precision=precision, before=earlier)
    kept, apart = _split(pictures, resolved.held_out, resolved.seed, bool(each))
    arranged = parts.arrange(kept, info.step)
    batches = _steps_per_epoch(arranged, resolved, processes)
    resolved = resolve(config, info, len(pictures), device.type, batches, precision=precision, before=earlier)
    parts = parts_of(resolved, resolved.resolution)
    tell(Arranged((*describe_buckets(arranged.fits), *subfolders.describe(kept))))
    _tell_alone(arranged, resolved.batch_size * processes.size, tell)
    tell(_held_out(config, resolved, pictures, apart, each))
    _tell_odd(config, resolved, apart, arranged.least / batches, tell)
    text.check()
    _check_previews(asked, info)
    _tell_prompts([*kept, *apart], parts.rules([*kept, *apart]), text, tell)
    of_class = class_images.pictures(resolved, pipe, tell, drawing, processes)
    if going_on is not None:
        run.check_data(going_on.origin, items(pictures, of_class))
    encode = _Encoder(resolved, info, pipe, tell, parts)
    examples = _encoded(encode, arranged, parts.arrange(apart, info.step, learned=False), of_class)
    of_run = Pictures(*map(tuple, (pictures, kept, apart, of_class)))
    return Prepared(resolved, pipe, info, of_run, *examples, replace(rules, dropout=resolved.caption_dropout), tuple(asked))


def _steps_per_epoch(arranged: Arrangement, config: ResolvedConfig, processes: Processes) -> int:
    """How many batches see each picture as often as it is to be seen."""
    fits, times = arranged.drawn
    return steps_per_epoch(repeated(group(fits), times), config.batch_size * processes.size)


def _encoded(
    encode: "_Encoder", kept: Arrangement, apart: Arrangement, of_class: Sequence[TrainingImage]
) -> tuple[Examples, Examples | None, Examples | None]:
    """Examples to learn from, to measure on and of the class, after telling what came of the cache."""
    config = encode.config
    before = _kept(config.cache)
    train = encode(kept, "encoding pictures")
    held_out = encode(apart, "encoding pictures kept apart") if apart.pictures else None
    kept_as_is = encode.beside(of_class, train.groups) if of_class else None
    _tell_cache(config.cache, before, [one for one in (train, held_out, kept_as_is) if one], encode.tell)
    return train, held_out, kept_as_is


def _checked(config: TrainConfig) -> tuple[CaptionRules, list[PreviewPrompt]]:
    """The rules of captions and the previews that are asked for, after seeing what can be told before the base is loaded.
    Raises UserError for it."""
    parse_colour(config.background)
    subfolders.check(config.repeats, config.folder_weight)
    refuse_files(config.preview_prompts, "read it with --preview-prompts-file")
    refuse_files(config.class_prompt)
    asked = _asked_previews(config)
    for parts in (parts_of(config, 1), class_parts(config, 1)):  # no size is needed to look for pictures
        parts.check()
    return config.caption_rules(), asked


def _tell_odd(
    asked: TrainConfig, config: ResolvedConfig, apart: Sequence[TrainingImage], each: float, tell: Observer
) -> None:
    """Tell of settings that do nothing, or leave nothing of the run, a batch of which shows each picture so many times."""
    seen = config.steps * config.accumulation * each
    if seen < SEEN_LEAST:
        enough = math.ceil(config.steps * SEEN_LEAST / seen)
        told = f"each picture is seen {seen:.1f} times in {config.steps} steps, which teaches little"
        tell(Warned(f"{told}; --steps {enough} shows each {SEEN_LEAST} times"))
    if config.patience and not apart:
        tell(IMPATIENT)
    if config.warmup >= config.steps:
        tell(COLD)
    for line in idle(asked, config):
        tell(Warned(line))


def items(pictures: Sequence[TrainingImage], of_class: Sequence[TrainingImage]) -> list[dict[str, str]]:
    """List what of pictures a run depends on.

    Args:
        pictures: Those that it learns from.
        of_class: Those of the class.

    Returns:
        Texts by name for each, as ``data.json`` holds them.
    """
    return [_item(picture) for picture in (*pictures, *of_class)]


def _item(picture: TrainingImage) -> dict[str, str]:
    item = {"name": picture.name, "digest": picture.digest, "caption": picture.caption}
    item |= {"mask": picture.mask_digest} if picture.mask_digest else {}
    drawn = (picture.repeats, picture.weight)
    return item | ({"drawn": f"{drawn[0]} times, weight {drawn[1]:g}"} if drawn != (1, 1.0) else {})


def _loaded(
    config: TrainConfig, pipe: Pipeline | None, device: torch.device, tell: Observer, processes: Processes
) -> Pipeline:
    """The base on its device, or this process's part of it. Raises UserError for one that cannot be used."""
    source = config.base if pipe is None else pipe
    if config.cuda_graph:
        frozen_ops.look_ahead(device)
    first = "cpu" if processes.shares_base else config.device
    pipe = load_base(source, device=first, dtype=config.precision, quantize=config.quantize, prediction=config.prediction)
    denoiser = denoiser_of(pipe)
    denoiser.check_learns()
    components = adapted_components(config, denoiser.family)
    parts = selected_components(pipe, components)
    check_placements(parts, with_words(pipe, blocks(replace(config, components=components))))
    noise_schedule(denoiser, config.zero_terminal_snr)
    if processes.shares_base:
        tell(shard(pipe, components, device))
    return pipe


@dataclass(frozen=True)
class _Encoder:
    """Pictures to examples."""

    config: ResolvedConfig
    info: BaseInfo
    pipe: Pipeline
    tell: Observer
    parts: Parts

    def __call__(self, arranged: Arrangement, what: str) -> Examples:
        pictures = arranged.pictures
        _tell_cropped(pictures, arranged.fits, "cut what matters out of them yourself", self.tell)
        return self._encode(arranged, self.parts.alpha(pictures), self.parts.rules(pictures), what)

    def beside(self, pictures: Sequence[TrainingImage], groups: Mapping[Bucket, Sequence[int]]) -> Examples:
        """Pictures of the class, each in one of the buckets that are trained on: every batch can have some beside it."""
        pairs = share_out(pictures, {bucket: len(entries) for bucket, entries in groups.items()})
        fits = [resize_crop(pictures[index].width, pictures[index].height, bucket) for index, bucket in pairs]
        self.tell(Arranged(tuple(describe_buckets(fits)), of_class=True))
        chosen = [pictures[index] for index, _ in pairs]
        _tell_cropped(chosen, fits, "the class is cropped to the shapes of what is trained on", self.tell)
        parts = class_parts(self.config, self.config.resolution)
        usual = self.config.caption_rules()
        rules = [one.of_class() for one in parts.rules(chosen, usual)]
        arranged = Arrangement(tuple(chosen), tuple(fits), (False,) * len(fits))
        return self._encode(arranged, parts.alpha(chosen), rules, "encoding pictures of the class")

    def _encode(self, arranged: Arrangement, alpha: Sequence[bool], rules: Sequence[CaptionRules], what: str) -> Examples:
        config, denoiser, pictures = self.config, denoiser_of(self.pipe), arranged.pictures
        largest = max((config.resolution, *(max(part.resolutions) for part in self.parts.parts)))
        with small_vae(denoiser.vae, largest, config.memory == "low"):
            latents = cache_latents(
                pictures,
                arranged.fits,
                denoiser.vae,
                background=config.background,
                flip=arranged.flip,
                masked=denoiser.inpaints,
                alpha=alpha,
                folder=config.cache,
                on_progress=progress(self.tell, what),
            )
        repeats = [one.repeats for one in pictures]
        weights = [one.weight for one in pictures]
        return Examples(
            latents,
            [one.caption for one in pictures],
            repeats if set(repeats) != {1} else (),
            weights if set(weights) != {1.0} else (),
            rules,
        )


def _kept(cache: Path | None) -> int:
    """How many latents a cache folder holds."""
    return 0 if cache is None else sum(1 for _ in cache.glob("*.safetensors"))


def _tell_cache(cache: Path | None, before: int, found: Sequence[Examples], tell: Observer) -> None:
    """Tell what came of a cache folder that held ``before`` latents."""
    if cache is None:
        return
    reused, computed, damaged = (
        sum(getattr(one.latents, name) for one in found) for name in ("reused", "computed", "damaged")
    )
    tell(LatentsCached(cache, reused, computed, before if not damaged and not reused else 0))
    if damaged:
        tell(Warned(f"{damaged} latents in {cache} were damaged, and are made again; look after that disk"))


def _read_pictures(config: TrainConfig, parts: Parts, tell: Observer) -> list[TrainingImage]:
    """The pictures, after telling what is wrong with the others. Raises UserError where captions are missing."""
    found = parts.read(tell, "reading pictures")
    _check_none_written(config, found)
    return parts.counted(found, config.repeats, config.folder_weight)


def _split(
    pictures: Sequence[TrainingImage], share: float, seed: int, of_each: bool
) -> tuple[list[TrainingImage], list[TrainingImage]]:
    """Pictures to train on and pictures kept apart, each in their order; at least one of each data set to train on.

    What is in several data sets is in all of them on the same side, or it would be measured on what was learned.
    ``of_each`` has the share kept apart of each data set, or the small ones might have none.
    """
    places: dict[str, Counter[int]] = {}  # how often each is in each data set
    for one in pictures:
        places.setdefault(one.digest, Counter())[one.dataset] += 1
    left, apart = Counter(one.dataset for one in pictures), set[str]()
    drawn_from = [[one for one in places if number in places[one]] for number in sorted(left)] if of_each else [list(places)]
    chance = random.Random(seed_of(seed, "held out"))
    for own in drawn_from:
        count = min(max(1, round(len(own) * share)), len(own) - 1) if share else 0
        drawn = chance.sample(own, count)
        for digest in dict.fromkeys([*drawn, *own]):  # those that are not drawn stand in for others that have to stay
            if len(apart.intersection(own)) >= count:
                break
            if digest not in apart and all(number < left[dataset] for dataset, number in places[digest].items()):
                left.subtract(places[digest])
                apart.add(digest)
    return [one for one in pictures if one.digest not in apart], [one for one in pictures if one.digest in apart]


def _held_out(
    config: TrainConfig,
    resolved: ResolvedConfig,
    pictures: Sequence[TrainingImage],
    apart: Sequence[TrainingImage],
    each: Sequence[str],
) -> HeldOut:
    """What is told of the pictures that are kept apart."""
    least = FEW_FROM if config.held_out is None else 0
    return HeldOut(len(apart), len(pictures), bool(resolved.held_out), least, apart_of(each, apart))


def apart_of(names: Sequence[str], apart: Sequence[TrainingImage]) -> tuple[tuple[str, int], ...]:
    """Count what is kept apart of each data set.

    Args:
        names: What each is called, in order.
        apart: The pictures that are kept apart, of all of them.

    Returns:
        The names, each with its number of pictures.
    """
    counted = Counter(one.dataset for one in apart)
    return tuple((name, counted[number]) for number, name in enumerate(names))


def _tell_alone(arranged: Arrangement, batch_size: int, tell: Observer) -> None:
    """Name the pictures whose batches hold nothing but them."""
    found = alone(arranged.pictures, arranged.fits) if batch_size > 1 else []
    if found:
        message = f"no other has the shape of {number_of(len(found), 'picture')}; copies fill each batch, and count as one:"
        tell(Warned(message, _first(found)))


def _tell_cropped(pictures: Sequence[TrainingImage], fits: Sequence[ResizeCrop], remark: str, tell: Observer) -> None:
    """Name the pictures of which much is cut away."""
    found = cropped(pictures, fits)
    if found:
        message = f"the crop leaves less than {KEPT:.0%} of {number_of(len(found), 'picture')}; {remark}:"
        tell(Warned(message, _first(found)))


def _first(lines: Sequence[str]) -> tuple[str, ...]:
    """The first lines of a list, and how many more there are."""
    more = [f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return (*(shortened(line, _LINE) for line in lines[:_SHOWN]), *more)


def _tell_prompts(pictures: Sequence[TrainingImage], rules: Sequence[CaptionRules], text: TextSide, tell: Observer) -> None:
    """Tell the prompts as they are trained, and every one that is too long for the text encoder."""
    prompts = [rule.plain(picture.caption) for rule, picture in zip(rules, pictures, strict=True)]
    tell(PromptsMade(tuple(prompts)))
    lost = [(picture, words) for picture, prompt in zip(pictures, prompts, strict=True) if (words := text.lost(prompt))]
    if lost:
        most = (text.limit - 2) * (text.reading.chunks or 1)
        over = number_of(len(lost), "prompt")
        message = f"{over} over {most} tokens, of which the rest is not seen; raise --max-tokens:"
        tell(Warned(message, _first([f"{picture.path}: without \u201c{words}\u201d" for picture, words in lost])))
    places = sum(map(has_place, prompts))
    if places:
        tell(
            Warned(
                f"{number_of(places, 'caption')} with [trigger] or [name], which --trigger WORDS fills; as it is, it is read"
            )
        )
    weighted = text.reading.weights != "none"
    odd = [
        f"{one.path}: {', '.join(taken)}"
        for one, rule, prompt in zip(pictures, rules, prompts, strict=True)
        if (taken := instructions(prompt, weighted=weighted, wildcards=rule.wildcards))
    ]
    if odd:
        message = f"{number_of(len(odd), 'prompt')} with what other programs read as instructions, learned here as letters:"
        tell(Warned(message, _first(odd)))
