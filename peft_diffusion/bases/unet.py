"""UNets of Stable Diffusion 1, 2 and XL, and of their inpainting versions, as denoisers."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, cat, nn

from ..core.errors import UserError
from . import family as families
from .denoiser import Conditioning, Denoiser
from .family import Family
from .pipelines import Pipeline, uncompiled
from .prompts import TextSide

_NEEDED = ("unet", "vae", "scheduler")
_FIRST_READER, _REFINERS_READER = ("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")
_PREDICTIONS = ("epsilon", "v_prediction", "flow_prediction", "sample")
_WIDTHS = (320, 640, 1280, 1280)
_BY_TEXT_WIDTH = {768: "sd1", 1024: "sd2"}


def family_of(config: Any) -> Family:
    """Tell the family of a UNet by its configuration alone.

    Args:
        config: That of diffusers' ``UNet2DConditionModel``.

    Returns:
        Stable Diffusion 1, 2 or XL by its widths; else that of small bases.
    """
    if _is_size_conditioned(config):
        return families.find("sdxl")
    if tuple(config.block_out_channels) != _WIDTHS:
        return families.SMALL_DIFFUSION
    return families.find(_BY_TEXT_WIDTH.get(config.cross_attention_dim, families.SMALL_DIFFUSION.name))


def _is_size_conditioned(config: Any) -> bool:
    return getattr(config, "addition_embed_type", None) == "text_time"


class UNetDenoiser(Denoiser):
    """The UNet of a pipeline."""

    def __init__(self, pipe: Pipeline) -> None:
        """Take a pipeline.

        Args:
            pipe: A pipeline of diffusers.

        Raises:
            UserError: It lacks a part, or its UNet takes other latents than its VAE gives.
        """
        refines = all(getattr(pipe, name, None) is not None for name in _REFINERS_READER)
        needed = _NEEDED if refines else (*_NEEDED, *_FIRST_READER)
        missing = [name for name in needed if getattr(pipe, name, None) is None]
        if missing:
            raise UserError(f"{type(pipe).__name__} is no Stable Diffusion with a UNet: it has no {', '.join(missing)}")
        self.pipe = pipe
        self.unet: Any = getattr(pipe, "unet")  # noqa: B009  (not every pipeline has one)
        self.config: Any = self.unet.config
        self._check()
        self.size_conditioned = _is_size_conditioned(self.config)
        self.inpaints = self.config.in_channels == 2 * self.channels + 1
        if self.config.in_channels != self.channels and not self.inpaints:
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

    def _check(self) -> None:
        """Raises UserError for a configuration that says no size, or nothing that can be predicted."""
        size, name = getattr(self.config, "sample_size", None), type(self.pipe).__name__
        sides = size if isinstance(size, (list, tuple)) else [size]
        if not sides or not all(type(side) is int and side > 0 for side in sides):
            raise UserError(
                f"the UNet of this {name} has the sample_size {size!r} in its config.json, not a number of latents"
            )
        if self.prediction not in _PREDICTIONS:
            raise UserError(
                f"the scheduler of this {name} has the prediction_type {self.prediction!r}; known are"
                f" {', '.join(_PREDICTIONS)}"
            )

    @classmethod
    def recognizes(cls, pipe: object) -> bool:
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
        return family_of(self.config)

    @property
    def network(self) -> nn.Module:
        """The UNet, without the wrapper of ``torch.compile`` where it has one."""
        return uncompiled(self.unet)

    @property
    def resolution(self) -> int:
        """Pixels a side of a square image, from the size of the UNet's sample."""
        size = self.config.sample_size
        return int(size if isinstance(size, int) else min(size)) * self.factor

    @property
    def step(self) -> int:
        """What the VAE and the UNet downsample by together."""
        return int(self.factor * 2 ** (len(self.config.block_out_channels) - 1))

    @property
    def steps_alike(self) -> bool:
        """Whether it is the plain pipeline from text to image: others call the UNet, or guide, in ways of their own."""
        from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

        return type(self.pipe) in (StableDiffusionPipeline, StableDiffusionXLPipeline)

    def check_learns(self) -> None:
        """See that it is not the refiner of Stable Diffusion XL, which has one text encoder of the two.

        Raises:
            UserError: It is.
        """
        if self.size_conditioned and len(self.text.sides) == 1:
            raise UserError("this is the refiner of Stable Diffusion XL, which finishes pictures; train on its base")

    def conditioning(self, encoding: tuple[Tensor, ...], inputs: Mapping[str, Tensor]) -> Conditioning:
        """Name what the UNet is conditioned on, in its dtype.

        Args:
            encoding: Hidden states (batch, tokens, width) and, for XL, the summary (batch, width).
            inputs: Of a batch: ``sizes`` (batch, 6) for XL, and ``inpainting`` for an inpainting base.

        Returns:
            What `predict` takes.
        """
        dtype = next(self.network.parameters()).dtype
        hidden, *summary = (tensor.to(dtype) for tensor in encoding)
        added = {"text_embeds": summary[0], "time_ids": inputs["sizes"]} if self.size_conditioned else {}
        return Conditioning(hidden, added, inputs["inpainting"].to(dtype) if self.inpaints else None)

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Call the UNet.

        Args:
            noisy: Latents, (batch, channels, height, width).
            timesteps: (batch,), whole numbers.
            conditioning: See `conditioning`.

        Returns:
            Its prediction, (batch, channels, height, width).
        """
        sample = noisy if conditioning.inpainting is None else cat([noisy, conditioning.inpainting], 1)
        prediction: Tensor = self.unet(
            sample,
            timesteps,
            encoder_hidden_states=conditioning.hidden,
            added_cond_kwargs=dict(conditioning.added) or None,
            return_dict=False,
        )[0]
        return prediction
