"""Training: the objective against papers and diffusers, the loop, the configuration, and whole runs on a tiny base."""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_pipe
from diffusers import DDPMScheduler, DiffusionPipeline
from making import modes, spec_of
from PIL import Image, ImageDraw, features
from rich.console import Console
from safetensors.torch import load_file
from torch import nn
from transformers import (
    get_cosine_with_hard_restarts_schedule_with_warmup,
    get_polynomial_decay_schedule_with_warmup,
    get_wsd_schedule,
)

from peft_diffusion import formats
from peft_diffusion.api import train
from peft_diffusion.bases import checksum, components, describe
from peft_diffusion.bases import family as families
from peft_diffusion.bases import noise as noise_process
from peft_diffusion.cli.console import TrainingConsole
from peft_diffusion.core import checksums, site, targets
from peft_diffusion.core.arena import Arena, side_by_side
from peft_diffusion.core.errors import UserError
from peft_diffusion.core.events import Event, Warned
from peft_diffusion.data.folder import ImageFolder, open_picture, scan
from peft_diffusion.fast.cuda_graph import Inputs
from peft_diffusion.generation.while_training import TrainingPictures
from peft_diffusion.methods import method
from peft_diffusion.training import TrainConfig
from peft_diffusion.training.events import Losses, Measured, Preview, PreviewsChosen, Signals, Step, StepLoss, Unrecorded
from peft_diffusion.training.loop.learning_rate import Shape, rate
from peft_diffusion.training.loop.optimizers import OPTIMIZERS
from peft_diffusion.training.loop.seeds import generator, seed_of
from peft_diffusion.training.loop.trainer import (
    Divergence,
    Trainer,
    TrainerSettings,
    TrainerState,
    loss_at,
)
from peft_diffusion.training.record import checkpoint, plots, recorder
from peft_diffusion.training.results import RunResult
from peft_diffusion.training.settings.choices import OptimizerName, Scheduler, TimestepBias
from peft_diffusion.training.settings.derive import resolve
from peft_diffusion.training.settings.toml import to_toml
from peft_diffusion.training.tasks import datasets, objective
from peft_diffusion.training.tasks.diffusion import DiffusionSettings, DiffusionTask
from peft_diffusion.training.tasks.objective import Timesteps
from peft_diffusion.training.tasks.preparation import prepare
from peft_diffusion.training.tasks.unseen import unseen

pytestmark = pytest.mark.usefixtures("few_measurements", "no_signals", "no_plots")

torch.set_num_threads(1)
POWERS = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
THINGS = ["red apple", "blue cat", "red dog", "blue house", "ink apple", "flat cat"]


def draw_pictures(folder: Path, count: int = 6, size: int = 64) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        image = Image.new("RGB", (size, size), "white")
        ImageDraw.Draw(image).ellipse((6, 6, 30 + number, 50), fill=(9 * number, 80, 200 - 7 * number), outline="black")
        image.save(folder / f"{THINGS[number % len(THINGS)]} {chr(97 + number)}.png")
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return draw_pictures(tmp_path / "pictures")


def warnings_but_counsel(events: Sequence[Event]) -> list[str]:
    """The warnings of a run but for those that a run so short and small always has."""
    messages = [event.message for event in events if isinstance(event, Warned)]
    return [message for message in messages if not message.startswith(("each picture is seen", "the border of all"))]


def small(folder: Path, where: Path, **changes: Any) -> TrainConfig:
    """A run of seconds. It keeps no pictures apart: to measure on them takes as long as its steps."""
    settings: dict[str, Any] = {
        "folder": (folder,), "output": where / "a.safetensors", "run_dir": where / "run", "steps": 6, "batch_size": 2,
        "rank": 2, "warmup": 0, "preview_steps": 0, "save_every": 3, "log_every": 2, "device": "cpu", "held_out": 0.0,
    }  # fmt: skip
    return TrainConfig(**(settings | changes))


def lines(result: RunResult) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"target": "attn"}, "no module of UNet2DConditionModel matches the target 'attn'"),
        ({"target": "norms"}, "method lora cannot serve what the target 'norms' names: GroupNorm, LayerNorm"),
        ({"block": ("unet attn lora",)}, "no module of UNet2DConditionModel matches the target 'attn'"),
        ({"block": ("unet attention lora",), "components": ("unet", "text_encoder")}, "no --block trains text_encoder"),
        ({"block": ("unet attention lora", "unet all-linear loha rank=4")}, "lora and loha cannot share a site"),
        ({"block": ("unet attention lora", "unet attention lora")}, "lora and lora cannot share a site"),
        (
            {
                "method": "tokens",
                "components": ("text_encoder",),
                "option": ("vectors=1", "initial=ink of cat"),
                "rank": None,
            },
            "the initial words 'ink of cat' have 3 tokens, for 1 vector;",
        ),
    ],
)
def test_a_wrong_placement_is_told_before_pictures_are_read(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    events: list[Event] = []
    with pytest.raises(UserError, match=said):
        train(small(draw_pictures(tmp_path / "pictures"), tmp_path, **changes), pipe=make_pipe(), observers=[events.append])
    assert [type(event).__name__ for event in events] == ["Ended"] and not (tmp_path / "run").exists()


def state_of(path: Path) -> TrainerState:
    """What a checkpoint holds."""
    found = checkpoint.read(path)
    assert found is not None
    return found.state


def last_state(result: RunResult) -> TrainerState:
    return state_of(result.run_dir / "checkpoints" / f"step_{result.steps:06}.safetensors")


def held_out(result: RunResult) -> tuple[float, float]:
    """The loss on what was kept apart, before and after."""
    assert result.held_out_before is not None and result.held_out_after is not None
    return result.held_out_before, result.held_out_after


def flat(loaded: formats.Loaded, pipe: DiffusionPipeline) -> torch.Tensor:
    """A loaded adapter's parameters in the order of the UNet's modules, like sites of one parent side by side."""
    found = loaded.components["unet"]
    sites = [(path, list(found[path].parameters())) for path in targets.modules(pipe.unet) if path in found]
    return torch.cat([parameter.detach().flatten() for parameter in side_by_side(sites)])


# The objective.


def test_noisy_latents_and_v_target_are_those_of_diffusers() -> None:
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    latents, noise = torch.randn(5, 4, 8, 8), torch.randn(5, 4, 8, 8)
    timesteps = torch.tensor([0, 10, 500, 900, 999])
    power = scheduler.alphas_cumprod[timesteps]
    torch.testing.assert_close(noise_process.noisy(latents, noise, power), scheduler.add_noise(latents, noise, timesteps))
    velocity = scheduler.get_velocity(latents, noise, timesteps)
    torch.testing.assert_close(noise_process.target("v_prediction", latents, noise, power), velocity)
    assert noise_process.target("epsilon", latents, noise, power) is noise


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weights_are_those_of_the_paper(gamma: float) -> None:
    snr = POWERS / (1 - POWERS)
    capped = torch.minimum(snr, torch.tensor(gamma))
    torch.testing.assert_close(objective.min_snr_weights("epsilon", POWERS, gamma), capped / snr)
    torch.testing.assert_close(objective.min_snr_weights("v_prediction", POWERS, gamma), capped / (snr + 1))


def test_min_snr_weights_are_finite_where_no_signal_or_no_noise_is_left() -> None:
    power = torch.tensor([0.0, 1.0])
    assert objective.min_snr_weights("epsilon", power, 5.0).tolist() == [1.0, 0.0]
    assert objective.min_snr_weights("v_prediction", power, 5.0).tolist() == [0.0, 0.0]


def test_weighted_loss_is_the_mean_of_weighted_images() -> None:
    answer, wanted, weights = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([0.0, 1.0, 2.0])
    per_image = ((answer - wanted) ** 2).mean((1, 2, 3))
    torch.testing.assert_close(objective.loss(answer, wanted, weights), (per_image[1] + 2 * per_image[2]) / 3)
    torch.testing.assert_close(objective.loss(answer, wanted), per_image.mean())


def test_noise_offset_shifts_whole_channels() -> None:
    plain = objective.noise((2, 4, 64, 64), 0.0, generator("a"))
    shifted = objective.noise((2, 4, 64, 64), 0.5, generator("a"))
    difference = shifted - plain
    torch.testing.assert_close(difference, difference[:, :, :1, :1].expand_as(difference), atol=1e-6, rtol=0)
    assert difference.std() > 0.1


@pytest.mark.slow
def test_timesteps_cover_the_schedule_evenly() -> None:
    drawn = objective.timesteps(20_000, 1000, Timesteps(), generator("t"))
    assert drawn.bincount(minlength=1000).tolist() == [20] * 1000
    few = torch.stack([objective.timesteps(4, 1000, Timesteps(), generator(n)) for n in range(4000)])
    assert (few.sort(1).values // 250 == torch.arange(4)).all()
    torch.testing.assert_close(few.float().mean(0), torch.full((4,), 499.5), atol=20, rtol=0)  # wherever in the batch


def test_a_bias_draws_later_or_earlier_timesteps_more_often() -> None:
    cases: tuple[tuple[TimestepBias, slice], ...] = (("later", slice(750, None)), ("earlier", slice(0, 250)))
    for bias, fourth in cases:
        shares = objective.timesteps(20_000, 1000, Timesteps(bias), generator("t")).bincount(minlength=1000)
        assert shares[fourth].sum() == 10_000 and shares.min() > 0


def test_timesteps_keep_to_their_range_and_to_the_logit_normal_distribution() -> None:
    within = objective.timesteps(20_000, 1000, Timesteps(within=(200, 700)), generator("t")).bincount(minlength=1000)
    assert within[200:700].tolist() == [40] * 500 and within.sum() == 20_000
    drawn = objective.timesteps(50_000, 1000, Timesteps("logit-normal", mean=0.5, std=0.8), generator("t"))
    for place in (0.1, 0.25, 0.5, 0.75, 0.9):  # the distribution function of what is sigmoid(0.5 + 0.8 z)
        below = torch.special.ndtr(torch.tensor((math.log(place / (1 - place)) - 0.5) / 0.8))
        assert abs(float((drawn < 1000 * place).float().mean() - below)) < 1e-3


def test_a_base_that_predicts_something_else_is_refused() -> None:
    with pytest.raises(UserError, match="'sample'"):
        noise_process.prediction_type("sample")


def test_seeds_differ_by_place_and_ignore_the_global_generator() -> None:
    places = [(0, "noise", 1, 11), (0, "noise", 11, 1), (1, "noise", 1, 11), (0, "order", 1, 11)]
    assert len({seed_of(*place) for place in places}) == 4
    first = torch.randn(3, generator=generator(*places[0]))
    torch.randn(7)
    assert torch.equal(first, torch.randn(3, generator=generator(*places[0])))


# The schedule.


def test_learning_rate_schedules() -> None:
    assert [rate("constant", step, 10, 0) for step in (0, 5, 9)] == [1, 1, 1]
    assert [rate("linear", step, 10, 0) for step in (0, 5, 9)] == pytest.approx([1, 0.5, 0.1])
    assert [rate("cosine", step, 10, 0) for step in (0, 5)] == pytest.approx([1, 0.5])
    assert rate("cosine", 9, 10, 0) == pytest.approx((1 + math.cos(0.9 * math.pi)) / 2)
    warming = [rate("cosine", step, 100, 4) for step in range(5)]
    assert warming == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_the_other_schedules_are_those_of_transformers_after_the_warm_up() -> None:
    optimizer, steps, warmup = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0), 50, 5
    theirs: dict[Scheduler, Any] = {
        "cosine-with-restarts": get_cosine_with_hard_restarts_schedule_with_warmup(optimizer, warmup, steps, num_cycles=3),
        "polynomial": get_polynomial_decay_schedule_with_warmup(optimizer, warmup, steps, lr_end=0.0, power=2.0),
        "warmup-stable-decay": get_wsd_schedule(
            optimizer, warmup, num_decay_steps=10, num_stable_steps=steps - warmup - 10, decay_type="linear"
        ),
    }
    for name, schedule in theirs.items():
        ours = [rate(name, step, steps, warmup, Shape(cycles=3, power=2.0, decay=0.2)) for step in range(warmup, steps)]
        assert ours == pytest.approx([schedule.lr_lambdas[0](step) for step in range(warmup, steps)], abs=1e-9)


# The loop, on a task that has nothing to do with images.


class Line(nn.Module):
    """A weight that should become 3."""

    def __init__(self, poison: int | None = None, grow: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))
        self.poison, self.grow = poison, grow
        self.asked: list[tuple[int, int]] = []

    def inputs(self, step: int, micro: int) -> dict[str, torch.Tensor]:
        self.asked.append((step, micro))
        return {"step": torch.tensor(step)}

    def seeded(self, step: int, micro: int) -> AbstractContextManager[None]:
        return nullcontext()

    def loss(self, inputs: Inputs) -> torch.Tensor:
        step = int(inputs["step"])
        loss = (self.weight - 3).square().mean()
        if self.grow:
            loss = loss * (1 + step) ** 2
        return loss * math.nan if step == self.poison else loss

    def held_out(self) -> float:
        return (self.weight - 3).square().mean().item()

    def signals(self) -> Signals:
        return Signals()


class Log:
    """What a trainer tells, and copies of the states that it gives."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.losses: list[StepLoss] = []
        self.held_out: list[tuple[int, float]] = []
        self.unrecorded: list[str] = []
        self.states: list[TrainerState] = []

    def __call__(self, event: Event) -> None:
        match event:
            case Step():
                self.steps.append(event.step)
            case Losses():
                self.losses += event.losses
            case Measured() if event.held_out is not None:
                self.held_out.append((event.step, event.held_out))
            case Unrecorded():
                self.unrecorded.append(event.why)

    def keep(self, state: TrainerState) -> None:
        copies = {name: tensor.clone() for name, tensor in state.tensors.items()}
        self.states.append(replace(state, tensors=copies, divergence=replace(state.divergence)))


def trainer(task: Line, **changes: Any) -> tuple[Trainer, Log]:
    settings: dict[str, Any] = {"steps": 12, "rates": {"line": 0.1}, "log_every": 5, "save_every": 4} | changes
    log = Log()
    return Trainer(task, Arena({"line": [task.weight]}), TrainerSettings(**settings), [log], keep=log.keep), log


def test_the_loop_tells_every_step_once_and_lowers_the_loss() -> None:
    task = Line()
    loop, log = trainer(task)
    assert loop.run()
    assert log.steps == list(range(1, 13)) == [one.step for one in log.losses]
    assert [step for step, _ in log.held_out] == [0, 4, 8, 12] == [0, *(state.step for state in log.states)]
    assert log.held_out[-1][1] < 0.6 * log.held_out[0][1]


def test_flat_adamw_is_torch_adamw_with_clipping_schedule_and_decay() -> None:
    task, other = Line(), Line()
    loop, _ = trainer(task, clip=0.5, weight_decay=0.1, scheduler="cosine", warmup=2)
    loop.run()
    optimizer = torch.optim.AdamW([other.weight], weight_decay=0.1)
    for step in range(12):
        optimizer.zero_grad()
        loss_at(other, step, 0, torch.device("cpu")).backward()
        torch.nn.utils.clip_grad_norm_([other.weight], 0.5)
        optimizer.param_groups[0]["lr"] = 0.1 * rate("cosine", step, 12, 2)
        optimizer.step()
    torch.testing.assert_close(task.weight, other.weight, rtol=1e-5, atol=1e-6)


def test_accumulation_asks_for_each_micro_batch_and_means_them() -> None:
    task, plain = Line(), Line()
    loop, log = trainer(task, accumulation=3, steps=2)
    loop.run()
    assert task.asked == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    single, single_log = trainer(plain, steps=2)
    single.run()
    torch.testing.assert_close(task.weight, plain.weight)
    assert log.losses[0].loss == pytest.approx(single_log.losses[0].loss)


def test_each_group_has_its_own_learning_rate() -> None:
    first, second = Line(), Line()
    second.weight.requires_grad_(True)

    class Both(Line):
        def loss(self, inputs: Inputs) -> torch.Tensor:
            return first.loss(inputs) + second.loss(inputs)

    arena = Arena({"unet": [first.weight], "text_encoder": [second.weight]})
    loop = Trainer(Both(), arena, TrainerSettings(1, {"text_encoder": 0.01, "unet": 0.1}, weight_decay=0.0))
    loop.run()
    assert first.weight[0].item() == pytest.approx(0.1, rel=1e-3)
    assert second.weight[0].item() == pytest.approx(0.01, rel=1e-3)


def two_lines(loud: float, ends: int, **more: Any) -> tuple[Trainer, Line, Line]:
    """A loop over two groups, of which the second has gradients that are so many times larger, and ends at a step."""
    first, second = Line(), Line()
    arena = Arena({"first": [first.weight], "second": [second.weight]})
    task = Line()
    task.loss = lambda inputs: first.loss(inputs) + loud * second.loss(inputs)  # type: ignore[method-assign]
    rates = {"first": 0.1, "second": 0.1}
    return Trainer(task, arena, TrainerSettings(steps=6, rates=rates, ends={"second": ends}, **more)), first, second


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_group_that_ends_before_the_run_stays_as_it_is(optimizer: OptimizerName) -> None:
    """Also where the weights that a run gives are an average, which goes on to follow where the optimizer is."""
    loop, first, second = two_lines(1.0, 3, optimizer=optimizer)
    loop.run(until=3)
    with loop.final_weights():
        before = second.weight.detach().clone(), first.weight.detach().clone()
    loop.run()
    with loop.final_weights():
        assert torch.equal(second.weight, before[0]) and not torch.equal(first.weight, before[1])
        assert bool(before[0].any()) and bool(first.weight.isfinite().all())


@pytest.mark.parametrize("loud", [1e4, math.inf])
def test_gradients_of_what_learns_no_more_neither_clip_nor_stop_the_others(loud: float) -> None:
    """As where it took no gradients at all."""
    loop, first, _ = two_lines(loud, 0, clip=0.1, loss_scaling=True, log_every=99)
    for step in range(3):
        loop._step()
        assert loop.step == step + 1
    alone, _ = trainer(other := Line(), clip=0.1, loss_scaling=True)
    alone.run(until=3)
    assert torch.equal(first.weight, other.weight)


def test_the_average_follows_and_is_what_the_run_gives() -> None:
    task = Line()
    loop, _ = trainer(task, ema=0.9)
    loop.run()
    present = task.weight.detach().clone()
    with loop.final_weights():
        assert loop.average is not None
        assert torch.equal(task.weight, loop.average[: len(task.weight)])
        assert 0 < task.weight[0] < present[0]
    assert torch.equal(task.weight, present)


def test_a_loss_that_is_not_finite_stops_and_names_the_step_and_keeps_the_checkpoint() -> None:
    task = Line(poison=9)
    loop, log = trainer(task)
    with pytest.raises(UserError, match=r"step 10: the loss is nan; the checkpoint of step 8 is kept.*line 0\.1"):
        loop.run()
    assert [one.step for one in log.losses] == list(range(1, 10))
    assert [state.step for state in log.states] == [4, 8]
    assert all(bool(tensor.isfinite().all()) for state in log.states for tensor in state.tensors.values())


def test_weights_that_are_not_finite_are_never_a_checkpoint() -> None:
    task = Line()
    loop, log = trainer(task, rates={"line": math.inf}, steps=1)
    with pytest.raises(UserError, match="step 1: weights are not finite; no checkpoint was made before"):
        loop.run()
    assert not log.states


def test_a_loss_that_runs_away_stops() -> None:
    loop, _ = trainer(Line(grow=True), rates={"line": 1e-9}, steps=500, save_every=1000)
    with pytest.raises(UserError, match=r"step \d+: the loss runs away"):
        loop.run()
    noisy = Divergence()
    assert not any(noisy.add(1.0 + 0.9 * math.sin(step * 7.0)) for step in range(1000))


# The configuration.


class Icons:
    name, family, resolution = "icons", "other", 128


class StableDiffusion1:
    name, family, resolution = "sd1", "sd1", 512


def test_presets_fill_what_was_left_out_and_nothing_else(tmp_path: Path) -> None:
    given = TrainConfig(folder=(tmp_path / "birds",), rank=7)
    found = resolve(given, Icons(), 48, "cpu")
    assert (found.rank, found.unet_lr, found.steps, found.batch_size, found.scheduler) == (7, 1e-3, 300, 8, "cosine")
    assert (found.resolution, found.held_out, found.preview_every, found.save_every) == (128, 0.1, 0, 50)
    assert (found.output, found.run_dir) == (Path("birds.safetensors"), Path("runs/birds"))
    large = resolve(given, StableDiffusion1(), 5, "cuda")
    assert (large.unet_lr, large.batch_size, large.min_snr_gamma, large.caption_dropout) == (1e-4, 4, 5.0, 0.05)
    assert (large.held_out, large.preview_every) == (0.0, 300)


def test_every_preset_gives_every_family_all_its_values() -> None:
    for preset in ("style", "subject"):
        for family in ("sd1", "sd2", "sdxl", "other"):
            base = type("Base", (), {"name": family, "family": family, "resolution": 64})()
            found = resolve(TrainConfig(folder=(Path("x"),), preset=preset), base, 48, "cpu")
            may_be_none = {"cache", "alpha", "epochs", "quantize", "target", "log_with", "clip_skip", "init_from"}
            may_be_none |= {"preview_prompts_file", "dataset_config", "notify"}
            assert not [f.name for f in fields(found) if getattr(found, f.name) is None and f.name not in may_be_none]
        assert set(families.find("other").defaults(preset)) == set(families.find("sd1").defaults(preset))


def test_epochs_become_steps_and_win_over_them() -> None:
    given = TrainConfig(folder=(Path("x"),), epochs=2.5, steps=7, accumulation=2, batch_size=4)
    found = resolve(given, Icons(), 48, "cpu", batches_per_epoch=11)
    assert (found.steps, found.epochs) == (14, None)
    assert resolve(found, Icons(), 48, "cpu", batches_per_epoch=11).steps == 14


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "--steps must be 1 or more, not 0"),
        ({"unet_lr": -1.0}, "--unet-lr must be 0 or more, not -1.0"),
        ({"unet_lr": math.nan}, "--unet-lr"),
        ({"held_out": 1.0}, "--held-out must be 0 or more, below 1, not 1.0"),
        ({"caption_dropout": 1.5}, "--caption-dropout must be 0 or more, at most 1"),
        ({"loss": "l3"}, "--loss is one of l2, huber, smooth-l1, not 'l3'"),
        ({"components": ("unet,vae",)}, "--components vae: there are unet, text_encoder, text_encoder_2"),
    ],
)
def test_values_that_no_run_can_use_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        TrainConfig(folder=(Path("x"),), **changes)
    assert message in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"rank": 9, "resume": True}])
def test_toml_goes_round_through_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    from peft_diffusion.cli.app import main
    from peft_diffusion.cli.parser import app

    given = TrainConfig(
        folder=(tmp_path / "a", tmp_path / 'b "q" \\ ä 🎨'), trigger="ink, {} 🖋", alpha=3.5, unet_lr=1e-5, flip=True, seed=3,
        components=("unet", "text_encoder"), preview_prompts=("a cat", "one, two"), shuffle_tags=True, scheduler="linear",
    )  # fmt: skip
    resolved = resolve(given, Icons(), 48, "cpu")
    file = tmp_path / "config.toml"
    file.write_text(to_toml(resolved), "utf-8")
    seen = []
    monkeypatch.setattr("peft_diffusion.api.train", lambda config, **_: seen.append(config))
    monkeypatch.setattr(app, "config", app.config)  # main sets it; put back afterwards
    flags = ["--rank", "9", "--resume"] if more else []
    assert main(["train", "--config", str(file), *flags]) == 0
    assert resolve(seen[0], Icons(), 48, "cpu") == replace(resolved, **more)


def test_the_configuration_imports_no_torch() -> None:
    code = "import sys; import peft_diffusion.training, peft_diffusion.cli.train; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Whole runs on a tiny base.


@pytest.mark.slow
def test_a_run_lowers_the_losses_and_leaves_the_base_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "draw", plots.draw)
    folder = draw_pictures(tmp_path / "pictures", 20)
    pipe = make_pipe()
    before, classes = checksum(components(pipe)), [type(m) for m in pipe.unet.modules()]
    pipe.unet.train()  # the caller's own training of some of it
    for learning in (pipe.unet.conv_in, pipe.vae.decoder):
        learning.requires_grad_(True)
    own = modes(pipe.unet, pipe.text_encoder, pipe.vae)
    settings = {"steps": 20, "unet_lr": 1e-2, "batch_size": 4, "log_every": 7, "save_every": 10, "held_out": None}
    result = train(small(folder, tmp_path, **settings), pipe=pipe)
    assert checksum(components(pipe)) == before == result.base_checksum
    assert [type(m) for m in pipe.unet.modules()] == classes
    assert modes(pipe.unet, pipe.text_encoder, pipe.vae) == own
    start, end = held_out(result)
    assert result.images == 18 and end < 0.97 * start
    losses = [line["loss"] for line in lines(result) if "loss" in line]
    assert len(losses) == 20 and sum(losses[-8:]) < 0.97 * sum(losses[:8])
    assert [line["step"] for line in lines(result) if "held_out_loss" in line] == [0, 10, 20]
    spec = spec_of(result.output)
    assert spec.methods["unet"][0]["rank"] == 2 and spec.training["steps_done"] == 20 and spec.training["images"] == 18
    assert spec.training["held_out_loss"] == result.held_out_after
    with Image.open(result.run_dir / "loss.png") as plot:
        assert plot.size == (880, 550)


@pytest.mark.slow
def test_the_file_gives_the_weights_that_were_trained(tmp_path: Path, pictures: Path) -> None:
    result = train(small(pictures, tmp_path, trigger="ink {}", steps=2), pipe=make_pipe())
    pipe = make_pipe()
    loaded = formats.load(result.output, pipe)
    assert not loaded.report.unmatched and loaded.spec.triggers == ("ink",)
    assert torch.equal(flat(loaded, pipe), last_state(result).tensors["parameters"])


@pytest.mark.slow
def test_the_average_is_what_is_saved(tmp_path: Path, pictures: Path) -> None:
    result = train(small(pictures, tmp_path, ema=0.9, steps=2), pipe=make_pipe())
    pipe, state = make_pipe(), last_state(result)
    assert torch.equal(flat(formats.load(result.output, pipe), pipe), state.tensors["average"])
    assert not torch.equal(state.tensors["average"], state.tensors["parameters"])


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bits_and_another_one_others(tmp_path: Path, pictures: Path) -> None:
    torch.manual_seed(1)
    first = train(small(pictures, tmp_path / "1", steps=2), pipe=make_pipe())
    torch.manual_seed(2)
    again = train(small(pictures, tmp_path / "2", steps=2), pipe=make_pipe())
    other = train(small(pictures, tmp_path / "3", steps=2, seed=1), pipe=make_pipe())
    one, two, three = (load_file(result.output) for result in (first, again, other))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert any(not torch.equal(one[key], three[key]) for key in one)


@pytest.mark.slow
def test_v_prediction_is_trained_as_the_base_says(tmp_path: Path, pictures: Path) -> None:
    epsilon = train(small(pictures, tmp_path / "1", steps=2), pipe=make_pipe())
    config = small(pictures, tmp_path / "2", steps=2, min_snr_gamma=5)
    velocity = train(config, pipe=make_pipe(prediction_type="v_prediction"))
    assert spec_of(velocity.output).base["prediction_type"] == "v_prediction"
    first = [next(line["loss"] for line in lines(result) if "loss" in line) for result in (epsilon, velocity)]
    assert first[0] != first[1]


@pytest.mark.slow
def test_pictures_kept_apart_are_never_trained_on(tmp_path: Path) -> None:
    folder = draw_pictures(tmp_path / "pictures", 10)
    prepared = prepare(small(folder, tmp_path, held_out=0.3), make_pipe(), lambda event: None, TrainingPictures())
    assert prepared.held_out is not None
    assert (len(prepared.train.captions), len(prepared.held_out.captions)) == (7, 3)
    assert not set(prepared.train.captions) & set(prepared.held_out.captions)
    site.attach(components(prepared.pipe)["unet"], "a", method("lora", rank=2))
    task = DiffusionTask(prepared.pipe, "a", DiffusionSettings(batch_size=2), prepared.train, prepared.held_out)
    seen = {prepared.train.caption(entry) for step in range(12) for entry in task.batch(step, 0).indices}
    assert seen == set(prepared.train.captions)
    assert task.held_out() == task.held_out()


@pytest.mark.slow
def test_held_out_loss_does_not_depend_on_how_the_run_learns(tmp_path: Path) -> None:
    folder = draw_pictures(tmp_path / "pictures", 10)
    plain = train(small(folder, tmp_path / "1", held_out=0.2, steps=1), pipe=make_pipe())
    changed: dict[str, Any] = {
        "min_snr_gamma": 5.0,
        "noise_offset": 0.1,
        "caption_dropout": 1.0,
        "batch_size": 3,
        "dropout": 0.5,
    }
    other = train(small(folder, tmp_path / "2", held_out=0.2, steps=1, flip=True, **changed), pipe=make_pipe())
    assert plain.held_out_before == pytest.approx(other.held_out_before, rel=1e-5)


@pytest.mark.slow
def test_training_the_text_encoder_too_writes_both(tmp_path: Path, pictures: Path) -> None:
    changes: dict[str, Any] = {"components": ("unet,text_encoder",), "text_encoder_lr": 1e-3, "steps": 2}
    result = train(small(pictures, tmp_path, **changes), pipe=make_pipe())
    spec = spec_of(result.output)
    assert set(spec.methods) == {"unet", "text_encoder"}
    ups = [tensor for key, tensor in load_file(result.output).items() if key.startswith("lora_te") and "lora_up" in key]
    assert ups and all(bool(tensor.any()) for tensor in ups)


@pytest.mark.slow
def test_previews_have_the_base_in_the_first_row(tmp_path: Path, pictures: Path) -> None:
    drawn: dict[str, Any] = {"steps": 2, "preview_steps": 1, "preview_every": 1, "preview_prompts": ("a cat", "a dog")}
    result = train(small(pictures, tmp_path, **drawn), pipe=make_pipe())
    names = sorted(path.name for path in (result.run_dir / "previews").iterdir())
    rows = ("base", "step_000001", "step_000002")
    assert names == sorted([*(f"{row}_{column}.png" for row in rows for column in range(2)), "sheet.png", "prompts.json"])


@pytest.mark.slow
def test_previews_show_what_the_pictures_do_not_and_tell_of_paper(tmp_path: Path) -> None:
    folder = tmp_path / "pages"
    folder.mkdir()
    for number, name in enumerate(("a red fox", "a tall castle", "a fox on a bicycle", "a small hut")):
        page = Image.new("RGB", (64, 64), (240, 228, 196))
        page.paste((30 * number, 90, 20), (16, 16, 48, 48))
        page.save(folder / f"{name}.png")
    told: list[Event] = []
    drawn: dict[str, Any] = {"preview_steps": 1, "steps": 1, "trigger": "pen"}
    result = train(small(folder, tmp_path, **drawn), pipe=make_pipe(), observers=[told.append])
    chosen = next(event for event in told if isinstance(event, PreviewsChosen))
    assert chosen == PreviewsChosen(("pen, a fox on a bicycle", "pen, a red fox"), ("pen, a lighthouse", "pen, a teapot"))
    first, last = (event for event in told if isinstance(event, Preview))
    assert first.prompts == last.prompts == (*chosen.shown, *chosen.others) and (first.step, last.step) == (0, 1)
    warned = [event.message for event in told if isinstance(event, Warned)]
    assert any(re.match(r"the border of all pictures is #f0e4c4, and [34] of 4 previews have", one) for one in warned)
    assert "pen, a teapot" in (result.run_dir / "report.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("captions", "preset", "want"),
    [
        (["twemoji emoji of a fox", "twemoji emoji of an owl"], "style", ["twemoji emoji of a lighthouse"]),
        (["a fox, ink style", "an owl, ink style"], "style", ["a lighthouse, ink style"]),
        (["a lighthouse at sea"], "style", ["a bicycle"]),
        (["mira smiles", "mira in the snow"], "subject", ["mira on a snowy mountain"]),
        (["mira smiles", "mira in a snowy street"], "subject", ["mira in a market"]),
        (["", ""], "style", ["a lighthouse"]),
    ],
)
def test_what_pictures_do_not_show_is_said_in_their_words(captions: list[str], preset: Any, want: list[str]) -> None:
    assert unseen(captions, preset, 1) == want


@pytest.mark.slow
def test_epochs_see_every_picture_so_many_times(tmp_path: Path, pictures: Path) -> None:
    result = train(small(pictures, tmp_path, epochs=2, batch_size=4, steps=50, held_out=0.0), pipe=make_pipe())
    assert result.steps == 4 and "steps = 4" in (result.run_dir / "config.toml").read_text("utf-8")


@pytest.mark.slow
def test_nothing_is_kept_apart_of_few_pictures_and_that_is_said(tmp_path: Path) -> None:
    console = Console(record=True, width=200, file=(tmp_path / "log").open("w"))
    config = small(draw_pictures(tmp_path / "few", 5), tmp_path, steps=2, held_out=None)
    result = train(config, pipe=make_pipe(), observers=[TrainingConsole(console)])
    assert result.held_out_before is None
    said = console.export_text()
    assert "no pictures are kept apart" in said and "next: peft-diffusion generate" in said
    assert "(fewer than 6 pictures; --held-out 0.1" in said and "--patience" not in said
    assert said.count(result.base_checksum) == 2
    # Everybody tells which base it was by one number.
    which = describe(make_pipe()).fingerprint
    assert which == result.base_fingerprint == spec_of(result.output).base["fingerprint"] != result.base_checksum
    assert f"base fingerprint {which}" in said and which in (result.run_dir / "report.html").read_text("utf-8")
    many = draw_pictures(tmp_path / "many", 20)
    asked = small(many, tmp_path / "two", held_out=0.0, patience=2, steps=1)
    train(asked, pipe=make_pipe(), observers=[TrainingConsole(console)])
    said = console.export_text()
    assert "measure on (--held-out 0.1" in said and "warning: --patience ends nothing" in said
    assert "warning: each picture is seen 0.1 times in 1 steps, which teaches little; --steps 40 shows each 4 times" in said


@pytest.mark.parametrize(
    ("count", "apart"), [(1, 0), (5, 0), *((few, 2) for few in range(6, 20)), (20, 2), (26, 3), (48, 5)]
)
def test_two_of_a_few_pictures_are_kept_apart(count: int, apart: int) -> None:
    given = TrainConfig(folder=(Path("x"),))
    share = resolve(given, Icons(), count, "cpu").held_out
    assert (max(1, round(count * share)) if share else 0) == apart
    assert resolve(replace(given, held_out=0.0), Icons(), count, "cpu").held_out == 0
    # A run of a version that kept none of a few goes on as it was.
    before = {"derived": ["held_out"], "held_out": 0.0}
    assert resolve(given, Icons(), count, "cpu", before=before).held_out == 0


@pytest.mark.slow
def test_captions_over_the_limit_are_named_with_what_is_lost(tmp_path: Path, pictures: Path) -> None:
    console = Console(record=True, width=200, file=(tmp_path / "log").open("w"))
    (pictures / "red apple a.txt").write_text("apple " * 80 + "dog", "utf-8")
    config = small(pictures, tmp_path, missing_captions="name", steps=1, max_tokens="75")
    train(config, pipe=make_pipe(), observers=[TrainingConsole(console)])
    said = console.export_text()
    assert "1 prompt over 75 tokens" in said and "red apple a.png" in said and "dog" in said


def test_missing_captions_stop_before_anything_is_written(tmp_path: Path, pictures: Path) -> None:
    (pictures / "red apple a.txt").write_text("an apple", "utf-8")
    with pytest.raises(UserError, match="caption"):
        train(small(pictures, tmp_path), pipe=make_pipe())
    assert not (tmp_path / "run").exists() and not (tmp_path / "a.safetensors").exists()


@pytest.mark.slow
def test_a_run_and_a_file_that_are_there_are_not_replaced_unasked(tmp_path: Path, pictures: Path) -> None:
    first = train(small(pictures, tmp_path, steps=2), pipe=make_pipe())
    held = first.output.read_bytes()
    with pytest.raises(UserError, match=r"holds a run already: --resume"):
        train(small(pictures, tmp_path), pipe=make_pipe())
    with pytest.raises(UserError, match=r"exists already: --overwrite"):
        train(small(pictures, tmp_path, run_dir=tmp_path / "other"), pipe=make_pipe())
    assert first.output.read_bytes() == held
    again = train(small(pictures, tmp_path, steps=2, overwrite=True, seed=1), pipe=make_pipe())
    assert again.output.read_bytes() != held and len(lines(again)) == len(lines(first))


@pytest.mark.parametrize("changes", [{}, {"overwrite": True}])
def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path, pictures: Path, changes: dict[str, Any]) -> None:
    model = tmp_path / "run" / "checkpoints" / "model.safetensors"
    model.parent.mkdir(parents=True)
    model.write_bytes(b"gigabytes")
    with pytest.raises(UserError, match=r"run is no run folder and holds checkpoints, where a run would write its own"):
        train(small(pictures, tmp_path, **changes), pipe=make_pipe())
    assert [path for path in (tmp_path / "run").rglob("*") if path.is_file()] == [model]
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "data.json").write_text("mine")
    with pytest.raises(UserError, match=r"project is no run folder and holds data\.json"):
        train(small(pictures, tmp_path, run_dir=tmp_path / "project", **changes), pipe=make_pipe())
    assert (tmp_path / "project" / "data.json").read_text() == "mine"


@pytest.mark.slow
def test_overwriting_deletes_nothing_but_what_runs_write(tmp_path: Path, pictures: Path) -> None:
    first: dict[str, Any] = {"steps": 2, "save_every": 1, "preview_steps": 1, "preview_prompts": ("a cat",)}
    run = train(small(pictures, tmp_path, **first), pipe=make_pipe()).run_dir
    (run / "logs").mkdir()
    (run / "logs" / "events.out.tfevents.1.host.2").write_bytes(b"")
    own = [run / place / name for place, name in (
        ("checkpoints", "best.safetensors"), ("previews", "mine.png"), ("thumbnails", "1.webp"), ("logs", "notes.txt"),
        (".", ".secret.12"), ("checkpoints", ".model.safetensors.7"),
    )]  # fmt: skip
    for path in own:
        path.write_bytes(b"mine")
    train(small(pictures, tmp_path, overwrite=True, steps=3, held_out=0.4), pipe=make_pipe())
    assert all(path.read_bytes() == b"mine" for path in own)
    left = {path.name for path in run.rglob("*.*") if path.is_file() and path.parent != run} - {path.name for path in own}
    assert left == {"step_000003.safetensors", "a-000003.safetensors", *(f"{number:06}.webp" for number in range(6))}


@pytest.mark.slow
def test_two_processes_do_not_train_into_one_folder(tmp_path: Path, pictures: Path) -> None:
    run = train(small(pictures, tmp_path, steps=1), pipe=make_pipe()).run_dir
    told = json.loads((run / "run.json").read_text())
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    running = told | {"state": "running", "process": {"host": told["process"]["host"], "pid": other.pid}}
    (run / "run.json").write_text(json.dumps(checksums.sealed(running)))
    hows: tuple[dict[str, Any], ...] = ({"resume": True}, {"overwrite": True}, {})
    for how in hows:
        with pytest.raises(UserError, match=rf"process {other.pid} trains into .*run now"):
            train(small(pictures, tmp_path, steps=2, **how), pipe=make_pipe())
    running["process"]["began"] = 1  # another process had this id then
    (run / "run.json").write_text(json.dumps(checksums.sealed(running)))
    if Path("/proc/self/stat").exists():
        train(small(pictures, tmp_path, steps=2, resume=True), pipe=make_pipe())
    other.communicate(b"\n")


@pytest.mark.slow
def test_an_output_that_cannot_be_written_is_found_before_training(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way", "utf-8")
    with pytest.raises(UserError, match="file"):
        train(small(pictures, tmp_path, output=tmp_path / "file" / "a.safetensors"), pipe=make_pipe())
    (tmp_path / "a.safetensors").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        train(small(pictures, tmp_path, overwrite=True), pipe=make_pipe())
    with pytest.raises(UserError, match=r"name it a\.pt\.safetensors"):
        train(small(pictures, tmp_path, output=tmp_path / "a.pt"), pipe=make_pipe())

    def refuse(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(30, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(UserError, match="Read-only file system"):
        train(small(pictures, tmp_path, output=tmp_path / "b.safetensors"), pipe=make_pipe())
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_full_disk_leaves_the_checkpoints_that_there_are(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync, calls = os.fsync, []

    def full(number: int) -> None:
        calls.append(number)
        if (tmp_path / "run" / "checkpoints" / "step_000003.safetensors").exists():
            raise OSError(28, "No space left on device")
        sync(number)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device; free space"):
        train(small(pictures, tmp_path), pipe=make_pipe())
    left = list((tmp_path / "run" / "checkpoints").iterdir())
    assert [path.name for path in left] == ["step_000003.safetensors"] and state_of(left[0]).step == 3
    assert not (tmp_path / "a.safetensors").exists()


@pytest.mark.slow
def test_a_picture_that_vanishes_is_named(tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def then_vanish(*given: Any, **named: Any) -> ImageFolder:
        found = scan(*given, **named)
        next(one for one in found.pictures if "red dog" in one.name).path.unlink()
        return found

    monkeypatch.setattr(datasets, "scan", then_vanish)
    with pytest.raises(UserError, match=r"red dog c\.png"):
        train(small(pictures, tmp_path), pipe=make_pipe())
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_method_that_reads_words_takes_the_text_encoder_and_a_run_of_warm_up_alone_is_told(
    pictures: Path, tmp_path: Path
) -> None:
    told: list[Event] = []
    run = small(pictures, tmp_path, method="tokens", rank=None, option=("placeholders=<ink>",), trigger="<ink>")
    result = train(replace(run, steps=2, warmup=2), pipe=make_pipe(), observers=[told.append])
    assert set(spec_of(result.output).methods) == {"text_encoder"}
    assert [event for event in told if isinstance(event, Warned) and event.message.startswith("--warmup is as long as")]


def test_avif_is_read(pictures: Path, tmp_path: Path) -> None:
    if not features.check("avif"):
        pytest.skip("this Pillow was built without libavif")
    for place, path in enumerate(sorted(pictures.glob("*.png"))):
        (tmp_path / "avif").mkdir(exist_ok=True)
        Image.open(path).save(tmp_path / "avif" / f"{place}.avif")
    found = scan(tmp_path / "avif", missing="empty")
    assert len(found.pictures) > 1 and {picture.path.suffix for picture in found.pictures} == {".avif"}
    assert np.asarray(open_picture(found.pictures[0].path)).shape[2] == 3
