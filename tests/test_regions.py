"""Regions of pictures: each against a run of its own, at sites, in attention, and by whole pictures."""

import pytest
import torch
from torch import Tensor, nn

from peft_diffusion.core import regions, site
from peft_diffusion.core.errors import UserError
from peft_diffusion.core.method import METHODS, Method
from peft_diffusion.core.regions import Layout
from peft_diffusion.methods.lora import Lora


def halves(height: int, width: int, pictures: int = 1) -> Tensor:
    """The left half, and the right half."""
    left = torch.zeros(pictures, 1, height, width)
    left[..., : width // 2] = 1
    return torch.cat([left, 1 - left], 1)


def carry(network: nn.Module, name: str, method: Method, target: str, seed: int) -> None:
    site.attach(network, name, method, target)
    chance = torch.Generator().manual_seed(seed)
    for adapter in site.adapters(network, name).values():
        for own in adapter.parameters():
            own.data.add_(0.1 * torch.randn(own.shape, generator=chance))
            own.requires_grad_(False)


class Pointwise(nn.Module):
    """A network in which no position sees another: its values inside a region are those of a run of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in, self.norm, self.to_q = nn.Conv2d(3, 8, 1), nn.LayerNorm(8), nn.Linear(8, 8)
        self.conv_out = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv_in(x)
        tokens = self.to_q(self.norm(y.flatten(2).transpose(1, 2)))
        found: Tensor = self.conv_out(tokens.transpose(1, 2).unflatten(2, x.shape[2:]))
        return found


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "apart"])
@pytest.mark.parametrize("size", [(8, 8), (6, 10), (5, 7)], ids=str)
@torch.no_grad()
def test_values_inside_a_region_are_those_of_a_run_of_its_own(size: tuple[int, int], packed: bool) -> None:
    torch.manual_seed(0)
    network = Pointwise().eval()
    plain = network(x := torch.randn(4, 3, *size))  # two pictures, each twice
    for seed, name in enumerate(("ink", "flat")):
        carry(network, name, Lora(rank=3), "all", seed)
    if packed:
        site.pack(network)
    strengths = site.strengths(network)
    assert strengths is not None
    layout = Layout(halves(*size, pictures=2), size)
    wanted = {"ink": [0.7, 0.0, 0.2, -1.0], "flat": [0.0, 1.3, 0.0, 0.0]}
    strengths.write(wanted)
    with regions.using(layout):
        found = network(x)
    for column in range(4):
        strengths.write({name: values[column] for name, values in wanted.items()})
        alone, half = network(x), layout.on_map(*size)[column // 2, column % 2] == 1
        for row in (column // 2, column // 2 + 2):  # guidance
            assert (found[row][:, half] - alone[row][:, half]).abs().max() < 1e-5
            assert (alone[row] - plain[row]).abs().max() > 1e-2
    strengths.write({"ink": [0.7, 0.0, 0.2, -1.0], "flat": 0.0})
    with regions.using(layout):
        nothing = network(x)[0][:, layout.on_map(*size)[0, 1] == 1]
    assert (nothing - plain[0][:, layout.on_map(*size)[0, 1] == 1]).abs().max() < 1e-6


@pytest.mark.parametrize("method", ["lora", "loha", "lokr", "dora", "oft", "ia3", "bitfit", "bottleneck", "full"])
@torch.no_grad()
def test_every_method_is_nothing_outside_of_its_region(method: str) -> None:
    torch.manual_seed(0)
    layer = nn.ModuleDict({"to_q": nn.Linear(8, 8), "conv": nn.Conv2d(8, 8, 3, padding=1)}).eval()
    for name, x in (("to_q", torch.randn(2, 64, 8)), ("conv", torch.randn(2, 8, 8, 8))):
        target = f"*{name}"
        plain = layer[name](x)
        try:
            carry(layer, "made", METHODS[method](), target, 1)
        except UserError:
            continue  # of convolutions some know nothing
        strengths = site.strengths(layer)
        assert strengths is not None
        strengths.write({"made": [0.8, 0.0]})
        with regions.using(Layout(halves(8, 8), (8, 8))):
            found = layer[name](x)
        strengths.write({"made": 0.8})
        alone = layer[name](x)
        if name == "to_q":
            plain, found, alone = (one.transpose(1, 2).unflatten(2, (8, 8)) for one in (plain, found, alone))
        assert torch.equal(found[..., 4:], plain[..., 4:])
        assert (found[..., :4] - alone[..., :4]).abs().max() < 1e-5 < (alone - plain).abs().max()
        site.detach(layer, "made")
