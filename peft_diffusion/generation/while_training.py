"""Pictures that are drawn while a run learns: previews, and pictures of a subject's class. `training` is given this."""

from collections.abc import Iterator, Sequence

import torch
from PIL import Image

from ..bases.pipelines import Pipeline, drawing
from . import sheet as sheets
from .adapters import Adapters
from .sampler import Cell, ending_in_noise, paint, whole_picture
from .settings import GenerateConfig
from .telling import Telling


class TrainingPictures:
    """Draws for a run; see `training.drawing.Drawing`, which this is."""

    def previews(
        self,
        pipe: Pipeline,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        size: int,
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
                **whole_picture(pipe, size, size),
                **Telling(pipe, sampling).arguments(prompts, [""] * len(prompts)),
                num_inference_steps=steps,
                guidance_scale=guidance,
                width=size,
                height=size,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            ).images
        return drawn

    def class_pictures(
        self, pipe: Pipeline, prompts: Sequence[str], seeds: Sequence[int], *, size: int, steps: int, guidance: float
    ) -> Iterator[Image.Image]:
        """Draw prompts together, each picture from the noise of its own seed alone."""
        sampling = GenerateConfig(
            tuple(prompts),
            steps=steps,
            guidance=guidance,
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
