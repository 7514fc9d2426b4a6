"""Options of the host that act on weights or on how layers are called: adapters follow, or refuse in words."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import remove_hook_from_module
from conftest import make_pipe, make_xl_pipe
from diffusers import AutoPipelineForText2Image, DiffusionPipeline, StableDiffusionXLImg2ImgPipeline
from diffusers.models.attention_processor import SlicedAttnProcessor
from laws import randomize
from peft import LoraConfig
from PIL import Image
from test_formats import write_adapter
from test_training import draw_pictures, small

from peft_diffusion.api import train
from peft_diffusion.core import site
from peft_diffusion.core.errors import UserError
from peft_diffusion.core.method import METHODS
from peft_diffusion.generation import Adapters
from peft_diffusion.generation.generate import generate
from peft_diffusion.generation.memory import spare, spared
from peft_diffusion.generation.sampler import Cell, paint
from peft_diffusion.generation.settings import GenerateConfig, Sampling
from peft_diffusion.training.tasks import datasets

pytestmark = pytest.mark.usefixtures("few_measurements", "no_signals", "no_plots")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "ink": write_adapter(folder / "ink.safetensors", make_pipe(), seed=3, parts=("unet",)),
        "said": write_adapter(folder / "said.safetensors", make_pipe(), seed=4, parts=("text_encoder",)),
    }


def sequential(pipe: DiffusionPipeline) -> None:
    # What enable_sequential_cpu_offload does, which itself refuses to run where there is no accelerator.
    cpu_offload(pipe.unet, torch.device("cpu"))


def whole(pipe: DiffusionPipeline) -> None:
    cpu_offload_with_hook(pipe.unet, torch.device("cpu"))


def grouped(kind: str, **more: object) -> Callable[[DiffusionPipeline], None]:
    device = torch.device("cpu")

    def enable(pipe: DiffusionPipeline) -> None:
        pipe.unet.enable_group_offload(
            onload_device=device, offload_device=device, offload_type=f"{kind}_level", num_blocks_per_group=1, **more
        )

    return enable


OFFLOADED = {"sequential": sequential, "model": whole, "block": grouped("block"), "leaf": grouped("leaf")}


@torch.no_grad()
def told(pipe: DiffusionPipeline, **options: object) -> torch.Tensor:
    draw = torch.Generator().manual_seed(7)
    x, words = torch.randn(1, 4, 8, 8, generator=draw), torch.randn(1, 7, 32, generator=draw)
    found: torch.Tensor = pipe.unet(x, 5, words, **options).sample
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ink", "said"])
def test_the_scale_of_cross_attention_is_refused_wherever_the_adapter_sits(
    name: str, files: dict[str, Path], tiny_pipe: DiffusionPipeline
) -> None:
    adapters = Adapters(tiny_pipe)
    before = tiny_pipe("a cat", num_inference_steps=1, output_type="np", generator=torch.Generator().manual_seed(0)).images
    adapters.load(files[name])
    for harmless in ({"scale": 1.0}, {}, None):
        tiny_pipe("a cat", num_inference_steps=1, output_type="latent", cross_attention_kwargs=harmless)
    with pytest.raises(UserError, match=r"scale=0.5 is for diffusers' own LoRA.*Adapters\(pipe\).set"):
        tiny_pipe("a cat", num_inference_steps=1, output_type="latent", cross_attention_kwargs={"scale": 0.5})
    adapters.remove(name)
    assert not tiny_pipe.unet._forward_pre_hooks
    given = {"cross_attention_kwargs": {"scale": 0.5}, "generator": torch.Generator().manual_seed(0)}
    assert np.array_equal(tiny_pipe("a cat", num_inference_steps=1, output_type="np", **given).images, before)


@pytest.mark.slow
def test_fused_projections_are_refused_unless_they_hold_the_adapters(
    files: dict[str, Path], tiny_pipe: DiffusionPipeline
) -> None:
    adapters, network = Adapters(tiny_pipe), tiny_pipe.unet
    plain = told(tiny_pipe)
    network.fuse_qkv_projections()
    with pytest.raises(UserError, match=r"cannot load an adapter: .*attn1.to_k out of use.*unfuse_qkv_projections"):
        adapters.load(files["ink"])
    assert adapters.names == () and torch.allclose(told(tiny_pipe), plain, atol=1e-6)
    network.unfuse_qkv_projections()
    adapters.load(files["ink"])
    wanted = told(tiny_pipe)
    network.fuse_qkv_projections()
    for doing in (adapters.merge, lambda: told(tiny_pipe)):
        with pytest.raises(UserError, match="out of use"):
            doing()
    network.unfuse_qkv_projections()
    assert torch.equal(told(tiny_pipe), wanted)
    adapters.merge()
    network.fuse_qkv_projections()  # of weights that hold the adapters
    assert torch.allclose(told(tiny_pipe), wanted, atol=1e-5)
    with pytest.raises(UserError, match="cannot unmerge the adapters"):
        adapters.unmerge()
    network.unfuse_qkv_projections()
    adapters.unmerge()
    assert torch.equal(told(tiny_pipe), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.bfloat16])
def test_layers_that_are_cast_for_each_call_keep_adapters_in_full(
    stored: torch.dtype, files: dict[str, Path], tiny_pipe: DiffusionPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    cast = make_pipe()
    cast.unet.enable_layerwise_casting(storage_dtype=stored, compute_dtype=torch.float32)
    for own, rounded in zip(tiny_pipe.unet.parameters(), cast.unet.parameters(), strict=True):
        own.data.copy_(rounded.data.float())
    assert torch.equal(told(tiny_pipe), told(cast))
    with pytest.raises(UserError, match="its forward is patched on the instance, as offloading and layerwise casting do"):
        Adapters(cast).load(files["ink"])
    Adapters(tiny_pipe).load(files["ink"])
    carried = make_pipe()
    adapters = Adapters(carried)
    adapters.load(files["ink"])
    carried.unet.enable_layerwise_casting(storage_dtype=stored, compute_dtype=torch.float32)
    assert torch.equal(told(carried), told(tiny_pipe))
    adapters.set(ink=0.3)
    Adapters(tiny_pipe).set(ink=0.3)
    assert torch.equal(told(carried), told(tiny_pipe))
    Adapters(tiny_pipe).merge()
    merged = adapters.merge()["unet"]  # rounded to what is stored, which 8 bits do to more than the adapter changes
    wanted = [tiny_pipe.unet.get_submodule(path).weight.data for path in site.sites(tiny_pipe.unet)]
    moved = sum(float((one.to(stored).float() - one).square().sum()) for one in wanted)
    lost = (moved / sum(float(one.square().sum()) for one in wanted)) ** 0.5
    assert merged.error == pytest.approx(lost if stored.itemsize == 1 else 0.0)
    assert ("float8_e4m3fn weights were quantized again" in caplog.text) == (stored.itemsize == 1)


@pytest.mark.slow
@pytest.mark.parametrize("way", OFFLOADED)
def test_offloading_after_a_load_draws_sets_and_merges_the_same_or_is_refused(
    way: str, files: dict[str, Path], tiny_pipe: DiffusionPipeline
) -> None:
    reference = Adapters(make_pipe())
    reference.load(files["ink"], strength=0.5)
    wanted = told(reference.pipe)
    adapters = Adapters(tiny_pipe)
    adapters.load(files["ink"])
    OFFLOADED[way](tiny_pipe)
    adapters.set(ink=0.5)
    assert torch.equal(told(tiny_pipe), wanted)
    assert all(not own.is_meta for slot in site.slots(tiny_pipe.unet).values() for own in slot.parameters())
    if way == "sequential":
        with pytest.raises(UserError, match=r"cannot merge: .* are offloaded and not there between calls"):
            adapters.merge()
        assert adapters.merged == () and torch.equal(told(tiny_pipe), wanted)
        remove_hook_from_module(tiny_pipe.unet, recurse=True)
    adapters.merge()
    assert torch.allclose(told(tiny_pipe), wanted, atol=1e-5) and adapters.merged == ("unet",)
    if way == "sequential":
        sequential(tiny_pipe)
        assert torch.allclose(told(tiny_pipe), wanted, atol=1e-5)
        with pytest.raises(UserError, match="cannot unmerge"):
            adapters.unmerge()
        assert torch.allclose(told(tiny_pipe), wanted, atol=1e-5)
        remove_hook_from_module(tiny_pipe.unet, recurse=True)
    adapters.unmerge()
    assert torch.equal(told(tiny_pipe), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ink", "said"])
def test_a_load_after_sequential_offloading_is_refused_in_words(
    name: str, files: dict[str, Path], tiny_pipe: DiffusionPipeline
) -> None:
    wanted, adapters = told(tiny_pipe), Adapters(tiny_pipe)
    for part in (tiny_pipe.unet, tiny_pipe.text_encoder):
        cpu_offload(part, torch.device("cpu"))
    with pytest.raises(UserError, match=r"are offloaded and not there between calls; load adapters before you enable"):
        adapters.load(files[name])
    assert adapters.names == () and torch.equal(told(tiny_pipe), wanted)


@pytest.mark.slow
def test_weights_that_are_offloaded_to_files_are_not_merged_into(
    files: dict[str, Path], tiny_pipe: DiffusionPipeline, tmp_path: Path
) -> None:
    adapters = Adapters(tiny_pipe)
    adapters.load(files["ink"])
    grouped("block", offload_to_disk_path=str(tmp_path))(tiny_pipe)
    with pytest.raises(UserError, match="cannot merge"):
        adapters.merge()


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SPARING: dict[str, dict[str, Any]] = {
    "model": {"offload": "model"}, "group": {"offload": "group"}, "sequential": {"offload": "sequential"},
    "sliced": {"attention_slicing": True}, "tiled": {"vae_tiling": True},
}  # fmt: skip


def layer_by_layer(pipe: DiffusionPipeline, device: torch.device) -> None:
    """What enable_sequential_cpu_offload does."""
    for part in (pipe.unet, pipe.text_encoder, pipe.vae):
        cpu_offload(part, device, offload_buffers=len(part._parameters) > 0)


def sparing(adapters: Adapters, **options: Any) -> tuple[np.ndarray, dict[str, Any]]:
    """A picture of 128x64 pixels, and what became of the pipeline."""
    pipe, config = adapters.pipe, Sampling(width=128, steps=2, device=DEVICE, **options)
    decoded: list[tuple[int, ...]] = []
    hook = pipe.vae.decoder.register_forward_pre_hook(lambda _, args: decoded.append(tuple(args[0].shape[-2:])))
    spare(adapters, config)
    (image,) = paint(adapters, [Cell("a cat", 1, {"ink": 0.5})], config)
    hook.remove()
    parts = list(pipe.unet.modules())
    return np.asarray(image, int), {
        "tiled": len(decoded) > 1 and all(max(sides) <= 8 for sides in decoded),
        "sliced": any(isinstance(getattr(one, "processor", None), SlicedAttnProcessor) for one in parts),
        "model": hasattr(pipe.unet, "_hf_hook") and not any(one.is_meta for one in pipe.unet.parameters()),
        "sequential": any(one.is_meta for one in pipe.unet.parameters()),
        "group": any(hasattr(one, "_diffusers_hook") for one in parts),
    }


@pytest.mark.slow
@pytest.mark.parametrize("way", SPARING)
def test_a_card_of_little_memory_draws_the_same_picture(
    way: str, files: dict[str, Path], tiny_pipe: DiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    if DEVICE == "cpu":  # for which diffusers' own takes a name that accelerate copies parameters for
        monkeypatch.setattr(type(tiny_pipe), "enable_sequential_cpu_offload", layer_by_layer)
    other = Adapters(make_pipe().to(DEVICE))
    other.load(files["ink"])
    wanted, plain = sparing(other)
    assert plain == dict.fromkeys(plain, False)
    adapters = Adapters(tiny_pipe if way in OFFLOADED or way == "group" else tiny_pipe.to(DEVICE))
    adapters.load(files["ink"])
    found, state = sparing(adapters, **SPARING[way])
    assert [name for name, is_so in state.items() if is_so] == [way]
    assert np.abs(found - wanted).max() <= (1 if way != "tiled" else 255) and np.abs(found - wanted).mean() < 25


@pytest.mark.slow
@pytest.mark.parametrize("way", ["model", "group", "sequential"])
def test_adapters_come_and_go_between_the_pictures_of_a_base_that_is_offloaded(
    way: str, files: dict[str, Path], tiny_pipe: DiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    if DEVICE == "cpu":
        monkeypatch.setattr(type(tiny_pipe), "enable_sequential_cpu_offload", layer_by_layer)
    config = Sampling(steps=2, device=DEVICE, **SPARING[way])
    plain = make_pipe().to(DEVICE)
    for name in ("ink", "said", "ink"):
        drawn: list[Image.Image] = []
        for adapters, how in ((Adapters(plain), Sampling(steps=2)), (Adapters(tiny_pipe), config)):
            adapters.load(files[name])
            with spared(adapters, how):
                drawn += paint(adapters, [Cell("a cat", 1, {name: 1.0})], how)
            adapters.remove(name)
        one, other = (np.asarray(image).astype(int) for image in drawn)
        assert np.abs(one - other).max() <= 1, name
    parts = [one for one in tiny_pipe.components.values() if isinstance(one, torch.nn.Module)]
    assert not any(vars(one).keys() & {"_hf_hook", "_diffusers_hook"} for part in parts for one in part.modules())
    assert {own.device.type for part in parts for own in part.parameters()} == {"cpu"}


@pytest.mark.slow
def test_what_a_host_puts_under_the_buffers_is_what_acts(files: dict[str, Path], tiny_pipe: DiffusionPipeline) -> None:
    clean, adapters = told(tiny_pipe), Adapters(tiny_pipe)
    adapters.load(files["ink"])
    wanted = told(tiny_pipe)
    assert not torch.equal(clean, wanted)
    OFFLOADED["leaf"](tiny_pipe)
    for _ in range(2):  # as group offloading does to another device and back
        for buffer in {id(one): one for one in tiny_pipe.unet.buffers()}.values():
            before = buffer.data
            buffer.data = before.clone()
            before.zero_()
        assert torch.equal(told(tiny_pipe), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["sequential", "leaf"])
def test_when_the_hooks_are_off_again_adapters_can_be_loaded_and_removed(
    way: str, files: dict[str, Path], tiny_pipe: DiffusionPipeline
) -> None:
    clean, adapters = told(tiny_pipe), Adapters(tiny_pipe)
    for _ in range(2):
        adapters.load(files["ink"])
        wanted = told(tiny_pipe)
        OFFLOADED[way](tiny_pipe)
        with pytest.raises(UserError, match="its forward is patched on the instance"):
            adapters.remove("ink")
        assert torch.equal(told(tiny_pipe), wanted)
        tiny_pipe.remove_all_hooks()
        for one in tiny_pipe.unet.modules():
            registry = vars(one).get("_diffusers_hook")
            for name in list(registry.hooks) if registry else ():
                registry.remove_hook(name, recurse=False)
        adapters.remove("ink")
        assert torch.equal(told(tiny_pipe), clean)


def test_what_spares_no_memory_is_refused(tiny_pipe: DiffusionPipeline) -> None:
    with pytest.raises(UserError, match="loaded already: enable offloading"):
        generate(GenerateConfig("a cat", vae_tiling=True), pipe=tiny_pipe)
    with pytest.raises(UserError, match="on a CPU there is nothing to offload to"):
        generate(GenerateConfig("a cat", offload="model", device="cpu"))
    with pytest.raises(UserError, match="leave --offload or --quantize away"):
        GenerateConfig("a cat", offload="model", quantize="nf4")


TARGETS = {"bitfit": "all-linear", "bottleneck": "sublayers"}


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("prefix", "prompt", "tokens")])
def test_every_method_runs_under_sequential_offloading(method: str, tiny_pipe: DiffusionPipeline) -> None:
    site.attach(tiny_pipe.unet, "a", METHODS[method](), TARGETS.get(method, "attention"))
    randomize(tiny_pipe.unet, "a")
    wanted = told(tiny_pipe)
    sequential(tiny_pipe)
    assert torch.equal(told(tiny_pipe), wanted)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("prompt", "tokens")])
def test_every_method_runs_with_sliced_attention(method: str, tiny_pipe: DiffusionPipeline) -> None:
    target = "cross-attentions" if method == "prefix" else TARGETS.get(method, "attention")
    site.attach(tiny_pipe.unet, "a", METHODS[method](), target)
    randomize(tiny_pipe.unet, "a")
    wanted = told(tiny_pipe)
    tiny_pipe.enable_attention_slicing(1)
    assert torch.allclose(told(tiny_pipe), wanted, atol=1e-5)


def test_a_method_that_reads_a_weight_of_another_layer_refuses_sequential_offloading(tiny_pipe: DiffusionPipeline) -> None:
    site.attach(tiny_pipe.unet, "a", METHODS["prefix"](), "cross-attentions")
    randomize(tiny_pipe.unet, "a")
    sequential(tiny_pipe)
    with pytest.raises(UserError, match=r"weight of a Linear is read, but it is offloaded.*enable_model_cpu_offload"):
        told(tiny_pipe)


@pytest.mark.slow
def test_what_is_loaded_in_inference_mode_is_set_and_trained_outside_of_it(
    files: dict[str, Path], tiny_pipe: DiffusionPipeline
) -> None:
    reference = Adapters(make_pipe())
    reference.load(files["ink"], strength=0.5)
    adapters = Adapters(tiny_pipe)
    with torch.inference_mode():
        adapters.load(files["ink"])
        adapters.set(ink=[0.1, 0.2])
    adapters.set(ink=[0.3, 0.4])
    adapters.set(ink=0.5)
    assert torch.equal(told(tiny_pipe), told(reference.pipe))
    assert not any(own.is_inference() for slot in site.slots(tiny_pipe.unet).values() for own in slot.parameters())
    with torch.inference_mode():
        adapters.merge()
    adapters.unmerge()
    adapters.remove("ink")
    assert torch.equal(told(tiny_pipe), told(make_pipe()))


def drawn(pipe: DiffusionPipeline, prompts: list[str], each: int = 1, **options: Any) -> np.ndarray:
    draws = [torch.Generator().manual_seed(number) for number in range(len(prompts) * each)]
    images: np.ndarray = pipe(
        prompts, num_images_per_prompt=each, num_inference_steps=1, output_type="np", generator=draws, **options
    ).images
    return images


@pytest.mark.slow
@pytest.mark.parametrize(("pag", "guidance"), [(3.0, 5.0), (3.0, 1.0)])
def test_strengths_per_image_under_perturbed_attention_are_those_of_separate_runs(
    pag: float, guidance: float, files: dict[str, Path], tiny_pipe: DiffusionPipeline
) -> None:
    pipe = AutoPipelineForText2Image.from_pipe(tiny_pipe, enable_pag=True, pag_applied_layers=["mid"])
    options: dict[str, Any] = {"pag_scale": pag, "guidance_scale": guidance}
    adapters, said = Adapters(pipe), ["a cat", "a dog"]
    adapters.load(files["ink"], strength=0.0)
    without = drawn(pipe, said, **options)
    adapters.set(ink=1.0)
    full = drawn(pipe, said, **options)
    adapters.set(ink=[0.0, 1.0])
    mixed = drawn(pipe, said, **options)
    assert np.allclose(mixed[0], without[0], atol=1e-5) and np.allclose(mixed[1], full[1], atol=1e-5)
    assert not np.allclose(full, without, atol=1e-3)
    with pytest.raises(UserError, match="2 images, but 1 is drawn"):
        drawn(pipe, said[:1], **options)


@pytest.mark.slow
def test_a_text_encoder_takes_strengths_for_the_images_of_each_prompt(
    files: dict[str, Path], tiny_pipe: DiffusionPipeline
) -> None:
    adapters, said = Adapters(tiny_pipe), ["a cat", "a dog"]
    adapters.load(files["said"], strength=0.0)
    without = drawn(tiny_pipe, said, 2)
    adapters.set(said=1.0)
    full = drawn(tiny_pipe, said, 2)
    adapters.set(said=[0.0, 0.0, 1.0, 1.0])
    mixed = drawn(tiny_pipe, said, 2)
    assert np.allclose(mixed[:2], without[:2], atol=1e-5) and np.allclose(mixed[2:], full[2:], atol=1e-5)
    adapters.set(said=[0.0, 1.0, 1.0, 1.0])
    with pytest.raises(UserError, match="read once cannot have 2 strengths; give a prompt for each image"):
        drawn(tiny_pipe, said, 2)


@pytest.mark.slow
def test_a_refiner_without_a_first_text_encoder_carries_adapters_and_is_not_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_xl_pipe()
    file = write_adapter(tmp_path / "fine.safetensors", base, seed=3, parts=("unet", "text_encoder_2"))
    refiner = StableDiffusionXLImg2ImgPipeline(
        **{**make_xl_pipe().components, "text_encoder": None, "tokenizer": None}, add_watermarker=False
    )
    adapters = Adapters(refiner)
    adapters.load(file)
    assert adapters["fine"].report.unmatched == () and set(site.sites(refiner.unet)) != set()
    assert site.sites(refiner.text_encoder_2)
    monkeypatch.setattr(datasets, "scan", lambda *_, **__: pytest.fail("pictures were read"))
    with pytest.raises(UserError, match="is the refiner of Stable Diffusion XL, which finishes pictures; train on its base"):
        train(small(draw_pictures(tmp_path / "pictures", 1), tmp_path), pipe=refiner)


@pytest.mark.slow
def test_loras_of_diffusers_come_after_ours_or_are_told(files: dict[str, Path], tiny_pipe: DiffusionPipeline) -> None:
    theirs = LoraConfig(r=2, target_modules=["to_q", "ff.net.2"], init_lora_weights=False)
    torch.manual_seed(5)
    tiny_pipe.unet.add_adapter(theirs, "theirs")
    with pytest.raises(UserError, match=r"carries an adapter of peft already.*unload_lora_weights.*load ours first"):
        Adapters(tiny_pipe).load(files["ink"])
    folded = make_pipe()
    for path, layer in tiny_pipe.unet.named_modules():
        if hasattr(layer, "get_delta_weight"):
            folded.unet.get_submodule(path).weight.data += layer.get_delta_weight("theirs").detach()
    Adapters(folded).load(files["ink"])
    both = make_pipe()
    Adapters(both).load(files["ink"])
    torch.manual_seed(5)
    both.unet.add_adapter(theirs, "theirs")
    assert torch.allclose(told(both), told(folded), atol=1e-5)


@pytest.mark.slow
def test_what_others_change_after_a_merge_is_not_undone_with_it(
    files: dict[str, Path], tiny_pipe: DiffusionPipeline, tmp_path: Path
) -> None:
    other = write_adapter(tmp_path / "other.safetensors", make_pipe(), seed=9)
    adapters = Adapters(tiny_pipe)
    adapters.load(files["said"])
    adapters.load(files["ink"])
    wanted = told(tiny_pipe)
    adapters.merge()
    tiny_pipe.load_lora_weights(str(other))
    tiny_pipe.fuse_lora(components=["unet"])  # into the same weights, of which ours are kept as they were
    fused = told(tiny_pipe)
    with pytest.raises(UserError, match=r"cannot unmerge: .*weight was changed after the merge.*unfuse_lora"):
        adapters.unmerge()
    assert adapters.merged == ("unet", "text_encoder") and torch.equal(told(tiny_pipe), fused)
    tiny_pipe.unfuse_lora(components=["unet"])
    tiny_pipe.unload_lora_weights()
    adapters.unmerge()
    assert torch.equal(told(tiny_pipe), wanted)
    adapters.merge()
    tiny_pipe.unet.load_state_dict(make_pipe(seed=2).unet.state_dict())
    with pytest.raises(UserError, match=r"load_state_dict\(\) do, and would lose that"):
        adapters.unmerge()
