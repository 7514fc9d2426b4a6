"""What can be asked of a base of either kind: a Stable Diffusion pipeline, or a causal language model."""

from typing import TYPE_CHECKING, Any, overload

from torch import nn

if TYPE_CHECKING:
    from .causal_lm import LanguageInfo, LanguageModel
    from .stable_diffusion import BaseInfo

COMPONENTS = ("unet", "text_encoder", "text_encoder_2", "lm")


def components(base: Any) -> dict[str, nn.Module]:
    """The parts that can carry adapters: of unet, text_encoder, text_encoder_2 and lm those that the base has."""
    return {name: part for name in COMPONENTS if isinstance(part := getattr(base, name, None), nn.Module)}


def inpaints(pipe: Any) -> bool:
    """Whether a pipeline's UNet is told, beside noisy latents, a mask and the picture without what it hides."""
    latents = int(pipe.vae.config.latent_channels)
    found: int = pipe.unet.config.in_channels
    return found == 2 * latents + 1


@overload
def describe(base: "LanguageModel") -> "LanguageInfo": ...
@overload
def describe(base: Any) -> "BaseInfo": ...
def describe(base: Any) -> "BaseInfo | LanguageInfo":
    """What an adapter must know of a base: name, family and identity among it."""
    from .causal_lm import LanguageModel

    if isinstance(base, LanguageModel):
        return base.describe()
    from .stable_diffusion import describe_pipeline  # brings diffusers, which text does not need

    return describe_pipeline(base)
