"""The diffusion loss as pure functions of latents, noise and the schedule's signal powers.

``power`` is alphas_cumprod at the timesteps of a batch: the share of a noisy latent's variance that is signal, (batch,).
"""

from typing import Literal, TypeAlias, cast, get_args

import torch
from torch import Tensor

from ..core.errors import UserError

Prediction: TypeAlias = Literal["epsilon", "v_prediction"]


def prediction_type(name: str) -> Prediction:
    """What the base predicts. Raises UserError for what cannot be trained."""
    if name not in get_args(Prediction):
        raise UserError(f"the base predicts {name!r}; training knows {', '.join(get_args(Prediction))}")
    return cast(Prediction, name)


def timesteps(batch: int, count: int, generator: torch.Generator) -> Tensor:
    """Timesteps drawn uniformly from 0 to ``count - 1``, (batch,)."""
    return torch.randint(count, (batch,), generator=generator)


def noise(shape: tuple[int, ...], offset: float, generator: torch.Generator) -> Tensor:
    """Gaussian noise (batch, channels, height, width), plus ``offset`` times noise that is constant over each channel.

    https://www.crosslabs.org/blog/diffusion-with-offset-noise
    """
    drawn = torch.randn(shape, generator=generator)
    return drawn + offset * torch.randn(*shape[:2], 1, 1, generator=generator) if offset else drawn


def noisy(latents: Tensor, noise: Tensor, power: Tensor) -> Tensor:
    """Latents at their timesteps (Ho et al. 2020, equation 4)."""
    power = _over(power, latents)
    return power.sqrt() * latents + (1 - power).sqrt() * noise


def target(prediction: Prediction, latents: Tensor, noise: Tensor, power: Tensor) -> Tensor:
    """What the network should answer: the noise, or v = sqrt(p) noise - sqrt(1 - p) latents (Salimans and Ho 2022)."""
    if prediction == "epsilon":
        return noise
    power = _over(power, latents)
    return power.sqrt() * noise - (1 - power).sqrt() * latents


def min_snr_weights(prediction: Prediction, power: Tensor, gamma: float) -> Tensor:
    """Min-SNR-gamma weights of the loss (Hang et al. 2023), (batch,).

    ``min(SNR, gamma) / SNR`` for epsilon, ``min(SNR, gamma) / (SNR + 1)`` for v; the first is 1 where no signal is left.
    """
    if prediction == "epsilon":
        return (gamma * (1 - power) / power).clamp(max=1.0)
    snr = power / (1 - power)
    return snr.clamp(max=gamma) / (snr + 1)


def loss(answer: Tensor, wanted: Tensor, weights: Tensor | None = None) -> Tensor:
    """The mean squared error in float32, each image with its weight."""
    per_image = (answer.float() - wanted.float()).square().flatten(1).mean(1)
    return per_image.mean() if weights is None else (per_image * weights).mean()


def _over(values: Tensor, latents: Tensor) -> Tensor:
    """Values per image as (batch, 1, 1, 1)."""
    return values.view(-1, *[1] * (latents.ndim - 1))
