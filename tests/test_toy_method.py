"""A new method is one file: this one, of under 20 lines, keeps the laws as they stand."""

import copy
import inspect
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path

import laws
import pytest
import torch
from conftest import make_pipe
from torch import Tensor, nn

from peft_diffusion.bases import components
from peft_diffusion.core.adapter import Adapter, float32_parameter
from peft_diffusion.core.method import Method


@dataclass(frozen=True)
class Gain(Method, name="gain", suffixes=frozenset({"gain"})):
    @classmethod
    def recognizes(cls, suffixes: Set[str]) -> bool:
        return "gain" in suffixes

    def serves(self, site: nn.Module) -> bool:
        return isinstance(site, nn.Linear)

    def build(self, site: nn.Module) -> Adapter:
        return GainAdapter(torch.zeros(len(site.get_parameter("weight"))))

    @classmethod
    def read(cls, site: nn.Module, tensors: Mapping[str, Tensor]) -> Adapter:
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


@pytest.fixture(params=["unet", "text_encoder"])
def case(request: pytest.FixtureRequest) -> laws.Case:
    torch.manual_seed(0)
    pipe = make_pipe()
    model = components(pipe)[request.param]
    return laws.Case(request.param, model, Gain(), "attention+ff", torch.float32, pipe)


def test_it_is_short() -> None:
    written = inspect.getsource(Gain) + inspect.getsource(GainAdapter)
    code = [line for line in written.splitlines() if line.strip() and not line.strip().startswith("@")]
    assert len(code) < 20


LAWS = (
    laws.test_law_1_a_fresh_adapter_and_strength_0_change_no_bit,
    laws.test_law_2_detach_gives_back_class_keys_and_bits,
    laws.test_law_3_folding_equals_running_and_restores_the_bytes,
    laws.test_law_4_only_the_adapter_learns,
    laws.test_law_7_checkpointing_gives_the_same_gradients,
    laws.test_law_7_compile_sees_new_strengths_without_recompiling,
)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__[5:10])
def test_it_keeps_the_law(law: Callable[[laws.Case], None], case: laws.Case) -> None:
    law(case)


def test_it_keeps_the_laws_of_files_images_and_copies(case: laws.Case, tmp_path: Path) -> None:
    copied = copy.deepcopy(case)
    laws.test_law_5_save_and_load_keep_every_bit(case, tmp_path)
    laws.test_law_8_copies_are_equal_and_independent(copied, copy.deepcopy)


@pytest.mark.parametrize("packed", [False, True])
def test_it_keeps_the_law_of_images(case: laws.Case, packed: bool) -> None:
    laws.test_law_6_strengths_per_image_equal_separate_runs(case, packed)
