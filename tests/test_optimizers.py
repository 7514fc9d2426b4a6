"""Optimizers over the flat groups: what they learn, what they keep, and that a run goes on to the same bits."""

import sys

import pytest
import torch
from conftest import make_pipe
from safetensors.torch import load_file
from test_training import draw_pictures

from peft_diffusion import TrainConfig, UserError, train
from peft_diffusion.core.arena import Arena
from peft_diffusion.training import checkpoint
from peft_diffusion.training.optimizers import OPTIMIZERS


def config(pictures, where, **more) -> TrainConfig:
    values = {"steps": 6, "batch_size": 2, "rank": 8, "warmup": 0, "save_every": 3, "log_every": 1, "preview_steps": 0}
    places = {"output": where / "a.safetensors", "run_dir": where / "run", "device": "cpu"}
    return TrainConfig((pictures,), **{**values, **places, **more})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_valley_is_descended_and_the_state_goes_on_bit_for_bit(name):
    wanted = torch.linspace(-1, 1, 6000)

    def steps(arena, optimizer, first, last):
        for step in range(first, last):
            arena.zero_grad()
            (arena.groups["large"][:6000] - wanted).square().sum().backward()
            arena.groups["small"].sub(0.5).square().sum().backward()
            optimizer.set_rates(dict.fromkeys(arena.groups, 0.05 / (1 + step / 10)))
            optimizer.optimizer.step()

    def fresh():
        groups = {"large": [torch.nn.Parameter(torch.zeros(6000))], "small": [torch.nn.Parameter(torch.zeros(5))]}
        arena = Arena(groups)
        return arena, OPTIMIZERS[name](arena, {"large": 0.05, "small": 0.05}, {"large": 0.0, "small": 0.0}, False)

    arena, whole = fresh()
    steps(arena, whole, 0, 7)
    kept = {key: tensor.clone() for key, tensor in whole.tensors().items()}
    weights = arena.flat.clone()
    steps(arena, whole, 7, 60)
    again, resumed = fresh()
    again.load(weights)
    for key, tensor in resumed.tensors().items():
        tensor.copy_(kept[key])
    resumed.go_on_from(7)
    steps(again, resumed, 7, 60)
    assert torch.equal(arena.flat, again.flat)
    assert (arena.groups["large"][:6000] - wanted).abs().mean() < 0.1
    assert (arena.groups["small"][:5] - 0.5).abs().max() < 0.1


def test_a_run_with_moments_of_8_bits_is_near_adamw_and_goes_on_to_the_same_bits(tmp_path):
    pictures = draw_pictures(tmp_path / "pictures")
    results = {name: train(config(pictures, tmp_path / name, optimizer=name), pipe=make_pipe()) for name in OPTIMIZERS}
    plain, small = (load_file(results[name].output) for name in ("adamw", "adamw8bit"))
    one, two = (torch.cat([tensors[key].flatten() for key in sorted(plain)]) for tensors in (plain, small))
    assert torch.cosine_similarity(one, two, dim=0) > 0.99 and not torch.equal(one, two)
    states = {name: checkpoint.read(max((tmp_path / name / "run" / "checkpoints").iterdir())).state for name in OPTIMIZERS}
    sizes = {name: sum(t.nbytes for t in state.tensors.values()) for name, state in states.items()}
    assert sizes["adamw8bit"] < 0.6 * sizes["adamw"]
    max((tmp_path / "adamw8bit" / "run" / "checkpoints").iterdir()).unlink()
    results["adamw8bit"].output.unlink()
    train(config(pictures, tmp_path / "adamw8bit", optimizer="adamw8bit", resume=True), pipe=make_pipe())
    again = load_file(results["adamw8bit"].output)
    assert all(torch.equal(small[key], again[key]) for key in small)
    with pytest.raises(UserError, match="--optimizer was adamw8bit, now adamw"):
        train(config(pictures, tmp_path / "adamw8bit", steps=9, resume=True), pipe=make_pipe())


def test_what_is_missing_and_what_there_is_not_are_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--optimizer is one of adamw, adamw8bit, not 'sgd'"):
        TrainConfig((tmp_path,), optimizer="sgd")
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match=r"pip install 'peft_diffusion\[quantize\]'"):
        OPTIMIZERS["adamw8bit"](Arena({"one": [torch.nn.Parameter(torch.zeros(3))]}, ), {"one": 1.0}, {"one": 0.0}, False)
