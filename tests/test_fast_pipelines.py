"""Pipelines that a person holds, drawn fast: the same latents as by the plain networks, and everything recorded."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from conftest import make_pipe, make_xl_pipe
from diffusers import ControlNetModel, DiffusionPipeline
from PIL import Image
from taped import Collecting, tape
from test_schedulers import parted
from torch import Tensor

from peft_diffusion.bases.schedulers import FLOW_SCHEDULERS, SCHEDULERS
from peft_diffusion.core import site
from peft_diffusion.core.strength import Amount
from peft_diffusion.core.strength_schedule import ByPart, Schedule
from peft_diffusion.fast import drawing, frozen_ops
from peft_diffusion.fast.stepping import HostSteps, keep_on_host, release
from peft_diffusion.generation.adapters import Adapters
from peft_diffusion.methods.bottleneck import Bottleneck
from peft_diffusion.methods.dora import Dora
from peft_diffusion.methods.lora import Lora

AMOUNTS: dict[str, Amount] = {
    "one for all": 0.8,
    "by step": Schedule([0, 1]),
    "by block and image": [ByPart(1.0, blocks={"up_blocks.1": 0.5}), ByPart(0.3)],
    "none": 0.0,
}


def picture(seed: int, mode: str = "RGB") -> Image.Image:
    shape = (64, 64, 3) if mode == "RGB" else (64, 64)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8), mode)


def mask() -> Image.Image:
    return Image.fromarray((np.indices((64, 64)).sum(0) > 60).astype(np.uint8) * 255)


def control(pipe: DiffusionPipeline, seed: int) -> ControlNetModel:
    torch.manual_seed(seed)
    net = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8, 8, 8, 8))
    for one in net.parameters():
        torch.nn.init.normal_(one, std=0.1)
    return net.requires_grad_(False).eval()


Made = tuple[Any, dict[str, Any]]


def from_text() -> Made:
    return make_xl_pipe(), {}


def from_picture() -> Made:
    pipe = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(make_pipe())
    return pipe, {"image": [picture(0), picture(1)], "strength": 0.7}


def painted_over() -> Made:
    pipe = diffusers.StableDiffusionInpaintPipeline.from_pipe(make_pipe())
    return pipe, {"image": [picture(0), picture(1)], "mask_image": mask(), "strength": 1.0, "height": 64, "width": 64}


def painted_by_nine_channels() -> Made:
    pipe = make_xl_pipe(in_channels=9)
    return pipe, {"image": [picture(0)] * 2, "mask_image": [mask()] * 2, "strength": 0.8, "height": 64, "width": 64}


def steered() -> Made:
    pipe = make_xl_pipe()
    made = diffusers.StableDiffusionXLControlNetPipeline.from_pipe(pipe, controlnet=control(pipe, 0))
    return made, {"image": [picture(0), picture(1)], "controlnet_conditioning_scale": 0.7, "control_guidance_end": 0.5}


def steered_by_two() -> Made:
    pipe = make_pipe()
    nets = [control(pipe, 0), control(pipe, 1)]
    made = diffusers.StableDiffusionControlNetImg2ImgPipeline.from_pipe(pipe, controlnet=nets)
    return made, {"image": [picture(0)] * 2, "control_image": [picture(2), picture(3)], "strength": 0.8, "guess_mode": True}


APART = [from_text, steered_by_two]  # with adapters that run by themselves too, besides pairs
MADE = [from_text, from_picture, painted_over, painted_by_nine_channels, steered, steered_by_two]


def carry(part: Any, name: str, method: Any, target: str, seed: int) -> None:
    torch.manual_seed(seed)  # by which they begin
    site.attach(part, name, method, target)
    chance = torch.Generator().manual_seed(seed)
    for adapter in site.adapters(part, name).values():
        for own in adapter.parameters():
            own.data.add_(0.1 * torch.randn(own.shape, generator=chance))
            own.requires_grad_(False)
    site.pack(part)


def latents(pipe: Any, given: dict[str, Any], steps: int = 3) -> Tensor:
    noise = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    found: Tensor = pipe(
        ["a cat", "a dog"], num_inference_steps=steps, generator=noise, guidance_scale=3.0, output_type="latent", **given
    ).images
    return found


@pytest.mark.slow
@pytest.mark.parametrize("make", MADE)
def test_a_pipeline_gives_the_same_latents(make: Callable[[], Made], monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, given = make()
    pipe.set_progress_bar_config(disable=True)
    carry(pipe.unet, "a", Lora(rank=2), "attention", 0)
    carry(pipe.unet, "b", Bottleneck() if make in APART else Lora(rank=3), "attention", 1)
    carry(pipe.text_encoder, "a", Lora(rank=2), "attention", 2)
    carry(pipe.text_encoder, "b", Dora(rank=2) if make in APART else Lora(rank=1), "attention", 3)
    adapters = Adapters(pipe)

    def drawn(*names: str) -> dict[str, Tensor]:
        found = {}
        for name in names:
            adapters.set(a=AMOUNTS[name], b=AMOUNTS[name])
            found[name] = latents(pipe, given)
            assert adapters.plain_because is None and not adapters.plain_parts
        return found

    expected = drawn(*AMOUNTS)
    tape(monkeypatch)
    assert adapters.fast(True) is None
    found = drawn(*AMOUNTS)
    engine = drawing.engine_of(pipe.unet)
    assert engine is not None
    first = engine.recordings
    again = drawn("by block and image", "one for all")
    assert first and adapters.recordings > first and engine.recordings == first
    for name in AMOUNTS:
        # A step is held to 1e-6 by test_fast_generation; guidance makes three times of what three steps round.
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=5e-5)
    for name, one in again.items():
        torch.testing.assert_close(one, found[name], rtol=1e-6, atol=1e-6)
    assert len({round(float(one.double().sum()), 4) for one in expected.values()}) == len(AMOUNTS)  # all act
    adapters.fast(False)
    assert not isinstance(pipe.scheduler, HostSteps)
    assert all(drawing.engine_of(one) is None for part in pipe.components.values() for one in _modules(part))


def _modules(part: Any) -> list[torch.nn.Module]:
    return list(part.modules()) if isinstance(part, torch.nn.Module) else []


@pytest.mark.slow
def test_what_a_part_is_told_otherwise_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    tape(monkeypatch)
    pipe = make_pipe()
    adapters = Adapters(pipe)
    plain = copy.deepcopy(pipe.text_encoder), copy.deepcopy(pipe.vae)
    adapters.fast(True)
    with torch.no_grad():
        for round_ in range(4):
            ids = torch.randint(0, 20, (2, 77), generator=torch.Generator().manual_seed(round_))
            told = pipe.text_encoder(ids, output_hidden_states=round_ > 1)
            wanted = plain[0](ids, output_hidden_states=round_ > 1)
            assert told.keys() == wanted.keys()
            torch.testing.assert_close(told.last_hidden_state, wanted.last_hidden_state, rtol=1e-6, atol=1e-6)
            x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(round_))
            torch.testing.assert_close(pipe.vae.decode(x).sample, plain[1].decode(x).sample, rtol=1e-5, atol=1e-5)
            if round_ == 2:
                for one in (pipe.vae, plain[1]):
                    one.decoder.conv_out.weight.data = one.decoder.conv_out.weight.data * 2
        one, other = (pipe.text_encoder(ids.roll(shift), output_hidden_states=True).last_hidden_state for shift in (0, 1))
    assert not torch.equal(one, other) and not adapters.plain_parts


@pytest.mark.slow
def test_memory_that_is_scarce_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    tape(monkeypatch)
    monkeypatch.setattr("peft_diffusion.fast.parts._roomy", lambda device: False)
    pipe = make_pipe()
    adapters = Adapters(pipe)
    adapters.fast(True)
    for _ in range(3):
        latents(pipe, {}, steps=1)
    assert adapters.recordings == 2 and not adapters.plain_parts


@pytest.mark.parametrize("name", parted([*SCHEDULERS, *(f"flow {name}" for name in FLOW_SCHEDULERS)]))
def test_a_scheduler_keeps_its_timesteps_on_the_host(name: str) -> None:
    kind, changes = FLOW_SCHEDULERS[name.removeprefix("flow ")] if name.startswith("flow ") else SCHEDULERS[name]
    cls = getattr(diffusers, kind)
    if "scipy" in getattr(cls, "_backends", ()):
        pytest.importorskip("scipy")
    plain = cls.from_config({}, **changes)
    kept = copy.deepcopy(plain)  # making some takes long
    keep_on_host(kept)
    keep_on_host(kept)
    plain.set_timesteps(5, device="cpu")
    kept.set_timesteps(5, device="meta")
    assert torch.equal(plain.timesteps, kept.timesteps) and isinstance(kept, cls) and type(kept).__name__ == kind
    answers = []
    for one in (plain, kept):
        torch.manual_seed(0)
        x = torch.randn(1, 4, 4, 4)
        for time in one.timesteps:
            told = one.scale_model_input(x, time) if hasattr(one, "scale_model_input") else x
            x = one.step(0.1 * told, time, x).prev_sample
        answers.append(x)
    assert torch.equal(*answers)
    for made in (copy.deepcopy(kept), pickle.loads(pickle.dumps(kept))):
        assert type(made) is cls and made.config == kept.config and torch.equal(made.timesteps, kept.timesteps)
    release(kept)
    assert type(kept) is cls


def short_xl_network() -> Any:
    """A level and a layer less than that of `make_xl_pipe`: each layer is gone through, though its kernels are known."""
    torch.manual_seed(0)
    plan = {
        **make_xl_pipe().unet.config, "block_out_channels": (32, 64), "attention_head_dim": (2, 4),
        "transformer_layers_per_block": (1, 1), "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    return diffusers.UNet2DConditionModel.from_config(plan).requires_grad_(False).eval()


@pytest.mark.slow
def test_kernels_are_compiled_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tape(monkeypatch)
    kernels = Collecting(tmp_path / "cache")
    monkeypatch.setattr(frozen_ops, "kernels_on", lambda device: kernels)
    for count in (1, 1, 2):  # another process with the same shape, and one with another
        network = short_xl_network()
        carry(network, "a", Lora(rank=2), "attention", 0)
        drawing.start(network)
        size = 8 if count == 1 else 4
        found = drawn_step(network, size)
        assert kernels.ahead == count and kernels.noted[False] <= kernels.noted[True]
        drawing.stop(network)
        torch.testing.assert_close(found, drawn_step(network, size), rtol=1e-5, atol=1e-5)
    assert {name for name, *_ in kernels.noted[True]} == {"group_norm", "layer_norm", "gated", "sum_with_bias"}


@torch.no_grad()
def drawn_step(network: Any, size: int) -> Tensor:
    chance = torch.Generator().manual_seed(0)
    told = {"text_embeds": torch.randn(2, 16, generator=chance), "time_ids": torch.randn(2, 6, generator=chance)}
    x, text = torch.randn(2, 4, size, size, generator=chance), torch.randn(2, 7, 64, generator=chance)
    found: Tensor = network(x, 5, text, added_cond_kwargs=told).sample
    return found
