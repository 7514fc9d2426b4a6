"""A method of one's own: declared, trained, saved, drawn with. For the commands: ``--method ssf --plugin own_method``."""

import argparse
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import peft_diffusion as pd
from peft_diffusion.core.adapter import Adapter, float32_parameter
from peft_diffusion.core.method import Method


@dataclass(frozen=True)
class SSF(Method, name="ssf", suffixes=frozenset({"ssf_scale", "ssf_shift"})):
    """SSF: a factor and a summand for each output of a layer (Lian et al. 2022, https://arxiv.org/abs/2210.08823)."""

    @classmethod
    def recognizes(cls, suffixes: Set[str]) -> bool:
        return cls.suffixes <= suffixes

    def serves(self, site: nn.Module) -> bool:
        return isinstance(site, nn.Linear) and site.bias is not None

    def build(self, site: nn.Module) -> "SSFAdapter":
        return SSFAdapter(*torch.zeros(2, len(site.get_parameter("bias"))))

    @classmethod
    def read(cls, site: nn.Module, tensors: Mapping[str, Tensor]) -> "SSFAdapter":
        return SSFAdapter(tensors["ssf_scale"], tensors["ssf_shift"])


class SSFAdapter(Adapter):
    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.scale, self.shift = float32_parameter(scale), float32_parameter(shift)

    def residual(self, x: Tensor, y: Tensor, base: Tensor) -> Tensor:  # what is added to the output y of the layer
        return self.scale.to(y.dtype) * y + self.shift.to(y.dtype)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:  # the same, added to its weights
        return self.scale[:, None] * weight, self.shift if bias is None else self.scale * bias + self.shift

    def state(self) -> dict[str, Tensor]:
        return {"ssf_scale": self.scale, "ssf_shift": self.shift}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", default="samples/styles/openmoji", type=Path, help="of pictures")
    parser.add_argument("--steps", default=20, type=int, help="of the training; 300 show the style well")
    parser.add_argument("--resolution", default=64, type=int, help="pixels a side; 128 is the base's own")
    given = parser.parse_args()
    small = pd.TrainConfig((given.folder,), batch_size=2, held_out=0, preview_steps=0, resolution=given.resolution)
    result = pd.train(replace(small, method="ssf", unet_lr=0.02, steps=given.steps, output=Path("ssf.safetensors")))
    pd.generate(pd.GenerateConfig(("openmoji emoji of a cat",), adapter=(str(result.output),), output=Path("ssf.png")))
    print(*result.lines(), "drew ssf.png with it", sep="\n")
