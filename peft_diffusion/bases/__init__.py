"""What a base is: Stable Diffusion pipelines and causal language models, from a folder, a hub, and the embedded ones."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .embedded import embedded

if TYPE_CHECKING:
    from .causal_lm import LanguageInfo, LanguageModel, load_lm
    from .digest import fingerprint, identity
    from .kinds import components, describe
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
    "load_base",
    "load_lm",
]

# Finding an embedded file must not cost an import of torch, nor must text cost one of diffusers.
_HOMES = {
    "BaseInfo": "stable_diffusion",
    "LanguageInfo": "causal_lm",
    "LanguageModel": "causal_lm",
    "components": "kinds",
    "describe": "kinds",
    "fingerprint": "digest",
    "identity": "digest",
    "load_base": "stable_diffusion",
    "load_lm": "causal_lm",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
