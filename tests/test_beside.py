"""Training beside adapters that stay as they are: when they act, what keeps them, and what the new one reads of theirs."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_pipe
from laws import randomize
from making import spec_of
from test_training import draw_pictures, small
from torch import Tensor, nn

from peft_diffusion.api import train
from peft_diffusion.bases import components
from peft_diffusion.bases.words import teach, with_initial_tokens
from peft_diffusion.core import site
from peft_diffusion.core.arena import Arena
from peft_diffusion.core.errors import UserError
from peft_diffusion.core.others import Other
from peft_diffusion.data.captions import CaptionRules
from peft_diffusion.data.latents import LatentCache
from peft_diffusion.generation.while_training import TrainingPictures
from peft_diffusion.methods.bitfit import BitFit
from peft_diffusion.methods.lora import Lora
from peft_diffusion.methods.lora.shared_basis import SharedBasisLora, basis_rows
from peft_diffusion.methods.prompt import SoftPrompt
from peft_diffusion.training import TrainConfig
from peft_diffusion.training.attachment import NAME, attach, selected_components, with_words
from peft_diffusion.training.loop.overlap import Overlap
from peft_diffusion.training.loop.trainer import loss_at
from peft_diffusion.training.machine.processes import Processes
from peft_diffusion.training.pictures import diffusion_task
from peft_diffusion.training.settings.placements import blocks
from peft_diffusion.training.tasks.diffusion import DiffusionTask, Examples
from peft_diffusion.training.tasks.keeping import kept
from peft_diffusion.training.tasks.preparation import prepare

pytestmark = pytest.mark.usefixtures("few_measurements", "no_signals", "no_plots")
OTHER = Other("other", {"file": "other.safetensors"}, "ink drawing of {}")
CPU = torch.device("cpu")


def task_beside(config: TrainConfig, *, carried: bool = True) -> tuple[DiffusionTask, Arena]:
    """The task of a run with a trained adapter that changes something, beside another one, or without it."""
    pipe: Any = make_pipe()
    prepared = prepare(config, pipe, lambda event: None, TrainingPictures())
    torch.manual_seed(0)
    for name in ("unet", "text_encoder") if carried else ():
        part = components(pipe)[name]
        site.attach(part, OTHER.name, Lora(rank=2), "attention")
        randomize(part, OTHER.name)
        site.freeze(part)
    made = blocks(prepared.config)
    arena = Arena(attach(selected_components(pipe, prepared.config.components), made, 0, lambda name: 1e-3).groups)
    arena.flat.add_(0.05 * torch.randn(arena.flat.shape, generator=torch.Generator().manual_seed(0)))
    return diffusion_task(prepared, made, Processes(), others=[OTHER] if carried else []), arena


@pytest.mark.slow
def test_others_are_off_in_a_share_of_the_steps_text_and_all(tmp_path: Path) -> None:
    folder = draw_pictures(tmp_path / "pictures", 2)
    beside: dict[str, Any] = {"beside": ("other.safetensors",)}
    always, _ = task_beside(small(folder, tmp_path, batch_size=1, **beside))
    sometimes, _ = task_beside(small(folder, tmp_path, batch_size=1, beside_dropout=0.5, **beside))
    without, _ = task_beside(small(folder, tmp_path, batch_size=1), carried=False)
    off = {step: sometimes.alone(step) for step in range(40)}
    assert 8 < sum(off.values()) < 32
    assert not any(always.alone(step) for step in off)
    for step in (next(step for step in off if off[step]), next(step for step in off if not off[step])):
        losses = [float(loss_at(task, step, 0, CPU).detach()) for task in (always, sometimes, without)]
        assert losses[1] == losses[2 if off[step] else 0] and losses[0] != losses[2]
    # What is cached of captions is what the text encoder says with the others, or without.
    (prompt, *_) = sometimes.train.plain(sometimes.settings.rules)
    texts = [task.embeddings_alone if task is sometimes else task.embeddings for task in (always, sometimes, without)]
    found = [text[prompt][0] for text in texts if text is not None]
    assert torch.equal(found[1], found[2]) and not torch.equal(found[0], found[2])


@pytest.mark.slow
def test_prompts_of_others_are_answered_as_without_the_new_adapter(tmp_path: Path) -> None:
    folder = draw_pictures(tmp_path / "pictures", 2)
    config = small(folder, tmp_path, batch_size=1, beside=("other.safetensors",), beside_keep=3.0, caption_dropout=0.0)
    task, _ = task_beside(config)
    plain, _ = task_beside(small(folder, tmp_path, batch_size=1, beside=("other.safetensors",), caption_dropout=0.0))
    inputs, own = task.inputs(0, 0), plain.inputs(0, 0)
    assert task.prior is not None and all(
        prompt.startswith("ink drawing of ") for prompt in task.prior.plain(CaptionRules())
    )
    second = {name: tensor[1:] for name, tensor in inputs.items()}
    with torch.no_grad():
        with task._base():
            before = task.answer(second)[0]
        moved = (task.answer(second)[0] - before).square().mean()
        assert float(moved) > 0
        expected = float(plain.loss(own)) + 3.0 * float(moved)
        assert float(task.loss(inputs)) == pytest.approx(expected, rel=1e-5)


def soft_prompt_of(pipe: Any, name: str) -> None:
    """Attach one to the text encoder that changes what is answered."""
    begun = with_initial_tokens(pipe, "text_encoder", SoftPrompt(4, initial="red"))
    site.attach(pipe.text_encoder, name, begun, "tokens")
    randomize(pipe.text_encoder, name)
    site.freeze(pipe.text_encoder)
    teach(pipe)


def answered(task: DiffusionTask, pipe: Any, prompt: str, inputs: dict[str, Tensor], row: int) -> Tensor:
    """What the plain modules of a base answer to a row of a batch, told a prompt."""
    ids = pipe.tokenizer([prompt], padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    latents, noise, timesteps = (inputs[name][row : row + 1] for name in ("latents", "noise", "timesteps"))
    power = task.powers[timesteps].view(-1, 1, 1, 1)
    noisy = power.sqrt() * latents + (1 - power).sqrt() * noise
    with torch.no_grad():
        answer: Tensor = pipe.unet(noisy, timesteps, pipe.text_encoder(ids).last_hidden_state).sample
    return answer


@pytest.mark.slow
def test_a_class_is_answered_without_the_soft_prompt_that_learns_and_with_those_of_others(tmp_path: Path) -> None:
    folder = draw_pictures(tmp_path / "pictures", 2)
    of_class = {"regularisation": (draw_pictures(tmp_path / "class", 2),), "components": ("text_encoder",)}
    learns: dict[str, Any] = {"method": "prompt", "rank": None, "batch_size": 1, "debiased": False, "min_snr_gamma": 0.0}
    learns |= {"caption_dropout": 0.0, **of_class}
    for other in (False, True):
        pipe: Any = make_pipe()
        prepared = prepare(small(folder, tmp_path, **learns), pipe, lambda event: None, TrainingPictures())
        with_other: Any = make_pipe()
        for base in (pipe, with_other) if other else ():
            soft_prompt_of(base, OTHER.name)
        made = with_words(pipe, blocks(prepared.config))
        arena = Arena(attach(selected_components(pipe, ("text_encoder",)), made, 0, lambda name: 1e-3).groups)
        arena.flat.add_(0.5 * torch.randn(arena.flat.shape, generator=torch.Generator().manual_seed(0)))
        teach(pipe)
        task = diffusion_task(prepared, made, Processes(), others=[OTHER] if other else [])
        inputs = task.inputs(0, 0)
        assert task.prior is not None
        (entry,) = task.prior_entries(task.batch(0, 0).bucket, 0, 0)
        prompt = task.prior.plain(task.prior_rules)[task.prior.latents.entries[entry].picture]
        expected = answered(task, with_other, prompt, inputs, 1)
        found = task._base_answer(inputs)
        assert found is not None
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert (answered(task, pipe, prompt, inputs, 1) - expected).abs().max() > 1e-3
        own = task.train.plain(task.settings.rules)[task.train.latents.entries[task.batch(0, 0).indices[0]].picture]
        with torch.no_grad():
            moved = (answered(task, pipe, prompt, inputs, 1) - expected).square().mean()
            missed = (answered(task, pipe, own, inputs, 0) - inputs["noise"][:1]).square().mean()
            assert float(task.loss(inputs)) == pytest.approx(float(missed + moved), rel=1e-5)


@pytest.mark.slow
def test_a_soft_prompt_of_others_stands_before_no_prompt_in_steps_in_which_it_is_off(tmp_path: Path) -> None:
    folder = draw_pictures(tmp_path / "pictures", 2)
    trains: dict[str, Any] = {"components": ("unet", "text_encoder"), "batch_size": 1, "caption_dropout": 0.0}
    tasks = []
    for beside in ({"beside": ("other.safetensors",), "beside_dropout": 0.5}, {}):
        pipe: Any = make_pipe()
        prepared = prepare(small(folder, tmp_path, **trains, **beside), pipe, lambda event: None, TrainingPictures())
        if beside:
            soft_prompt_of(pipe, OTHER.name)
        made = blocks(prepared.config)
        arena = Arena(attach(selected_components(pipe, prepared.config.components), made, 0, lambda name: 1e-3).groups)
        arena.flat.add_(0.05 * torch.randn(arena.flat.shape, generator=torch.Generator().manual_seed(0)))
        tasks.append(diffusion_task(prepared, made, Processes(), others=[OTHER] if beside else []))
    sometimes, never = tasks
    off = next(step for step in range(40) if sometimes.alone(step))
    on = next(step for step in range(40) if not sometimes.alone(step))
    assert float(loss_at(sometimes, off, 0, CPU)) == pytest.approx(float(loss_at(never, off, 0, CPU)), rel=1e-6)
    assert float(loss_at(sometimes, on, 0, CPU)) != pytest.approx(float(loss_at(never, on, 0, CPU)), rel=1e-4)


def test_prompts_that_call_others_are_those_given_or_their_triggers() -> None:
    cache = LatentCache((), 0, 0, 0)
    train_on = Examples(cache, ["a cat", "a dog", "a cow"], rules=[CaptionRules("flat {}")] * 3)
    usual = CaptionRules("flat {}")
    assert kept(train_on, usual, [""], ["ink cat", "ink house"]).plain(usual.of_class()) == [
        "ink cat",
        "ink house",
        "ink cat",
    ]
    assert kept(train_on, usual, ["ink {}", "wax style"], []).plain(usual) == ["ink a cat", "wax style, a dog", "ink a cow"]
    for triggers in ([""], ["flat {}"]):
        with pytest.raises(UserError, match="nothing tells which prompts call them; say some with --beside-prompt"):
            kept(train_on, usual, triggers, [])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"orthogonal": 0.1}, "--orthogonal needs adapters to be orthogonal to"),
        ({"beside_dropout": 0.5}, "--beside-dropout is about adapters that are trained beside; name them with --beside"),
        ({"beside_prompt": "a cat", "beside": "a"}, "--beside-prompt has the prompts of --beside-keep; give it a weight"),
        ({"beside_keep": 1.0, "beside": "a", "class_prompt": "a cat"}, "both stand beside each batch"),
    ],
)
def test_settings_about_others_that_do_nothing_are_refused(more: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        TrainConfig(("pictures",), **more)


def layers(*ranks: int) -> tuple[nn.Module, list[Tensor]]:
    """A layer of twelve inputs with an adapter to be trained and others, and the ``down`` of each."""
    torch.manual_seed(0)
    part = nn.Sequential(nn.Linear(12, 5))
    for number, rank in enumerate(ranks):
        name = NAME if not number else f"other{number}"
        site.attach(part, name, Lora(rank=rank), ".*")
        randomize(part, name)
    names = [NAME, *(f"other{number}" for number in range(1, len(ranks)))]
    return part, [dict(site.adapters(part, name)["0"].named_parameters())["down"] for name in names]


def test_the_penalty_is_the_share_that_others_read_and_its_gradient_the_formula() -> None:
    part, (own, *others) = layers(3, 2, 4)
    overlap = Overlap({"unet": part}, NAME, ["other1", "other2"])
    share = overlap()
    share.backward()
    read = torch.cat([other.detach() for other in others])
    onto = torch.linalg.pinv(read) @ read  # the projection onto what the rows of the others span
    a, size = own.detach(), own.detach().square().sum()
    expected = (a @ onto).square().sum() / size
    assert overlap.layers == 1 and not overlap.left_out
    assert share.item() == pytest.approx(expected.item(), rel=1e-5) and 0 < share.item() < 1
    torch.testing.assert_close(own.grad, 2 * (a @ onto - expected * a) / size, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        own.copy_(a - a @ onto)
        assert float(overlap()) < 1e-10
        own.copy_(others[0][[0, 1, 0]])
        assert float(overlap()) == pytest.approx(1.0, rel=1e-6)


def test_no_pair_to_be_orthogonal_to_is_told() -> None:
    part, _ = layers(3)
    site.attach(part, "other", BitFit(), "biases")
    with pytest.raises(UserError, match="there is no layer at which what is trained and what it is trained beside are both"):
        Overlap({"unet": part}, NAME, ["other"])


@pytest.mark.parametrize("width", [1, 7, 64])
def test_the_shared_basis_is_orthogonal(width: int) -> None:
    whole = basis_rows(width, 0, width, seed=3)
    torch.testing.assert_close(whole @ whole.T, torch.eye(width), atol=1e-5, rtol=0)
    assert torch.equal(basis_rows(width, width // 2, 2, seed=3), whole[width // 2 : width // 2 + 2])
    assert width == 1 or not torch.allclose(whole, basis_rows(width, 0, width, seed=4), atol=1e-2)


@pytest.mark.parametrize("module", [nn.Linear(24, 8), nn.Conv2d(4, 6, 3)], ids=["linear", "conv"])
def test_parts_of_a_shared_basis_read_nothing_in_common_and_only_up_learns(module: nn.Module) -> None:
    built = [Lora(rank=4, init="orthogonal", basis_seed=5, basis_part=part).build(module) for part in (0, 1, 1)]
    downs = [one.down.flatten(1) for one in built]
    assert float((downs[0] @ downs[1].T).abs().max()) < 1e-6 and torch.equal(downs[1], downs[2])
    width = downs[0].shape[1]
    usual = Lora(rank=4).build(module).down.square().sum() / 4
    assert float(downs[0].square().sum() / 4) == pytest.approx(1 / 3, rel=1e-5) == pytest.approx(float(usual), rel=0.5)
    assert isinstance(built[0], SharedBasisLora) and built[0].by_rate() == {1.0: [built[0].up]}
    assert not built[0].down.requires_grad and not bool(built[0].up.any())
    with pytest.raises(UserError, match=f"at a layer of {width} inputs the shared basis has {width // 4} parts of rank 4"):
        Lora(rank=4, init="orthogonal", basis_part=width // 4).build(module)


@pytest.mark.slow
def test_a_run_on_a_part_of_the_basis_says_so_in_its_file(tmp_path: Path, tiny_base: Path) -> None:
    folder = draw_pictures(tmp_path / "pictures", 1)
    options = ("init=orthogonal", "basis_seed=9", "basis_part=1")
    done = train(small(folder, tmp_path, base=str(tiny_base), rank=2, steps=1, option=options, preview_steps=0))
    (told,) = spec_of(done.output).methods["unet"]
    assert {name: told[name] for name in ("init", "basis_seed", "basis_part")} == {
        "init": "orthogonal", "basis_seed": 9, "basis_part": 1,
    }  # fmt: skip
    assert math.isfinite(done.seconds)
