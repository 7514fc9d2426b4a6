"""Options of diffusers that would change or drop what adapters do without a word: they are refused in words."""

from typing import Any

from torch import nn

from ..bases import components, pipelines
from ..bases.base import Base
from ..core import site as sites
from ..core.errors import UserError
from ..core.registry import Registry
from .watch import Watch


def refuse_fused(network: nn.Module, doing: str) -> None:
    """See that no adapter sits at a projection that ``fuse_qkv_projections`` has put out of use.

    Fused attention computes queries, keys and values from a copy of their weights, so what sits at the projections is asked
    no more.

    Args:
        network: The network that denoises.
        doing: What the caller is about to do, as "load an adapter".

    Raises:
        UserError: One does.
    """
    fused = pipelines.fused_attentions(network)
    if not fused:
        return
    idle = {f"{path}.{name}" for path in fused for name in ("to_q", "to_k", "to_v")}
    reached = sorted(idle & sites.sites(network).keys())
    if reached:
        raise UserError(
            f"cannot {doing}: fuse_qkv_projections() put {reached[0]} out of use, so the adapter there is not asked; call"
            " pipe.unfuse_qkv_projections(), or merge() the adapters and fuse then"
        )


class OptionWatch(Watch):
    """A hook that runs before each call of a network whose pipeline carries adapters."""

    def __call__(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise UserError for an option that adapters do not follow."""
        network = pipelines.uncompiled(network)
        scale = (kwargs.get("cross_attention_kwargs") or {}).get("scale")
        if scale is not None and scale != 1 and self._carried(network):
            raise UserError(
                f"cross_attention_kwargs scale={scale} is for diffusers' own LoRA, and adapters of peft_diffusion do not"
                " follow it; set their strengths with Adapters(pipe).set, and leave scale away"
            )
        found = sites.strengths(network)
        if found is not None and not found.merged:
            refuse_fused(network, "draw")

    def _carried(self, network: nn.Module) -> bool:
        if sites.strengths(network) is not None:
            return True
        pipe = pipelines.drawing_with(network) or self.pipe  # a text encoder may carry some, which scale is for as well
        return pipe is not None and carries(pipe)


def carries(pipe: Base) -> bool:
    """Tell whether a base has adapters.

    Args:
        pipe: The base.

    Returns:
        Whether any of its components does.
    """
    return bool(Registry(components(pipe)).names)
