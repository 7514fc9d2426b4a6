"""Pictures that are drawn while a run learns: previews, and pictures of a subject's class. `training` is given this."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image

from ..bases.base import Base
from ..bases.pipelines import Pipeline, drawing
from ..core.errors import UserError
from ..core.events import Noted, Observer
from ..core.others import Other
from . import amounts
from . import sheet as sheets
from .adapted import warner
from .adapters import Adapters
from .sampler import Cell, ending_in_noise, paint, whole_picture
from .settings import Choice, GenerateConfig, parse_choices, separated
from .telling import Telling


def others(files: Sequence[str]) -> tuple[Choice, ...]:
    """Read which adapters a run trains another one beside.

    Args:
        files: ``FILE`` or ``FILE=STRENGTH`` each, or several with commas between.

    Returns:
        The adapters.

    Raises:
        UserError: As `parse_choices`, and for a strength over denoising steps, of which training has none.
    """
    choices = parse_choices(separated(files))
    stepping = next((choice for choice in choices if choice.parts is not None and choice.parts.over_steps), None)
    if stepping is not None:
        raise UserError(f"--beside {stepping.text}: training has no denoising steps that a strength could follow")
    return choices


@contextmanager
def beside(base: Base, files: Sequence[str], tell: Observer) -> Iterator[list[Other]]:
    """Attach adapters for as long as a run trains another one beside them.

    Args:
        base: A pipeline or a language model.
        files: ``FILE`` or ``FILE=STRENGTH`` each.
        tell: Is told what should be known of the files.

    Yields:
        What is known of each.

    Raises:
        UserError: A file is missing, is no adapter or does not fit the base.
    """
    choices = others(files)
    if not choices:
        yield []
        return
    adapters, names = Adapters(base), list[str]()
    try:
        told = []
        for number, choice in enumerate(choices, 1):
            name = f"beside_{number}"
            adapters.load(choice.parsed(), name, choice.amount, warn=warner(tell))
            names.append(name)
            parts = {"parts": amounts.text_of(choice.parts)} if choice.parts else {}
            known = {"file": choice.path.name, "sha256": adapters[name].sha256, "strength": choice.strength, **parts}
            told.append(Other(name, known, adapters[name].spec.trigger))
        named = " and ".join(f"{choice.name} at {choice.strength:g}" for choice in choices)
        tell(Noted(f"learns beside {named}; losses, measurements and previews have that too, and the new file has not"))
        yield told
    finally:
        for name in names:
            adapters.remove(name)


@contextmanager
def carried(base: Base, files: Sequence[str], tell: Observer) -> Iterator[list[Other]]:
    """Attach adapters at strength 1 for as long as a training weighs them.

    Args:
        base: A pipeline.
        files: Adapter files.
        tell: Is told what should be known of them.

    Yields:
        What is known of each.

    Raises:
        UserError: A file is missing, is no adapter or does not fit the base.
    """
    adapters, found = Adapters(base), list[Other]()
    try:
        for path in map(Path, files):
            name = adapters.load(path, warn=warner(tell))
            found.append(Other(name, {"file": path.name, "sha256": adapters[name].sha256}, adapters[name].spec.trigger))
        yield found
    finally:
        for one in found:
            adapters.remove(one.name)


class TrainingPictures:
    """Draws for a run; see `training.drawing.Drawing`, which this is."""

    def previews(
        self,
        pipe: Pipeline,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        against: Sequence[str],
        size: tuple[int, int],
        steps: int,
        guidance: float,
        from_pure_noise: bool,
        clip_skip: int | None,
    ) -> list[Image.Image]:
        """Draw prompts together, with whatever the pipeline carries."""
        sampling = GenerateConfig(
            tuple(prompts), steps=steps, guidance=guidance, clip_skip=clip_skip, device=str(pipe.device)
        )
        scheduler = ending_in_noise(pipe.scheduler) if from_pure_noise else pipe.scheduler
        with drawing(pipe, scheduler):
            drawn: list[Image.Image] = pipe(
                **whole_picture(pipe, *size),
                **Telling(pipe, sampling).arguments(prompts, against, guided=guidance > 1),
                num_inference_steps=steps,
                guidance_scale=guidance,
                width=size[0],
                height=size[1],
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            ).images
        return drawn

    def class_pictures(
        self,
        pipe: Pipeline,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        size: int,
        steps: int,
        guidance: float,
        clip_skip: int | None,
    ) -> Iterator[Image.Image]:
        """Draw prompts together, each picture from the noise of its own seed alone."""
        sampling = GenerateConfig(
            tuple(prompts),
            steps=steps,
            guidance=guidance,
            clip_skip=clip_skip,
            width=size,
            height=size,
            batch_size=len(prompts),
            device=str(pipe.device),
        )
        cells = [Cell(prompt, seed, None) for prompt, seed in zip(prompts, seeds, strict=True)]
        yield from paint(Adapters(pipe), cells, sampling)

    def sheet(
        self, rows: Sequence[Sequence[Image.Image | None]], row_labels: Sequence[str], column_labels: Sequence[str]
    ) -> Image.Image:
        """Lay pictures out in rows, with their labels."""
        return sheets.grid(rows, row_labels, column_labels)
