"""A new method is one file, `toy_method.py`: of under 20 lines it keeps the laws, and commands know it by `--plugin`."""

import copy
import inspect
from collections.abc import Callable
from pathlib import Path

import laws
import pytest
import torch
from conftest import make_pipe
from toy_method import Gain, GainAdapter

from peft_diffusion.bases import components


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


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__[5:10])
def test_it_keeps_the_law(law: Callable[[laws.Case], None], case: laws.Case) -> None:
    law(case)


@pytest.mark.slow
def test_it_keeps_the_laws_of_files_images_and_copies(case: laws.Case, tmp_path: Path) -> None:
    copied, other = copy.deepcopy(case), copy.deepcopy(case)
    laws.test_law_5_save_and_load_keep_every_bit(case, tmp_path)
    laws.test_law_6_strengths_per_image_equal_separate_runs(other)
    with torch.no_grad():
        copied.trained()
        copied.strength(0.6)
        assert laws.dependence(copied, copy.deepcopy) == []
