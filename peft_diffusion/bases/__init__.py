"""What a base is: Stable Diffusion pipelines and causal language models, from a folder, a hub, and the embedded ones."""

from typing import TYPE_CHECKING

from ..core.lazy import lazy
from .embedded import embedded

if TYPE_CHECKING:
    from .causal_lm import LanguageInfo, LanguageModel, load_lm
    from .digest import fingerprint, identity
    from .kinds import components, describe, inpaints
    from .stable_diffusion import BaseInfo, load_base

__all__ = [
    "BaseInfo",
    "LanguageInfo",
    "LanguageModel",
    "components",
    "describe",
    "embedded",
    "fingerprint",
    "identity",
    "inpaints",
    "load_base",
    "load_lm",
]

# Finding an embedded file must not cost an import of torch, nor must text cost one of diffusers.
__getattr__, __dir__ = lazy(
    __name__,
    {
        "BaseInfo": "stable_diffusion",
        "LanguageInfo": "causal_lm",
        "LanguageModel": "causal_lm",
        "components": "kinds",
        "describe": "kinds",
        "fingerprint": "digest",
        "identity": "digest",
        "inpaints": "kinds",
        "load_base": "stable_diffusion",
        "load_lm": "causal_lm",
    },
)
