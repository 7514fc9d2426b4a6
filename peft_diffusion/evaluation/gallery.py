"""Real pictures of what an adapter was taught, that it never saw: what it is judged by."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..bases import denoiser_of
from ..bases.pipelines import Pipeline
from ..core.errors import UserError
from ..core.events import Observer, Warned, progress, untold
from ..core.wording import first_of
from ..data.buckets import ResizeCrop, arrange, place
from ..data.captions import CaptionRules
from ..data.folder import MISSING_CAPTION, Missing, TrainingImage, scan
from ..data.images import open_picture
from ..data.latents import LatentCache, cache_latents
from ..formats import Spec
from ..generation.adapted import contains, without
from ..training.tasks.diffusion import Examples
from ..training.tasks.unseen import shared

_MARKS = " ,.;:-"


@dataclass(frozen=True)
class Gallery:
    """Pictures of a folder, as a base sees them.

    Attributes:
        name: What it is called.
        pictures: The files, in order.
        fits: How each is brought to a size of the base.
        captions: What each is called in a prompt, with the words that call the adapter.
        words: What all captions begin and end with.
        triggers: The words that call the adapter, where its file tells any.
    """

    name: str
    pictures: tuple[TrainingImage, ...]
    fits: tuple[ResizeCrop, ...]
    captions: tuple[str, ...]
    words: tuple[str, str] = ("", "")
    triggers: tuple[str, ...] = ()

    @cached_property
    def images(self) -> list[Image.Image]:
        """The pictures at their sizes."""
        files = [open_picture(one.path, digest=one.digest) for one in self.pictures]
        return [place(image, fit) for image, fit in zip(files, self.fits, strict=True)]

    @cached_property
    def subjects(self) -> list[str]:
        """What each picture shows, in words: its caption without the words that call the adapter."""
        return [self.without_words(caption) for caption in self.captions]

    def without_words(self, caption: str) -> str:
        """Take the words that call the adapter out of a caption.

        Args:
            caption: One of them.

        Returns:
            What is left.
        """
        before, after = self.words
        text = " ".join(caption.split())
        text = text.removeprefix(before).removesuffix(after)
        for trigger in self.triggers:
            text = without(text, trigger)
        return " ".join(text.split()).strip(_MARKS)

    def some(self, count: int) -> list[int]:
        """Choose pictures, spread over all, no two of which have one caption.

        Args:
            count: How many at most.

        Returns:
            Their places.
        """
        distinct = list({caption: number for number, caption in reversed(list(enumerate(self.captions)))}.values())[::-1]
        if len(distinct) <= count:
            return distinct
        return [distinct[number * len(distinct) // count] for number in range(count)]


def read_gallery(
    folder: Path,
    name: str,
    pipe: Pipeline,
    *,
    spec: Spec | None = None,
    without: Collection[str] = (),
    missing: Missing = "stop",
    tell: Observer = untold,
) -> Gallery:
    """Read a folder of pictures with captions.

    Args:
        folder: As `train` reads it.
        name: What it is called.
        pipe: The base, whose sizes the pictures are brought to.
        spec: What the adapter's file says of itself: captions become prompts as they did when it was trained.
        without: Digests of pictures that are left out, as an adapter was trained on them.
        missing: What becomes of pictures without a caption.
        tell: Is told what is left out.

    Returns:
        The gallery.

    Raises:
        UserError: There is no picture, or something stops reading, such as a missing caption.
    """
    found = scan(folder, missing=missing)
    without_words = [
        f"{one.where}: {one.message}. Write one beside it: prompts are made of captions"  # which no option waives here
        for one in found.problems
        if one.stops and one.kind == MISSING_CAPTION
    ]
    if without_words:
        raise UserError(first_of(without_words))
    found.check()
    for problems in found.by_kind.values():
        tell(Warned(first_of(problems)))
    pictures = tuple(one for one in found.pictures if one.digest not in without)
    seen = len(found.pictures) - len(pictures)
    if not pictures:
        raise UserError(f"{folder}: all {seen} pictures were trained on; give pictures that the adapter never saw")
    if seen:
        tell(Warned(f"{folder}: {seen} of {len(found.pictures)} pictures were trained on, and are left out"))
    denoiser = denoiser_of(pipe)
    fits = arrange(pictures, denoiser.resolution, denoiser.step)
    captions = [prompt_of(one.caption, spec or Spec()) for one in pictures]
    return Gallery(name, pictures, fits, tuple(captions), shared(captions), () if spec is None else spec.triggers)


def prompt_of(caption: str, spec: Spec) -> str:
    """Make a prompt of a caption as it was made when an adapter was trained, with the words that call it.

    Args:
        caption: As written.
        spec: What the adapter's file says of itself; of files of other programs the triggers alone are known.

    Returns:
        The caption with prefix, suffix, template and trigger of the training, each where the caption has not got it already.
    """
    told = spec.training

    def text(name: str) -> str:
        value = told.get(name, "")
        return value if isinstance(value, str) else ""

    plain = CaptionRules(separator=text("keep_separator"), wildcards=told.get("wildcards") is True).plain(caption)
    before, after = (text(name).strip() for name in ("caption_prefix", "caption_suffix"))
    templates = told.get("caption_template")
    first = templates[0] if isinstance(templates, list) and templates and isinstance(templates[0], str) else ""
    called = any(contains(plain, trigger) for trigger in spec.triggers)
    trigger = "" if called else text("trigger") or next(iter(spec.triggers), "")
    rules = CaptionRules(
        trigger=trigger,
        prefix="" if plain.startswith(before) else before,
        suffix="" if plain.endswith(after) else after,
        templates=() if called or not first else (first,),
    )
    return rules.plain(plain)


def encoded(gallery: Gallery, pipe: Pipeline, tell: Observer = untold) -> Examples:
    """Encode a gallery, to measure the loss of denoising it.

    Args:
        gallery: The pictures.
        pipe: The base.
        tell: Is told how far it is.

    Returns:
        Latents and captions.
    """
    denoiser = denoiser_of(pipe)
    tick = progress(tell, f"encoding the pictures of {gallery.name}")
    latents = cache_latents(gallery.pictures, gallery.fits, denoiser.vae, masked=denoiser.inpaints, on_progress=tick)
    return Examples(latents, gallery.captions)


@torch.no_grad()
def decoded(latents: LatentCache, pipe: Pipeline) -> list[Image.Image]:
    """Give pictures back as the base's autoencoder has them, with the softness of what it draws.

    Args:
        latents: Of the pictures.
        pipe: The base.

    Returns:
        A picture each.
    """
    vae: Any = denoiser_of(pipe).vae
    weight = next(vae.parameters())
    pixels = [vae.decode(one.mean[None].to(weight)).sample.float().cpu() for one in latents.entries]
    processed = [((one[0].clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy() for one in pixels]
    return [Image.fromarray(one) for one in processed]


def in_pieces(gallery: Gallery, count: int) -> Iterator[Gallery]:
    """Part a gallery, to hold few of its pictures at a time.

    Args:
        gallery: The pictures.
        count: How many at a time.

    Yields:
        Galleries of so many, in order.
    """
    places = range(len(gallery.pictures))
    yield from (_of_places(gallery, places[start : start + count]) for start in places[::count])


def _of_places(gallery: Gallery, places: Sequence[int]) -> Gallery:
    return replace(
        gallery,
        pictures=tuple(gallery.pictures[number] for number in places),
        fits=tuple(gallery.fits[number] for number in places),
        captions=tuple(gallery.captions[number] for number in places),
    )


def at_most(gallery: Gallery, count: int) -> Gallery:
    """Keep some pictures of a gallery, spread over all.

    Args:
        gallery: The pictures.
        count: How many at most.

    Returns:
        The gallery of those.
    """
    total = len(gallery.pictures)
    if total <= count:
        return gallery
    return _of_places(gallery, [number * total // count for number in range(count)])
