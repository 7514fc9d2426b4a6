"""A second pass over a larger picture, as A1111's hires fix: what can be asked of it, and its steps. Imports no torch."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ..core.errors import UserError, did_you_mean

LANCZOS = "lanczos"
UPSCALERS: Mapping[str, Mapping[str, Any] | None] = MappingProxyType(
    {
        "latent": {"mode": "bilinear", "antialias": False},
        "latent-antialiased": {"mode": "bilinear", "antialias": True},
        "latent-bicubic": {"mode": "bicubic", "antialias": False},
        "latent-bicubic-antialiased": {"mode": "bicubic", "antialias": True},
        "latent-nearest": {"mode": "nearest", "antialias": False},
        "latent-nearest-exact": {"mode": "nearest-exact", "antialias": False},
        LANCZOS: None,
    }
)
"""By name: how latents are interpolated, as A1111's ``latent_upscale_modes`` has it; None where the picture is resized."""

_STRENGTH = 0.7  # as A1111 has it
_NEARLY_ALL = 0.999  # as A1111 bounds it, so that the picture of the first pass is never left behind wholly


def upscaler(text: str) -> str:
    """Read the name of an upscaler, as ``--hires-upscaler`` or A1111 calls it.

    Args:
        text: Such as "latent-bicubic" or "Latent (bicubic)".

    Returns:
        A name in `UPSCALERS`.

    Raises:
        UserError: There is none of the name.
    """
    name = re.sub(r"[\W_]+", "-", text.lower()).strip("-")
    if name not in UPSCALERS:
        raise UserError(f"there is no upscaler {text!r}; there are: {', '.join(UPSCALERS)}{did_you_mean(name, UPSCALERS)}")
    return name


def label(name: str) -> str:
    """Say what A1111 calls an upscaler.

    Args:
        name: As `upscaler` gives it.

    Returns:
        Its name there.
    """
    kind, _, manner = name.partition("-")
    told = manner if manner == "nearest-exact" else manner.replace("-", " ")
    return kind.capitalize() + (f" ({told})" if told else "")


@dataclass(frozen=True)
class Hires:
    """The second pass of a picture.

    Attributes:
        factor: How many times larger each side gets, above 1.
        upscaler: A name in `UPSCALERS`.
        strength: How far what the first pass drew is left behind, above 0 to 1: the share of the noise levels.
        steps: The denoising steps that are taken.
    """

    factor: float
    upscaler: str
    strength: float
    steps: int

    @classmethod
    def asked(cls, factor: float, name: str | None, strength: float | None, steps: int) -> "Hires":
        """Fill in what was left out.

        Args:
            factor: How many times larger.
            name: The upscaler; None for A1111's usual one, ``latent``.
            strength: None for A1111's usual one, 0.7.
            steps: The steps.

        Returns:
            The second pass.
        """
        return cls(factor, name or "latent", _STRENGTH if strength is None else strength, steps)

    @property
    def planned(self) -> int:
        """Steps from pure noise on, of which the last `steps` are taken, as A1111's ``setup_img2img_steps`` counts them."""
        return max(self.steps, int(self.steps / min(self.strength, _NEARLY_ALL)))

    @property
    def begins(self) -> float:
        """The share of the planned steps that is taken, such that diffusers, which rounds down, takes exactly those."""
        return min(1.0, (self.steps + 0.5) / self.planned)

    def size(self, width: int, height: int, step: int) -> tuple[int, int]:
        """Tell how large the picture gets.

        Args:
            width: Pixels of the first pass.
            height: Pixels of the first pass.
            step: Pixels that sides are multiples of.

        Returns:
            Width and height in pixels, rounded down to what the base can make.
        """
        wide, high = (int(side * self.factor) // step * step for side in (width, height))
        return wide, high
