"""The diffusion loss as pure functions of latents, noise and the schedule's signal powers.

``power`` is alphas_cumprod at the timesteps of a batch: the share of a noisy latent's variance that is signal, (batch,).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ...bases.noise import Prediction, over
from ..settings.choices import HuberSchedule, Loss, TimestepBias


@dataclass(frozen=True)
class Timesteps:
    """Which timesteps are drawn, and how often.

    Attributes:
        bias: Bends the shares: half of all are then in the last fourth of the schedule (later), in the first (earlier), or
            around its middle (logit-normal, Esser et al. 2024, https://arxiv.org/abs/2403.03206, equation 19).
        within: The first one, and the one after the last; None for all.
        mean: Of the logits; above 0 are more in the noisier half.
        std: Of the logits.
    """

    bias: TimestepBias = "none"
    within: tuple[int, int] | None = None
    mean: float = 0.0
    std: float = 1.0


def timesteps(batch: int, count: int, chosen: Timesteps, generator: torch.Generator) -> Tensor:
    """Draw timesteps: one from each of as many equal shares of the schedule, in random order.

    Each by itself is as likely as any other, but together they cover the schedule, and their mean loss varies less (Kingma
    et al. 2021, https://arxiv.org/abs/2107.00630, appendix I.1).

    Args:
        batch: How many.
        count: The timesteps that there are.
        chosen: Which of them.
        generator: The chance.

    Returns:
        (batch,), from 0 to ``count - 1``.
    """
    places = torch.randperm(batch, generator=generator) + torch.rand(batch, generator=generator, dtype=torch.float64)
    share = places / batch
    if chosen.bias == "later":
        share = 1 - (1 - share).square()
    elif chosen.bias == "earlier":
        share = share.square()
    elif chosen.bias == "logit-normal":
        share = torch.sigmoid(chosen.mean + chosen.std * torch.special.ndtri(share))
    first, end = chosen.within or (0, count)
    return (first + share * (end - first)).long().clamp(max=end - 1)


def noise(shape: tuple[int, ...], offset: float, generator: torch.Generator) -> Tensor:
    """Draw Gaussian noise, with an offset of whole channels (https://www.crosslabs.org/blog/diffusion-with-offset-noise).

    Args:
        shape: (batch, channels, height, width).
        offset: How much noise that is constant over a channel is added.
        generator: The chance.

    Returns:
        Of that shape.
    """
    drawn = torch.randn(shape, generator=generator)
    return drawn + offset * torch.randn(*shape[:2], 1, 1, generator=generator) if offset else drawn


def pyramid(noise: Tensor, discount: float, generator: torch.Generator) -> Tensor:
    """Add more noise, as fine and then coarser, each of 2 to 4 times fewer rows than the one before, at random, down to one.

    https://wandb.ai/johnowhitaker/multires_noise/reports/Multi-Resolution-Noise-for-Diffusion-Model-Training--VmlldzozNjYyOTU2
    in the reading of sd-scripts (``pyramid_noise_like``), but for the deviation, which is that of each image here.

    Args:
        noise: (batch, channels, height, width).
        discount: How strong each is, over the one before.
        generator: The chance.

    Returns:
        Of that shape; each image has a deviation of 1.
    """
    height, width = size = noise.shape[-2:]
    level = 0
    while level == 0 or min(height, width) > 1:
        divisor = (2 + 2 * float(torch.rand((), generator=generator))) ** level
        height, width = (max(1, int(side / divisor)) for side in size)
        coarse = torch.randn(*noise.shape[:2], height, width, generator=generator)
        noise = noise + discount**level * F.interpolate(coarse, size, mode="bilinear")
        level += 1
    return noise / noise.flatten(1).std(1).view(-1, 1, 1, 1)


def min_snr_weights(prediction: Prediction, power: Tensor, gamma: float) -> Tensor:
    """Weigh the loss by Min-SNR-gamma (Hang et al. 2023, https://arxiv.org/abs/2303.09556).

    Args:
        prediction: What the network predicts.
        power: (batch,).
        gamma: The signal to noise ratio from which weights grow no more.

    Returns:
        ``min(SNR, gamma)`` times what turns the error of the prediction into that of the image, (batch,): ``1 / SNR`` for
        epsilon, where no signal is left 1; ``1 / (SNR + 1)`` for v; ``1 / (1 + sqrt(SNR))^2`` for a flow.
    """
    if prediction == "epsilon":
        return (gamma * (1 - power) / power).clamp(max=1.0)
    snr = power / (1 - power)
    return snr.clamp(max=gamma) / _over_image(prediction, snr)


def debiased_weights(prediction: Prediction, power: Tensor) -> Tensor:
    """Weigh the loss by debiased estimation (Yu et al. 2024, https://arxiv.org/abs/2310.08442).

    Args:
        prediction: What the network predicts.
        power: (batch,).

    Returns:
        ``1 / sqrt(SNR)`` for epsilon, with an SNR of at most 1000 as in sd-scripts; else what turns the error of the
        prediction into that of the image: ``1 / (SNR + 1)`` for v, ``1 / (1 + sqrt(SNR))^2`` for a flow. (batch,), finite
        where no signal is left.
    """
    if prediction == "v_prediction":
        return 1 - power
    snr = (power / (1 - power)).clamp(max=1000.0)
    return snr.clamp(min=1e-4).rsqrt() if prediction == "epsilon" else 1 / _over_image(prediction, snr)


def _over_image(prediction: Prediction, snr: Tensor) -> Tensor:
    """The squared error of the prediction over that of the image, for v and for a flow."""
    return snr + 1 if prediction == "v_prediction" else (1 + snr.sqrt()).square()


def huber_deltas(schedule: HuberSchedule, c: float, timesteps: Tensor, power: Tensor, count: int) -> Tensor:
    """Compute the error from which a Huber loss is linear, as sd-scripts does.

    Args:
        schedule: ``exponential`` falls with the timestep, ``snr`` with the noise, ``constant`` not.
        c: The lowest, above 0 and up to 1.
        timesteps: (batch,).
        power: (batch,).
        count: The timesteps that there are.

    Returns:
        (batch,), from 1 at a clean image down to ``c``.
    """
    if schedule == "constant":
        return torch.full_like(power, c)
    if schedule == "exponential":
        return torch.exp(timesteps.to(power.dtype) * (math.log(c) / count))
    sigma = ((1 - power) / power.clamp(min=1e-12)).sqrt()
    return (1 - c) / (1 + sigma).square() + c


def errors(answer: Tensor, wanted: Tensor, kind: Loss = "l2", deltas: Tensor | None = None) -> Tensor:
    """Compute the error of every number.

    The pseudo-Huber losses of sd-scripts: ``2 d (sqrt(e^2 + d^2) - d)``, and for smooth L1 the same without the factor d.

    Args:
        answer: (batch, channels, height, width).
        wanted: Of the same shape.
        kind: l2, huber or smooth-l1.
        deltas: (batch,), for what is not squared.

    Returns:
        Of that shape, float32.
    """
    squared = (answer.float() - wanted.float()).square()
    if kind == "l2" or deltas is None:
        return squared
    delta = over(deltas, squared)
    smooth = 2 * squared / ((squared + delta.square()).sqrt() + delta)  # exact for small errors too
    return delta * smooth if kind == "huber" else smooth


def per_image(errors: Tensor, where: Tensor | None = None) -> Tensor:
    """Average errors over each image, or over a part of it.

    Args:
        errors: (batch, channels, height, width).
        where: (batch, 1, height, width) from 0 to 1; what is at 0 adds nothing.

    Returns:
        (batch,).
    """
    if where is None:
        return errors.flatten(1).mean(1)
    return (errors * where).flatten(1).mean(1) / where.flatten(1).mean(1).clamp(min=1e-6)


def loss(answer: Tensor, wanted: Tensor, weights: Tensor | None = None) -> Tensor:
    """Compute the mean squared error in float32, each image with its weight.

    Args:
        answer: (batch, channels, height, width).
        wanted: Of the same shape.
        weights: (batch,).

    Returns:
        A scalar.
    """
    return weighted(per_image(errors(answer, wanted)), weights)


def weighted(losses: Tensor, weights: Tensor | None) -> Tensor:
    """Average losses, each with its weight.

    Args:
        losses: (batch,).
        weights: (batch,); None for 1 each.

    Returns:
        A scalar.
    """
    return losses.mean() if weights is None else (losses * weights).mean()


def counted(loss: Tensor, share: Tensor) -> Tensor:
    """Let the gradient of a loss count for more or less, and leave its value, which people read, as it is.

    Args:
        loss: A scalar.
        share: A scalar: what the gradient is multiplied by.

    Returns:
        A scalar of the loss's value.
    """
    value = loss.detach()
    return value + share * (loss - value)
