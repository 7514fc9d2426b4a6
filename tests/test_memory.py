"""Less memory: the same adapter from blocks that are computed twice, and a prediction that is near what is measured."""

import gc
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from conftest import make_pipe, make_xl_pipe
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from language import make_lm
from safetensors.torch import load_file
from test_training import draw_pictures
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from peft_diffusion import TextTrainConfig, TrainConfig, UserError, train, train_text
from peft_diffusion.core import site
from peft_diffusion.core.arena import Arena
from peft_diffusion.core.events import Event, Observer
from peft_diffusion.fast.cuda_graph import Inputs
from peft_diffusion.methods.lora import Lora
from peft_diffusion.training.events import MemoryUnknown
from peft_diffusion.training.machine import low_memory, memory_plan
from peft_diffusion.training.machine.low_memory import blocks_of, recomputed, small_vae
from peft_diffusion.training.machine.preflight import peak
from peft_diffusion.training.need import Need, fits
from peft_diffusion.training.settings.choices import Memory
from peft_diffusion.training.watch.previews import Previews

Make: TypeAlias = Callable[..., DiffusionPipeline]
CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("few_measurements", "no_signals", "no_plots")


def learn(
    pictures: Path, where: Path, pipe: DiffusionPipeline, observers: Sequence[Observer] = (), **more: Any
) -> dict[str, torch.Tensor]:
    values: dict[str, Any] = {"steps": 4, "batch_size": 2, "rank": 2, "warmup": 0, "preview_steps": 0}
    places = {"output": where / "a.safetensors", "run_dir": where / "run", "device": "cpu"}
    return load_file(train(TrainConfig((pictures,), **{**values, **places, **more}), pipe=pipe, observers=observers).output)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.slow
@pytest.mark.parametrize("make", [make_pipe, make_xl_pipe])
def test_blocks_that_are_computed_twice_give_the_same_adapter(tmp_path: Path, make: Make) -> None:
    pictures = draw_pictures(tmp_path / "pictures")
    pipe = make()
    more: dict[str, Any] = {"components": ("unet", "text_encoder"), "dropout": 0.2, "steps": 2, "held_out": 0.0}
    one, two = (learn(pictures, tmp_path / memory, pipe, memory=memory, **more) for memory in ("off", "low"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        # Gradients that meet at a block are added up in another order. The weights move by 1.5e-3.
        torch.testing.assert_close(tensor, two[name], rtol=0, atol=5e-5)
    assert not any("forward" in vars(module) for module in pipe.unet.modules())
    assert not pipe.vae.use_slicing


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "prefix"])
def test_text_learns_the_same_too(tmp_path: Path, method: str) -> None:
    words = tmp_path / "words.txt"
    words.write_text("the red cat and the blue dog sat in the house of ink. " * 40)
    runs = []
    memories: tuple[Memory, ...] = ("off", "low")
    for memory in memories:
        places: dict[str, Any] = {
            "output": tmp_path / f"{memory}.safetensors",
            "run_dir": tmp_path / memory,
            "device": "cpu",
        }
        config = TextTrainConfig((words,), method=method, steps=3, batch_size=2, context=24, memory=memory, **places)
        runs.append(load_file(train_text(config, base=make_lm()).output))
    assert same(*runs)


def measured(work: Callable[[], object]) -> int:
    """The most bytes that torch's own allocator gave out at once."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def short(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """A pipeline whose UNet has half the blocks, each kind of them still: tracing takes its time for each operation.

    Of SDXL's, transformers of two layers and of one stay. The VAE gets a width that no processor pads: within a convolution
    oneDNN copies its input into blocks of 8 channels, or of 16 with AVX-512, and half of a block may be empty. The widths
    of real bases are multiples of 32.
    """
    config = dict(pipe.unet.config)
    xl = config["addition_embed_type"] is not None
    torch.manual_seed(0)
    changes = {
        "block_out_channels": (32, 64), "attention_head_dim": 8, "transformer_layers_per_block": (1, 2) if xl else 1,
        "reverse_transformer_layers_per_block": (1, 1) if xl else None,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "mid_block_type": None,
    }  # fmt: skip
    pipe.unet = UNet2DConditionModel.from_config({**config, **changes}).requires_grad_(False).eval()
    vae = AutoencoderKL.from_config({**pipe.vae.config, "block_out_channels": (16,) * 4})
    pipe.vae = vae.requires_grad_(False).eval()
    return pipe


@pytest.mark.slow
@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize(("make", "batch"), [(make_pipe, 4), (make_xl_pipe, 2)])
def test_the_peak_of_a_step_is_predicted_within_a_tenth(make: Make, batch: int, low: bool) -> None:
    unet = short(make()).unet
    site.attach(unet, "trained", Lora(rank=4), "attention+ff")
    arena = Arena({"unet": [p for a in site.adapters(unet, "trained").values() for p in a.parameters()]})
    width = unet.config.cross_attention_dim
    inputs = {
        "latents": torch.randn(batch, 4, 16, 16), "times": torch.zeros(batch, dtype=torch.long),
        "text": torch.randn(batch, 77, width), "summary": torch.randn(batch, 16), "sizes": torch.ones(batch, 6),
    }  # fmt: skip

    def loss(given: Inputs) -> torch.Tensor:
        added = {"text_embeds": given["summary"], "time_ids": given["sizes"]}
        found: torch.Tensor = unet(given["latents"], given["times"], given["text"], added_cond_kwargs=added).sample
        return found.square().mean()

    with recomputed([unet], chance=False) if low else nullcontext():
        before = arena.flat.clone()
        predicted = peak(lambda given: loss(given).backward(), inputs, CPU)
        assert torch.equal(arena.flat, before) and not arena.grad.any()
        loss(inputs).backward()  # what is allocated once and kept
        assert predicted == pytest.approx(measured(lambda: loss(inputs).backward()), rel=0.1)


def test_operations_on_weights_are_looked_up_as_others_are() -> None:
    layer = torch.nn.Linear(5, 9)
    given = {"x": torch.randn(3, 5)}  # of shapes that no other test has: to forget what is known would make those slower
    peaks, told = [], [FakeTensorMode.cache_info()]
    for _ in range(2):
        peaks.append(peak(lambda given: layer(given["x"]).square().mean().backward(), given, CPU))
        told.append(FakeTensorMode.cache_info())
    before, first, second = told
    assert peaks[0] == peaks[1] > 0
    assert first.misses > before.misses and second.misses == first.misses and second.hits > first.hits
    assert not {reason for reason in Counter(second.bypasses) - Counter(before.bypasses) if "non-fake" in reason}


def test_a_block_that_is_computed_again_keeps_a_forward_of_its_own() -> None:
    unet = make_pipe().unet
    hooked, *others = blocks_of(unet)
    add_hook_to_module(hooked, ModelHook())  # as accelerate's offloading does
    own = vars(hooked)["forward"]
    with recomputed([unet], chance=False) as count:
        assert count == 1 + len(others) and all("forward" in vars(block) for block in (hooked, *others))
    assert vars(hooked)["forward"] is own and not any("forward" in vars(block) for block in others)


class _Seen(Exception):
    """Ends a run that has shown what a test wants to see."""


@pytest.mark.slow
@pytest.mark.parametrize(("make", "size"), [(make_pipe, 128), (make_xl_pipe, 128), (make_pipe, 192)])
def test_the_peak_of_a_preview_is_predicted_within_a_tenth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Make, size: int
) -> None:
    seen = []

    def look(previews: Previews) -> None:
        drawn = previews.pictures()
        seen.append((previews.peak(), measured(previews.pictures), len(drawn)))
        raise _Seen

    monkeypatch.setattr(low_memory, "SLICED_FROM", 192)  # pixels; as at 512, the VAE takes the largest here one by one
    monkeypatch.setattr(Previews, "draw_base", look)
    pictures = draw_pictures(tmp_path / "pictures", size=size)
    prompts = ("a cat", "a dog", "a house")
    with pytest.raises(_Seen):
        learn(pictures, tmp_path, short(make()), preview_steps=1, preview_prompts=prompts, resolution=size, steps=1)
    ((predicted, most, count),) = seen
    assert predicted == pytest.approx(most, rel=0.1) and count == 3


@pytest.mark.slow
def test_recomputing_saves_and_what_does_not_fit_is_refused_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = draw_pictures(tmp_path / "pictures")
    monkeypatch.setattr(memory_plan, "SMALL", 0)
    needs = []
    predict = memory_plan.MemoryPlan.need

    def need(plan: memory_plan.MemoryPlan, low: bool) -> Need:
        needs.append(predict(plan, low))
        return needs[-1]

    monkeypatch.setattr(memory_plan.MemoryPlan, "need", need)
    learn(pictures, tmp_path / "one", short(make_pipe()), memory="off", steps=1, held_out=0.0)
    learn(pictures, tmp_path / "two", short(make_pipe()), memory="low", steps=1, held_out=0.0)
    plain, low = needs
    assert low.step < 0.8 * plain.step and low.weights == plain.weights > 0
    assert low.adapter == plain.adapter
    monkeypatch.setattr(memory_plan, "predict", lambda *_: plain)
    monkeypatch.setattr(memory_plan, "room", lambda _: 2**20)
    with pytest.raises(UserError, match=r"needs \d+ MiB and cpu has 1 MiB; save memory with --memory low, --batch-size 1"):
        learn(pictures, tmp_path / "three", short(make_pipe()))
    assert not (tmp_path / "three" / "run" / "config.toml").exists()
    monkeypatch.setattr(Previews, "peak", lambda previews: 2**30)
    with pytest.raises(UserError, match=r"this run needs 10\d\d MiB.* --preview-steps 0, or free the device"):
        learn(pictures, tmp_path / "four", short(make_pipe()), preview_steps=1)


def test_small_things_of_memory() -> None:
    assert Need(50, 30, 15, away=5, drawing=7).total == 95 and Need(50, 30, 15, away=5, drawing=11).total == 96
    assert Need(50, 30, 15, away=5, drawing=7, recorded=True).total == 107
    assert Need(50, 30, 15, away=5, recorded=True).total == 95
    assert fits(Need(50, 30, 15), 100) and not fits(Need(50, 30, 16), 100) and fits(Need(1, 1, 1), None)
    pipe = make_pipe()
    assert len(blocks_of(pipe.unet)) > len(blocks_of(pipe.text_encoder)) == 2
    with small_vae(pipe.vae, 2048):
        assert pipe.vae.use_slicing and pipe.vae.use_tiling
    with small_vae(pipe.vae, 1024):
        assert pipe.vae.use_slicing and not pipe.vae.use_tiling
    for low in (False, True):
        with small_vae(pipe.vae, 256, low):
            assert pipe.vae.use_slicing == low
    assert not pipe.vae.use_slicing and not pipe.vae.use_tiling


@pytest.mark.slow
def test_a_need_that_cannot_be_told_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no meta kernel\nand more")

    monkeypatch.setattr(memory_plan, "SMALL", 0)
    monkeypatch.setattr(memory_plan, "predict", fail)
    told: list[Event] = []
    learn(draw_pictures(tmp_path / "pictures"), tmp_path / "run", make_pipe(), observers=[told.append], steps=1)
    (event,) = (event for event in told if isinstance(event, MemoryUnknown))
    assert "cannot be told before it (RuntimeError: no meta kernel)" in event.lines()[0]


def test_work_that_reads_a_number_of_its_own_is_measured() -> None:
    def work(given: Inputs) -> object:
        return given["x"] * float(torch.tensor(3.0)) if bool(torch.tensor(True)) else None

    assert peak(work, {"x": torch.zeros(128)}, torch.device("cpu")) >= 512
