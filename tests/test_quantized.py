"""Law 9, and the other laws on quantized bases: every method that has a Linear to sit at, on nf4 and int8."""

import copy
import functools
import itertools
import json
import logging
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import laws
import pytest
import torch
from conftest import make_pipe
from copies import Copies
from language import make_lm, save_lm
from laws import (  # noqa: F401
    Case,
    loss_of,
    same,
    state,
    strengths_of,
    test_law_1_a_fresh_adapter_and_strength_0_change_no_bit,
    test_law_2_detach_gives_back_class_keys_and_bits,
    test_law_4_only_the_adapter_learns,
    test_law_5_save_and_load_keep_every_bit,
    test_law_6_strengths_per_image_equal_separate_runs,
    test_law_7_a_captured_graph_gives_the_same_gradients,
    test_law_7_checkpointing_gives_the_same_gradients,
)
from making import spec_of
from rich.console import Console
from test_training import draw_pictures, small
from torch import nn

from peft_diffusion import bases, formats
from peft_diffusion.api import train, train_text
from peft_diffusion.bases import checksum, components, describe, digest, load_base, load_lm
from peft_diffusion.cli.console import TrainingConsole
from peft_diffusion.core import merge, quantized, site
from peft_diffusion.core.errors import UserError
from peft_diffusion.core.slot import Packed, slot_of
from peft_diffusion.generation import Adapters
from peft_diffusion.generation.generate import generate
from peft_diffusion.generation.recipe import Recipe
from peft_diffusion.generation.settings import GenerateConfig
from peft_diffusion.generation.text import generate_text
from peft_diffusion.generation.text_settings import TextGenerateConfig
from peft_diffusion.methods.lora import Lora
from peft_diffusion.training import TextTrainConfig
from peft_diffusion.training.settings.choices import Quantize

KINDS: tuple[Quantize, ...] = ("nf4", "int8")
# How far, against their norm, rounding takes weights that are spread evenly, as those of these small bases are.
ROUNDING = {"nf4": 0.12, "int8": 0.01}
ON_LINEAR = [name for name, (_, target) in laws.METHODS.items() if "conv" not in target]
CASES = [
    *((name, "unet", "nf4", "float32") for name in ON_LINEAR if laws.METHODS[name][1] not in laws.LACKING["unet"]),
    *((name, "unet", "int8", "float32") for name in ("lora", "dora", "oft", "ia3")),
    *(("lora", component, kind, "bfloat16") for component in ("text_encoder", "lm") for kind in KINDS),
    ("tokens", "text_encoder", "nf4", "float32"),
]


@pytest.fixture(autouse=True)
def _backend() -> None:
    pytest.importorskip("bitsandbytes")


# Daily work sees LoRA, and a method that asks for the whole weight.
DAILY_FIRST = [pytest.param(one, marks=() if one[0] in ("lora", "dora") else pytest.mark.slow) for one in CASES]


@pytest.fixture(params=DAILY_FIRST, ids="-".join)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    name, component, kind, dtype = request.param
    method, target = laws.METHODS[name]
    torch.manual_seed(0)
    model = _copies(component, kind, dtype).copy()
    pipe = laws.base_of(component, model)
    yield Case(component, model, method, target, laws.DTYPES[dtype], pipe)


@functools.cache
def _copies(component: str, kind: str, dtype: str) -> Copies[nn.Module]:
    model = components(laws.base_of(component))[component]
    if component == "unet":  # fewer layers of the same kinds, above all fewer convolutions, which nothing here quantizes
        model = laws.shortest(component, model)
    model.to(laws.DTYPES[dtype])
    quantized.quantize(model, kind)
    return Copies(lambda: model)


def linears(model: nn.Module) -> dict[str, quantized.QuantizedLinear]:
    return {path: m for path, m in model.named_modules() if isinstance(m, quantized.QuantizedLinear)}


@pytest.mark.slow
@pytest.mark.parametrize("case", [("lora", "unet", kind, "float32") for kind in KINDS], ids="-".join, indirect=True)
def test_law_7_compile_sees_new_strengths_without_recompiling(case: Case) -> None:
    assert linears(case.model)
    assert laws.recompilations(case) == 0


@torch.no_grad()
def test_law_8_copies_are_equal_and_independent(case: Case) -> None:
    assert laws.dependence_of_copies(case) == []


@torch.no_grad()
def test_law_9_merging_rounds_again_and_unmerging_restores_the_bytes(case: Case) -> None:
    before = state(case.model)
    dense = {path: m.dense() for path, m in linears(case.model).items()}
    case.trained()
    case.strength(0.7)
    running = case.run()
    if laws.refused(case, before):
        return
    wanted = {path: laws.wanted_weight(s, 0.7) for path, s in site.sites(case.model).items() if path in dense}
    told = merge.merge(case.model)
    kind = quantized.kind_of(case.model)
    assert kind is not None
    changed = {path: w for path, w in wanted.items() if w is not None}
    assert told.quantized == len(changed)
    assert not same(state(case.model), before)
    moved = {path: linears(case.model)[path].dense() for path in changed}
    expected = _norm(moved[p] - changed[p] for p in changed) / _norm(changed.values()) if changed else 0.0
    assert told.error == pytest.approx(expected, rel=1e-4) and told.error <= 1.5 * ROUNDING[kind]
    if changed:
        change = _norm(changed[p] - dense[p] for p in changed)
        assert told.error_of_change == pytest.approx(told.error * _norm(changed.values()) / change, rel=1e-4)
    else:
        assert case.close(case.run(), running)  # biases are not quantized
    merge.unmerge(case.model)
    assert same(state(case.model), before)
    assert torch.equal(case.run(), running)


def _norm(tensors: Iterable[torch.Tensor]) -> float:
    return float(torch.stack([t.float().square().sum() for t in tensors]).sum().sqrt())


@pytest.mark.slow
def test_law_9_training_lowers_the_loss_and_no_byte_of_the_base_changes(case: Case) -> None:
    bytes_before, print_before = state(case.model), checksum({case.component: case.model})
    case.attach()
    target = case.run().detach() + 0.5 * torch.randn(case.run().shape, generator=torch.Generator().manual_seed(1)).sign()
    own = [p for a in site.adapters(case.model, "a").values() for p in a.parameters()]
    optimizer = torch.optim.Adam(own, lr=3e-3)
    case.model.train()
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = (case.run().float() - target.float()).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.999 * losses[0]
    case.model.eval()
    case.run()
    assert same(state(case.model), bytes_before)
    assert checksum({case.component: case.model}) == print_before


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_a_quantized_base_loads_onto_the_plain_one_and_back(kind: str, tmp_path: Path) -> None:
    plain, packed = make_pipe(), make_pipe()
    digest.quantize(components(packed), kind)
    assert describe(packed) == describe(plain)  # the fingerprint is that of the base before
    for source, other in ((packed, plain), (plain, packed)):
        site.attach(source.unet, "a", Lora(rank=4), "attention+ff")
        laws.randomize(source.unet, "a")
        spec = formats.Spec(base=asdict(describe(source)))
        formats.save(tmp_path / "a.safetensors", {"unet": source.unet}, "a", spec)
        loaded = formats.load(tmp_path / "a.safetensors", other, strict=True)
        assert loaded.warnings == () and loaded.report.found > 0
        site.attach_built(other.unet, "a", loaded.components["unet"])
        close = Case("unet", other.unet, Lora(), "", torch.float32, other).run()
        there = Case("unet", source.unet, Lora(), "", torch.float32, source).run()
        assert _norm([close - there]) < 0.25 * _norm([there])
        site.detach(source.unet, "a")
        site.detach(other.unet, "a")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_load_base_quantizes_every_linear_but_no_other_module(kind: str, tiny_base: Path) -> None:
    pipe, plain = load_base(tiny_base, device="cpu", quantize=kind), load_base(tiny_base, device="cpu")
    for name, part in components(pipe).items():
        original = dict(components(plain)[name].named_modules())
        for path, module in part.named_modules():
            assert isinstance(module, quantized.KINDS[kind]) == (type(original[path]) is nn.Linear)
            if isinstance(module, quantized.QuantizedLinear):
                weight = original[path].weight
                assert _norm([module.dense() - weight]) <= ROUNDING[kind] * _norm([weight])
                assert torch.equal(module.bias, original[path].bias) if module.bias is not None else True
    assert load_base(pipe, quantize=kind) is pipe
    with pytest.raises(UserError, match="loaded already"):
        load_base(plain, quantize=kind)
    with pytest.raises(UserError, match="not quantized yet"):
        quantized.quantize(pipe.unet, kind)


def test_shared_weights_and_heads_stay_as_they_are() -> None:
    model = make_lm().lm
    parameters = model.num_parameters()
    quantized.quantize(model, "nf4")
    assert quantized.count(model) == parameters > model.num_parameters()
    assert model.lm_head.weight is model.get_input_embeddings().weight and model.lm_head.weight.dtype == torch.float32
    assert len(linears(model)) == 14


def test_halving_keeps_scales_and_codes() -> None:
    model = nn.Sequential(nn.Linear(64, 32)).requires_grad_(False)
    quantized.quantize(model, "int8")
    before = state(model)
    half = copy.deepcopy(model).half()
    assert half[0].bias.dtype == torch.float16
    assert all(torch.equal(half.state_dict()[key], before[key]) for key in ("0.weight", "0.weight_scale"))


def packed_of(module: nn.Module) -> Packed:
    """The pair that the adapters of a module are packed into."""
    slot = slot_of(module)
    assert slot is not None and slot.packed is not None
    return slot.packed


@pytest.mark.parametrize("kind", KINDS)
def test_packed_adapters_of_a_half_base_are_cast_once(kind: str) -> None:
    model = nn.Sequential(nn.Linear(64, 32, bias=False), nn.LayerNorm(32)).requires_grad_(False).to(torch.bfloat16)
    quantized.quantize(model, kind)
    site.attach(model, "a", Lora(rank=2), "all-linear")
    adapter = site.adapters(model, "a")["0"]
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    seen = []
    for seed in (2, 3):  # as if it was trained between
        torch.nn.init.normal_(adapter.get_parameter("up"), generator=torch.Generator().manual_seed(seed))
        site.pack(model)
        assert packed_of(model[0]).down.dtype == packed_of(model[0]).up.dtype == torch.bfloat16
        for strength in (1.0, 0.5):
            strengths_of(model).write({"a": strength})
            with torch.no_grad():
                packed = model(x)
            seen.append(packed)
            assert torch.allclose(packed.float(), model(x).detach().float(), atol=0.1)
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(seen, 2))
    model.append(nn.LayerNorm(32))  # in float32: what the layer computes in cannot be told
    site.pack(model)
    assert packed_of(model[0]).down.dtype == torch.float32


@pytest.mark.parametrize("shape", [(64, 128), (40, 32), (3, 50), (5, 7), (1, 200)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_of_any_shape_is_what_its_codes_and_scales_say(kind: str, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Linear(shape[1], shape[0])).requires_grad_(False)
    model[0].get_parameter("weight").copy_(weight)
    quantized.quantize(model, kind)
    layer = model[0]
    assert isinstance(layer, quantized.QuantizedLinear)
    if kind == "int8":
        expected = layer.weight * layer.weight_scale[:, None]
    else:
        import bitsandbytes

        table = bitsandbytes.functional.get_4bit_type("nf4", device="cpu")
        codes = torch.stack([layer.weight.flatten() >> 4, layer.weight.flatten() & 15], 1).flatten()
        expected = (table[codes.long()].view(-1, 64) * layer.weight_scale[:, None]).flatten()[: weight.numel()].view(shape)
    assert torch.allclose(layer.dense(), expected, atol=1e-6)
    assert _norm([expected - weight]) <= ROUNDING[kind] * _norm([weight])
    x = torch.randn(2, shape[1], generator=torch.Generator().manual_seed(1))
    assert torch.allclose(layer(x), x @ expected.T + layer.bias, atol=1e-5)


def test_the_codes_are_those_of_bitsandbytes() -> None:
    import bitsandbytes

    weight = torch.randn(48, 128, generator=torch.Generator().manual_seed(0))
    codes, scale = quantized.Nf4Linear.codes(weight)
    theirs = bitsandbytes.nn.Params4bit(weight, compress_statistics=False, quant_type="nf4").to("cpu")
    assert torch.equal(codes, theirs.data) and torch.equal(scale, theirs.quant_state.absmax)
    codes, scale = quantized.Int8Linear.codes(weight.half().float())
    rows, absmax, _ = bitsandbytes.functional.int8_vectorwise_quant(weight.half())
    assert (codes.int() - rows.int()).abs().max() <= 1 and (codes != rows).float().mean() < 0.01
    assert torch.allclose(scale * 127, absmax)


@torch.no_grad()
def test_layers_that_bitsandbytes_itself_quantized_take_adapters_but_are_not_merged() -> None:
    import bitsandbytes

    layer = bitsandbytes.nn.Linear4bit(64, 32, quant_type="nf4", compute_dtype=torch.float32)
    model = nn.Sequential(layer).to("cpu").eval()
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(1))
    before = model(x)
    site.attach(model, "a", Lora(rank=4), "all-linear")
    assert torch.equal(model(x), before)
    laws.randomize(model, "a")
    assert not torch.equal(model(x), before)
    with pytest.raises(UserError, match="quantized by another program"):
        merge.merge(model)
    site.detach(model, "a")
    assert torch.equal(model(x), before)


@pytest.mark.slow
def test_a_backend_that_is_not_installed_is_named(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"pip install 'peft_diffusion\[quantize\]'") as told:
        load_base(tiny_base, device="cpu", quantize="nf4")
    assert "\n" not in str(told.value)
    load_base(tiny_base, device="cpu", quantize="int8")
    with pytest.raises(UserError, match="there are: nf4, int8"):
        load_base(tiny_base, device="cpu", quantize="int3")


@pytest.mark.slow
@pytest.mark.usefixtures("few_measurements", "no_signals", "no_plots")
@pytest.mark.parametrize("kind", KINDS)
def test_training_generating_and_repeating_a_picture_on_a_quantized_base(
    kind: Quantize, tiny_base: Path, tmp_path: Path
) -> None:
    folder = draw_pictures(tmp_path / "pictures")
    base = str(tiny_base)
    said = Console(record=True, width=1000, file=(tmp_path / "log").open("w"))
    both = ("unet", "text_encoder")
    run = small(folder, tmp_path, base=base, quantize=kind, unet_lr=1e-2, components=both, held_out=0, steps=3)
    trained = train(run, observers=[TrainingConsole(said)])
    shown = f"generate 'blue cat b' --adapter {trained.output} --base {base} --quantize {kind}\n"
    assert f"next: peft-diffusion {shown}" in said.export_text()
    spec = spec_of(trained.output)
    assert spec.training["quantize"] == kind
    assert spec.base["fingerprint"] == describe(load_base(base, device="cpu")).fingerprint
    asked = GenerateConfig(
        ("a red apple",), adapter=(str(trained.output),), base=base, quantize=kind, steps=2, output=tmp_path / "a.png",
        device="cpu",
    )  # fmt: skip
    first = generate(asked)[0]
    assert first.recipe.quantize == kind
    again = generate(GenerateConfig(recipe=first.path, base=asked.base, output=tmp_path / "b.png", device="cpu"))[0]
    assert again.path.read_bytes() == first.path.read_bytes()
    plain = generate(replace(asked, quantize=None, output=tmp_path / "c.png"))[0]
    assert plain.image.tobytes() != first.image.tobytes()
    with pytest.raises(UserError, match=r"the recipe of .* says quantize"):
        generate(GenerateConfig(recipe=first.path, quantize=kind, output=tmp_path / "b.png", device="cpu"))


@pytest.mark.slow
def test_a_recipe_without_a_word_on_quantization_is_of_a_plain_base(tiny_base: Path, tmp_path: Path) -> None:
    asked = GenerateConfig(("a cat",), base=str(tiny_base), steps=1, output=tmp_path / "a.png", device="cpu")
    values = json.loads(json.dumps(generate(asked)[0].recipe.to_json()))
    del values["quantize"]
    assert Recipe.from_json(values).quantize is None


@pytest.mark.slow
@pytest.mark.usefixtures("few_measurements", "no_signals", "no_plots")
def test_a_language_model_learns_and_writes_quantized(tmp_path: Path) -> None:
    save_lm(tmp_path / "lm")
    words = tmp_path / "words.txt"
    words.write_text("the red cat and the blue dog sat in the house of ink. " * 40)
    said = Console(record=True, width=1000, file=(tmp_path / "log").open("w"))
    trained = train_text(
        TextTrainConfig(
            (words,), base=str(tmp_path / "lm"), output=tmp_path / "a.safetensors", run_dir=tmp_path / "run", rank=2,
            steps=4, batch_size=2, context=24, device="cpu", quantize="nf4",
        ),
        observers=[TrainingConsole(said)],
    )  # fmt: skip
    flags = f"--adapter {trained.output} --base {tmp_path / 'lm'} --quantize nf4\n"
    assert f"next: peft-diffusion text generate 'the red cat and the blue' {flags}" in said.export_text()
    plain, packed = load_lm(tmp_path / "lm", device="cpu"), load_lm(tmp_path / "lm", device="cpu", quantize="nf4")
    assert describe(plain) == describe(packed)
    assert formats.load(trained.output, plain, strict=True).warnings == ()
    written = TextGenerateConfig(
        ("the",), adapter=(str(trained.output),), base=str(tmp_path / "lm"), max_tokens=4, quantize="nf4", device="cpu"
    )
    assert [one.prompt for one in generate_text(written)] == ["the"]


@pytest.mark.slow
def test_the_command_names_a_missing_backend_in_one_line(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft_diffusion.cli.app import main

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    flags = ["--base", str(tiny_base), "--device", "cpu", "--quantize", "nf4"]
    draw_pictures(tmp_path / "pictures")
    output = tmp_path / "a.safetensors"
    drawn, learned = ["generate", "a cat"], ["train", str(tmp_path / "pictures")]
    for given in ([*drawn, "-o", str(tmp_path / "a.png")], [*learned, "-o", str(output)]):
        assert main([*given, *flags]) == 1
        told = capsys.readouterr().err.strip()
        assert "pip install 'peft_diffusion[quantize]'" in told.replace("\n", " ") and "Traceback" not in told
        assert not output.exists()
    assert main(["generate", "a cat", "--quantize", "int3"]) == 2


@pytest.mark.slow
@torch.no_grad()
def test_merging_tells_its_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe = make_pipe()
    digest.quantize(components(pipe), "nf4")
    site.attach(pipe.unet, "a", Lora(rank=4), "attention+ff")
    laws.randomize(pipe.unet, "a")
    formats.save(tmp_path / "a.safetensors", {"unet": pipe.unet}, "a", formats.Spec(base=asdict(describe(pipe))))
    site.detach(pipe.unet, "a")
    before = bases.fingerprint(components(pipe))
    adapters = Adapters(pipe)
    adapters.load(tmp_path / "a.safetensors")
    with caplog.at_level(logging.WARNING, "peft_diffusion"):
        adapters.merge()
    assert "unet: 40 nf4 weights were quantized again" in caplog.text
    adapters.unmerge()
    assert bases.fingerprint(components(pipe)) == before
