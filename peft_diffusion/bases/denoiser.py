"""The network that denoises, as training and drawing reach it: one protocol, and one file for each kind of network.

A kind is registered with `register`, and `Family.kind` names it; `base.denoiser_of` finds that of a pipeline.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from ..core.errors import UserError
from .family import Family
from .noise import Prediction
from .pipelines import Pipeline
from .prompts import TextSide


@dataclass(frozen=True)
class Conditioning:
    """What a network is told besides noisy latents and timesteps.

    Attributes:
        hidden: Hidden states of the prompts, (batch, tokens, width).
        added: Further inputs, by the names that the network gives them.
        masked: For a base that paints parts of an image anew: the mask, and the latents of the image without what it hides,
            (batch, 1 + channels, height, width); None for others.
    """

    hidden: Tensor
    added: Mapping[str, Tensor] = field(default_factory=dict)
    masked: Tensor | None = None


class Denoiser(Protocol):
    """A pipeline's network that denoises, and what belongs to it.

    Attributes:
        kind: The name that `Family.kind` gives it.
        pipe: The pipeline.
        text: The tokenizers and text encoders.
        told_sizes: Whether it is told the sizes and crops of images, (batch, 6).
        told_masks: Whether it is told a mask and what that leaves: see `Conditioning.masked`.
    """

    kind: ClassVar[str]
    pipe: Pipeline
    text: TextSide
    told_sizes: bool
    told_masks: bool

    def __init__(self, pipe: Any) -> None:
        """Take a pipeline. Raises UserError where it lacks what this kind needs."""

    @classmethod
    def recognizes(cls, pipe: Any) -> bool:
        """Whether a pipeline denoises with a network of this kind."""

    @property
    def family(self) -> Family:
        """The family that the base belongs to."""

    @property
    def network(self) -> nn.Module:
        """The network itself, which carries adapters."""

    @property
    def channels(self) -> int:
        """Channels of latents."""

    @property
    def resolution(self) -> int:
        """Pixels a side of the square image that the base was made for."""

    @property
    def step(self) -> int:
        """Pixels that the sides of an image are multiples of."""

    @property
    def prediction(self) -> str:
        """What the network predicts, as the scheduler's configuration says it."""

    def powers(self) -> Tensor:
        """The signal power of each timestep in training, (timesteps,)."""

    def scaled(self, latents: Tensor) -> Tensor:
        """The VAE's latents as the network knows them, of the same shape."""

    def conditioning(self, encoding: tuple[Tensor, ...], inputs: Mapping[str, Tensor]) -> Conditioning:
        """What the network is told: of the prompts, and of ``sizes`` and ``shown`` among the inputs of a batch."""

    @staticmethod
    def call(args: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[Tensor, Any]:
        """The noisy latents (batch, ...) and the timestep among what a pipeline calls the network with."""

    def predict(self, noisy: Tensor, timesteps: Tensor, told: Conditioning) -> Tensor:
        """The network's answer to noisy latents (batch, channels, height, width) at timesteps (batch,), of their shape."""

    def target(self, latents: Tensor, noise: Tensor, power: Tensor, prediction: Prediction) -> Tensor:
        """What it should answer, of the shape of the latents; ``power`` is (batch,)."""


KINDS: dict[str, type[Denoiser]] = {}
"""The kinds of networks by name."""


def register(kind: type[Denoiser]) -> None:
    """Add a kind of network.

    Args:
        kind: A class that keeps the protocol.

    Raises:
        UserError: Another kind has its name.
    """
    if KINDS.setdefault(kind.kind, kind) is not kind:
        raise UserError(f"there is a kind of network {kind.kind!r} already; give the new one another name")
