"""What a base is: Stable Diffusion pipelines and causal language models, from a folder, a hub, and the embedded ones."""

from typing import TYPE_CHECKING

from ..core.lazy import lazy
from .embedded import embedded

if TYPE_CHECKING:
    from .base import BaseInfo, components, denoiser_of, describe
    from .causal_lm import LanguageInfo, LanguageModel, load_lm
    from .digest import checksum, fingerprint
    from .stable_diffusion import load_base

__all__ = [
    "BaseInfo",
    "LanguageInfo",
    "LanguageModel",
    "checksum",
    "components",
    "denoiser_of",
    "describe",
    "embedded",
    "fingerprint",
    "load_base",
    "load_lm",
]

# Finding an embedded file must not cost an import of torch, nor must text cost one of diffusers.
if not TYPE_CHECKING:  # or a type checker takes any name for one of the package
    __getattr__, __dir__ = lazy(
        __name__,
        {
            "BaseInfo": "base",
            "LanguageInfo": "causal_lm",
            "LanguageModel": "causal_lm",
            "components": "base",
            "denoiser_of": "base",
            "describe": "base",
            "checksum": "digest",
            "fingerprint": "digest",
            "load_base": "stable_diffusion",
            "load_lm": "causal_lm",
        },
    )
