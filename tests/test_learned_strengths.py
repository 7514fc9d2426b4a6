"""Strengths that are learned: gradients against finite differences, and strengths of blocks over the steps."""

from typing import Any

import pytest
import torch
from conftest import make_pipe

from peft_diffusion import Adapters, ByPart, Schedule, UserError
from peft_diffusion.core import site
from peft_diffusion.core.strength import Strengths
from peft_diffusion.methods.bottleneck import Bottleneck
from peft_diffusion.methods.dora import Dora
from peft_diffusion.methods.lora import Lora


@pytest.fixture(scope="module")
def network() -> Any:
    """A network with a LoRA and a DoRA, and a bottleneck, which is not linear; of sizes that are seen."""
    unet = make_pipe().unet.double()
    torch.manual_seed(0)
    for name, method, target in (
        ("ink", Lora(rank=2), "attention+ff"), ("flat", Dora(rank=2), "attention+ff"), ("bent", Bottleneck(), "outputs"),
    ):  # fmt: skip
        site.attach(unet, name, method, target)
        for adapter in site.adapters(unet, name).values():
            for parameter in adapter.parameters():
                parameter.data.add_(0.3 * torch.randn_like(parameter))
    return unet.requires_grad_(False)


@pytest.mark.slow
def test_gradients_of_strengths_are_those_of_finite_differences(network: Any) -> None:
    strengths = site.strengths(network)
    assert isinstance(strengths, Strengths)
    rows, images = torch.tensor([strengths.index(name) for name in ("flat", "ink", "bent")]), 2
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(images, 4, 8, 8, generator=generator, dtype=torch.float64)
    hidden = torch.randn(images, 77, 32, generator=generator, dtype=torch.float64)
    values = torch.rand(len(rows), len(strengths.blocks), images, generator=generator).requires_grad_()

    def loss(given: torch.Tensor) -> torch.Tensor:
        strengths.learn(rows, given)
        found: torch.Tensor = network(latents, torch.tensor([500, 100]), hidden).sample.square().mean()
        return found

    loss(values).backward()
    assert values.grad is not None
    acting = values.grad.abs().amax((0, 2)) > 0
    assert 2 <= int(acting.sum()) < len(strengths.blocks)  # where there are no sites there is nothing to learn
    step = 2.0**-7  # exact in float32, in which strengths are
    places = torch.nonzero(values.grad)
    for place in map(tuple, places[:: len(places) // 8].tolist()):
        nudge = torch.zeros_like(values)
        nudge[place] = step
        with torch.no_grad():
            slope = (loss(values + nudge) - loss(values - nudge)) / (2 * step)
        assert slope.item() == pytest.approx(values.grad[place].item(), rel=2e-3, abs=1e-7)
    strengths.stop_learning()
    assert strengths.present is strengths.values


def test_steps_of_blocks_multiply_what_is_said_besides() -> None:
    adapters = Adapters(make_pipe())
    for component in ("unet", "text_encoder"):
        site.attach(getattr(adapters.pipe, component), "ink", Lora(rank=2), "attention+ff")
    strengths = {name: site.strengths(getattr(adapters.pipe, name)) for name in ("unet", "text_encoder")}
    unet, text = strengths["unet"], strengths["text_encoder"]
    assert unet is not None and text is not None
    fades, rises = Schedule([1, 0]), Schedule([0, 1])
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    amount = ByPart(0.5, {"text_encoder": 0.5}, steps=fades, block_steps={"mid_block": rises, layer: Schedule([0.5])})
    adapters.set(ink=amount)
    unet.at_progress(0.25)
    row = dict(zip(unet.blocks, unet.present[0, :, 0].tolist(), strict=True))
    assert row.pop(layer) == 0.5 * 0.75 * 0.5
    inside = [value for name, value in row.items() if name.startswith("mid_block")]
    assert set(inside) == {0.5 * 0.75 * 0.25} and len(inside) > 4
    assert {value for name, value in row.items() if not name.startswith("mid_block")} == {0.375}
    assert set(text.values[0, :, 0].tolist()) == {0.125}  # the mean of what fades; the network's blocks are none of its own
    adapters.set(ink=[0.3, amount])
    unet.at_progress(0.25)
    assert unet.present[0, unet.blocks.index("mid_block")].tolist() == pytest.approx([0.3, 0.5 * 0.75 * 0.25])
    with pytest.raises(UserError, match="there is no block middle"):
        adapters.set(ink=ByPart(block_steps={"middle": fades}))
