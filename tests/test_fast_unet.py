"""A fused UNet: the same numbers as the plain one, less kept for backward, and afterwards as it was."""

import re
from collections.abc import Callable
from typing import TypeAlias

import pytest
import torch
from conftest import make_pipe, make_xl_pipe
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.nn import functional as F

from peft_diffusion.bases import checksum
from peft_diffusion.core import site
from peft_diffusion.fast import frozen_ops
from peft_diffusion.fast.unet import (
    FrozenConv,
    FusedAttention,
    FusedBlock,
    FusedGeglu,
    FusedNorm,
    FusedResnet,
    FusedTransformer,
    channels_last,
    fused,
    side_by_side,
    swapped,
)
from peft_diffusion.methods.bitfit import BitFit
from peft_diffusion.methods.lora import Lora
from peft_diffusion.training.machine.low_memory import recomputed

Make: TypeAlias = Callable[..., DiffusionPipeline]
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
DTYPES = {"float32": (torch.float32, 0.9999), "bfloat16": (torch.bfloat16, 0.999)}
METHODS = {"lora": (Lora(rank=2), "attention+ff"), "conv": (Lora(rank=2), "conv"), "biases": (BitFit(), "biases"),
           "all": (Lora(rank=2), "all-linear"), "norms": (BitFit(), "norms")}  # fmt: skip


def unet_with(method: str, dtype: torch.dtype, make: Make = make_pipe, device: str = "cpu") -> UNet2DConditionModel:
    unet = make().unet.to(device, dtype)
    site.attach(unet, "a", *METHODS[method])
    for number, parameter in enumerate(p for p in unet.parameters() if p.requires_grad):
        drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        parameter.data.add_(0.1 * drawn.to(device))
    return unet


def gradients(unet: UNet2DConditionModel) -> torch.Tensor:
    weight, chance = next(unet.parameters()), torch.Generator().manual_seed(7)
    width = unet.config.cross_attention_dim
    x, text = torch.randn(2, 4, 8, 8, generator=chance), torch.randn(2, 7, width, generator=chance)
    added = {"text_embeds": torch.ones(2, 16), "time_ids": torch.ones(2, 6)} if width == 64 else {}
    added = {name: tensor.to(weight) for name, tensor in added.items()}
    unet.zero_grad()
    when = torch.tensor(500, device=weight.device)
    unet(
        x.to(weight), when, encoder_hidden_states=text.to(weight), added_cond_kwargs=added
    ).sample.float().square().mean().backward()
    return torch.cat([p.grad.float().flatten() for p in unet.parameters() if p.grad is not None])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", [make_pipe, make_xl_pipe])
def test_gradients_are_those_of_the_plain_unet(make: Make, method: str, dtype: str) -> None:
    kind, limit = DTYPES[dtype]
    unet = unet_with(method, kind, make)
    expected = gradients(unet)
    with swapped(unet):
        found = gradients(unet)
    assert torch.cosine_similarity(expected, found, dim=0) >= limit
    assert torch.equal(gradients(unet), expected)


def test_the_modules_are_fused_inside_and_afterwards_as_they_were() -> None:
    unet = make_pipe().unet
    before, digest = [type(one) for one in unet.modules()], checksum({"unet": unet})
    with swapped(unet):
        kinds = {type(one) for one in unet.modules()}
        assert {FrozenConv, FusedNorm, FusedGeglu, FusedResnet, FusedBlock, FusedTransformer} <= kinds
        assert not {nn.Conv2d, nn.GroupNorm} & kinds
        site.attach(unet, "a", Lora(rank=2), "conv")
        assert site.base_class(unet.conv_in) is FrozenConv
    assert site.base_class(unet.conv_in) is nn.Conv2d
    site.detach(unet, "a")
    assert [type(one) for one in unet.modules()] == before and checksum({"unet": unet}) == digest


@pytest.mark.parametrize("method", ["lora", "biases", "all"])
def test_the_timestep_is_read_by_one_product(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = unet_with("lora", torch.float32)
    blocks = [one for one in unet.modules() if isinstance(one, ResnetBlock2D)]
    own = blocks[1].time_emb_proj
    if method != "lora":
        kind = METHODS[method][0]
        paths = [re.escape(path) for path, one in unet.named_modules() if one is own or one is blocks[2].conv1]
        site.attach(unet, "b", kind, "|".join(paths))
    expected, widths = gradients(unet), {len(block.time_emb_proj.weight) for block in blocks}
    rows: list[int] = []
    linear = F.linear

    def counted(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        rows.append(len(weight))
        return linear(x, weight, bias)

    with side_by_side(unet), swapped(unet):
        monkeypatch.setattr(F, "linear", counted)
        found = gradients(unet)
        again = gradients(unet)
        monkeypatch.undo()
    together = sum(len(block.time_emb_proj.weight) for block in blocks)
    assert rows.count(together) == 2 and together not in widths  # once a pass
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(found, again)
    assert not any("times" in vars(block) for block in blocks)
    torch.testing.assert_close(gradients(unet), expected, rtol=0, atol=0)


def test_a_timestep_that_has_a_gradient_is_read_block_by_block() -> None:
    unet = make_pipe().unet.requires_grad_(False)
    site.attach(unet, "a", Lora(rank=2), r"time_embedding\.linear_1")
    for parameter in (one for one in unet.parameters() if one.requires_grad):
        parameter.data.add_(0.1)
    expected = gradients(unet)
    with side_by_side(unet), swapped(unet), recomputed([unet], chance=False):
        found = gradients(unet)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    assert expected.abs().max() > 0


def test_nothing_changes_on_a_cpu() -> None:
    unet = make_pipe().unet
    before = [type(one) for one in unet.modules()]
    with fused(unet):
        assert [type(one) for one in unet.modules()] == before


def test_order_processors_and_bytes_come_back_after_an_error_too() -> None:
    unet = make_xl_pipe().unet
    processors = [type(one) for one in unet.attn_processors.values()]
    before = {name: (tensor.stride(), tensor.clone()) for name, tensor in unet.state_dict().items()}
    with pytest.raises(ZeroDivisionError), channels_last(unet), swapped(unet):
        assert unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
        assert {type(one) for one in unet.attn_processors.values()} == {FusedAttention}
        raise ZeroDivisionError
    assert [type(one) for one in unet.attn_processors.values()] == processors
    for name, tensor in unet.state_dict().items():
        assert tensor.stride() == before[name][0] and torch.equal(tensor, before[name][1])


def test_checkpointing_gives_the_same_gradients() -> None:
    unet = unet_with("lora", torch.float32)
    with channels_last(unet), swapped(unet):
        expected = gradients(unet)
        unet.train()
        unet.enable_gradient_checkpointing()
        torch.testing.assert_close(gradients(unet), expected, rtol=1e-4, atol=1e-6)


def test_a_unet_keeps_less() -> None:
    unet = unet_with("lora", torch.float32)

    def size() -> int:
        weights = {parameter.untyped_storage().data_ptr() for parameter in unet.parameters()}
        kept = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept_by(run)}
        return sum(nbytes for place, nbytes in kept.items() if place not in weights)

    x, text = torch.randn(2, 4, 16, 16), torch.randn(2, 7, 32)
    run = lambda: unet(x, torch.tensor(500), encoder_hidden_states=text).sample  # noqa: E731
    plain = size()
    with channels_last(unet), swapped(unet):
        assert size() < 0.75 * plain


def kept_by(run: Callable[[], object]) -> list[torch.Tensor]:
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        run()
    return kept


def test_each_keeps_what_it_has_to() -> None:
    unet = make_pipe().unet
    x = torch.randn(2, 32, 8, 8, requires_grad=True)
    with swapped(unet):
        resnet = unet.down_blocks[0].resnets[0]
        assert {t.numel() for t in kept_by(lambda: resnet.conv1(x))} == {resnet.conv1.weight.numel()}
        norm = kept_by(lambda: resnet.norm1.normed(x, silu=True))
        assert sum(t.numel() == x.numel() for t in norm) == 1
        geglu = next(one for one in unet.modules() if isinstance(one, FusedGeglu))
        flat = torch.randn(2, 5, 32, requires_grad=True)
        large = 2 * 5 * geglu.proj.out_features
        assert sum(t.numel() == large for t in kept_by(lambda: geglu(flat))) == 1
        assert sum(t.numel() == large // 2 for t in kept_by(lambda: geglu(flat))) == 0


@pytest.mark.parametrize("silu", [False, True])
def test_the_norm_is_right(silu: bool) -> None:
    torch.manual_seed(0)
    norm = nn.GroupNorm(4, 16).requires_grad_(False)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    x = torch.randn(2, 16, 3, 5, requires_grad=True)
    weights = torch.randn(2, 16, 3, 5)
    plain = F.silu(norm(x)) if silu else norm(x)
    (expected,) = torch.autograd.grad((plain * weights).sum(), x)
    norm.__class__ = FusedNorm
    assert isinstance(norm, FusedNorm)
    for given in (x, x.detach().contiguous(memory_format=torch.channels_last).requires_grad_(True)):
        y = norm.normed(given, silu=silu)
        torch.testing.assert_close(y, plain)
        torch.testing.assert_close(torch.autograd.grad((y * weights).sum(), given)[0], expected, rtol=1e-4, atol=1e-5)


def test_a_norm_that_is_trained_gets_its_gradients() -> None:
    norm = nn.GroupNorm(2, 4)
    norm.__class__ = FusedNorm
    assert isinstance(norm, FusedNorm)
    norm.normed(torch.randn(1, 4, 2, 2), silu=True).sum().backward()
    assert norm.weight.grad is not None and norm.bias.grad is not None


@CUDA
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [make_pipe, make_xl_pipe])
def test_kernels_give_the_gradients_of_the_plain_unet(make: Make, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # what is compared to the bit are our kernels
    kind, limit = DTYPES[dtype]
    unet = unet_with("lora", kind, make, "cuda")
    expected, digest = gradients(unet), checksum({"unet": unet})
    with fused(unet):
        assert frozen_ops.kernels_on(next(unet.parameters()).device) is not None
        found = gradients(unet)
        again = gradients(unet)
    assert torch.cosine_similarity(expected, found, dim=0) >= limit
    assert torch.equal(found, again)
    assert checksum({"unet": unet}) == digest


@CUDA
@pytest.mark.parametrize("channels, groups, side", [(32, 8, 8), (320, 32, 64), (960, 32, 31), (2560, 32, 8)])
@pytest.mark.parametrize("silu", [False, True])
def test_kernels_of_the_norm_are_right(channels: int, groups: int, side: int, silu: bool) -> None:
    norm = nn.GroupNorm(groups, channels).cuda().requires_grad_(False)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    x = (3 + torch.randn(2, channels, side, side, device="cuda")).contiguous(memory_format=torch.channels_last)
    x.requires_grad_(True)
    weights = torch.randn_like(x)
    plain = F.silu(norm(x)) if silu else norm(x)
    (expected,) = torch.autograd.grad((plain * weights).sum(), x)
    norm.__class__ = FusedNorm
    assert isinstance(norm, FusedNorm)
    y = norm.normed(x, silu=silu)
    torch.testing.assert_close(y, plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.autograd.grad((y * weights).sum(), x)[0], expected, rtol=1e-3, atol=1e-4)
