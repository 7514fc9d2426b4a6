"""UNets of Stable Diffusion 1, 2 and XL, and of their inpainting versions, as denoisers."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, cat, nn

from ..core.errors import UserError
from . import family as families
from .denoiser import Conditioning, register
from .family import Family
from .noise import Prediction, target
from .pipelines import Pipeline
from .prompts import TextSide

_NEEDED = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
_WIDTHS = (320, 640, 1280, 1280)
_BY_TEXT_WIDTH = {768: "sd1", 1024: "sd2"}


class UNetDenoiser:
    """The UNet of a pipeline: see `Denoiser`."""

    kind: ClassVar[str] = "unet"

    def __init__(self, pipe: Any) -> None:
        """Take a pipeline.

        Args:
            pipe: A pipeline of diffusers.

        Raises:
            UserError: It lacks a part, or its UNet takes other latents than its VAE gives.
        """
        missing = [name for name in _NEEDED if getattr(pipe, name, None) is None]
        if missing:
            raise UserError(f"{type(pipe).__name__} is no Stable Diffusion with a UNet: it has no {', '.join(missing)}")
        self.pipe: Pipeline = pipe
        self.unet: Any = pipe.unet
        self.config: Any = pipe.unet.config
        self.told_sizes = getattr(self.config, "addition_embed_type", None) == "text_time"
        self.told_masks = self.config.in_channels == 2 * self.channels + 1
        if self.config.in_channels != self.channels and not self.told_masks:
            raise UserError(
                f"the UNet takes {self.config.in_channels} channels, for latents of {self.channels}: a"
                f" {type(pipe).__name__} is neither a Stable Diffusion nor its inpainting version"
            )
        readers = [(one.name, one.tokenizer) for one in families.components("text encoder").values()]
        self.text = TextSide(
            [
                (getattr(pipe, tokenizer), encoder)
                for name, tokenizer in readers
                if tokenizer is not None and (encoder := getattr(pipe, name, None)) is not None
            ]
        )

    @classmethod
    def recognizes(cls, pipe: Any) -> bool:
        """Tell whether a pipeline has a UNet.

        Args:
            pipe: A pipeline of diffusers.

        Returns:
            True with an attribute of that name.
        """
        return getattr(pipe, "unet", None) is not None

    @property
    def family(self) -> Family:
        """Stable Diffusion 1, 2 or XL by the shape of the UNet; else that of small bases."""
        if self.told_sizes:
            return families.find("sdxl")
        if tuple(self.config.block_out_channels) != _WIDTHS:
            return families.SMALL_DIFFUSION
        return families.find(_BY_TEXT_WIDTH.get(self.config.cross_attention_dim, families.SMALL_DIFFUSION.name))

    @property
    def network(self) -> nn.Module:
        """The UNet."""
        unet: nn.Module = self.unet
        return unet

    @property
    def channels(self) -> int:
        """Channels of the VAE's latents."""
        return int(self.pipe.vae.config.latent_channels)

    @property
    def resolution(self) -> int:
        """Pixels a side of a square image, from the size of the UNet's sample."""
        size = self.config.sample_size
        return int(size if isinstance(size, int) else min(size)) * self._factor

    @property
    def step(self) -> int:
        """What the VAE and the UNet downsample by together."""
        return int(self._factor * 2 ** (len(self.config.block_out_channels) - 1))

    @property
    def prediction(self) -> str:
        """As the scheduler's configuration says it."""
        return str(self.pipe.scheduler.config.get("prediction_type", "epsilon"))

    @property
    def _factor(self) -> int:
        return int(2 ** (len(self.pipe.vae.config.block_out_channels) - 1))

    def powers(self) -> Tensor:
        """The schedule that training goes by, whatever sampler the pipeline has.

        Returns:
            alphas_cumprod, (timesteps,), float32.
        """
        from diffusers import DDPMScheduler  # which language models need not wait for

        powers: Tensor = DDPMScheduler.from_config(self.pipe.scheduler.config).alphas_cumprod
        return powers

    def scaled(self, latents: Tensor) -> Tensor:
        """Scale and shift latents.

        Args:
            latents: Those of the VAE, (..., channels, height, width).

        Returns:
            Those of the UNet.
        """
        config = self.pipe.vae.config
        shift = float(getattr(config, "shift_factor", None) or 0.0)
        return (latents - shift) * float(config.scaling_factor)

    def conditioning(self, encoding: tuple[Tensor, ...], inputs: Mapping[str, Tensor]) -> Conditioning:
        """Name what the UNet is told, in its dtype.

        Args:
            encoding: Hidden states (batch, tokens, width) and, for XL, the summary (batch, width).
            inputs: Of a batch; ``sizes`` (batch, 6) for XL, and ``shown`` for an inpainting base.

        Returns:
            What `predict` takes.
        """
        dtype = next(self.network.parameters()).dtype
        hidden, *summary = (tensor.to(dtype) for tensor in encoding)
        added = {"text_embeds": summary[0], "time_ids": inputs["sizes"]} if self.told_sizes else {}
        return Conditioning(hidden, added, inputs["shown"].to(dtype) if self.told_masks else None)

    @staticmethod
    def call(args: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[Tensor, Any]:
        """Find the sample and the timestep in a call of the UNet.

        Args:
            args: What it is given by place.
            named: What it is given by name.

        Returns:
            The noisy latents, (batch, channels, height, width), and the timestep, a number or a tensor.
        """
        sample = named["sample"] if "sample" in named else args[0]
        return sample, named["timestep"] if "timestep" in named else args[1]

    def predict(self, noisy: Tensor, timesteps: Tensor, told: Conditioning) -> Tensor:
        """Ask the UNet.

        Args:
            noisy: Latents, (batch, channels, height, width).
            timesteps: (batch,), whole numbers.
            told: See `conditioning`.

        Returns:
            Its answer, (batch, channels, height, width).
        """
        sample = noisy if told.masked is None else cat([noisy, told.masked], 1)
        answer: Tensor = self.unet(
            sample,
            timesteps,
            encoder_hidden_states=told.hidden,
            added_cond_kwargs=dict(told.added) or None,
            return_dict=False,
        )[0]
        return answer

    def target(self, latents: Tensor, noise: Tensor, power: Tensor, prediction: Prediction) -> Tensor:
        """Compute what the UNet should answer: see `noise.target`.

        Args:
            latents: Clean, as the UNet knows them.
            noise: What was added.
            power: (batch,).
            prediction: What it predicts.

        Returns:
            The target, of the shape of the latents.
        """
        return target(prediction, latents, noise, power)


register(UNetDenoiser)
