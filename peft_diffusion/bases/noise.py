"""The forward process of a diffusion model, as pure functions of latents, noise and the schedule's signal powers.

``power`` is alphas_cumprod at the timesteps of a batch: the share of a noisy latent's variance that is signal, (batch,).
"""

from typing import Literal, TypeAlias, cast, get_args

import torch
from torch import Tensor

from ..core.errors import UserError

Prediction: TypeAlias = Literal["epsilon", "v_prediction", "flow_prediction"]
"""What a network predicts: the noise; ``sqrt(power) * noise - sqrt(1 - power) * latents``; or ``noise - latents``."""


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


def noisy(latents: Tensor, noise: Tensor, power: Tensor, prediction: Prediction = "epsilon") -> Tensor:
    """Add noise to latents.

    Args:
        latents: Clean, (batch, channels, height, width).
        noise: Standard normal, of the same shape.
        power: (batch,), from 0 to 1.
        prediction: What the network predicts, which tells the process that it was trained on.

    Returns:
        ``sqrt(power) * latents + sqrt(1 - power) * noise`` (Ho et al. 2020, https://arxiv.org/abs/2006.11239, equation 4).
        For a flow the same divided by the sum of both factors, which is a straight line from latents to noise (Lipman et al.
        2023, https://arxiv.org/abs/2210.02747).
    """
    power = over(power, latents)
    signal, spread = power.sqrt(), (1 - power).sqrt()
    mixed = signal * latents + spread * noise
    return mixed / (signal + spread) if prediction == "flow_prediction" else mixed


def target(prediction: Prediction, latents: Tensor, noise: Tensor, power: Tensor) -> Tensor:
    """Compute what the network should answer.

    Args:
        prediction: What it predicts.
        latents: Clean, (batch, channels, height, width).
        noise: What was added, of the same shape.
        power: (batch,), from 0 to 1.

    Returns:
        The noise for epsilon; for v, ``sqrt(power) * noise - sqrt(1 - power) * latents`` (Salimans and Ho 2022,
        https://arxiv.org/abs/2202.00512); for a flow, ``noise - latents``.
    """
    if prediction == "epsilon":
        return noise
    if prediction == "flow_prediction":
        return noise - latents
    power = over(power, latents)
    return power.sqrt() * noise - (1 - power).sqrt() * latents


def flow_powers(count: int) -> Tensor:
    """The signal power at each timestep of a flow.

    Args:
        count: Timesteps in all.

    Returns:
        (count,), float32: ``(1 - t)^2 / ((1 - t)^2 + t^2)`` for t from ``1 / count`` to 1.
    """
    times = torch.arange(1, count + 1, dtype=torch.float64) / count
    signal = (1 - times).square()
    return (signal / (signal + times.square())).float()


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
