"""The laws on a base that torchao quantized: int8 weight-only, as diffusers' and transformers' own loaders make it."""

import copy
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import laws
import pytest
import torch
from conftest import make_pipe
from laws import (  # noqa: F401
    Case,
    same,
    state,
    test_law_1_a_fresh_adapter_and_strength_0_change_no_bit,
    test_law_2_detach_gives_back_class_keys_and_bits,
    test_law_4_only_the_adapter_learns,
    test_law_5_save_and_load_keep_every_bit,
    test_law_6_strengths_per_image_equal_separate_runs,
    test_law_7_checkpointing_gives_the_same_gradients,
)
from torch import nn

from peft_diffusion import formats
from peft_diffusion.bases import components, describe, fingerprint
from peft_diffusion.core import merge, quantized, site
from peft_diffusion.core.errors import UserError
from peft_diffusion.core.merge import dense_weight
from peft_diffusion.methods.lora import Lora

pytest.importorskip("torchao")
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

ON_UNET = [name for name, (_, target) in laws.METHODS.items() if "conv" not in target and target not in laws.LACKING["unet"]]
CASES = [
    *((name, "unet", "float32") for name in ON_UNET),
    ("lora", "text_encoder", "bfloat16"),
    ("tokens", "text_encoder", "float32"),
    ("dora", "lm", "float32"),
]


def is_inner(module: nn.Module, path: str) -> bool:
    return isinstance(module, nn.Linear) and path != "lm_head"  # whose weight is the embedding's


# Daily work sees LoRA, and a method that asks for the whole weight.
DAILY_FIRST = [pytest.param(one, marks=() if one[0] in ("lora", "dora") else pytest.mark.slow) for one in CASES]


@pytest.fixture(params=DAILY_FIRST, ids="-".join)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    name, component, dtype = request.param
    method, target = laws.METHODS[name]
    torch.manual_seed(0)
    model = components(laws.base_of(component))[component]
    if component == "unet":  # fewer layers of the same kinds, above all fewer convolutions, which nothing here quantizes
        model = laws.shortest(component, model)
    quantize_(model.to(laws.DTYPES[dtype]), Int8WeightOnlyConfig(), filter_fn=is_inner)
    yield Case(component, model, method, target, laws.DTYPES[dtype], laws.base_of(component, model))


@torch.no_grad()
def test_law_3_merging_rounds_again_and_unmerging_restores_the_bytes(case: Case) -> None:
    before = state(case.model)
    case.trained()
    case.strength(0.7)
    running = case.run()
    if laws.refused(case, before):
        return
    wanted = {
        path: laws.wanted_weight(carrier, 0.7)
        for path, carrier in site.sites(case.model).items()
        if hasattr(carrier, "weight")
    }
    told = merge.merge(case.model)
    rounded = {path: one for path, one in wanted.items() if one is not None and quantized.torchao_kind(_weight(case, path))}
    assert told.quantized == len(rounded) and 0 <= told.error < 0.01
    for path, one in rounded.items():
        assert (dense_weight(case.model.get_submodule(path)) - one).norm() <= 0.012 * one.norm()
    assert not same(state(case.model), before)
    assert case.close(case.run(), running, 0.05, 0.1)
    merge.unmerge(case.model)
    assert same(state(case.model), before)
    assert torch.equal(case.run(), running)


def _weight(case: Case, path: str) -> torch.Tensor:
    return case.model.get_submodule(path).get_parameter("weight")


@torch.no_grad()
def test_law_8_a_deepcopy_is_equal_and_independent(case: Case) -> None:
    case.trained()
    case.strength(0.6)
    assert laws.dependence(case, copy.deepcopy) == []  # torchao's tensors do not pickle


@torch.no_grad()
def test_merging_twice_gives_the_same_bytes() -> None:
    model = nn.Sequential(nn.Linear(64, 32)).requires_grad_(False)
    quantize_(model, Int8WeightOnlyConfig())
    site.attach(model, "a", Lora(rank=4), "all-linear")
    laws.randomize(model, "a")
    before = fingerprint({"model": model})
    merge.merge(model)
    first = state(model)
    assert fingerprint({"model": model}) == before  # that of the base, whatever is merged into it
    merge.unmerge(model)
    merge.merge(model)
    assert same(state(model), first)


@torch.no_grad()
def test_what_torchao_rounds_in_another_way_runs_but_is_not_merged() -> None:
    model = nn.Sequential(nn.Linear(64, 32)).requires_grad_(False)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(1))
    before = model(x)
    site.attach(model, "a", Lora(rank=4), "all-linear")
    assert torch.equal(model(x), before)
    laws.randomize(model, "a")
    assert not torch.equal(model(x), before)
    kept = state(model)
    with pytest.raises(UserError, match="cannot be merged into"):
        merge.merge(model)
    assert same(state(model), kept)


@pytest.mark.slow
@torch.no_grad()
def test_an_adapter_of_the_plain_base_runs_on_one_that_torchao_quantized(tmp_path: Path) -> None:
    plain, packed = make_pipe(), make_pipe()
    quantize_(packed.unet, Int8WeightOnlyConfig())
    site.attach(plain.unet, "a", Lora(rank=4), "attention+ff")
    laws.randomize(plain.unet, "a")
    formats.save(tmp_path / "a.safetensors", {"unet": plain.unet}, "a", formats.Spec(base=asdict(describe(plain))))
    loaded = formats.load(tmp_path / "a.safetensors", packed, strict=True)
    site.attach_built(packed.unet, "a", loaded.components["unet"])
    one, other = (Case("unet", pipe.unet, Lora(), "", torch.float32, pipe).run() for pipe in (plain, packed))
    assert 0 < (one - other).norm() < 0.02 * one.norm()
    assert json.dumps(asdict(describe(packed)))


def test_torchao_is_not_imported_for_a_base_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torchao.utils")
    assert quantized.torchao_kind(nn.Linear(2, 2).weight) is None
    assert "torchao.utils" not in sys.modules
