"""Training and generation on bases of every family, at their smallest."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_pipe, make_xl_pipe
from diffusers import DiffusionPipeline
from making import spec_of
from safetensors.torch import load_file
from test_training import draw_pictures, small

from peft_diffusion.api import train
from peft_diffusion.bases import load_base
from peft_diffusion.core import site
from peft_diffusion.core.errors import UserError
from peft_diffusion.data import inpainting_masks
from peft_diffusion.data.buckets import place
from peft_diffusion.data.folder import scan
from peft_diffusion.data.images import MAX_PIXELS, open_picture
from peft_diffusion.generation import Adapters
from peft_diffusion.generation.sampler import Cell, paint
from peft_diffusion.generation.settings import GenerateConfig
from peft_diffusion.generation.while_training import TrainingPictures
from peft_diffusion.methods import method
from peft_diffusion.training.loop.trainer import loss_at
from peft_diffusion.training.tasks.diffusion import DiffusionSettings, DiffusionTask
from peft_diffusion.training.tasks.preparation import prepare

pytestmark = pytest.mark.usefixtures("few_measurements", "no_signals", "no_plots")

torch.set_num_threads(1)
BOTH = ("unet", "text_encoder", "text_encoder_2")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return draw_pictures(tmp_path / "pictures")


def task_of(pipe: DiffusionPipeline, folder: Path, tmp_path: Path, **changes: Any) -> DiffusionTask:
    config = small(folder, tmp_path, **changes)
    prepared = prepare(config, pipe, lambda event: None, TrainingPictures())
    site.attach(pipe.unet, "a", method("lora", rank=2))
    return DiffusionTask(pipe, "a", DiffusionSettings(batch_size=2), prepared.train, prepared.held_out)


@pytest.mark.slow
@torch.no_grad()
def test_sdxl_is_told_what_its_pipeline_tells_it(pictures: Path, tmp_path: Path) -> None:
    pipe = make_xl_pipe()
    task = task_of(pipe, pictures, tmp_path, resolution=64)
    prompts = ["a red apple", ""]
    hidden, _, pooled, _ = pipe.encode_prompt(prompts, device="cpu", do_classifier_free_guidance=False)
    own = task.text.encode(prompts)
    assert torch.equal(own[0], hidden) and torch.equal(own[1], pooled)
    entries = task.batch(0, 0).indices
    told = task.conditioning(task.inputs(0, 0))
    fits = [task.train.latents.entries[entry].fit for entry in entries]
    expected = [
        pipe._get_add_time_ids(
            fit.original[::-1], (fit.crop[1], fit.crop[0]), (fit.bucket.height, fit.bucket.width), torch.float32, 16
        )
        for fit in fits
    ]
    assert torch.equal(told.added["time_ids"], torch.cat(expected))
    assert told.added["text_embeds"].shape == (2, 16)


@pytest.mark.slow
def test_the_sizes_of_a_wide_picture_are_those_before_the_crop(tmp_path: Path) -> None:
    from PIL import Image

    folder = tmp_path / "wide"
    folder.mkdir()
    for number in range(2):
        Image.new("RGB", (200, 90), (number * 90, 60, 20)).save(folder / f"red cat {number}.png")
    pipe = make_xl_pipe()
    task = task_of(pipe, folder, tmp_path, missing_captions="name", held_out=0.0, flip=True)
    latents = task.train.latents
    assert [entry.flipped for entry in latents.entries] == [False, False, True, True]
    fit = latents.entries[0].fit
    height, width, top, left, *target = latents.entries[0].sizes
    assert (height, width) == (90, 200) and tuple(target) == (fit.bucket.height, fit.bucket.width)
    assert (left, top) == fit.crop[:2]
    assert latents.entries[2].sizes[3] == fit.resized[0] - fit.crop[2]


@pytest.mark.slow
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_sdxl_trains_both_text_encoders_and_generates(prediction: str, pictures: Path, tmp_path: Path) -> None:
    pipe = make_xl_pipe(prediction_type=prediction)
    run = small(pictures, tmp_path, components=BOTH, steps=4, preview_steps=2, batch_size=2)
    result = train(run, pipe=pipe)
    keys = load_file(result.output)
    learned = {name for name, tensor in keys.items() if name.endswith("lora_up.weight") and tensor.abs().sum() > 0}
    for prefix, layers in {"lora_unet_": 110, "lora_te1_": 6, "lora_te2_": 12}.items():
        # The UNet is told the first encoder's last layer but one, so the last one learns nothing.
        assert sum(name.startswith(prefix) for name in learned) == layers, prefix
    assert list((result.run_dir / "previews").glob("step_000004_*.png"))
    adapters = Adapters(make_xl_pipe(prediction_type=prediction))
    name = adapters.load(result.output)
    sampling = GenerateConfig(("a red apple",), steps=2, device="cpu")
    with_it, without = (next(paint(adapters, [Cell("a red apple", 1, {name: s})], sampling)) for s in (1.0, 0.0))
    assert with_it.size == (64, 64) and with_it.tobytes() != without.tobytes()


@pytest.mark.slow
def test_sdxl_with_a_frozen_text_side_learns_as_with_one_that_is_encoded_anew(pictures: Path, tmp_path: Path) -> None:
    cached = task_of(make_xl_pipe(), pictures, tmp_path)
    anew = task_of(make_xl_pipe(), pictures, tmp_path)
    anew.embeddings = None
    for step in range(2):
        torch.testing.assert_close(*(loss_at(task, step, 0, task.device) for task in (cached, anew)))


def test_a_component_that_the_base_has_not_is_named_before_it_trains(
    pictures: Path, tmp_path: Path, tiny_pipe: DiffusionPipeline
) -> None:
    with pytest.raises(UserError, match="--components text_encoder_2: this base has unet, text_encoder"):
        train(small(pictures, tmp_path, components=("unet", "text_encoder_2")), pipe=tiny_pipe)
    assert not site.sites(tiny_pipe.unet)


@pytest.mark.slow
def test_the_file_of_sdxl_loads_in_diffusers(pictures: Path, tmp_path: Path) -> None:
    run = small(pictures, tmp_path, components=BOTH, steps=3, unet_lr=1e-2, text_encoder_lr=1e-2)
    result = train(run, pipe=make_xl_pipe())

    def drawn(pipe: DiffusionPipeline) -> torch.Tensor:
        chance = torch.Generator().manual_seed(0)
        images: torch.Tensor = pipe("a red apple", num_inference_steps=2, generator=chance, output_type="pt").images
        return images

    theirs, ours = make_xl_pipe(), make_xl_pipe()
    theirs.load_lora_weights(str(result.output))
    Adapters(ours).load(result.output)
    plain, expected = drawn(make_xl_pipe()), drawn(theirs)
    torch.testing.assert_close(drawn(ours), expected, atol=1e-4, rtol=1e-4)
    assert (plain - expected).abs().max() > 1e-3
    assert spec_of(result.output).base["family"] == "sdxl"


MAKERS: dict[str, Callable[..., DiffusionPipeline]] = {"sd": make_pipe, "sdxl": make_xl_pipe}


@pytest.mark.slow
@pytest.mark.parametrize("kind", MAKERS)
def test_inpainting_bases_train_and_generate(kind: str, pictures: Path, tmp_path: Path) -> None:
    run = small(pictures, tmp_path, steps=4, preview_steps=2, batch_size=2, held_out=0.3, unet_lr=1e-2)
    result = train(run, pipe=MAKERS[kind](in_channels=9))
    assert result.held_out_before is not None and result.held_out_after != result.held_out_before
    adapters = Adapters(MAKERS[kind](in_channels=9))
    name = adapters.load(result.output)
    sampling = GenerateConfig(("a red apple",), steps=2, device="cpu", batch_size=2)
    cells = [Cell("a red apple", 1, {name: strength}) for strength in (1.0, 0.0)]
    with_it, without = paint(adapters, cells, sampling)
    assert with_it.size == (64, 64) and with_it.tobytes() != without.tobytes()


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("flip", [False, True])
def test_an_inpainting_base_is_told_what_its_pipeline_tells_it(flip: bool, pictures: Path, tmp_path: Path) -> None:
    pipe = make_pipe(in_channels=9)
    task = task_of(pipe, pictures, tmp_path, flip=flip, held_out=0.0)
    latents = task.train.latents
    index = len(latents.entries) - 1
    entry = latents.entries[index]
    picture = scan([pictures]).pictures[entry.picture]
    image = place(open_picture(picture.path, "white", MAX_PIXELS, picture.digest), entry.fit, flip)
    for number in range(inpainting_masks.COUNT):
        whole = inpainting_masks.mask(picture.digest, number, *image.size)
        whole = whole.flip(-1) if flip else whole
        pixels = pipe.image_processor.preprocess(image)
        hidden = pixels * (whole < 0.5)
        small_mask, _ = pipe.prepare_mask_latents(
            whole[None], hidden, 1, *image.size[::-1], torch.float32, "cpu", torch.Generator().manual_seed(0), False
        )
        mean = pipe.vae.encode(hidden).latent_dist.mean * pipe.vae.config.scaling_factor
        shown = task.inpainting_inputs(latents, [index], [number])
        assert torch.equal(shown[:, :1], small_mask)
        # Where all is hidden, the norms of a random VAE blow up the rounding of what is constant.
        torch.testing.assert_close(shown[:, 1:], mean, atol=0.02 if number == 0 else 1e-4, rtol=1e-3)


def test_masks_are_drawn_from_the_picture_alone() -> None:
    assert bool(inpainting_masks.mask("a", 0, 20, 10).all())
    drawn = [
        inpainting_masks.mask(digest, number, 40, 24) for digest in "abcdefgh" for number in range(1, inpainting_masks.COUNT)
    ]
    assert all(one.shape == (1, 24, 40) and set(one.unique().tolist()) <= {0.0, 1.0} for one in drawn)
    shares = [float(one.mean()) for one in drawn]
    assert 0.05 < min(shares) < 0.3 and 0.6 < max(shares) <= 1
    assert torch.equal(inpainting_masks.mask("a", 2, 40, 24), inpainting_masks.mask("a", 2, 40, 24))
    assert not torch.equal(inpainting_masks.mask("a", 2, 40, 24), inpainting_masks.mask("b", 2, 40, 24))


@pytest.mark.slow
def test_masked_latents_are_found_again_on_disk(pictures: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = task_of(make_pipe(in_channels=9), pictures, tmp_path / "1", cache=cache).train.latents
    again = task_of(make_pipe(in_channels=9), pictures, tmp_path / "2", cache=cache).train.latents
    assert first.computed == again.reused == len(first.entries) * (1 + inpainting_masks.COUNT) and again.computed == 0
    for one, other in zip(first.entries, again.entries, strict=True):
        assert one.hidden is not None and other.hidden is not None and torch.equal(one.hidden, other.hidden)
        assert one.masks is not None and other.masks is not None and torch.equal(one.masks, other.masks)


@pytest.mark.slow
def test_what_is_no_stable_diffusion_is_refused() -> None:
    with pytest.raises(UserError, match="takes 8 channels"):
        load_base(make_pipe(in_channels=8))
