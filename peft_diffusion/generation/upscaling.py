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


def enlarged(drawn: Tensor | Sequence[Image.Image], hires: Hires, size: tuple[int, int], factor: int) -> Any:
    """Make larger what the first pass drew.

    Args:
        drawn: Latents, (batch, channels, height, width); or pictures, where the upscaler is one of pictures.
        hires: The second pass.
        size: Width and height in pixels of what is wanted.
        factor: Pixels a side for one latent.

    Returns:
        Latents or pictures of that size.
    """
    if not isinstance(drawn, Tensor):
        return [image.resize(size, Image.Resampling.LANCZOS) for image in drawn]
    width, height = size
    sides = height // factor, width // factor
    told = UPSCALERS[hires.upscaler] or {}
    return interpolate(drawn.float(), size=sides, **told).to(drawn.dtype)


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
