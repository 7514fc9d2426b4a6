"""A frozen Linear with a LoRA as one function: the same numbers as one after the other, and nothing saved twice."""

from collections.abc import Callable, Iterator
from typing import TypeAlias

import pytest
import torch
from conftest import make_pipe, make_xl_pipe
from diffusers import DiffusionPipeline
from laws import strengths_of
from torch import Tensor, nn

from peft_diffusion.core import site
from peft_diffusion.core.arena import Arena, side_by_side
from peft_diffusion.fast import low_rank
from peft_diffusion.fast.unet import side_by_side as side_by_side_weights
from peft_diffusion.fast.unet import swapped
from peft_diffusion.methods.lora import Lora

Pays: TypeAlias = Callable[[bool], None]
DTYPES = {"float32": (torch.float32, 1e-5), "bfloat16": (torch.bfloat16, 2e-2)}
CASES = {
    "plain": (Lora(rank=4), 1.0),
    "scaled": (Lora(rank=3, alpha=1.0), 1.0),
    "half": (Lora(rank=4), 0.5),
    "pissa": (Lora(rank=4, init="pissa"), 1.0),
}


class Layers(nn.Module):
    """Two layers, the first of which need not give gradients to its input."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(12, 16), nn.Linear(16, 10, bias=False)
        self.requires_grad_(False).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.tanh(self.first(x)))
        return y


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    y = model(x)
    y.float().square().mean().backward()
    return [y.detach().float(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.fixture
def pays(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pays]:
    """Sets whether the function is taken, on a CPU too."""
    with low_rank.fusing():
        yield lambda taken: monkeypatch.setattr(low_rank, "pays", lambda x: taken)


def randomize(model: nn.Module) -> None:
    for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
        drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        parameter.data.add_(0.3 * drawn)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_one_function_gives_the_gradients_of_two(case: str, dtype: str, pays: Pays) -> None:
    (method, strength), (kind, limit) = CASES[case], DTYPES[dtype]
    model = Layers(kind)
    site.attach(model, "a", method, "all-linear")
    randomize(model)
    strengths_of(model).write({"a": strength})
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1)).to(kind)
    pays(False)
    expected = gradients(model, x)
    pays(True)
    found = gradients(model, x)
    assert len(expected) == len(found) == 5
    for a, b in zip(expected, found, strict=True):
        assert b.dtype == torch.float32
        assert (a - b).abs().max() <= limit * a.abs().max()


def test_the_function_is_right_to_the_last_term() -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(*shape, dtype=torch.float64) for shape in ((3, 2, 6), (5, 6), (5,), (2, 6), (5, 2))]
    x, weight, bias, down, up = tensors
    for tensor in (x, down, up):
        tensor.requires_grad_(True)
    strength = torch.tensor([0.7], dtype=torch.float64)

    def run(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return low_rank.low_rank_linear(x, weight, bias, down, up, strength, 0.25)

    expected = x @ weight.T + bias + 0.25 * 0.7 * (x @ down.T) @ up.T
    torch.testing.assert_close(run(x, down, up), expected)
    loss = (run(x, down, up) * torch.arange(30).view(3, 2, 5)).sum()
    wanted = torch.autograd.grad((expected * torch.arange(30).view(3, 2, 5)).sum(), (x, down, up))
    found = torch.autograd.grad(loss, (x, down, up))
    torch.testing.assert_close(found[0], wanted[0])
    for a, b in zip(found[1:], wanted[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)  # summed in float32


def test_nothing_is_kept_but_the_input_and_its_product_with_down(pays: Pays) -> None:
    model = Layers(torch.float32)
    site.attach(model, "a", Lora(rank=2), "all-linear")
    pays(True)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model.first(torch.randn(7, 12))
    assert sorted(tensor.numel() for tensor in kept) == sorted([7 * 12, 7 * 2, 12 * 16, 2 * 12, 16 * 2, 1])


def test_what_it_does_not_serve_goes_the_usual_way(pays: Pays, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("not to be called")

    pays(True)
    monkeypatch.setattr(low_rank, "low_rank_linear", refuse)
    x = torch.randn(2, 5, 12)
    for case in ("dropout", "two", "images", "trained base", "no gradients", "strength 0"):
        model = Layers(torch.float32)
        site.attach(model, "a", Lora(rank=2, dropout=0.5 if case == "dropout" else 0.0), "all-linear")
        model.train()
        if case == "two":
            site.attach(model, "b", Lora(rank=2), "all-linear")
        if case == "images":
            strengths_of(model).write({"a": [1.0, 0.5]})
        if case == "strength 0":
            strengths_of(model).write({"a": 0.0})
        if case == "trained base":
            model.first.weight.requires_grad_(True)
            model.second.weight.requires_grad_(True)
        with torch.set_grad_enabled(case != "no gradients"):
            model(x)
    quantized = Layers(torch.float32)
    from peft_diffusion.core.quantized import quantize

    quantize(quantized, "int8")
    site.attach(quantized, "a", Lora(rank=2), "all-linear")
    quantized(x)
    with pytest.raises(AssertionError, match="not to be called"):
        plain = Layers(torch.float32)
        site.attach(plain, "a", Lora(rank=2), "all-linear")
        plain(x)


@pytest.mark.slow
def test_a_unet_has_the_same_gradients_and_checkpointing_too(pays: Pays) -> None:
    pipe = make_pipe()
    unet = pipe.unet
    site.attach(unet, "a", Lora(rank=2), "attention+ff")
    randomize(unet)
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 32)

    def run() -> Tensor:
        unet.zero_grad()
        unet(x, torch.tensor(500), encoder_hidden_states=text).sample.square().mean().backward()
        return torch.cat([p.grad.flatten() for p in unet.parameters() if p.grad is not None])

    pays(False)
    expected = run()
    pays(True)
    found = run()
    unet.train()
    unet.enable_gradient_checkpointing()
    again = run()
    assert torch.cosine_similarity(expected, found, dim=0) >= 0.99999
    torch.testing.assert_close(again, found)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [make_pipe, make_xl_pipe])
def test_queries_keys_and_values_are_one_layer_in_a_pass_of_the_trainer(
    make: Callable[..., DiffusionPipeline], dtype: str, pays: Pays, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, limit = DTYPES[dtype]
    limit *= 2 if kind == torch.bfloat16 else 1  # the net of XL is deep, and rounds to 3% in either order of the sums
    torch.manual_seed(0)
    unet = make().unet.to(kind)
    site.attach(unet, "a", Lora(rank=4, alpha=2.0), "attention")
    built = site.adapters(unet, "a")
    arena = Arena({"unet": side_by_side((path, list(adapter.parameters())) for path, adapter in built.items())})
    arena.flat.add_(0.1 * torch.randn(arena.flat.shape, generator=torch.Generator().manual_seed(3)))
    width = unet.config.cross_attention_dim
    x, text = torch.randn(2, 4, 8, 8).to(kind), torch.randn(2, 7, width).to(kind)
    added = {"text_embeds": torch.randn(2, 16).to(kind), "time_ids": torch.ones(2, 6, dtype=kind)}

    def run() -> Tensor:
        y = unet(x, torch.tensor(500), encoder_hidden_states=text, added_cond_kwargs=added).sample
        y.float().square().mean().backward()
        return torch.cat([y.detach().float().flatten(), 1000 * arena.grad])

    expected = run()
    arena.zero_grad()
    pays(True)
    weights = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    layers = []
    call = low_rank.Projections.__call__

    def counted(own: low_rank.Projections, x: Tensor) -> Tensor:
        layers.append(len(own.down.value))
        return call(own, x)

    monkeypatch.setattr(low_rank.Projections, "__call__", counted)
    working = low_rank.Working(arena.flat, arena.grad)
    with swapped(unet), side_by_side_weights(unet):
        with working.passing():
            found = run()
        with working.passing():
            twice = run()  # gradients are added to those that are there
    attentions = len(built) // 8
    assert [layers.count(one) for one in (1, 2, 3)] == [6 * attentions, 2 * attentions, 2 * attentions]
    assert (found - expected).norm() <= limit * expected.norm()
    assert (twice[-len(arena.grad) :] - 2 * found[-len(arena.grad) :]).norm() <= limit * expected.norm()
    for name, parameter in unet.named_parameters():
        if name in weights:
            assert torch.equal(parameter, weights[name])
            assert parameter.untyped_storage().nbytes() == parameter.nbytes


def test_a_pass_of_the_trainer_serves_only_what_lies_in_its_arena(pays: Pays, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("not to be called")

    pays(True)
    monkeypatch.setattr(low_rank.Projections, "__call__", refuse)
    model, other = Layers(torch.float32), Layers(torch.float32)
    for one in (model, other):
        site.attach(one, "a", Lora(rank=2), "all-linear")
    x = torch.randn(2, 5, 12)
    arena = Arena({"model": [p for p in model.parameters() if p.requires_grad]})
    working = low_rank.Working(arena.flat, arena.grad)
    with working.passing():
        other(x)
        with strengths_of(model).without("a"):
            model(x)
    model(x)
    with working.passing(), pytest.raises(AssertionError, match="not to be called"):
        model(x)


@pytest.mark.parametrize("method", [Lora(rank=2), Lora(rank=2, init="pissa")], ids=["lora", "pissa"])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_a_pass_of_the_trainer_computes_what_every_other_way_does(pays: Pays, method: Lora, strength: float) -> None:
    model, x = Layers(torch.float32), torch.randn(2, 5, 12)
    site.attach(model, "a", method, "all-linear")
    arena = Arena({"model": [p for p in model.parameters() if p.requires_grad]})
    arena.flat.add_(0.1 * torch.randn(arena.flat.shape, generator=torch.Generator().manual_seed(3)))
    strengths_of(model).write({"a": strength})

    def run() -> Tensor:
        arena.zero_grad()
        y = model(x)
        y.square().mean().backward()
        return torch.cat([y.detach().flatten(), arena.grad])

    pays(False)
    expected = run()
    pays(True)
    with low_rank.Working(arena.flat, arena.grad).passing():
        torch.testing.assert_close(run(), expected)


def test_a_recording_of_a_pass_does_not_outlive_the_strength_that_it_took_for_1(pays: Pays) -> None:
    pays(True)
    model, x = Layers(torch.float32), torch.randn(2, 5, 12)
    site.attach(model, "a", Lora(rank=2), "all-linear")
    arena = Arena({"model": [p for p in model.parameters() if p.requires_grad]})
    working = low_rank.Working(arena.flat, arena.grad)
    assert working.full
    with working.passing():
        model(x).sum().backward()
    strengths = strengths_of(model)
    assert working.full
    with strengths.without("a"):
        assert not working.full
    assert working.full
    strengths.write({"a": 0.5})
    assert not working.full
    strengths.write({"a": 1.0})
    assert working.full
