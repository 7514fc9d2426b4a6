"""Optimizers over the flat groups: what they learn, what they keep, and that a run goes on to the same bits."""

import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_optimizer
import torch
from conftest import make_pipe
from safetensors.torch import load_file
from test_training import draw_pictures, state_of

from peft_diffusion import TrainConfig, UserError, train
from peft_diffusion.core.arena import Arena
from peft_diffusion.training.loop.optimizers import OPTIMIZERS, FlatOptimizer
from peft_diffusion.training.settings.choices import FINDS_RATE, OptimizerName

pytestmark = pytest.mark.usefixtures("few_measurements", "no_signals", "no_plots")


def config(pictures: Path, where: Path, **more: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "steps": 4,
        "batch_size": 2,
        "rank": 8,
        "warmup": 0,
        "save_every": 2,
        "log_every": 1,
        "preview_steps": 0,
    }
    places = {"output": where / "a.safetensors", "run_dir": where / "run", "device": "cpu"}
    return TrainConfig((pictures,), **{**values, **places, **more})


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_valley_is_descended_and_the_state_goes_on_bit_for_bit(name: OptimizerName) -> None:
    wanted = torch.linspace(-1, 1, 6000)

    def steps(arena: Arena, optimizer: FlatOptimizer, first: int, last: int) -> None:
        for step in range(first, last):
            arena.zero_grad()
            (arena.groups["large"][:6000] - wanted).square().sum().backward()
            arena.groups["small"].sub(0.5).square().sum().backward()
            optimizer.set_rates(dict.fromkeys(arena.groups, rate if name in FINDS_RATE else rate / (1 + step / 10)))
            optimizer.optimizer.step()

    def fresh() -> tuple[Arena, FlatOptimizer]:
        groups = {"large": [torch.nn.Parameter(torch.zeros(60, 100))], "small": [torch.nn.Parameter(torch.zeros(5))]}
        arena = Arena(groups)
        return arena, OPTIMIZERS[name](arena, {"large": 0.05, "small": 0.05}, {"large": 0.0, "small": 0.0}, False)

    rate = 1.0 if name in FINDS_RATE else 0.05
    arena, whole = fresh()
    steps(arena, whole, 0, 7)
    kept = {key: tensor.clone() for key, tensor in whole.tensors().items()}
    weights = arena.flat.clone()
    end = 200 if name in FINDS_RATE else 60  # it begins with a rate of nearly nothing
    steps(arena, whole, 7, end)
    again, resumed = fresh()
    again.load(weights)
    for key, tensor in resumed.tensors().items():
        tensor.copy_(kept[key])
    resumed.go_on_from(7)
    steps(again, resumed, 7, end)
    assert torch.equal(arena.flat, again.flat)
    if (final := whole.final(arena.flat, whole.tensors())) is not None:
        assert not torch.equal(final, arena.flat)
        arena.load(final)
    assert (arena.groups["large"][:6000] - wanted).abs().mean() < 0.15
    assert (arena.groups["small"][:5] - 0.5).abs().max() < 0.15


@pytest.mark.parametrize("name", ["adafactor", "lion", "came"])
def test_an_optimizer_of_a_library_does_what_it_does_there(name: OptimizerName) -> None:
    """In the arena as on parameters of its own, rows and columns and all."""
    chance = torch.Generator().manual_seed(0)
    shapes: dict[str, list[tuple[int, ...]]] = {"unet": [(12, 40), (40, 12)], "text_encoder": [(12, 3, 3, 3), (7,)]}
    options: dict[str, Any] = {"betas": (None, 0.999), "relative_step": False, "scale_parameter": False}
    kind = {"adafactor": "AdaFactor", "lion": "Lion", "came": "CAME"}[str(name)]
    values = {group: [torch.randn(shape, generator=chance) for shape in own] for group, own in shapes.items()}
    theirs = {group: [torch.nn.Parameter(one.clone()) for one in own] for group, own in values.items()}
    groups = [{"params": own, "lr": 0.01 * (place + 1), "weight_decay": 0.1} for place, own in enumerate(theirs.values())]
    library = getattr(pytorch_optimizer, kind)(groups, **(options if name == "adafactor" else {}))
    ours = {group: [torch.nn.Parameter(one.clone()) for one in own] for group, own in values.items()}
    arena = Arena(ours)
    optimizer = OPTIMIZERS[name](arena, {"unet": 0.01, "text_encoder": 0.02}, dict.fromkeys(shapes, 0.1), False)
    for _ in range(4):
        for group, own in theirs.items():
            for number, parameter in enumerate(own):
                parameter.grad = torch.randn(parameter.shape, generator=chance)
                given = ours[group][number].grad
                assert given is not None
                given.copy_(parameter.grad)
        library.step()
        optimizer.optimizer.step()
    for group, own in theirs.items():
        for mine, there in zip(ours[group], own, strict=True):
            torch.testing.assert_close(mine, there, rtol=1e-6, atol=1e-7)
    held = sum(tensor.nbytes for tensor in optimizer.tensors().values())
    assert held < 2 * arena.flat.nbytes  # what the moments of AdamW take


@pytest.mark.slow
def test_a_run_with_moments_of_8_bits_is_near_adamw_and_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    pictures = draw_pictures(tmp_path / "pictures")
    names = ("adamw", "adamw8bit")
    results = {name: train(config(pictures, tmp_path / name, optimizer=name), pipe=make_pipe()) for name in names}
    plain, small = (load_file(results[name].output) for name in ("adamw", "adamw8bit"))
    one, two = (torch.cat([tensors[key].flatten() for key in sorted(plain)]) for tensors in (plain, small))
    assert torch.cosine_similarity(one, two, dim=0) > 0.99 and not torch.equal(one, two)
    states = {name: state_of(max((tmp_path / name / "run" / "checkpoints").iterdir())) for name in names}
    sizes = {name: sum(t.nbytes for t in state.tensors.values()) for name, state in states.items()}
    assert sizes["adamw8bit"] < 0.6 * sizes["adamw"]
    max((tmp_path / "adamw8bit" / "run" / "checkpoints").iterdir()).unlink()
    results["adamw8bit"].output.unlink()
    train(config(pictures, tmp_path / "adamw8bit", optimizer="adamw8bit", resume=True), pipe=make_pipe())
    again = load_file(results["adamw8bit"].output)
    assert all(torch.equal(small[key], again[key]) for key in small)
    with pytest.raises(UserError, match="--optimizer was adamw8bit, now adamw"):
        train(config(pictures, tmp_path / "adamw8bit", steps=9, resume=True), pipe=make_pipe())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prodigy", "schedule-free", "prodigy-plus"])
def test_a_run_goes_on_to_the_same_bits_and_gives_what_the_optimizer_gives(tmp_path: Path, name: str) -> None:
    pictures = draw_pictures(tmp_path / "pictures")
    first = train(config(pictures, tmp_path / name, optimizer=name), pipe=make_pipe())
    assert first.config.unet_lr == (1e-3 if name == "schedule-free" else 1.0)
    assert first.config.scheduler == ("cosine" if name == "prodigy" else "constant")
    whole = load_file(first.output)
    max((first.run_dir / "checkpoints").iterdir()).unlink()
    first.output.unlink()
    train(config(pictures, tmp_path / name, optimizer=name, resume=True), pipe=make_pipe())
    again = load_file(first.output)
    assert all(torch.equal(whole[key], again[key]) for key in whole)


def test_prodigy_finds_rates_that_fit_each_group_by_itself() -> None:
    groups = {"far": [torch.nn.Parameter(torch.zeros(50))], "near": [torch.nn.Parameter(torch.zeros(50))]}
    arena = Arena(groups)
    optimizer = OPTIMIZERS["prodigy"](arena, {"far": 1.0, "near": 1.0}, {"far": 0.0, "near": 0.0}, False)
    for _ in range(100):
        arena.zero_grad()
        (arena.groups["far"] - 10).square().sum().backward()
        (arena.groups["near"] - 0.01).square().sum().backward()
        optimizer.optimizer.step()
    far, near = (group["d"] for group in optimizer.optimizer.param_groups)
    assert far > 20 * near > 20e-6


def test_an_average_of_an_average_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="averages the weights itself"):
        TrainConfig((tmp_path,), optimizer="schedule-free", ema=0.99)


def test_what_is_missing_and_what_there_is_not_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"--optimizer is one of adamw, adamw8bit, adafactor, .*, prodigy-plus, not 'sgd'"):
        TrainConfig((tmp_path,), optimizer="sgd")  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match=r"pip install 'peft_diffusion\[quantize\]'"):
        OPTIMIZERS["adamw8bit"](
            Arena(
                {"one": [torch.nn.Parameter(torch.zeros(3))]},
            ),
            {"one": 1.0},
            {"one": 0.0},
            False,
        )
