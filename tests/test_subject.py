"""Subjects and the options of their kind, each by its effect: the class kept, masks, repeats, captions, noise, losses."""

import os
import random
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_pipe
from diffusers import DiffusionPipeline, PNDMScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from laws import strengths_of
from making import command
from PIL import Image, ImageDraw
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file
from test_resume import stop_after
from test_training import POWERS, draw_pictures, small

from peft_diffusion import formats
from peft_diffusion.api import train
from peft_diffusion.bases import noise as noise_process
from peft_diffusion.cli.console import TrainingConsole
from peft_diffusion.core.arena import Arena
from peft_diffusion.core.errors import UserError
from peft_diffusion.core.events import Event, Warned
from peft_diffusion.data import subfolders
from peft_diffusion.data.buckets import arrange
from peft_diffusion.data.captions import CaptionRules, pick_wildcards
from peft_diffusion.data.folder import scan
from peft_diffusion.data.latents import cache_latents
from peft_diffusion.fast.cuda_graph import Inputs
from peft_diffusion.generation import Adapters
from peft_diffusion.generation.sampler import Cell, paint
from peft_diffusion.generation.settings import GenerateConfig
from peft_diffusion.generation.while_training import TrainingPictures
from peft_diffusion.training import Interrupted, TrainConfig
from peft_diffusion.training.attachment import NAME, attach, selected_components
from peft_diffusion.training.drawing import PreviewPrompt
from peft_diffusion.training.loop.seeds import generator, seed_of
from peft_diffusion.training.machine.processes import Processes
from peft_diffusion.training.pictures import diffusion_task
from peft_diffusion.training.settings.choices import HuberSchedule, Loss
from peft_diffusion.training.settings.pictures import ResolvedConfig
from peft_diffusion.training.settings.placements import blocks
from peft_diffusion.training.tasks import class_images, objective
from peft_diffusion.training.tasks.diffusion import DiffusionTask
from peft_diffusion.training.tasks.preparation import prepare
from peft_diffusion.training.watch.previews import Previews

pytestmark = pytest.mark.usefixtures("few_measurements", "no_signals", "no_plots")

torch.set_num_threads(1)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return draw_pictures(tmp_path / "pictures", 4)


def draw_mask(picture: Path, box: tuple[int, int, int, int] = (0, 0, 31, 63), size: int = 64) -> Path:
    mask = Image.new("L", (size, size))
    ImageDraw.Draw(mask).rectangle(box, fill=255)
    path = picture.with_name(f"{picture.stem}-mask.png")
    mask.save(path)
    return path


def config_of(config: TrainConfig) -> ResolvedConfig:
    return prepare(config, make_pipe(), lambda event: None, TrainingPictures()).config


def task_of(config: TrainConfig, pipe: DiffusionPipeline | None = None) -> tuple[DiffusionTask, Arena]:
    """The task of a run with a fresh adapter, and its parameters."""
    pipe = pipe or make_pipe()
    prepared = prepare(config, pipe, lambda event: None, TrainingPictures())
    made = blocks(prepared.config)
    attached = attach(selected_components(pipe, prepared.config.components), made, 0, lambda name: 1e-3)
    return diffusion_task(prepared, made, Processes()), Arena(attached.groups)


def moved(arena: Arena) -> Arena:
    """An adapter that changes something."""
    arena.flat.add_(0.05 * torch.randn(arena.flat.shape, generator=generator("moved")))
    return arena


def gradient(task: DiffusionTask, arena: Arena, inputs: Inputs) -> torch.Tensor:
    arena.zero_grad()
    task.loss(inputs).backward()
    return arena.grad.clone()


# Pictures of the class.


CLASS: dict[str, Any] = {"class_prompt": ("a cat", "a dog"), "class_images": 5, "preset": "subject"}


@pytest.mark.slow
def test_the_base_draws_the_class_once_and_later_runs_find_it(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train(small(pictures, tmp_path / "a", steps=1, **CLASS), pipe=make_pipe())
    folder = next((tmp_path / "a" / "class_images").iterdir())
    assert [path.name for path in sorted(folder.iterdir())] == [f"{number:04}.png" for number in range(5)]
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    (folder / "0004.png").unlink()  # as where it was stopped: the other four stay, and this comes out as it was
    config = small(pictures, tmp_path / "a", steps=1, **CLASS, overwrite=True)
    before = load_file(first.output)
    again = load_file(train(config, pipe=make_pipe()).output)
    assert all(torch.equal(before[key], again[key]) for key in before)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("000[0-3].png")} == {
        path: time for path, time in times.items() if path.name != "0004.png"
    }
    monkeypatch.setattr(TrainingPictures, "class_pictures", lambda *_, **__: pytest.fail("drawn again"))
    train(config, pipe=make_pipe())
    with safe_open(first.output, "pt") as file:
        assert file.metadata()["ss_num_reg_images"] == "5" and file.metadata()["ss_prior_loss_weight"] == "1.0"


@pytest.mark.slow
def test_whatever_decides_what_is_drawn_has_other_pictures(tmp_path: Path, pictures: Path) -> None:
    config = config_of(small(pictures, tmp_path, preset="subject"))
    pipe, *others = make_pipe(), make_pipe(1), make_pipe(prediction_type="v_prediction"), make_pipe(), make_pipe()
    others[2].vae = make_pipe(1).vae
    others[3].scheduler = PNDMScheduler.from_config(pipe.scheduler.config)
    found = {class_images.class_folder(config, one, 64) for one in (pipe, *others)}
    found |= {class_images.class_folder(config, pipe, 128)}
    for changes in ({"class_images": 7}, {"class_prompt": ("a cat",)}, {"clip_skip": 2}):
        found |= {class_images.class_folder(replace(config, **changes), pipe, 64)}
    assert len(found) == 9 and class_images.class_folder(config, make_pipe(), 64) in found


@pytest.mark.slow
def test_pictures_of_the_class_are_drawn_by_the_layer_that_is_trained_with(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 6
    monkeypatch.setattr(class_images, "_STEPS", steps)
    told: dict[str, Any] = {"class_prompt": ("a red cat",), "class_images": 1, "preset": "subject", "clip_skip": 2}
    ready = prepare(small(pictures, tmp_path, **told), make_pipe(), lambda event: None, TrainingPictures())
    (one,) = ready.of_run.of_class
    pipe, seed = make_pipe(), seed_of("class picture", 0)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    ids = pipe.tokenizer(["a red cat", ""], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():  # the last layer but one of both, as A1111 and kohya count, with the norm behind the last
        states = pipe.text_encoder(ids, output_hidden_states=True).hidden_states[-2]
        words, nothing = getattr(pipe.text_encoder, "text_model", pipe.text_encoder).final_layer_norm(states).split(1)
    common: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": 5.0, "height": 64, "width": 64}
    own = pipe(prompt_embeds=words, negative_prompt_embeds=nothing, latents=noise, **common)
    with Image.open(one.path) as drawn:
        found = np.abs(np.asarray(drawn, int) - np.asarray(own.images[0], int)).max()
    assert found <= 1


@pytest.mark.slow
def test_instructions_of_other_programs_are_told_wherever_a_run_draws_or_learns(tmp_path: Path, pictures: Path) -> None:
    sorted(pictures.glob("*.png"))[1].with_suffix(".txt").write_text("[trigger] a dog, (red hair:1.2)")
    settings: dict[str, Any] = {"preset": "subject", "class_images": 1, "missing_captions": "name"}
    asked = small(pictures, tmp_path, class_prompt=("(a cat:1.3) <segment:x>",), **settings)
    told: list[Event] = []
    pipe = make_pipe()
    prepared = prepare(asked, pipe, told.append, TrainingPictures())
    assert [one.caption for one in prepared.of_run.of_class] == ["a cat"]
    made = blocks(prepared.config)
    attach(selected_components(pipe, prepared.config.components), made, 0, lambda name: 1e-3)
    task, drawing = diffusion_task(prepared, made, Processes()), TrainingPictures()
    previews = [
        Previews(tmp_path, task, [PreviewPrompt(prompt)], drawing, nullcontext, told.append, steps=1, every=0, size=64)
        for prompt in ("a dog <lora:ink:0.8>", "a dog")
    ]
    drawn, plain = (one.pictures()[0].tobytes() for one in previews)
    assert drawn == plain
    warned = [event for event in told if isinstance(event, Warned)]
    letters = [event for event in warned if "learned here as letters" in event.message]
    assert any("1 caption with [trigger] or [name], which --trigger WORDS fills" in event.message for event in warned)
    assert letters and "(red hair:1.2)" in letters[0].details[0] and len(letters[0].details) == 1
    assert any("<segment:x> in the prompt is an instruction to another program" in event.message for event in warned)
    assert any("<lora:ink:0.8> in the prompt names an adapter" in event.message for event in warned)


@pytest.mark.slow
def test_a_fresh_adapter_learns_nothing_from_the_class_and_a_changed_one_goes_back_to_the_base(
    tmp_path: Path, pictures: Path
) -> None:
    task, arena = task_of(small(pictures, tmp_path, **CLASS))
    inputs = task.inputs(0, 0)
    assert len(inputs["latents"]) == 4 and inputs["weights"].tolist() == [2.0] * 4
    of_class = {**inputs, "weights": torch.tensor([0.0, 0.0, 2.0, 2.0])}
    assert task.loss(of_class).item() < 1e-10  # other batches, other rounding
    moved(arena)
    start = task.loss(of_class).item()
    assert start > 0
    strengths = [strengths_of(part) for part in selected_components(task.pipe, ("unet", "text_encoder")).values()]
    assert all(bool((one.values[one.index(NAME)] == 1).all()) and one.active == {NAME} for one in strengths)
    for _ in range(10):
        arena.zero_grad()
        loss = task.loss(of_class)
        loss.backward()
        arena.flat.sub_(arena.grad, alpha=0.5 * loss.item() / arena.grad.square().sum().item())
    assert task.loss(of_class).item() < 0.5 * start


@pytest.mark.slow
def test_the_pictures_themselves_are_learned_if_asked_and_the_weight_counts(tmp_path: Path, pictures: Path) -> None:
    task, _ = task_of(small(pictures, tmp_path, **CLASS, prior_target="noise", prior_weight=0.5))
    inputs = task.inputs(0, 0)
    assert inputs["weights"].tolist() == [2, 2, 1, 1]
    answer, wanted = task.answer(inputs)
    own, of_class = ((answer - wanted)[rows].square().mean() for rows in (slice(0, 2), slice(2, 4)))
    torch.testing.assert_close(task.loss(inputs), own + 0.5 * of_class)


@pytest.mark.slow
def test_the_subject_is_drawn_as_without_the_class_and_the_class_without_the_trigger(tmp_path: Path, pictures: Path) -> None:
    plain, _ = task_of(small(pictures, tmp_path / "a", preset="subject", trigger="ink"))
    kept, _ = task_of(small(pictures, tmp_path / "b", **CLASS, trigger="ink"))
    one, other = plain.inputs(3, 0), kept.inputs(3, 0)
    assert all(torch.equal(one[name], other[name][:2]) for name in one)
    decoded = kept.pipe.components["tokenizer"].batch_decode(other["ids_0"], skip_special_tokens=True)
    assert all(text.startswith("ink") or not text for text in decoded[:2])
    assert all(text.replace(" ", "") in ("acat", "adog", "") for text in decoded[2:])
    drawn = Counter(entry for step in range(50) for entry in kept.prior_entries(kept.batch(step, 0).bucket, step, 0))
    assert set(drawn) == set(range(5)) and min(drawn.values()) > 8


@pytest.mark.slow
def test_a_regularisation_folder_takes_any_shape_and_its_own_captions(tmp_path: Path, pictures: Path) -> None:
    folder = tmp_path / "class"
    draw_pictures(folder, 2)
    Image.new("RGB", (160, 64), "teal").save(folder / "wide one.png")
    task, arena = task_of(small(pictures, tmp_path, regularisation=(folder,), masks="off"))
    assert task.prior is not None
    assert sorted(task.prior.captions) == ["blue cat b", "red apple a", "wide one"]
    assert len(task.prior.latents.entries) == 3
    gradient(task, arena, task.inputs(0, 0))
    with pytest.raises(UserError, match="there is no folder"):
        task_of(small(pictures, tmp_path, regularisation=(tmp_path / "nowhere",)))


@pytest.mark.slow
def test_pictures_of_the_class_are_encoded_once_and_their_crops_are_told(tmp_path: Path, pictures: Path) -> None:
    Image.new("RGB", (96, 64), "teal").save(pictures / "a wide one.png")
    Image.new("RGB", (64, 128), "gold").save(pictures / "a tall one.png")
    folder = draw_pictures(tmp_path / "class", 0)
    for number in range(8):
        Image.new("RGB", (64, 64), (9 * number, 0, 0)).save(folder / f"c{number}.png")
    console = Console(record=True, width=300)
    config = small(pictures, tmp_path, regularisation=(folder,), resolution=64, missing_captions="empty", held_out=0)
    prepared = prepare(config, make_pipe(), TrainingConsole(console), TrainingPictures())
    assert prepared.prior is not None and prepared.prior.latents.computed == 8
    task = diffusion_task(prepared, blocks(prepared.config), Processes())
    assert len(task.groups) == 3 and all(task.prior_entries(bucket, 0, 0) for bucket in task.groups)
    said = console.export_text()
    assert "class: 64x64: 5 pictures, 100% or more of each kept" in said
    assert "warning: the crop leaves less than 70% of 3 pictures; the class is cropped to" in said
    assert f"{folder / 'c7.png'}: 64x64, of which 80x48 keeps 60%, the middle" in said


@pytest.mark.slow
def test_a_subject_without_class_says_so_and_trains_text_too(tmp_path: Path, pictures: Path) -> None:
    console = Console(record=True, width=300)
    config = small(pictures, tmp_path, preset="subject", steps=1)
    result = train(config, pipe=make_pipe(), observers=[TrainingConsole(console)])
    assert "the class is not kept" in console.export_text()
    assert result.config.components == ("unet", "text_encoder")
    assert small(pictures, tmp_path).components == ("unet",)


# Masks.


@pytest.mark.slow
def test_the_outside_of_a_mask_gives_no_gradient(tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in sorted(pictures.glob("*.png")):
        draw_mask(path)
    task, arena = task_of(small(pictures, tmp_path))
    moved(arena)
    inputs = task.inputs(0, 0)
    assert torch.equal(inputs["where"], torch.cat([torch.ones(2, 1, 8, 4), torch.zeros(2, 1, 8, 4)], -1))
    noise = inputs["noise"].clone()
    answer = task.answer(inputs)[0].detach().requires_grad_()
    errors = objective.per_image(objective.errors(answer, noise), inputs["where"])
    errors.sum().backward()
    assert answer.grad is not None
    assert answer.grad[..., 4:].abs().max() == 0 and answer.grad[..., :4].abs().min() > 0
    torch.testing.assert_close(errors, (answer - noise).square()[..., :4].flatten(1).mean(1))

    # What is wanted outside changes nothing; what is wanted inside does.
    def wanting(columns: slice) -> torch.Tensor:
        changed = noise.clone()
        changed[..., columns] += 1
        plain = task.answer
        with monkeypatch.context() as patched:
            patched.setattr(task, "answer", lambda given: (plain(given)[0], changed))
            return gradient(task, arena, inputs)

    usual = gradient(task, arena, inputs)
    assert torch.equal(wanting(slice(4, 8)), usual) and not torch.equal(wanting(slice(0, 4)), usual)


def test_masks_are_resized_cropped_and_flipped_as_their_pictures_are(tmp_path: Path) -> None:
    folder = tmp_path / "wide"
    folder.mkdir()
    picture = Image.new("RGB", (384, 128), "black")  # brought to 160x64, and its middle cut out
    ImageDraw.Draw(picture).rectangle((100, 32, 180, 127), fill="white")
    picture.save(folder / "a.png")
    picture.convert("L").save(folder / "a-mask.png")
    found = scan(folder, masks=True).pictures
    fits = arrange(found, 64, 8)
    cache = cache_latents(found, fits, make_pipe().vae, flip=True)
    plain, flipped = cache.entries
    assert plain.where is not None and flipped.where is not None
    assert plain.where.shape == (1, *plain.mean.shape[1:]) and torch.equal(plain.where.flip(-1), flipped.where)
    bucket = fits[0].bucket
    shown = picture.convert("L").resize(fits[0].resized, Image.Resampling.BILINEAR).crop(fits[0].crop)
    expected = torch.tensor(list(shown.tobytes())).view(bucket.height, bucket.width) / 255
    expected = expected.view(bucket.height // 8, 8, bucket.width // 8, 8).mean((1, 3))
    torch.testing.assert_close(plain.where[0], expected)
    assert 0 < plain.where.mean() < 1 and plain.where.eq(0).any()


def test_alpha_is_a_mask_where_asked_and_there_is_no_file(tmp_path: Path) -> None:
    folder = tmp_path / "clear"
    folder.mkdir()
    clear = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    ImageDraw.Draw(clear).rectangle((0, 0, 63, 31), fill=(200, 0, 0, 255))
    clear.save(folder / "top.png")
    Image.new("RGB", (64, 64), "red").save(folder / "solid.png")
    draw_mask(folder / "top.png")
    found = scan(folder).pictures
    assert [one.mask is not None for one in found] == [False, True]
    fits, vae = arrange(found, 64, 8), make_pipe().vae
    files = cache_latents(found, fits, vae, alpha=True).entries
    assert files[0].where is None and files[1].where is not None
    assert torch.equal(files[1].where[0], torch.tensor([1.0] * 4 + [0.0] * 4).expand(8, 8))
    bare = [replace(one, mask=None) for one in found]
    alpha = cache_latents(bare, fits, vae, alpha=True).entries
    assert alpha[1].where is not None
    assert torch.equal(alpha[1].where[0], torch.tensor([1.0] * 4 + [0.0] * 4).expand(8, 8).T)
    assert all(entry.where is None for entry in cache_latents(bare, fits, vae).entries)


@pytest.mark.parametrize("masks", ["files", "alpha"])
def test_a_picture_of_which_nothing_is_left_is_named(tmp_path: Path, masks: str) -> None:
    folder = tmp_path / "wide"
    folder.mkdir()
    edge = (0, 0, 20, 127)  # which is cropped away
    picture = Image.new("RGBA", (640, 128), (0, 0, 0, 0))
    ImageDraw.Draw(picture).rectangle(edge, fill=(200, 0, 0, 255))
    picture.save(folder / "a.png")
    if masks == "files":
        mask = Image.new("L", picture.size)
        ImageDraw.Draw(mask).rectangle(edge, fill=255)
        mask.save(folder / "a-mask.png")
    found = scan(folder).pictures
    why = "its mask .*a-mask.png is black there" if masks == "files" else "it is all transparent there"
    with pytest.raises(UserError, match=rf"a\.png: nothing of it would be learned: cropped to \d+x\d+, {why}"):
        cache_latents(found, arrange(found, 64, 8), make_pipe().vae, alpha=True)


def test_masks_that_do_not_fit_are_listed(tmp_path: Path, pictures: Path) -> None:
    first, second, third, fourth = sorted(pictures.glob("*.png"))
    draw_mask(first, size=32)
    draw_mask(second, box=(99, 99, 99, 99))
    draw_mask(third)
    draw_mask(pictures / "nobody.png")
    (pictures / f"{fourth.stem}-mask.png").write_bytes(b"no picture")
    found = scan(pictures)
    kinds = {problem.kind: problem for problem in found.problems}
    assert set(kinds) == {"mask of another size", "empty mask", "mask without a picture", "not a picture"}
    assert "the mask is 32x32, its picture 64x64" in str(kinds["mask of another size"])
    assert [one.path for one in found.pictures] == [third]
    with pytest.raises(UserError, match="mask"):
        found.check()
    assert len(scan(pictures, masks=False).pictures) == 4 and not any(p.stops for p in scan(pictures, masks=False).problems)


def test_a_picture_of_a_mask_is_a_picture(tmp_path: Path, pictures: Path) -> None:
    draw_mask(pictures / "gas.png")
    assert "gas mask" in [one.caption for one in scan(pictures).pictures]
    first = sorted(pictures.glob("*.png"))[0]
    draw_mask(first, box=(0, 0, 3, 3)).with_suffix(".txt").write_text("a mask")
    assert len(scan(pictures, missing="name").pictures) == 6


# Repeats and weights.


@pytest.mark.slow
def test_a_repeated_folder_is_drawn_as_often_as_asked(tmp_path: Path) -> None:
    for name in ("4_mira", "often/deep", "once"):
        draw_pictures(tmp_path / "all" / name, 2, size=64)
    for number, path in enumerate(sorted((tmp_path / "all").rglob("*.png"))):
        Image.new("RGB", (64, 64), (number * 20, 0, 0)).save(path)
    config = small(
        tmp_path / "all", tmp_path, repeats=("often=3",), folder_weight=("once=0.5",), batch_size=1, epochs=1, save_every=16
    )
    task, _ = task_of(config)
    names = [one.subfolder for one in scan(tmp_path / "all").pictures]
    drawn = Counter(names[task.batch(step, 0).indices[0]] for step in range(16))
    assert drawn == {"4_mira": 8, "often/deep": 6, "once": 2}
    weights = {names[task.batch(step, 0).indices[0]]: task.inputs(step, 0)["weights"].item() for step in range(16)}
    assert weights == {"4_mira": 1.0, "often/deep": 1.0, "once": 0.5}
    result = train(config, pipe=make_pipe())
    assert result.steps == 16
    plain, _ = task_of(replace(config, repeats=("4_mira=1", "often=1")))
    assert len({plain.batch(step, 0).indices for step in range(6)}) == 6


@pytest.mark.slow
def test_the_folders_of_other_programs_are_trained_on_by_the_command(tiny_base: Path, tmp_path: Path) -> None:
    """Kohya's folders, OneTrainer's masks, PowerShell's captions, a caption without end, and a pipe."""
    draw_pictures(tmp_path / "pics" / "2_mychar woman", 2)
    style = draw_pictures(tmp_path / "pics" / "1_style", 3)
    first, second, third = sorted(style.iterdir())
    first.with_suffix(".txt").write_text("word " * 2_500)
    second.with_suffix(".txt").write_bytes("ein Bär\nein Hund".encode("utf-16"))
    third.with_suffix(".txt").write_text("{red|blue}, round\ngreen, square")
    Image.new("RGB", (64, 64), "white").save(style / f"{first.stem}-masklabel.png")
    os.mkfifo(style / "f.png")
    for path, shade in zip(sorted((tmp_path / "pics" / "2_mychar woman").iterdir()), (20, 90), strict=True):
        Image.new("RGB", (64, 64), (shade, 0, 0)).save(path)
    given = ("train", "pics", "--base", tiny_base, "--output", "a.safetensors", "--steps", 2, "--batch-size", 2)
    done = command(*given, "--preview-steps", 1, "--held-out", 0, "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = done.stdout
    assert "2 captions from names of folders, as kohya's 10_WORDS" in said and "1 mask: only what is white" in said
    assert "2 captions with several lines" in said and "no ordinary file: 1" in said and "  ein Bär\n" in said
    assert "next: peft-diffusion generate 'ein Bär' --adapter a.safetensors" in said
    assert len(said) + len(done.stderr) < 10_000, (len(said), done.stderr[:3000])
    assert (tmp_path / "runs" / "a" / "previews" / "sheet.png").exists()
    silent = small(tmp_path / "none", tmp_path, missing_captions="empty")
    Image.new("RGB", (64, 64), "red").save(draw_pictures(tmp_path / "none", 0) / "IMG_1.png")
    told: list[str] = []
    prepare(silent, make_pipe(), lambda event: told.extend(event.lines()), TrainingPictures())
    assert any(line.startswith("1 of 1 prompts are empty: no word will call") for line in told), told


@pytest.mark.slow
def test_a_batch_of_copies_has_the_gradient_of_one_picture(tmp_path: Path, pictures: Path) -> None:
    """As the sum of the gradients of its images, each by what it counts; what is told of the loss is the plain mean."""
    Image.new("RGB", (64, 128), "gold").save(pictures / "a tall one.png")
    console = Console(record=True, width=300)
    config = small(pictures, tmp_path, batch_size=4, resolution=64, caption_dropout=0.0)
    task, arena = task_of(config)
    moved(arena)
    counted: Counter[int] = Counter()
    for step in range(2):
        batch, inputs = task.batch(step, 0), task.inputs(step, 0)
        rows = [{name: tensor[row : row + 1] for name, tensor in inputs.items()} for row in range(4)]
        ones = {"weights": torch.ones(1), "shares": torch.ones(1)}
        alone = [gradient(task, arena, {**row, **ones}) for row in rows]
        wanted = sum((weight / 4 * one for weight, one in zip(batch.weights, alone, strict=True)), torch.zeros(()))
        torch.testing.assert_close(gradient(task, arena, inputs), wanted, rtol=1e-3, atol=1e-6)
        plain = torch.stack([task.loss({**row, **ones}) for row in rows]).mean()
        torch.testing.assert_close(task.loss(inputs), plain)
        for index, weight in zip(batch.indices, batch.weights, strict=True):
            counted[index] += round(weight * 1000)
    assert set(counted.values()) == {1600}  # eight slots over five pictures
    prepare(config, make_pipe(), TrainingConsole(console), TrainingPictures())
    said = console.export_text()
    assert "warning: no other has the shape of 1 picture" in said and "a tall one.png: 48x80" in said


def test_numbers_before_names_are_repeats_and_dates_are_not(tmp_path: Path) -> None:
    for number, name in enumerate(("10_mira", "3_1girl", "20_12", "24_12_2023", "mira")):
        draw_pictures(tmp_path / "all" / name, 1, size=64 + 8 * number)
    found = {one.subfolder: one.repeats for one in subfolders.apply(scan(tmp_path / "all").pictures)}
    assert found == {"10_mira": 10, "3_1girl": 3, "20_12": 1, "24_12_2023": 1, "mira": 1}


@pytest.mark.slow
def test_a_weight_scales_what_is_learned(tmp_path: Path, pictures: Path) -> None:
    task, arena = task_of(small(pictures, tmp_path, folder_weight=("pictures=0.25",)))
    moved(arena)
    plain, other = task_of(small(pictures, tmp_path))
    moved(other)
    quarter, whole = gradient(task, arena, task.inputs(0, 0)), gradient(plain, other, plain.inputs(0, 0))
    torch.testing.assert_close(quarter, whole / 4)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"repeats": ("nowhere=2",)}, r"--repeats nowhere: no picture is in a subfolder .* there are: pictures"),
        ({"repeats": ("pictures",)}, "SUBFOLDER=NUMBER, the number 1 or more"),
        ({"repeats": ("pictures=0",)}, "1 or more"),
        ({"folder_weight": ("pictures=-1",)}, "0 or more"),
        ({"folder_weight": ("pictures=nan",)}, "0 or more"),
        ({"zero_terminal_snr": True}, "needs a base with v-prediction; this one predicts epsilon"),
        ({"debiased": True, "min_snr_gamma": 5.0}, "leave one of them away"),
        ({"multires_noise": 1.0}, "--multires-noise must be 0 or more, below 1"),
        ({"huber_c": 0.0}, "--huber-c must be above 0"),
        ({"loss": "l3"}, "--loss is one of l2, huber, smooth-l1"),
    ],
)
def test_what_no_run_can_use_is_refused(tmp_path: Path, pictures: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        train(small(pictures, tmp_path, **changes), pipe=make_pipe())
    assert not (tmp_path / "run").exists()


# Captions.


def test_wildcards_draw_each_alternative_and_braces_can_be_written() -> None:
    rules = CaptionRules("mira", wildcards=True)
    drawn = Counter(rules.prompt("a {red|blue|big green} {cat|dog} {{x}}", random.Random(seed)) for seed in range(600))
    assert len(drawn) == 6 and min(drawn.values()) > 60 and "mira, a big green dog {x}" in drawn
    assert rules.plain("a {red|blue} cat") == "mira, a red cat"
    assert pick_wildcards("a {|red} cat", None) == "a cat"
    assert CaptionRules().prompt("a {red|blue} cat", random.Random(0)) == "a {red|blue} cat"


@pytest.mark.slow
def test_wildcards_reach_the_steps(tmp_path: Path, pictures: Path) -> None:
    for path in pictures.glob("*.png"):
        path.with_suffix(".txt").write_text("a {cat|dog}")
    task, _ = task_of(small(pictures, tmp_path, wildcards=True, caption_dropout=0.0))
    texts = {tuple(row.tolist()) for step in range(10) for row in task.inputs(step, 0)["ids_0"]}
    assert len(texts) == 2


# Noise, schedule and losses.


@pytest.mark.slow
def test_the_pyramid_is_as_strong_as_that_of_sd_scripts() -> None:
    """How much neighbours differ, and how much the means of channels do, of many images: written out from its formula."""
    found, wanted, chance = [], [], random.Random(0)
    torch.manual_seed(0)
    for number in range(300):
        noise = torch.randn(8, 4, 16, 24)
        found.append(objective.pyramid(noise, 0.4, generator("strength", number)))
        for level in range(6):
            divisor = (chance.random() * 2 + 2) ** level
            rows, columns = max(1, int(16 / divisor)), max(1, int(24 / divisor))
            coarse = torch.nn.functional.interpolate(torch.randn(8, 4, rows, columns), (16, 24), mode="bilinear")
            noise = noise + coarse * 0.4**level
            if rows == 1 or columns == 1:
                break
        wanted.append(noise / noise.std())
    ours, theirs = torch.cat(found), torch.cat(wanted)
    assert float(ours.diff(dim=-1).std()) == pytest.approx(float(theirs.diff(dim=-1).std()), rel=0.01)
    assert float(ours.mean((2, 3)).std()) == pytest.approx(float(theirs.mean((2, 3)).std()), rel=0.05)


def test_the_pyramid_has_more_power_in_large_shapes() -> None:
    def power(noise: torch.Tensor, low: bool) -> torch.Tensor:
        spectrum = torch.fft.fft2(noise).abs().square().mean((0, 1))
        frequency = torch.fft.fftfreq(32).abs()
        radius = torch.maximum(frequency[:, None], frequency[None, :])
        found: torch.Tensor = spectrum[(radius < 0.1) if low else (radius > 0.3)].mean()
        return found

    plain = objective.noise((64, 4, 32, 32), 0.0, generator("p"))
    shaped = objective.pyramid(plain, 0.6, generator("q"))
    assert power(shaped, True) > 2 * power(plain, True) and power(shaped, False) < power(plain, False)
    torch.testing.assert_close(shaped.flatten(1).std(1), torch.ones(64))
    weak = objective.pyramid(plain, 0.1, generator("q"))
    assert power(plain, True) < power(weak, True) < power(shaped, True)
    assert torch.equal(shaped, objective.pyramid(plain, 0.6, generator("q")))


@pytest.mark.slow
def test_zero_terminal_snr_is_that_of_diffusers_and_ends_at_zero(tmp_path: Path, pictures: Path) -> None:
    found = noise_process.zero_terminal(POWERS)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    expected = torch.cumprod(1 - rescale_zero_terminal_snr(betas), 0)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3)
    assert found[-1] == 0 and found[0] == POWERS[0] and bool((found.diff() < 0).all())
    config = small(pictures, tmp_path, zero_terminal_snr=True, min_snr_gamma=5.0, steps=1)
    task, _ = task_of(config, make_pipe(prediction_type="v_prediction"))
    assert task.powers[-1] == 0
    result = train(config, pipe=make_pipe(prediction_type="v_prediction"))
    with safe_open(result.output, "pt") as file:
        assert file.metadata()["ss_zero_terminal_snr"] == "True"
    pipe = make_pipe(prediction_type="v_prediction")
    assert "zero terminal SNR" in formats.load(result.output, pipe).warnings[0]
    pipe.scheduler.register_to_config(rescale_betas_zero_snr=True)
    assert formats.load(result.output, pipe).warnings == ()


Schedule = tuple[bool | None, str | None, str]  # zero terminal SNR, where the steps begin, and whose it is


def scheduled(patched: pytest.MonkeyPatch) -> list[Schedule]:
    """The schedules that pipelines are called with from here on."""
    seen: list[Schedule] = []
    call = type(make_pipe()).__call__

    def watched(pipe: DiffusionPipeline, *given: Any, **named: Any) -> Any:
        config = pipe.scheduler.config
        seen.append((config.get("rescale_betas_zero_snr"), config.get("timestep_spacing"), type(pipe.scheduler).__name__))
        return call(pipe, *given, **named)

    patched.setattr(type(make_pipe()), "__call__", watched)
    return seen


@pytest.fixture(scope="module")
def to_pure_noise(
    tmp_path_factory: pytest.TempPathFactory, few_measurements: None, no_signals: None, no_plots: None
) -> tuple[Path, DiffusionPipeline]:
    """An adapter that was trained to pure noise, and the base as its run left it; the run drew previews from there."""
    where = tmp_path_factory.mktemp("noise")
    pipe = make_pipe(prediction_type="v_prediction")
    before = pipe.scheduler
    made: dict[str, Any] = {"zero_terminal_snr": True, "preview_steps": 2, "steps": 2, "save_every": 2}
    with pytest.MonkeyPatch.context() as patched:
        seen = scheduled(patched)
        output = train(small(draw_pictures(where / "pictures", 4), where, **made), pipe=pipe).output
    assert seen and all(one[:2] == (True, "trailing") for one in seen)
    assert pipe.scheduler is before
    return output, pipe


@pytest.mark.slow
@pytest.mark.parametrize("sampler", [None, "pndm", "euler", "dpm++"])
def test_what_was_trained_to_pure_noise_is_drawn_from_it(
    to_pure_noise: tuple[Path, DiffusionPipeline], sampler: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By previews and by `paint`, whatever sampler; one that cannot gives way to DDIM's. Others draw as ever."""
    file, pipe = to_pure_noise
    before, seen = pipe.scheduler, scheduled(monkeypatch)
    sampling = GenerateConfig(("red",), steps=2, device="cpu", scheduler=sampler)
    adapters = Adapters(pipe)
    for loaded in (False, True):
        seen.clear()
        if loaded:
            adapters.load(file, name="a")
        list(paint(adapters, [Cell("red", 0, dict.fromkeys(adapters.names, 1.0))], sampling))
        assert [one[0] is True for one in seen] == [loaded]
    adapters.remove("a")
    assert (seen[0][2] == "DDIMScheduler") == (sampler in (None, "pndm"))
    assert pipe.scheduler is before


@pytest.mark.parametrize("kind", ["huber", "smooth-l1"])
def test_the_gradient_of_huber_is_bounded_and_near_zero_it_is_a_square(kind: Loss) -> None:
    deltas = torch.tensor([0.1, 1.0])
    answer = torch.tensor([1e4, -1e4]).view(2, 1, 1, 1).requires_grad_()
    wanted = torch.zeros(2, 1, 1, 1)
    objective.errors(answer, wanted, kind, deltas).sum().backward()
    bound = 2 * deltas if kind == "huber" else torch.full((2,), 2.0)
    assert answer.grad is not None
    torch.testing.assert_close(answer.grad.flatten().abs(), bound)
    small_error = torch.full((2, 1, 1, 1), 1e-3)
    near = objective.errors(small_error, wanted, kind, deltas).flatten()
    torch.testing.assert_close(near, 1e-6 / deltas ** (kind != "huber"), rtol=1e-3, atol=0)


def test_huber_deltas_fall_from_one_to_c() -> None:
    timesteps = torch.tensor([0, 500, 999])
    cases: tuple[tuple[HuberSchedule, float], ...] = (("exponential", 1.0), ("snr", 0.93))
    for schedule, first in cases:
        found = objective.huber_deltas(schedule, 0.1, timesteps, POWERS[timesteps], 1000)
        assert bool((found.diff() < 0).all()) and found[0] >= first and 0.1 <= found[-1] < 0.11
    assert objective.huber_deltas("constant", 0.1, timesteps, POWERS[timesteps], 1000).tolist() == pytest.approx([0.1] * 3)
    assert objective.huber_deltas("snr", 0.1, timesteps, torch.zeros(3), 1000).tolist() == pytest.approx([0.1] * 3)


def test_debiased_weights_are_those_of_the_paper() -> None:
    snr = POWERS / (1 - POWERS)
    torch.testing.assert_close(objective.debiased_weights("epsilon", POWERS), snr.clamp(max=1000).rsqrt())
    torch.testing.assert_close(objective.debiased_weights("v_prediction", POWERS), 1 / (snr + 1))
    assert objective.debiased_weights("epsilon", torch.tensor([0.0, 1.0])).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"loss": "huber"}, {"loss": "smooth-l1"}, {"debiased": True}, {"multires_noise": 0.3}])
def test_each_changes_the_loss_and_nothing_that_is_measured(tmp_path: Path, pictures: Path, changes: dict[str, Any]) -> None:
    plain, _ = task_of(small(pictures, tmp_path, held_out=0.3))
    other, _ = task_of(small(pictures, tmp_path, held_out=0.3, **changes))
    assert plain.loss(plain.inputs(0, 0)).item() != other.loss(other.inputs(0, 0)).item()
    assert plain.held_out() == other.held_out()


# Going on.

EVERYTHING = {
    "preset": "subject", "class_prompt": ("a cat",), "class_images": 3, "multires_noise": 0.3, "loss": "huber",
    "debiased": True, "wildcards": True, "repeats": ("pictures=2",), "folder_weight": ("pictures=0.5",), "ema": 0.9,
    "zero_terminal_snr": True, "held_out": 0.3, "flip": True, "dropout": 0.2, "trigger": "ink", "accumulation": 2,
    "steps": 4, "save_every": 2,
}  # fmt: skip


@pytest.mark.slow
def test_a_run_that_was_stopped_gives_the_bits_of_one_that_was_not(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in sorted(pictures.glob("*.png")):
        path.with_suffix(".txt").write_text("a {cat|dog}, red")
        draw_mask(path)
    config = small(pictures, tmp_path / "whole", **EVERYTHING)
    whole = load_file(train(config, pipe=make_pipe(prediction_type="v_prediction")).output)
    places: dict[str, Any] = {"output": tmp_path / "part.safetensors", "run_dir": tmp_path / "whole" / "part"}
    part = small(pictures, tmp_path, **EVERYTHING, **places)  # beside the other, whose pictures of the class are its own
    with monkeypatch.context() as patched:
        stop_after(patched, 3)
        with pytest.raises(Interrupted):
            train(part, pipe=make_pipe(prediction_type="v_prediction"))
    result = train(replace(part, resume=True), pipe=make_pipe(prediction_type="v_prediction"))
    resumed = load_file(result.output)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    draw_mask(sorted(pictures.glob("*a.png"))[0], box=(0, 0, 15, 63))
    with pytest.raises(UserError, match="other pictures or captions"):
        train(replace(part, resume=True), pipe=make_pipe(prediction_type="v_prediction"))
