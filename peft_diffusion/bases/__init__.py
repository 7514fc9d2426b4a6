"""What a base is: Stable Diffusion pipelines from a folder, a hub, a single file, and the embedded one."""

from typing import TYPE_CHECKING, Any

from .embedded import embedded

if TYPE_CHECKING:
    from .digest import fingerprint, identity
    from .stable_diffusion import BaseInfo, components, describe, load_base

__all__ = ["BaseInfo", "components", "describe", "embedded", "fingerprint", "identity", "load_base"]


def __getattr__(name: str) -> Any:
    # Finding an embedded file must not cost an import of torch.
    if name in ("fingerprint", "identity"):
        from . import digest as module
    elif name in __all__:
        from . import stable_diffusion as module  # type: ignore[no-redef]
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(module, name)
