"""(IA)3: a factor for each channel.

Liu et al. 2022, https://arxiv.org/abs/2205.05638. Names are those of LyCORIS.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...core.method import LYCORIS, Method, Network, Rates, Scalars, Shapes, Values
from ...core.parsing import Patterns

if TYPE_CHECKING:
    from torch import Tensor

    from ...core.adapter import Site
    from .adapter import Ia3Adapter

WEIGHT, ON_INPUT = "weight", "on_input"
ON_BIAS = "on_bias"
"""Of peft's files: a mark that the factors multiply the bias too."""

_PEFT = "ia3_l"


@dataclass(frozen=True)
class Ia3(Method, name="ia3", suffixes=frozenset({WEIGHT, ON_INPUT, ON_BIAS})):
    """What the weight makes of the input is multiplied by 1 + w, one w an output or, with ``on_input``, one an input.

    The paper has it on keys, values (outputs) and the second layer of the feed-forward (inputs). The bias stays as it is,
    as in LyCORIS; in files of peft it is multiplied too, as peft does.
    """

    constants: ClassVar[frozenset[str]] = frozenset({ON_INPUT, ON_BIAS})
    aliases: ClassVar[Mapping[str, str]] = {_PEFT: WEIGHT}
    rates: ClassVar[Rates] = Rates(factor=30.0, text=3e-3)

    on_input: bool = False

    @classmethod
    def recognizes(cls, suffixes: Set[str]) -> bool:
        """By the mark that LyCORIS sets."""
        return ON_INPUT in suffixes

    @classmethod
    def needed(cls, suffixes: Set[str]) -> Sequence[str]:
        """The factors."""
        return (WEIGHT,)

    def serves(self, site: "Site") -> bool:
        """Linear layers and convolutions without groups."""
        from ..shared.affine import serves

        return serves(site)

    def build(self, site: "Site") -> "Ia3Adapter":
        """Factors of 1, kept as their distance from 1."""
        from .adapter import fresh

        return fresh(site, self.on_input)

    @classmethod
    def read(cls, site: "Site", tensors: Mapping[str, "Tensor"]) -> "Ia3Adapter":
        """From the LyCORIS layout."""
        from .adapter import read

        return read(site, tensors)

    @classmethod
    def read_hyper_parameters(cls, shapes: Shapes, scalars: Scalars) -> Values | None:
        """On which side the factors are."""
        if not cls.recognizes(shapes.keys()):
            return None
        return {"on_input": bool(scalars.get(ON_INPUT)), **({"on_bias": True} if scalars.get(ON_BIAS) else {})}

    @classmethod
    def from_alias(cls, alias: str, tensor: "Tensor") -> "Tensor":
        """peft keeps the factors themselves, with the other sides of the weight at 1."""
        return (tensor.float() - 1).flatten()  # in halves the distance would be rounded

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], path: str, shapes: Shapes) -> Mapping[str, float]:
        """On which side the factors are, and that those of the outputs multiply the bias."""
        if WEIGHT not in shapes:
            return {}
        told = config.get("feedforward_modules")
        if isinstance(told, str):
            on_input = Patterns({told: True}, "", "adapter_config.json").value(path, False)
        elif isinstance(told, list):
            on_input = any(path.endswith(str(one)) for one in told)
        else:
            shape = shapes[WEIGHT]
            on_input = not config and len(shape) == 2 and shape[0] == 1  # without a configuration, as a Linear tells it
        return {ON_INPUT: float(on_input), ON_BIAS: float(not on_input)}

    @classmethod
    def network(cls, values: Mapping[str, Any]) -> Network:
        """LyCORIS' own, which has no rank."""
        return Network(LYCORIS, None, None, {"algo": "ia3"})
