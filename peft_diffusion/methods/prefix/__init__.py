"""Prefixes: learned rows of keys and values that attention takes in.

Prefix tuning (Li and Liang 2021, https://arxiv.org/abs/2101.00190) puts rows P_k and P_v before the keys and values. He et
al. 2022 (https://arxiv.org/abs/2110.04366, eq. 7) show that a head then computes

    (1 - g) softmax(q K^T) V  +  g softmax(q P_k^T) P_v

where g is the share of the softmax that the prefix takes. The first term shrinks what the base knew, even before anything
is learned. Here it stays whole, and the prefix is a sum of its own, as in LLaMA-Adapter (Zhang et al. 2023,
https://arxiv.org/abs/2303.16199), whose softmax over the prefix is apart from the other and has a gate that begins at zero:

    softmax(q K^T) V  +  softmax(q P_k^T) P_v

The gate is a factor of P_v, so P_v itself begins at zero: a fresh prefix changes no bit, and strength scales the term
exactly.

In a causal language model a prefix is what it is in peft: rows that stand in the cache before those of the text, which one
softmax runs over. A gate of each attention weighs what that changes. It begins at zero, so that a fresh prefix changes no
bit; at gate 1 and strength 1 the output is peft's.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ...core.errors import UserError
from ...core.method import Method, Rates, Scalars, Shapes, Values, VirtualRows
from ..shared.hyper_parameters import side

if TYPE_CHECKING:
    from torch import Tensor

    from ...core.adapter import Site
    from .adapter import CausalPrefixAdapter, PrefixAdapter

KEYS, VALUES, GATE = "prefix_keys", "prefix_values", "prefix_gate"


@dataclass(frozen=True)
class Prefix(Method, name="prefix", suffixes=frozenset({KEYS, VALUES, GATE})):
    """``length`` learned rows of keys and values at each attention: target ``attentions``, or in a UNet one kind of them.

    Parameters at a site: 2 * length * width of the heads of keys together, and in a language model 1, the gate.
    """

    target: ClassVar[str] = "attentions"
    rates: ClassVar[Rates] = Rates(factor=30.0, text=1e-2, text_small=3e-2)

    length: int = 16

    def __post_init__(self) -> None:
        if self.length < 1:
            raise UserError(f"length must be at least 1, not {self.length}")

    @classmethod
    def recognizes(cls, suffixes: Set[str]) -> bool:
        """By its own names."""
        return KEYS in suffixes

    @classmethod
    def needed(cls, suffixes: Set[str]) -> Sequence[str]:
        """Keys and values; the gate of causal attention is asked of the site."""
        return (KEYS, VALUES)

    def serves(self, site: "Site") -> bool:
        """Attention as UNets of diffusers have it, without norms of its own; in language models, with rotary positions."""
        from .adapter import serves

        return serves(site)

    def build(self, site: "Site") -> "PrefixAdapter | CausalPrefixAdapter":
        """Keys of the size that normalized queries have; what makes them change nothing, values or a gate, zero."""
        from .adapter import fresh

        return fresh(site, self.length)

    @classmethod
    def read(cls, site: "Site", tensors: Mapping[str, "Tensor"]) -> "PrefixAdapter | CausalPrefixAdapter":
        """From keys of our own."""
        from .adapter import read

        return read(site, tensors)

    @classmethod
    def from_virtual_tokens(cls, kind: str, width: int, layers: int) -> Sequence[VirtualRows]:
        """Prefix tuning, of which peft keeps the rows of all attentions side by side, keys before values, and no gate."""
        if kind != "PREFIX_TUNING" or layers < 1 or width % (2 * layers):
            return ()
        own, found = width // (2 * layers), []
        for layer in range(layers):
            start = 2 * layer * own
            found.append(VirtualRows(layer, KEYS, (start, start + own), {GATE: 1.0}))
            found.append(VirtualRows(layer, VALUES, (start + own, start + 2 * own)))
        return found

    @classmethod
    def read_hyper_parameters(cls, shapes: Shapes, scalars: Scalars) -> Values | None:
        """The number of rows."""
        return {"length": side(shapes, KEYS, 0)} if cls.recognizes(shapes.keys()) else None
