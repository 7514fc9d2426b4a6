"""The network that denoises, as training and generation reach it: one protocol, and one file for each kind of network.

A kind is a class that derives from `Denoiser`. `Family.kind` names it, and `base.denoiser_of` finds the one of a pipeline.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from ..core.errors import UserError
from . import family as families
from . import noise as noise_process
from .family import Family
from .noise import Prediction
from .pipelines import Pipeline, images_drawn
from .prompts import TextSide
from .schedulers import SCHEDULERS, SchedulerTable


@dataclass(frozen=True)
class Conditioning:
    """What a network is conditioned on besides noisy latents and timesteps.

    Attributes:
        hidden: Hidden states of the prompts, (batch, tokens, width).
        added: Further inputs, by the names that the network gives them.
        inpainting: For a base that inpaints: the mask, and the latents of the image without what it hides, (batch,
            1 + channels, height, width); None for others.
    """

    hidden: Tensor
    added: Mapping[str, Tensor] = field(default_factory=dict)
    inpainting: Tensor | None = None


@dataclass(frozen=True)
class NetworkCall:
    """One call of a network that denoises, as a hook on it sees it.

    Attributes:
        rows: Images in its batch, each twice where classifier-free guidance doubles the batch.
        timestep: On the scale of the scheduler's timesteps; of a batch, that of the first image.
    """

    rows: int
    timestep: Tensor | float


class Denoiser(Protocol):
    """A pipeline's network that denoises, and what belongs to it.

    What is defined here suits latents of diffusers' `AutoencoderKL` and networks that are called with latents and timestep
    first; a kind for which it is otherwise overrides it.

    Attributes:
        schedulers: Schedulers that can generate with it.
        pipeline_class: The class that reads a folder of such a pipeline, where diffusers has none of the name that
            `model_index.json` gives.
        pipe: The pipeline.
        text: The tokenizers and text encoders.
        size_conditioned: Whether it is conditioned on the sizes and crops of images, (batch, 6).
        inpaints: Whether it is conditioned on a mask and what that leaves: see `Conditioning.inpainting`.
    """

    schedulers: ClassVar[SchedulerTable] = SCHEDULERS
    pipeline_class: ClassVar[type | None] = None
    pipe: Pipeline
    text: TextSide
    size_conditioned: bool = False
    inpaints: bool = False

    def __init__(self, pipe: Pipeline) -> None:
        """Take a pipeline. Raises UserError where it lacks what this kind needs."""

    @classmethod
    def recognizes(cls, pipe: object) -> bool:
        """Tell whether a pipeline is one that this class reaches the network of.

        Args:
            pipe: Anything.

        Returns:
            Whether it is.
        """

    @property
    def family(self) -> Family:
        """The family that the base belongs to."""

    @property
    def network(self) -> nn.Module:
        """The network itself, which carries adapters."""

    @property
    def resolution(self) -> int:
        """Pixels a side of the square image that the base was made for."""

    @property
    def step(self) -> int:
        """Pixels that the sides of an image are multiples of."""

    @property
    def vae(self) -> Any:
        """The autoencoder, a module of diffusers: latents are what its posterior gives, before `scaled`."""
        return self.pipe.vae

    @property
    def channels(self) -> int:
        """Channels of latents."""
        return int(self.vae.config.latent_channels)

    @property
    def factor(self) -> int:
        """Pixels a side of the image for one of its latents."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def prediction(self) -> str:
        """What the network predicts, as the scheduler's configuration says it."""
        return str(self.pipe.scheduler.config.get("prediction_type", "epsilon"))

    @property
    def steps_alike(self) -> bool:
        """Whether the pipeline draws from noise by nothing but the network, classifier-free guidance and the scheduler, with
        one network input for all steps beside latents and timestep: then pictures at different steps may share a call."""
        return False

    def check_learns(self) -> None:
        """See that adapters can be trained on the network.

        Raises:
            UserError: They cannot; says what to train on.
        """

    def powers(self) -> Tensor:
        """The signal power at each timestep of training, whatever scheduler the pipeline generates with.

        Returns:
            alphas_cumprod, (timesteps,), float32.
        """
        from diffusers import DDPMScheduler  # which language models need not wait for

        powers: Tensor = DDPMScheduler.from_config(self.pipe.scheduler.config).alphas_cumprod
        return powers

    def scaled(self, latents: Tensor) -> Tensor:
        """Scale and shift latents of the VAE to what the network takes.

        Args:
            latents: (..., channels, height, width).

        Returns:
            Of the same shape.
        """
        config = self.vae.config
        shift = float(getattr(config, "shift_factor", None) or 0.0)
        return (latents - shift) * float(config.scaling_factor)

    def conditioning(self, encoding: tuple[Tensor, ...], inputs: Mapping[str, Tensor]) -> Conditioning:
        """Name what the network is conditioned on, in its dtype.

        Args:
            encoding: What `text` gives: hidden states (batch, tokens, width), and perhaps a summary (batch, width).
            inputs: Of a batch: ``sizes`` (batch, 6) where `size_conditioned`, ``inpainting`` where `inpaints`.

        Returns:
            What `predict` takes.
        """
        return Conditioning(encoding[0].to(next(self.network.parameters()).dtype))

    def prompt_arguments(self, encoding: tuple[Tensor, ...], against: tuple[Tensor, ...] | None) -> Mapping[str, Tensor]:
        """Say what the pipeline is called with in place of prompts.

        Args:
            encoding: What `text` gives for the prompts.
            against: What it gives for the negative prompts, of the same lengths; None without guidance.

        Returns:
            Arguments of the pipeline's call, as diffusers' pipelines for Stable Diffusion name them.
        """
        names = ("prompt_embeds", "pooled_prompt_embeds")
        told = dict(zip(names, encoding, strict=False))
        return told | {f"negative_{name}": one for name, one in zip(names, against or (), strict=False)}

    @property
    def zeroes_negative(self) -> bool:
        """Whether the base was trained to be told nothing by zeros, as SDXL was, and not by an empty prompt."""
        return bool(self.pipe.config.get("force_zeros_for_empty_prompt", False))

    def noised(self, latents: Tensor, noise: Tensor, power: Tensor, prediction: Prediction) -> Tensor:
        """Add noise to latents: see `noise.noisy`.

        Args:
            latents: Clean, as the network takes them, (batch, channels, height, width).
            noise: Standard normal, of the same shape.
            power: Signal power, (batch,).
            prediction: What the network predicts.

        Returns:
            Of the shape of the latents.
        """
        return noise_process.noisy(latents, noise, power, prediction)

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Call the network.

        Args:
            noisy: Latents, (batch, channels, height, width).
            timesteps: Indices into `powers`, (batch,).
            conditioning: See `conditioning`.

        Returns:
            Its prediction, (batch, channels, height, width).
        """

    def target(self, latents: Tensor, noise: Tensor, power: Tensor, prediction: Prediction) -> Tensor:
        """Compute what the network should predict: see `noise.target`.

        Args:
            latents: Clean, as the network takes them.
            noise: What was added.
            power: (batch,).
            prediction: What it predicts.

        Returns:
            Of the shape of the latents.
        """
        return noise_process.target(prediction, latents, noise, power)

    @classmethod
    def read_call(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> NetworkCall:
        """Read from a call of the network how many images there are, and at which timestep.

        Args:
            args: Positional arguments of the network's ``forward``.
            kwargs: Its arguments by name.

        Returns:
            What both say.
        """
        sample = kwargs["sample"] if "sample" in kwargs else args[0]
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        return NetworkCall(len(sample), timestep)

    @classmethod
    def images(cls, pipeline: Pipeline, rows: int) -> int:
        """Count the images that a pipeline generates.

        Args:
            pipeline: The one that calls the network.
            rows: The batch of the call.

        Returns:
            Half of it where classifier-free guidance doubles the batch.
        """
        return images_drawn(pipeline, rows)


def kinds() -> tuple[type[Denoiser], ...]:
    """List the kinds of networks that families have.

    Returns:
        Their classes, in the order of the families.

    Raises:
        UserError: One that a family names cannot be imported.
    """
    return tuple(_kind(name) for name in dict.fromkeys(family.kind for family in families.every()) if name is not None)


@cache
def _kind(name: str) -> type[Denoiser]:
    module, _, attribute = name.partition(":")
    try:
        found: type[Denoiser] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"the kind of network {name!r} of a family of bases cannot be imported: {error}") from error
    return found
