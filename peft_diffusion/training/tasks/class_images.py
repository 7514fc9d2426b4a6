"""Pictures of the class that a subject belongs to: what the base draws, or a folder; what they show is kept as it was."""

import hashlib
import io
import json
from dataclasses import replace
from pathlib import Path

from PIL import Image

from ...bases import denoiser_of, describe, fingerprint
from ...bases.pipelines import Pipeline
from ...bases.prompt_syntax import words
from ...core.events import Observer, progress
from ...core.files import explained, write_bytes
from ...data.folder import TrainingImage
from ...data.images import check_picture
from ...data.prompts import in_words
from ...data.wildcards import Wildcards
from ..drawing import Drawing
from ..events import ClassNotKept, ClassPictures
from ..loop.seeds import seed_of
from ..machine.low_memory import small_vae
from ..machine.processes import Processes
from ..settings.choices import MissingCaptions
from ..settings.pictures import ResolvedConfig
from .datasets import DRAWN, Parts, class_parts

_STEPS, _GUIDANCE = 25, 5.0
_BATCH = 4  # pictures drawn at once; part of what they are, as rounding depends on it


def pictures(
    config: ResolvedConfig, pipe: Pipeline, tell: Observer, drawing: Drawing, processes: Processes
) -> list[TrainingImage]:
    """Collect the pictures of the class: from the regularisation folders, and drawn by the base for the class prompts.

    Args:
        config: The settings.
        pipe: The base, without adapters.
        tell: Is told what is found and drawn.
        drawing: Draws the pictures.
        processes: Those that train together; the one that leads draws.

    Returns:
        The pictures. Their captions are those of the folders, without the trigger, and the class prompts.

    Raises:
        UserError: A folder cannot be used: see `data.folder.scan`.
    """
    config = replace(config, class_prompt=tuple(in_words(config.class_prompt, tell)))  # before it is a caption, too
    parts = class_parts(config, config.resolution)
    found = _of_folders(config, parts, tell) if parts.parts else []
    if config.class_prompt:
        found += _drawn(config, pipe, tell, drawing, processes)
    elif not found and config.preset == "subject":
        tell(ClassNotKept())
    return found


def class_folder(config: ResolvedConfig, pipe: Pipeline, size: int) -> Path:
    """Say where drawn pictures of the class are kept: beside the runs, under a digest of all that they depend on.

    Args:
        config: The settings.
        pipe: The base: what it predicts and its scheduler decide what it draws, and its VAE does.
        size: Pixels a side.

    Returns:
        The folder, which need not exist yet.
    """
    scheduler = {name: told for name, told in pipe.scheduler.config.items() if not name.startswith("_")}
    key: list[object] = [describe(pipe).fingerprint, fingerprint({"vae": denoiser_of(pipe).vae})]
    key += [type(pipe.scheduler).__name__, scheduler]
    key += [list(config.class_prompt), config.class_images, size, _STEPS, _GUIDANCE, _BATCH]
    key += [config.precision, config.quantize, config.clip_skip]
    name = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:16]
    return (config.cache or config.run_dir.parent / "class_images") / f"class_{name}"


def _of_folders(config: ResolvedConfig, parts: Parts, tell: Observer) -> list[TrainingImage]:
    """Pictures of the regularisation folders. Those without caption get the first class prompt, if there is one."""
    missing: MissingCaptions | None = "empty" if config.class_prompt else None
    found = parts.counted(parts.read(tell, "reading pictures of the class", missing=missing, of_class=True))
    usual = next((_caption(prompt, config) for prompt in config.class_prompt), "")
    return [one if one.caption else replace(one, caption=usual) for one in found]


def _drawn(
    config: ResolvedConfig, pipe: Pipeline, tell: Observer, drawing: Drawing, processes: Processes
) -> list[TrainingImage]:
    """Pictures that the base draws, or drew before. A batch that is not all there is drawn again."""
    step = denoiser_of(pipe).step
    size = config.resolution // step * step
    folder = class_folder(config, pipe, size)
    given = [config.class_prompt[number % len(config.class_prompt)] for number in range(config.class_images)]
    prompts = [Wildcards().draw(prompt, number) for number, prompt in enumerate(given)]
    seeds = [seed_of("class picture", number) for number in range(len(prompts))]
    paths = [folder / f"{number:04}.png" for number in range(len(prompts))]
    starts = range(0, len(prompts), _BATCH)
    # Before any is written: all who draw have to draw the same.
    undrawn = [start for start in starts if not all(path.is_file() for path in paths[start : start + _BATCH])]
    missing = processes.agreed(undrawn)
    if processes.measures:
        tell(ClassPictures(len(prompts), folder))
        with explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
        tick = progress(tell, "drawing pictures of the class")
        for start in starts:
            own = slice(start, start + _BATCH)
            if start in missing:
                with small_vae(denoiser_of(pipe).vae, size):
                    # The base's own sampler and noise of each picture's own seed: the same pictures wherever they are drawn.
                    found = drawing.class_pictures(
                        pipe,
                        prompts[own],
                        seeds[own],
                        size=size,
                        steps=_STEPS,
                        guidance=_GUIDANCE,
                        clip_skip=config.clip_skip,
                    )
                    for path, picture in zip(paths[own], found, strict=True):
                        if processes.leads:
                            write_bytes(path, _png(picture))
            tick(min(start + _BATCH, len(prompts)), len(prompts))
    processes.wait()
    checked = [check_picture(path) for path in paths]
    return [
        TrainingImage(
            path,
            f"class/{path.name}",
            _caption(prompt, config),
            "none",
            one.width,
            one.height,
            one.digest,
            dataset=DRAWN,
        )
        for path, prompt, one in zip(paths, prompts, checked, strict=True)
    ]


def _caption(prompt: str, config: ResolvedConfig) -> str:
    """What a picture is learned with that the base drew for a prompt."""
    return prompt if config.weighted_captions else words(prompt)


def _png(picture: Image.Image) -> bytes:
    data = io.BytesIO()
    picture.save(data, format="PNG")
    return data.getvalue()
