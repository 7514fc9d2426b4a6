"""What the second pass of a picture begins with: what the first drew, made larger, and noise of its own."""

import copy
from collections.abc import Sequence
from typing import Any

from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from ..bases import denoiser_of
from ..bases.pipelines import Pipeline
from ..core.errors import UserError
from .hires import LANCZOS, UPSCALERS, Hires
from .settings import Tile
from .source import beginning_with_pictures


def check(pipe: Pipeline, hires: Hires) -> None:
    """See that a pipeline can take a second pass.

    Args:
        pipe: The pipeline.
        hires: The second pass.

    Raises:
        UserError: It cannot.
    """
    denoiser = denoiser_of(pipe)
    if denoiser.inpaints:
        raise UserError(f"--hires is for bases that draw whole pictures, and a {type(pipe).__name__} paints parts anew")
    if UPSCALERS[hires.upscaler] is not None and denoiser.channels != 4:
        # Pipelines of diffusers know latents that they are given in place of a picture by that number.
        raise UserError(
            f"latents of {denoiser.channels} channels are not enlarged here; give --hires-upscaler {LANCZOS}, which enlarges"
            " pictures"
        )
    second(pipe)


def second(pipe: Pipeline) -> Pipeline:
    """Make the pipeline of the second pass, which starts from what the first drew.

    Args:
        pipe: The pipeline of the first.

    Returns:
        One of the same parts.

    Raises:
        UserError: diffusers has none.
    """
    made = beginning_with_pictures(pipe)
    if made is None:
        raise UserError(f"a {type(pipe).__name__} cannot start from a picture, so it has no second pass; leave --hires away")
    return made


def enlarged(
    drawn: Tensor | Sequence[Image.Image], hires: Hires, size: tuple[int, int], factor: int, tile: Tile | None
) -> Any:
    """Make larger what the first pass drew.

    Args:
        drawn: Latents, (batch, channels, height, width); or pictures, where the upscaler is one of pictures.
        hires: The second pass.
        size: Width and height in pixels of what is wanted.
        factor: Pixels a side for one latent.
        tile: Which edges of a picture meet.

    Returns:
        Latents or pictures of that size.
    """
    across, down = (3 if tile in (axis, "both") else 1 for axis in ("x", "y"))  # what lies beyond edges that meet
    width, height = size
    if not isinstance(drawn, Tensor):
        whole = [_repeated(image, across, down) for image in drawn]
        larger = [image.resize((across * width, down * height), Image.Resampling.LANCZOS) for image in whole]
        left, upper = across // 2 * width, down // 2 * height
        return [image.crop((left, upper, left + width, upper + height)) for image in larger]
    width, height = width // factor, height // factor
    told = UPSCALERS[hires.upscaler] or {}
    latents = interpolate(drawn.float().repeat(1, 1, down, across), size=(down * height, across * width), **told)
    middle = latents[:, :, down // 2 * height :, across // 2 * width :][:, :, :height, :width]
    return middle.to(drawn.dtype)


def _repeated(image: Image.Image, across: int, down: int) -> Image.Image:
    """A picture, side by side and one below the other."""
    whole = Image.new(image.mode, (across * image.width, down * image.height))
    for column in range(across):
        for row in range(down):
            whole.paste(image, (column * image.width, row * image.height))
    return whole


def noised_by(scheduler: Any, noise: Tensor) -> Any:
    """Copy a scheduler, so that the noise that it adds to what a pipeline starts from is this one.

    A pipeline that starts from a picture draws its noise itself, in the precision of the device and from one seed.

    Args:
        scheduler: The scheduler.
        noise: (batch, channels, height, width), on any device.

    Returns:
        The copy.
    """
    own = copy.copy(scheduler)
    add = getattr(own, "add_noise", None)  # bound to the copy

    def add_noise(samples: Tensor, _: Tensor, timesteps: Tensor) -> Tensor:
        found: Tensor = add(samples, noise.to(samples), timesteps)  # type: ignore[misc]
        return found

    if add is not None:
        own.add_noise = add_noise
    return own
