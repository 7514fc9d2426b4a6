"""The loader on a real pipeline: load, set, schedule, merge, remove."""

import functools
import gc
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_pipe
from diffusers import DiffusionPipeline
from laws import shortest, strengths_of
from making import modes, step_watches
from safetensors.torch import load_file, save_file
from test_formats import picture, write_adapter
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from peft_diffusion import formats
from peft_diffusion.bases import checksum, components, digest, load_base, load_lm
from peft_diffusion.core import site
from peft_diffusion.core.adapter import AdapterDict, StoredPair
from peft_diffusion.core.errors import UserError
from peft_diffusion.core.slot import SLOT
from peft_diffusion.generation import Adapters, Schedule


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return [
        write_adapter(folder / "ink.safetensors", make_pipe(), seed=3),
        write_adapter(folder / "flat-look.safetensors", make_pipe(), target="all-linear", seed=4, parts=("unet",)),
    ]


@pytest.mark.slow
def test_a_pipeline_is_the_one_it_was_when_everything_is_removed(files: list[Path], tiny_pipe: DiffusionPipeline) -> None:
    before, digest = picture(tiny_pipe), checksum(components(tiny_pipe))
    adapters = Adapters(tiny_pipe)
    assert [adapters.load(file) for file in files] == ["ink", "flat-look"]
    assert adapters.names == ("ink", "flat-look") and adapters["ink"].spec.triggers == ("ink style",)
    both = picture(tiny_pipe)
    adapters.remove("ink")
    one = picture(tiny_pipe)
    adapters.remove("flat-look")
    assert np.array_equal(picture(tiny_pipe), before) and checksum(components(tiny_pipe)) == digest
    assert not np.array_equal(both, one) and not np.array_equal(one, before)
    assert not any(site.sites(part) for part in components(tiny_pipe).values())


@pytest.mark.slow
def test_sites_are_called_what_they_are_in_the_base(files: list[Path], tiny_pipe: DiffusionPipeline, tmp_path: Path) -> None:
    kinds = {path: type(module).__name__ for path, module in tiny_pipe.unet.named_modules()}
    adapters = Adapters(tiny_pipe)
    adapters.load(files[1])
    there = dict(tiny_pipe.unet.named_modules())
    assert {path: type(there[path]).__name__ for path in kinds} == kinds and site.sites(tiny_pipe.unet)
    wide = write_adapter(tmp_path / "wide.safetensors", make_pipe(width=48), seed=5)
    with pytest.raises(UserError, match=r"do not fit a Linear of \(32, 32\)"):
        adapters.load(wide)


@pytest.mark.slow
def test_strengths_blend_and_those_not_named_are_kept(files: list[Path], tiny_pipe: DiffusionPipeline) -> None:
    before = picture(tiny_pipe)
    adapters = Adapters(tiny_pipe)
    for file in files:
        adapters.load(file, strength=0.0)
    assert np.array_equal(picture(tiny_pipe), before)
    adapters.set(ink=1.0)
    ink = picture(tiny_pipe)
    adapters.set({"flat-look": 0.5})
    both = picture(tiny_pipe)
    adapters.set({"flat-look": 0.0})
    assert np.array_equal(picture(tiny_pipe), ink) and not np.array_equal(both, ink)


@pytest.mark.slow
def test_merging_draws_the_same_and_gives_the_bytes_back(files: list[Path], tiny_pipe: DiffusionPipeline) -> None:
    digest = checksum(components(tiny_pipe))
    adapters = Adapters(tiny_pipe)
    adapters.load(files[0], strength=0.8)
    adapters.load(files[1], strength=-0.4)
    running = picture(tiny_pipe)
    for _ in range(3):
        adapters.merge()
        assert np.abs(picture(tiny_pipe) - running).max() <= 1
        for refused in (lambda: adapters.set(ink=0.1), lambda: adapters.remove("ink"), adapters.merge):
            with pytest.raises(UserError, match="merge"):
                refused()
        adapters.unmerge()
    assert checksum(components(tiny_pipe)) == digest
    assert np.array_equal(picture(tiny_pipe), running)


@pytest.mark.slow
def test_strengths_per_image_and_per_block(files: list[Path], tiny_pipe: DiffusionPipeline) -> None:
    adapters = Adapters(tiny_pipe)
    adapters.load(files[1], name="flat")

    def pictures(count: int) -> list[np.ndarray]:
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)).repeat(count, 1, 1, 1)
        out = tiny_pipe(["a cat"] * count, num_inference_steps=3, height=64, width=64, latents=noise)
        return [np.asarray(image).astype(int) for image in out.images]

    adapters.set(flat=[0.0, 0.5, 1.0])
    together = pictures(3)
    for amount, expected in zip((0.0, 0.5, 1.0), together, strict=True):
        adapters.set(flat=amount)
        assert np.abs(pictures(1)[0] - expected).max() <= 1
    blocks = ("down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1", "other")
    adapters.set(flat=dict.fromkeys(blocks, 1.0))
    assert np.abs(pictures(1)[0] - together[2]).max() <= 1
    adapters.set(flat={"mid_block": 1.0})
    assert not np.array_equal(pictures(1)[0], together[2]) and not np.array_equal(pictures(1)[0], together[0])
    with pytest.raises(UserError, match=r"'unet' is a component and no block; say ByPart\(components="):
        adapters.set(flat={"unet": 0.5, "text_encoder": 0.25})  # as of set_adapters of diffusers
    with pytest.raises(UserError, match="no block nowhere"):
        adapters.set(flat={"nowhere": 1.0})


@pytest.mark.slow
def test_a_schedule_follows_the_steps_and_leaves_no_trace(files: list[Path], tiny_pipe: DiffusionPipeline) -> None:
    adapters = Adapters(tiny_pipe)
    adapters.load(files[1], name="flat")
    seen: list[float] = []
    strengths = strengths_of(tiny_pipe.unet)
    watch = tiny_pipe.unet.register_forward_hook(lambda *_: seen.append(float(strengths.values[0, 0, 0])))
    adapters.set(flat=Schedule([0.0, 1.0]))
    faded = picture(tiny_pipe, steps=4)
    assert seen == pytest.approx([0.0, 1 / 3, 2 / 3, 1.0])
    with pytest.raises(UserError, match="steps cannot be merged"):
        adapters.merge()
    adapters.set(flat=Schedule([1.0, 1.0, 1.0]))
    constant = picture(tiny_pipe, steps=4)
    adapters.set(flat=1.0)
    assert np.array_equal(picture(tiny_pipe, steps=4), constant) and not np.array_equal(faded, constant)
    watch.remove()
    assert not step_watches(tiny_pipe.unet)
    assert Schedule([0.0, 1.0, 0.0]).at(0.25) == 0.5 and Schedule([2.0]).at(0.9) == 2.0


@pytest.mark.slow
def test_a_failed_load_changes_nothing(files: list[Path], tiny_pipe: DiffusionPipeline, tmp_path: Path) -> None:
    adapters = Adapters(tiny_pipe)
    adapters.load(files[0])
    before = picture(tiny_pipe)
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"nothing")
    with pytest.raises(UserError):
        adapters.load(bad)
    with pytest.raises(UserError, match="finite"):
        adapters.load(files[1], strength=float("nan"))
    with pytest.raises(UserError, match="loaded already"):
        adapters.load(files[1], name="ink")
    with pytest.raises(UserError, match="no adapter 'nobody'"):
        adapters.set(nobody=1.0)
    assert adapters.names == ("ink",) and np.array_equal(picture(tiny_pipe), before)
    assert adapters.load(files[0]) == "ink_2"


@pytest.mark.parametrize("on", [True, False])
def test_garbage_is_looked_for_after_a_load_and_not_in_it(
    files: list[Path], tiny_pipe: DiffusionPipeline, monkeypatch: pytest.MonkeyPatch, on: bool
) -> None:
    adapters, within, read = Adapters(tiny_pipe), list[bool](), formats.load

    def reading(*given: Any, **how: Any) -> Any:
        within.append(gc.isenabled())
        return read(*given, **how)

    monkeypatch.setattr(formats, "load", reading)
    if not on:
        gc.disable()
    try:
        for change in (adapters.load, functools.partial(adapters.swap, "ink")):
            change(files[0])
            assert gc.isenabled() == on  # as the host has it
        with pytest.raises(UserError, match="is loaded already"):
            adapters.load(files[0], "ink")
        assert gc.isenabled() == on and within == [False, False]
    finally:
        gc.enable()


@pytest.mark.slow
def test_offloading_hooks_are_refused_with_the_module_named(files: list[Path], tiny_pipe: DiffusionPipeline) -> None:
    module = tiny_pipe.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    module.forward = functools.partial(module.forward)
    with pytest.raises(UserError, match=r"mid_block.*attn1\.to_q: its forward is patched"):
        Adapters(tiny_pipe).load(files[0])
    assert not site.sites(tiny_pipe.unet) and not site.sites(tiny_pipe.text_encoder)


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [KeyboardInterrupt, torch.OutOfMemoryError, TypeError])
def test_an_attachment_that_breaks_off_leaves_nothing(
    files: list[Path], tiny_pipe: DiffusionPipeline, monkeypatch: pytest.MonkeyPatch, stopped: type[BaseException]
) -> None:
    adapters = Adapters(tiny_pipe)
    adapters.load(files[1])
    before, classes = picture(tiny_pipe), [type(one) for one in tiny_pipe.text_encoder.modules()]
    bound, carriers = [], {path: list(one.adapters.items()) for path, one in site.slots(tiny_pipe.unet).items()}

    def store(self: AdapterDict, name: str, pair: StoredPair, module: torch.nn.Module) -> None:
        bound.append(module)
        if len(bound) == broken_off:
            raise stopped
        as_ever(self, name, pair, module)

    as_ever = AdapterDict.store

    for broken_off in (1, 2, 30, 40):  # the first, some of the UNet, and some of the text encoder
        bound.clear()
        with monkeypatch.context() as patched:
            patched.setattr(AdapterDict, "store", store)
            with pytest.raises(stopped):
                adapters.load(files[0])
        assert len(bound) == broken_off and adapters.names == ("flat-look",)
        assert {path: list(one.adapters.items()) for path, one in site.slots(tiny_pipe.unet).items()} == carriers
        assert [type(one) for one in tiny_pipe.text_encoder.modules()] == classes
        assert np.array_equal(picture(tiny_pipe), before)
    with monkeypatch.context() as patched:  # as where a device has no room for the pairs
        outcomes = iter([stopped, *[None] * 4])
        copy = torch._foreach_copy_

        def full(to: list[torch.Tensor], of: list[torch.Tensor]) -> None:
            if (error := next(outcomes)) is not None:
                raise error
            copy(to, of)

        patched.setattr(torch, "_foreach_copy_", full)
        with pytest.raises(stopped):
            adapters.load(files[0])
    assert adapters.names == ("flat-look",)
    assert np.array_equal(picture(tiny_pipe), before)
    assert adapters.load(files[0]) == "ink"


@pytest.mark.slow
def test_a_removal_that_one_component_refuses_is_none(files: list[Path], tiny_pipe: DiffusionPipeline) -> None:
    adapters = Adapters(tiny_pipe)
    adapters.load(files[0])
    running = picture(tiny_pipe)
    module = tiny_pipe.text_encoder.get_submodule(list(site.sites(tiny_pipe.text_encoder))[-1])
    module.forward = functools.partial(module.forward)
    with pytest.raises(UserError, match="its forward is patched"):
        adapters.remove("ink")
    assert site.names(tiny_pipe.unet) == site.names(tiny_pipe.text_encoder) == ["ink"]
    assert np.array_equal(picture(tiny_pipe), running)
    del module.forward
    adapters.remove("ink")
    assert adapters.names == ()


@pytest.mark.slow
def test_a_class_that_was_changed_over_adapters_is_refused_with_the_module_named(
    files: list[Path], tiny_pipe: DiffusionPipeline
) -> None:
    class Wrapped:
        """As fully_shard puts one before the class of a module."""

    adapters = Adapters(tiny_pipe)
    adapters.load(files[0])
    module = tiny_pipe.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    adapted = type(module)
    module.__class__ = type("FSDPLinear", (Wrapped, adapted), {})
    before = picture(tiny_pipe)
    for refused in (lambda: adapters.remove("ink"), lambda: adapters.load(files[1])):
        with pytest.raises(UserError, match=r"mid_block.*attn1\.to_q: its class was changed to FSDPLinear"):
            refused()
    assert adapters.names == ("ink",) and np.array_equal(picture(tiny_pipe), before)
    module.__class__ = adapted
    adapters.remove("ink")


@pytest.mark.slow
def test_a_module_that_has_the_private_name_itself_is_refused(files: list[Path], tiny_pipe: DiffusionPipeline) -> None:
    module = tiny_pipe.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    for own in (3, torch.nn.Linear(2, 2), torch.nn.Parameter(torch.zeros(1))):
        setattr(module, SLOT, own)
        with pytest.raises(UserError, match=r"mid_block.*attn1\.to_q: it has an attribute '_peft_diffusion' of its own"):
            Adapters(tiny_pipe).load(files[0])
        assert getattr(module, SLOT) is own and not site.sites(tiny_pipe.unet)
        delattr(module, SLOT)


def test_a_base_in_training_is_adapted_and_stays_in_training(files: list[Path], tiny_pipe: DiffusionPipeline) -> None:
    tiny_pipe.unet.train().requires_grad_(True)
    before = modes(tiny_pipe.unet, tiny_pipe.text_encoder, tiny_pipe.vae)
    adapters = Adapters(tiny_pipe)
    assert modes(tiny_pipe.unet, tiny_pipe.text_encoder, tiny_pipe.vae) == before
    adapters.load(files[0])
    assert all(own.requires_grad for own in tiny_pipe.unet.conv_in.parameters()) and tiny_pipe.unet.conv_in.training
    adapters.remove("ink")
    assert modes(tiny_pipe.unet, tiny_pipe.text_encoder, tiny_pipe.vae) == before


@pytest.mark.slow
def test_adapters_that_were_loaded_on_a_half_pipeline_act_in_full_on_a_wider_one(
    files: list[Path], tiny_pipe: DiffusionPipeline
) -> None:
    path, of_file = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q", load_file(files[1])
    name = f"lora_unet_{path.replace('.', '_')}"
    down, up, alpha = (of_file[f"{name}.{suffix}"] for suffix in ("lora_down.weight", "lora_up.weight", "alpha"))
    Adapters(tiny_pipe.to(torch.bfloat16)).load(files[1])
    layer = tiny_pipe.to(torch.float32).unet.get_submodule(path)
    x = torch.randn(4, layer.in_features)
    wanted = torch.nn.functional.linear(x, layer.weight + alpha / len(down) * up @ down, layer.bias)
    with torch.no_grad():
        assert torch.allclose(layer(x), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "computed",
    [
        weight_norm,
        spectral_norm,
        lambda layer: prune.random_unstructured(layer, "weight", 0.5),
        parametrizations.weight_norm,
    ],
    ids=["weight_norm", "spectral_norm", "pruned", "parametrized"],
)
def test_a_weight_that_is_computed_at_every_call_is_not_merged_into(
    files: list[Path], tiny_pipe: DiffusionPipeline, computed: Callable[[torch.nn.Module], object]
) -> None:
    path = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    layer = tiny_pipe.unet.get_submodule(path)
    computed(layer)
    adapters = Adapters(tiny_pipe)
    adapters.load(files[1])
    x = torch.randn(1, layer.in_features)
    with torch.no_grad():
        running = layer(x)
        with pytest.raises(UserError, match=rf"{path}: its weight is computed anew at every call"):
            adapters.merge()
        assert not adapters.merged and torch.equal(layer(x), running)


@pytest.mark.slow
@pytest.mark.parametrize("fails", [3, 45], ids=["in the first component", "in the second"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
def test_a_merge_that_ends_early_leaves_every_byte(
    files: list[Path], tiny_pipe: DiffusionPipeline, monkeypatch: pytest.MonkeyPatch, fails: int, error: type[BaseException]
) -> None:
    adapters, parts = Adapters(tiny_pipe), components(tiny_pipe)
    adapters.load(files[0])
    before, weights = checksum(parts), 0

    def failing(operation: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def counted(*tensors: torch.Tensor) -> torch.Tensor:
            nonlocal weights
            weights += 1
            if weights == fails:  # all before it are written
                raise error
            return operation(*tensors)

        return counted

    monkeypatch.setattr(torch, "addmm", failing(torch.addmm))  # of pairs
    monkeypatch.setattr(torch.Tensor, "clone", failing(torch.Tensor.clone))  # of what is folded by itself
    with pytest.raises(error):
        adapters.merge()
    monkeypatch.undo()
    assert checksum(parts) == before and not adapters.merged
    adapters.merge()
    assert checksum(parts) != before and set(adapters.merged) == set(parts)
    adapters.unmerge()
    assert checksum(parts) == before


@pytest.mark.slow
def test_what_is_removed_is_gone_from_memory(files: list[Path], tiny_pipe: DiffusionPipeline) -> None:
    adapters = Adapters(tiny_pipe)

    def tensors() -> int:
        gc.collect()
        return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())

    counts = []
    for _ in range(4):
        name = adapters.load(files[0])
        adapters.merge()
        adapters.unmerge()
        adapters.remove(name)
        counts.append(tensors())
    assert counts[1] == counts[3]


@pytest.mark.slow
def test_adapters_stay_float32_and_follow_the_device_on_a_half_pipeline(
    files: list[Path], tiny_pipe: DiffusionPipeline
) -> None:
    adapters = Adapters(tiny_pipe)
    adapters.load(files[0])
    tiny_pipe.to(torch.bfloat16)
    parameters = [p for a in site.adapters(tiny_pipe.unet, "ink").values() for p in a.parameters()]
    assert {p.dtype for p in parameters} == {torch.float32}
    assert strengths_of(tiny_pipe.unet).values.dtype == torch.float32
    assert next(tiny_pipe.unet.parameters()).dtype == torch.bfloat16
    assert picture(tiny_pipe).shape == (64, 64, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8])
def test_a_checksum_is_that_of_the_numbers_wherever_they_lie(dtype: torch.dtype) -> None:
    layer, other = torch.nn.Module(), torch.nn.Module()
    layer.register_buffer("numbers", torch.arange(41).to(dtype)[1:])
    other.register_buffer("numbers", torch.arange(1, 41).to(dtype))
    assert checksum({"layer": layer}) == checksum({"layer": other})


@pytest.mark.parametrize("at_once", [1, 7, 64])
def test_a_fingerprint_does_not_depend_on_how_much_is_read_at_a_time(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    layer = torch.nn.Linear(31, 11)
    monkeypatch.setattr(digest, "_GROUP", 64)
    expected = checksum({"layer": layer})
    monkeypatch.setattr(digest, "_AT_ONCE", at_once)
    assert checksum({"layer": layer}) == expected
    with torch.no_grad():
        layer.weight[0, 0] += 1e-7
    assert checksum({"layer": layer}) != expected


def _shortest() -> DiffusionPipeline:
    """Of one layer of every kind, as each takes a compiler a second."""
    pipe: Any = make_pipe()
    pipe.unet, pipe.text_encoder = shortest("unet", pipe.unet), shortest("text_encoder", pipe.text_encoder)
    return pipe


@pytest.mark.slow
@pytest.mark.parametrize("first", [False, True], ids=["before the first call", "after it"])
def test_what_torch_compile_returned_carries_adapters_as_the_module_inside(tmp_path: Path, first: bool) -> None:
    plain, compiled = _shortest(), _shortest()
    file = write_adapter(tmp_path / "ink.safetensors", _shortest(), seed=1)
    compiled.unet = torch.compile(compiled.unet, backend="eager")
    compiled.text_encoder = torch.compile(compiled.text_encoder, backend="eager")
    if first:
        picture(compiled)
    seen = []
    for pipe in (plain, compiled):
        adapters = Adapters(pipe)
        adapters.load(file, name="ink", strict=True)
        seen.append([picture(pipe)])
        for amount in (Schedule([0.0, 1.0]), 0.3):
            adapters.set(ink=amount)
            seen[-1].append(picture(pipe))
        assert list(components(pipe)) == ["unet", "text_encoder"]
        assert not any("_orig_mod" in path for part in components(pipe).values() for path in site.sites(part))
        adapters.remove("ink")
        seen[-1].append(picture(pipe))
    for one, other in zip(*seen, strict=True):
        assert np.abs(one.astype(int) - other.astype(int)).max() <= 1
    assert len({one.tobytes() for one in seen[0]}) == 4
    assert not compiled.unet._forward_pre_hooks


@pytest.mark.slow
def test_a_schedule_goes_on_when_the_network_is_compiled_after_it_was_set(tmp_path: Path) -> None:
    pipe = _shortest()
    adapters = Adapters(pipe)
    adapters.load(write_adapter(tmp_path / "ink.safetensors", _shortest(), seed=1), name="ink", strict=True)
    plain = picture(pipe)
    adapters.set(ink=Schedule([0.0, 1.0]))
    before = picture(pipe)
    assert before.tobytes() != plain.tobytes()
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    assert np.abs(picture(pipe).astype(int) - before.astype(int)).max() <= 1


@pytest.mark.slow
def test_what_a_load_leaves_out_is_logged_with_counts_and_names(
    files: list[Path], tiny_pipe: DiffusionPipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = load_file(files[0])
    extra = {f"lora_unet_nowhere_{number}.alpha": torch.ones(()) for number in range(5)}
    save_file({**tensors, **extra}, tmp_path / "part.safetensors")
    adapters = Adapters(tiny_pipe)
    with caplog.at_level(logging.WARNING, "peft_diffusion"):
        adapters.load(files[0])
        assert caplog.messages == []
        adapters.load(tmp_path / "part.safetensors")
    (message,) = caplog.messages
    total = len(tensors) + 5
    assert f"5 of {total} tensors are of no method that is known here and were left out" in message
    assert "lora_unet_nowhere_0.alpha, lora_unet_nowhere_1.alpha, lora_unet_nowhere_2.alpha, ..." in message
    told: list[str] = []
    adapters.load(tmp_path / "part.safetensors", name="again", warn=told.append)
    assert told == [message] and caplog.messages == [message]


@pytest.mark.parametrize("read", [load_base, load_lm, Adapters])
def test_a_part_of_a_pipeline_is_told_to_be_no_base_in_a_line(
    read: Callable[[Any], object], tiny_pipe: DiffusionPipeline
) -> None:
    with pytest.raises(UserError, match=r"^a UNet2DConditionModel is no base; give a .+, or the name or path of one$"):
        read(tiny_pipe.unet)
