"""What a network predicts, found by asking it: the noise, or v.

Files say it in a configuration or not at all, and a wrong one ruins a run without a word: losses are merely high. But at
much noise the answers are far apart. With the signal power ``p``, a network that predicts the noise answers with nearly all
of it, as there is little else in its input. One that predicts ``v = sqrt(p) noise - sqrt(1 - p) latents`` (Salimans and Ho
2022, https://arxiv.org/abs/2202.00512) answers with little of the noise, and with what it makes of the picture.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ...bases.noise import Prediction, target

TESTED: tuple[Prediction, ...] = ("epsilon", "v_prediction")
PICTURES = 4  # that are asked about
_POWERS = (0.03, 0.1)  # of the signal, at which they are asked: much noise, and not so much that nothing else is left
_LEAST = 0.02  # share of v that a network explains which predicts it at all


@dataclass(frozen=True)
class Answers:
    """What a network answered to noisy latents.

    Attributes:
        answer: (batch, channels, height, width), float32, as all that follow.
        latents: Clean.
        noise: That was added.
        power: Of the signal; a scalar.
    """

    answer: Tensor
    latents: Tensor
    noise: Tensor
    power: Tensor


def places(powers: Tensor) -> list[int]:
    """Choose the timesteps that are asked at.

    Args:
        powers: The signal power of each, (timesteps,).

    Returns:
        Those whose powers are nearest to what the test needs.
    """
    return [int((powers - wanted).abs().argmin()) for wanted in _POWERS]


def fitting(answers: Sequence[Answers]) -> Prediction | None:
    """Find what a network predicts.

    The answer's share of the noise, by least squares, is near 1 for the noise and near ``sqrt(p)`` for v. Where it is nearer
    to 1 the noise is predicted. Where it is not, v is, if the answer explains some of it: a network that knows nothing does
    not.

    Args:
        answers: Of the network, to noisy latents.

    Returns:
        What it predicts; None where neither fits.
    """
    shares, middles, explained = [], [], []
    for one in answers:
        shares.append(float((one.answer * one.noise).sum() / one.noise.square().sum()))
        middles.append((1 + float(one.power.sqrt())) / 2)
        v = target("v_prediction", one.latents, one.noise, one.power.expand(len(one.answer)))
        explained.append(1 - float((one.answer - v).square().sum() / v.square().sum()))
    count = len(answers)
    share, middle = sum(shares) / count, sum(middles) / count
    if middle < share < 1 + middle:
        noise = [1 - float((one.answer - one.noise).square().sum() / one.noise.square().sum()) for one in answers]
        return "epsilon" if sum(noise) / count > 0 else None
    return "v_prediction" if share < middle and sum(explained) / count > _LEAST else None
