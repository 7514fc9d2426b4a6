"""Gain: a factor for each output of a layer."""

from collections.abc import Mapping, Set
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peft_diffusion.core.adapter import Adapter, float32_parameter
from peft_diffusion.core.method import Method


@dataclass(frozen=True)
class Gain(Method, name="gain", suffixes=frozenset({"gain"})):
    @classmethod
    def recognizes(cls, suffixes: Set[str]) -> bool:
        return "gain" in suffixes

    def serves(self, site: nn.Module) -> bool:
        return isinstance(site, nn.Linear)

    def build(self, site: nn.Module) -> "GainAdapter":
        return GainAdapter(torch.zeros(len(site.get_parameter("weight"))))

    @classmethod
    def read(cls, site: nn.Module, tensors: Mapping[str, Tensor]) -> "GainAdapter":
        return GainAdapter(tensors["gain"])


class GainAdapter(Adapter):
    def __init__(self, gain: Tensor) -> None:
        super().__init__()
        self.gain = float32_parameter(gain)

    def residual(self, x: Tensor, y: Tensor, base: Tensor) -> Tensor:
        return y * self.gain.to(y.dtype)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight * self.gain[:, None], None if bias is None else bias * self.gain

    def state(self) -> dict[str, Tensor]:
        return {"gain": self.gain}
