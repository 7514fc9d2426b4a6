"""Drawing by recorded steps: the same numbers as the plain network, whatever adapters it carries, and then as it was."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from conftest import make_pipe, make_xl_pipe
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from taped import tape
from torch import Tensor, nn

from peft_diffusion.core import site
from peft_diffusion.core.errors import UserError
from peft_diffusion.core.method import Method
from peft_diffusion.core.strength_schedule import Schedule
from peft_diffusion.fast import drawing
from peft_diffusion.generation.adapters import Adapters
from peft_diffusion.methods.bitfit import BitFit
from peft_diffusion.methods.bottleneck import Bottleneck
from peft_diffusion.methods.lora import Lora

Make: TypeAlias = Callable[..., DiffusionPipeline]
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
DEVICES = ["cpu", "taped", pytest.param("cuda", marks=CUDA)]
METHODS: dict[str, tuple[Method, str]] = {
    "attention": (Lora(rank=3), "attention"),
    "linear": (Lora(rank=2), "all-linear"),
    "conv": (Lora(rank=2), "conv"),
    "norms": (BitFit(), "norms"),
    "bottleneck": (Bottleneck(), "attention"),
}


@pytest.fixture(scope="module")
def lora_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA as peft writes it."""
    pipe, path = make_pipe(), tmp_path_factory.mktemp("lora")
    shapes = {
        name: tuple(one.weight.shape) for name, one in pipe.unet.named_modules() if name.endswith(("to_q", "to_k", "to_v"))
    }
    chance = torch.Generator().manual_seed(5)
    drawn = {
        f"unet.{name}.lora_{side}.weight": 0.2 * torch.randn((2, width) if side == "A" else (out, 2), generator=chance)
        for name, (out, width) in shapes.items()
        for side in "AB"
    }
    save_file(drawn, path / "lora.safetensors")
    return path / "lora.safetensors"


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where is drawn: "taped" is the CPU with recordings."""
    if request.param == "taped":
        tape(monkeypatch)
    return "cuda" if request.param == "cuda" else "cpu"


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def carry(network: nn.Module, name: str, method: str = "attention", seed: int = 0) -> None:
    site.attach(network, name, *METHODS[method])
    chance = torch.Generator().manual_seed(seed)
    for adapter in site.adapters(network, name).values():
        for own in adapter.parameters():
            own.data.add_(0.1 * torch.randn(own.shape, generator=chance).to(own.device))
            own.requires_grad_(False)
    site.pack(network)


def given(network: Any, batch: int = 2, seed: int = 3) -> dict[str, Any]:
    chance, weight, width = (
        torch.Generator().manual_seed(seed),
        next(network.parameters()),
        network.config.cross_attention_dim,
    )

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=chance).to(weight)

    xl = network.config.addition_embed_type is not None
    return {
        "sample": drawn(batch, 4, 8, 8),
        "timestep": torch.tensor(500, device=weight.device),
        "encoder_hidden_states": drawn(batch, 7, width),
        "added_cond_kwargs": {"text_embeds": drawn(batch, 16), "time_ids": drawn(batch, 6)} if xl else None,
    }


@torch.no_grad()
def both(network: Any, call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """What a fast network gives, and what a plain copy of it does."""
    found: Tensor = network(**call).sample
    engine = drawing.engine_of(network)
    assert engine is not None and engine.refused is None
    plain = copy.deepcopy(network)
    assert drawing.engine_of(plain) is None
    return found, plain(**call).sample


def assert_alike(pair: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(*pair, rtol=1e-6, atol=4e-6)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", [make_pipe, make_xl_pipe])
def test_a_fast_step_is_the_plain_one(make: Make, method: str, device: str) -> None:
    network = make().unet.to(device)
    carry(network, "a", method)
    carry(network, "b", "attention", seed=1)
    drawing.start(network)
    found = both(network, given(network))
    assert_alike(found)
    strengths = site.strengths(network)
    assert strengths is not None
    strengths.write({"a": 0.0, "b": 0.0})
    idle = both(network, given(network))
    assert_alike(idle)
    assert (idle[0] - found[0]).abs().max() > 1e-3  # the adapters did something


@pytest.mark.slow
def test_what_adapters_do_meanwhile_is_followed(device: str) -> None:
    network = make_pipe().unet.to(device)
    kinds = [type(one) for one in network.modules()]
    engine, call = drawing.start(network), given(network)
    assert_alike(both(network, call))
    carry(network, "a")
    carry(network, "b", seed=1)
    strengths = site.strengths(network)
    assert strengths is not None
    assert_alike(both(network, call))
    first = engine.recordings
    strengths.write({"a": 0.3, "b": 0.7})
    assert_alike(both(network, call))
    strengths.write({"a": {block: 0.1 * number for number, block in enumerate(strengths.blocks)}})
    assert_alike(both(network, call))
    site.detach(network, "b")
    site.pack(network)
    assert_alike(both(network, call))
    carry(network, "c", seed=2)
    assert_alike(both(network, call))
    assert engine.recordings == first  # all of that found its place
    strengths.write({"a": [0.0, 1.0]})
    assert_alike(both(network, call))
    network.conv_in.weight.data = network.conv_in.weight.data + 0.1  # as another program moves weights
    assert_alike(both(network, call))
    network.conv_in.weight.data = network.conv_in.weight.data - 0.1
    for name in ("a", "c"):
        site.detach(network, name)
    assert_alike(both(network, call))
    drawing.stop(network)
    assert [type(one) for one in network.modules()] == kinds


@pytest.mark.slow
def test_the_only_adapter_is_exchanged_without_another_recording(device: str) -> None:
    network = make_pipe().unet.to(device)
    carry(network, "a")
    engine, call = drawing.start(network), given(network)
    one = both(network, call)[0]
    first = engine.recordings
    site.detach(network, "a")
    carry(network, "a", seed=4)
    other = both(network, call)
    assert_alike(other)
    assert engine.recordings == first and not torch.equal(one, other[0])


@pytest.mark.slow
def test_strengths_that_are_learned_are_read_by_the_plain_network(device: str) -> None:
    network = make_pipe().unet.to(device)
    carry(network, "style")
    call, strengths = given(network), site.strengths(network)
    assert strengths is not None
    engine, learned = drawing.start(network), torch.full((1, len(strengths.blocks), 1), 0.25, device=device)
    before = both(network, call)[0]
    strengths.learn(torch.tensor([strengths.index("style")], device=device), learned)
    with torch.no_grad():
        found = network(**call).sample
    assert engine.refused == "strengths are being learned"
    strengths.stop_learning()
    assert torch.equal(both(network, call)[0], before)
    strengths.write({"style": 0.25})
    expected = both(network, call)[1]
    assert_alike((found, expected))
    assert (before - expected).abs().max() > 1e-3


@pytest.mark.slow
def test_another_prompt_and_one_written_anew_are_told(device: str) -> None:
    network = make_pipe().unet.to(device)
    drawing.start(network)
    call = given(network)
    one = both(network, call)[0]
    other = both(network, {**call, "encoder_hidden_states": given(network, seed=9)["encoder_hidden_states"]})
    assert_alike(other)
    assert not torch.equal(one, other[0])
    call["encoder_hidden_states"].mul_(2)
    assert_alike(both(network, call))
    assert_alike(both(network, given(network, batch=1)))
    wide = given(network)
    wide["timestep"] = 7  # a number, as some samplers give it
    assert_alike(both(network, wide))


@pytest.mark.slow
def test_the_network_is_afterwards_as_it_was() -> None:
    network = make_xl_pipe().unet
    before = {name: (tensor.stride(), tensor.clone()) for name, tensor in network.state_dict().items()}
    kinds, processors = [type(one) for one in network.modules()], network.attn_processors
    drawing.start(network)
    both(network, given(network))
    assert isinstance(pickle.loads(pickle.dumps(network)), kinds[0])
    assert type(network).__name__ == kinds[0].__name__ and type(network).__module__ == kinds[0].__module__
    drawing.stop(network)
    assert [type(one) for one in network.modules()] == kinds and network.attn_processors == processors
    for name, tensor in network.state_dict().items():
        assert tensor.stride() == before[name][0] and torch.equal(tensor, before[name][1])


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda network: network.train(), "in training"),
        (lambda network: network.mid_block.register_forward_hook(lambda *_: None), "hooks"),
        (lambda network: network.conv_in.weight.requires_grad_(True), "trained"),
        (lambda network: setattr(network.conv_in, "forward", network.conv_in.forward), "patched"),
    ],
)
def test_what_cannot_be_served_is_computed_as_before_and_told(spoil: Callable[[Any], object], why: str) -> None:
    network = make_pipe().unet
    call = given(network)
    with torch.no_grad():
        expected = network(**call).sample
        engine = drawing.start(network)
        network(**call)
        spoil(network)
        assert_alike((network(**call).sample, expected))
    assert engine.refused is not None and why in engine.refused
    network(**call)
    assert "gradients" in (engine.refused or "")


@pytest.mark.slow
@pytest.mark.parametrize("strength", [0.8, [0.2, 0.9], Schedule([0, 1]), [0.0, 0.0]], ids=str)
def test_a_pipeline_draws_the_same_picture(strength: Any, device: str, lora_file: Path) -> None:
    pipe = make_pipe().to(device)
    adapters = Adapters(pipe)
    adapters.load(lora_file, "a", strength)

    def drawn() -> Tensor:
        noise = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        images: Tensor = pipe(["a cat", "a dog"], num_inference_steps=3, generator=noise, output_type="pt").images
        return images

    expected = drawn()
    assert adapters.fast(True) is None
    found = drawn()
    assert adapters.plain_because is None
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(drawn(), found)
    # A step and what prompts are told by; text, twice a picture; and pictures, from the second on.
    assert adapters.recordings == (4 if drawing.records_on(pipe.device) else 0) and not adapters.plain_parts
    adapters.fast(False)
    assert torch.equal(drawn(), expected)


@pytest.mark.slow
def test_fast_says_why_it_is_not(lora_file: Path) -> None:
    adapters = Adapters(make_pipe())
    assert "CUDA" in (adapters.fast() or "") and adapters.recordings == 0
    assert adapters.fast(True) is None and drawing.engine_of(adapters.pipe.unet) is not None
    assert adapters.fast(False) == "it is off" and drawing.engine_of(adapters.pipe.unet) is None
    adapters.pipe.unet = torch.compile(adapters.pipe.unet)
    assert "compiled" in (adapters.fast(True) or "")


def test_strengths_for_another_number_of_images_are_refused() -> None:
    network = make_pipe().unet
    carry(network, "a")
    drawing.start(network)
    strengths = site.strengths(network)
    assert strengths is not None
    strengths.write({"a": [1.0, 0.5, 0.2]})
    with torch.no_grad(), pytest.raises(UserError, match="strengths for 3 images, but the batch holds 2"):
        network(**given(network))
