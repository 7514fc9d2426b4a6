"""The forward process of a diffusion model, as pure functions of latents, noise and the schedule's signal powers.

``power`` is alphas_cumprod at the timesteps of a batch: the share of a noisy latent's variance that is signal, (batch,).
"""

from typing import Literal, TypeAlias, cast, get_args

from torch import Tensor

from ..core.errors import UserError

Prediction: TypeAlias = Literal["epsilon", "v_prediction"]


def prediction_type(name: str) -> Prediction:
    """Check what a base predicts.

    Args:
        name: As the configuration of its scheduler says it.

    Returns:
        The same.

    Raises:
        UserError: It is nothing that can be trained.
    """
    if name not in get_args(Prediction):
        raise UserError(f"the base predicts {name!r}; training knows {', '.join(get_args(Prediction))}")
    return cast(Prediction, name)


def noisy(latents: Tensor, noise: Tensor, power: Tensor) -> Tensor:
    """Add noise to latents (Ho et al. 2020, https://arxiv.org/abs/2006.11239, equation 4).

    Args:
        latents: Clean, (batch, channels, height, width).
        noise: Standard normal, of the same shape.
        power: (batch,), from 0 to 1.

    Returns:
        ``sqrt(power) * latents + sqrt(1 - power) * noise``.
    """
    power = over(power, latents)
    return power.sqrt() * latents + (1 - power).sqrt() * noise


def target(prediction: Prediction, latents: Tensor, noise: Tensor, power: Tensor) -> Tensor:
    """Compute what the network should answer.

    Args:
        prediction: What it predicts.
        latents: Clean, (batch, channels, height, width).
        noise: What was added, of the same shape.
        power: (batch,), from 0 to 1.

    Returns:
        The noise for epsilon; for v, ``sqrt(power) * noise - sqrt(1 - power) * latents`` (Salimans and Ho 2022,
        https://arxiv.org/abs/2202.00512).
    """
    if prediction == "epsilon":
        return noise
    power = over(power, latents)
    return power.sqrt() * noise - (1 - power).sqrt() * latents


def zero_terminal(powers: Tensor) -> Tensor:
    """Shift and scale a schedule so that no signal is left at its last timestep.

    Lin et al. 2023, algorithm 1 (https://arxiv.org/abs/2305.08891).

    Args:
        powers: (timesteps,), from 1 downwards.

    Returns:
        (timesteps,), ending at 0.
    """
    roots = powers.double().sqrt()
    first, last = roots[0], roots[-1]
    return ((roots - last) * (first / (first - last))).square().to(powers.dtype)


def over(values: Tensor, latents: Tensor) -> Tensor:
    """Shape one value an image so that it broadcasts over latents.

    Args:
        values: (batch,).
        latents: (batch, ...).

    Returns:
        (batch, 1, ...).
    """
    return values.view(-1, *[1] * (latents.ndim - 1))
