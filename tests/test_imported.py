"""Files of sd-scripts, kohya_ss and OneTrainer, in the shapes of their public documents, as folders and settings here."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import make_pipe
from test_datasets import draw, epoch, prepared
from test_training import small

import peft_diffusion as pd
from peft_diffusion.cli.app import main
from peft_diffusion.core.settings_file import load
from peft_diffusion.training.settings.others import reading
from peft_diffusion.training.settings.others.reading import with_datasets
from peft_diffusion.training.tasks.preparation import Prepared

pytestmark = pytest.mark.usefixtures("few_measurements", "no_signals", "no_plots")

# As docs/config_README-en.md of sd-scripts has it, but for the folders and sizes.
DATASETS = """
[general]
shuffle_caption = false
caption_extension = '.txt'
keep_tokens = 1

[[datasets]]
resolution = 64
batch_size = 4
keep_tokens = 2

  [[datasets.subsets]]
  image_dir = '{0}/hoge'
  class_tokens = 'hoge girl'

  [[datasets.subsets]]
  image_dir = '{0}/fuga'
  class_tokens = 'fuga boy'
  keep_tokens = 3
  flip_aug = true
  num_repeats = 3

  [[datasets.subsets]]
  is_reg = true
  image_dir = '{0}/reg'
  class_tokens = 'human'

[[datasets]]
resolution = [48, 48]
batch_size = 4
enable_bucket = true
min_bucket_reso = 16
max_bucket_reso = 128

  [[datasets.subsets]]
  image_dir = '{0}/hoge'
  class_tokens = 'hoge girl'
  caption_prefix = 'again, '
  num_repeats = 2
  color_aug = true
"""


def of_file(place: Path, file: Path) -> Prepared:
    found, absent = with_datasets(pd.TrainConfig(dataset_config=file))
    assert isinstance(absent, tuple)
    return prepared(place, dataset=found.dataset, resolution=None)


@pytest.mark.slow
def test_a_dataset_file_of_kohya_is_read_by_its_rules(tmp_path: Path) -> None:
    draw(tmp_path / "hoge", "a", size=(128, 64))
    draw(tmp_path / "hoge" / "5_inner", "deep")  # sd-scripts reads no folders in an image_dir
    draw(tmp_path / "10_fuga", "b", caption="fuga, standing")
    (tmp_path / "10_fuga").rename(tmp_path / "fuga")
    draw(tmp_path / "reg", "c")
    file = tmp_path / "data.toml"
    file.write_text(DATASETS.format(tmp_path), "utf-8")
    config, absent = with_datasets(pd.TrainConfig(dataset_config=file))
    ready = of_file(tmp_path, file)
    # Written out: 1 draw of the first, 3 of the second, mirrored by chance, 2 of the first again at another size. Here both
    # sides are drawn, so that an epoch is two of theirs.
    assert epoch(ready) == {
        ("hoge girl", (64, 64), False): 2,  # without enable_bucket, squares
        ("fuga, standing", (64, 64), False): 3,
        ("fuga, standing", (64, 64), True): 3,
        ("again, hoge girl", (64, 32), False): 4,
    }
    # Of the last, the one tag that stays in front is the prefix, which stays outside of those that are counted here.
    assert [one.keep_tags for one in config.dataset] == [2, 3, 2, 0] and config.batch_size == 4
    assert ready.prior is not None and set(ready.prior.plain(ready.rules)) == {"human"}
    assert len(absent) == 2 and "color_aug = True" in absent[0] and "unless --prior-target noise" in absent[1]
    assert reading.read(file).settings["prior_target"] == "noise"  # sd-scripts learns them as they are
    assert len(with_datasets(pd.TrainConfig(dataset_config=file, prior_target="noise"))[1]) == 1


@pytest.mark.slow
def test_a_dataset_file_trains_as_it_is_and_the_run_keeps_what_it_said(tmp_path: Path) -> None:
    for name in ("hoge", "fuga", "reg"):
        draw(tmp_path / name, name)
    file = tmp_path / "data.toml"
    file.write_text(DATASETS.format(tmp_path), "utf-8")
    told: list[str] = []
    config = replace(
        small(tmp_path, tmp_path / "out", steps=2, held_out=0.0, batch_size=None), folder=(), dataset_config=file
    )
    done = pd.train(config, pipe=make_pipe(), observers=[lambda event: told.extend(event.lines())])
    assert done.images == 3 and any("color_aug = True" in line for line in told)
    kept = load(pd.TrainConfig, done.run_dir / "config.toml")
    assert kept.dataset == with_datasets(config)[0].dataset and kept.dataset_config is None
    longer = replace(config, steps=3, resume=True)  # the file is read anew, and says the same
    assert pd.train(longer, pipe=make_pipe()).steps == 3
    file.write_text(DATASETS.format(tmp_path).replace("num_repeats = 3", "num_repeats = 4"), "utf-8")
    with pytest.raises(pd.UserError, match="--dataset was"):
        pd.train(replace(longer, steps=4), pipe=make_pipe())


def test_subsets_that_kohya_leaves_out_are_left_out_and_what_is_wrong_is_told_in_words(tmp_path: Path) -> None:
    one = {"image_dir": str(draw(tmp_path / "a", "a", caption="a")), "num_repeats": 1}
    file = tmp_path / "data.json"

    def told(*subsets: dict[str, Any], **more: Any) -> pd.TrainConfig:
        file.write_text(json.dumps({"general": {"resolution": [64, 36]}, "datasets": [{"subsets": list(subsets), **more}]}))
        return with_datasets(pd.TrainConfig(dataset_config=file))[0]

    assert len(told(one, one, {**one, "image_dir": "b", "num_repeats": 0}).dataset) == 1
    assert told(one).dataset[0].resolution == (48,)  # of the same area
    for subsets, said in (
        ([{"num_repeats": 2}], "lacks image_dir"),
        ([], r"has no \[\[datasets.subsets\]\]"),
        ([{**one, "num_repeats": "often"}], "num_repeats is a number, not 'often'"),
        ([{**one, "resolution": [1, 2, 3]}], "resolution is a number or two"),
    ):
        with pytest.raises(pd.UserError, match=said):
            told(*subsets)
    file.write_text("{")
    with pytest.raises(pd.UserError, match="is no valid JSON"):
        with_datasets(pd.TrainConfig(dataset_config=file))
    file.write_text('{"rank": 3}')
    with pytest.raises(pd.UserError, match="neither a dataset file of sd-scripts"):
        with_datasets(pd.TrainConfig(dataset_config=file))


def concept(
    path: Path, text: dict[str, Any] | None = None, image: dict[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    """As OneTrainer writes a concept, in the shape of its ConceptConfig."""
    usual = {
        "__version": 2, "name": path.name, "path": str(path), "seed": 7, "enabled": True, "type": "STANDARD",
        "include_subdirectories": False, "image_variations": 1, "text_variations": 1, "balancing": 1.0,
        "balancing_strategy": "REPEATS", "loss_weight": 1.0,
    }  # fmt: skip
    images = {
        "__version": 0, "enable_crop_jitter": False, "enable_random_flip": False, "enable_fixed_flip": False,
        "enable_random_rotate": False, "random_rotate_max_angle": 0.0, "enable_resolution_override": False,
        "resolution_override": "512", "enable_random_circular_mask_shrink": False,
    }  # fmt: skip
    texts = {
        "__version": 0, "prompt_source": "sample", "prompt_path": "", "enable_tag_shuffling": False, "tag_delimiter": ",",
        "keep_tags_count": 1, "tag_dropout_enable": False, "tag_dropout_mode": "FULL", "tag_dropout_probability": 0.0,
        "caps_randomize_enable": False, "caps_randomize_probability": 0.0,
    }  # fmt: skip
    return {**usual, "image": images | (image or {}), "text": texts | (text or {}), **more}


@pytest.mark.slow
def test_concepts_of_onetrainer_are_read_by_its_rules(tmp_path: Path) -> None:
    plain = draw(tmp_path / "plain", "a", caption="a hat")
    named = draw(tmp_path / "named", "red_hat", "old_shoe")
    draw(tmp_path / "deep" / "er", "c", "d")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a thing\n", "utf-8")
    sized = {"enable_resolution_override": True, "resolution_override": "64,32", "enable_random_flip": True}
    concepts = [
        concept(plain, image=sized, balancing=2.0),
        concept(named, {"prompt_source": "filename"}, balancing=0.5),
        concept(tmp_path / "deep", {"prompt_source": "concept", "prompt_path": str(prompts)}, include_subdirectories=True,
                balancing=4, balancing_strategy="SAMPLES", loss_weight=0.25, image={"enable_random_hue": True}),
        concept(tmp_path / "gone", enabled=False),
        concept(tmp_path / "apart", type="VALIDATION"),
    ]  # fmt: skip
    file = tmp_path / "concepts.json"
    file.write_text(json.dumps(concepts), "utf-8")
    config, absent = with_datasets(pd.TrainConfig(dataset_config=file))
    ready = prepared(tmp_path, dataset=config.dataset)
    # Written out, an epoch there: 2 draws of the first, each one of two sizes and of two sides; half of the second's two
    # pictures; 4 samples of the third. The first has 4 forms, of which an epoch of 2 there draws each once.
    assert epoch(ready) == {
        **{("a hat", (side, side), flip): 1 for side in (64, 32) for flip in (False, True)},
        ("red hat", (64, 64), False): 1, ("old shoe", (64, 64), False): 1, ("a thing", (64, 64), False): 8,
    }  # fmt: skip
    assert {ready.train.weight(entry) for entry in range(len(ready.train.latents.entries))} == {1.0, 0.25}
    assert [line.rpartition(": ")[2].partition(" (")[0] for line in absent] == [
        "enable_random_hue = True", "type = 'VALIDATION'",
    ]  # fmt: skip


def test_captions_of_concepts(tmp_path: Path) -> None:
    folder = draw(tmp_path / "tags", "a", caption="first line, tag\nsecond line")
    for text, wanted in (
        ({}, {"wildcards": True}),
        ({"enable_tag_shuffling": True, "keep_tags_count": 2}, {"shuffle_tags": True, "keep_tags": 2}),
        ({"tag_dropout_enable": True, "tag_dropout_mode": "RANDOM", "tag_dropout_probability": 0.2}, {"tag_dropout": 0.2}),
        (
            {"tag_dropout_enable": True, "tag_dropout_probability": 0.1, "keep_tags_count": 0},
            {"caption_dropout": 0.1},
        ),
    ):
        file = tmp_path / "concepts.json"
        file.write_text(json.dumps([concept(folder, text)]), "utf-8")
        (one,) = with_datasets(pd.TrainConfig(dataset_config=file))[0].dataset
        assert {name: getattr(one, name) for name in wanted} == wanted


# As `train_network.py --config_file` of sd-scripts takes it; sections are without meaning.
KOHYA = """
[model_arguments]
pretrained_model_name_or_path = "sd15.safetensors"
[dataset_arguments]
train_data_dir = "{0}/train"
reg_data_dir = "{0}/reg"
resolution = "512,512"
enable_bucket = true
shuffle_caption = true
caption_extension = ".txt"
caption_tag_dropout_rate = 0.1
flip_aug = true
[training_arguments]
output_dir = "out"
output_name = "mira"
network_module = "networks.lora"
network_dim = 32
network_alpha = 16
network_args = ["conv_dim=8", "conv_alpha=4"]
max_train_epochs = 10
train_batch_size = 2
learning_rate = 1e-4
text_encoder_lr = 5e-5
lr_scheduler = "cosine_with_restarts"
lr_scheduler_num_cycles = 3
lr_warmup_steps = 100
optimizer_type = "AdamW8bit"
optimizer_args = ["weight_decay=0.1", "betas=.9,.99"]
mixed_precision = "bf16"
min_snr_gamma = 5
noise_offset = 0.05
clip_skip = 2
seed = 42
xformers = true
scale_weight_norms = 1.0
ip_noise_gamma = 0.1
"""


def imported(place: Path, file: Path) -> tuple[pd.TrainConfig, tuple[str, ...]]:
    """By the command's function, and what the file that it wrote says."""
    made = pd.import_config(pd.ImportConfig(file, output=place / "ours.toml", overwrite=True))
    read = load(pd.TrainConfig, place / "ours.toml")
    assert read == made.config
    written = (place / "ours.toml").read_text("utf-8")
    assert all(line.split(": ", 1)[1].split(" = ")[0] in written for line in made.absent)
    return read, made.absent


def test_a_training_of_kohya_becomes_ours_and_every_option_without_counterpart_is_listed(tmp_path: Path) -> None:
    file = tmp_path / "kohya.toml"
    file.write_text(KOHYA.format(tmp_path), "utf-8")
    config, absent = imported(tmp_path, file)
    wanted = {
        "base": "sd15.safetensors", "folder": (tmp_path / "train",), "regularisation": (tmp_path / "reg",),
        "resolution": 512, "shuffle_tags": True, "tag_dropout": 0.1, "flip": True, "output": Path("out/mira.safetensors"),
        "rank": 32, "alpha": 16.0, "epochs": 5.0, "batch_size": 2, "unet_lr": 1e-4, "text_encoder_lr": 5e-5,
        "components": ("unet", "text_encoder"), "scheduler": "cosine-with-restarts", "cycles": 3, "warmup": 100,
        "optimizer": "adamw8bit", "weight_decay": 0.1, "precision": "bfloat16", "min_snr_gamma": 5.0, "noise_offset": 0.05,
        "clip_skip": 2, "seed": 42, "max_tokens": "75", "caption_dropout": 0.0, "max_aspect": 4.0, "upscale": True,
        "prior_target": "noise",
    }  # fmt: skip
    assert {name: getattr(config, name) for name in wanted} == wanted
    assert [block.split()[2:] for block in config.block] == [
        ["lora"], ["lora"], ["lora"], ["lora", "rank=8", "alpha=4"],
    ]  # fmt: skip
    assert [line.partition(": ")[2].partition(" = ")[0] for line in absent] == [
        "optimizer_args betas", "scale_weight_norms", "ip_noise_gamma",
    ]  # fmt: skip


def test_what_kohya_takes_where_nothing_is_said_is_written_out(tmp_path: Path) -> None:
    file = tmp_path / "bare.toml"
    file.write_text(
        'pretrained_model_name_or_path = "base"\ntrain_data_dir = "train"\nnetwork_train_unet_only = true', "utf-8"
    )
    config, absent = imported(tmp_path, file)
    assert (config.rank, config.alpha, config.steps, config.batch_size, config.scheduler) == (4, 1.0, 1600, 1, "constant")
    assert (config.warmup, config.components, config.max_aspect, config.optimizer) == (0, ("unet",), 1.0, "adamw")
    assert absent == ()


# As kohya_ss saves it, with numbers as texts.
GUI = {
    "LoRA_type": "LyCORIS/LoKr", "additional_parameters": "", "bucket_no_upscale": False, "bucket_reso_steps": 64,
    "cache_latents": True, "caption_dropout_rate": 0.05, "caption_extension": ".txt", "clip_skip": "1", "color_aug": True,
    "conv_alpha": 1, "conv_dim": 0, "enable_bucket": True, "epoch": 50, "factor": 8, "flip_aug": False,
    "gradient_accumulation_steps": "2", "gradient_checkpointing": True, "keep_tokens": "1", "learning_rate": 3e-05,
    "lr_scheduler": "constant", "lr_scheduler_num_cycles": "", "lr_warmup": 0, "max_bucket_reso": 2048,
    "max_resolution": "1024,1024", "max_timestep": 1000, "max_token_length": "75", "max_train_epochs": "50",
    "max_train_steps": "", "min_bucket_reso": 256, "min_snr_gamma": 5, "min_timestep": 0, "mixed_precision": "fp16",
    "multires_noise_discount": 0, "multires_noise_iterations": 0, "network_alpha": 32, "network_dim": 32,
    "network_dropout": 0, "noise_offset": 0, "noise_offset_type": "Original", "optimizer": "Prodigy", "optimizer_args": "",
    "output_name": "x", "output_dir": "out", "persistent_data_loader_workers": False, "prior_loss_weight": 1.0,
    "sdxl": True, "pretrained_model_name_or_path": "sd_xl_base_1.0.safetensors", "save_precision": "fp16", "seed": "",
    "shuffle_caption": True, "stop_text_encoder_training_pct": 0, "text_encoder_lr": 3e-05, "train_batch_size": 3,
    "unet_lr": 3e-05, "v2": False, "xformers": "xformers", "train_data_dir": "train",
}  # fmt: skip


def test_a_training_that_kohya_ss_saved_becomes_ours(tmp_path: Path) -> None:
    file = tmp_path / "gui.json"
    file.write_text(json.dumps(GUI), "utf-8")
    config, absent = imported(tmp_path, file)
    wanted = {
        "method": "lokr", "option": ("factor=8",), "rank": 32, "alpha": 32.0, "epochs": 50.0, "accumulation": 2,
        "batch_size": 3, "resolution": 1024, "max_aspect": 8.0, "keep_tags": 1, "memory": "low", "optimizer": "prodigy",
        "precision": "float16", "save_dtype": "fp16", "components": ("unet", "text_encoder", "text_encoder_2"),
        "text_encoder_lr": 3e-5, "base": "sd_xl_base_1.0.safetensors", "seed": 0,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in wanted} == wanted
    assert len(absent) == 1 and "color_aug" in absent[0]


@pytest.mark.parametrize(
    ("saved", "wanted"),
    [
        ({"LoRA_type": "Standard", "conv_dim": 1, "conv_alpha": 1}, {"method": "lora", "block": ()}),
        ({"max_train_epochs": 0, "max_train_steps": 1600, "epoch": 1}, {"steps": 1600, "epochs": None}),
        ({"max_train_epochs": 0, "max_train_steps": 0, "epoch": 7}, {"steps": None, "epochs": 7.0}),
        ({"max_train_epochs": 3, "max_train_steps": 1600, "epoch": 7}, {"steps": None, "epochs": 3.0}),
        ({"noise_offset": 0.05, "multires_noise_iterations": 6}, {"noise_offset": 0.05, "multires_noise": 0.0}),
        ({"noise_offset": 0.05, "multires_noise_iterations": 6, "multires_noise_discount": 0.2,
          "noise_offset_type": "Multires"}, {"noise_offset": 0.0, "multires_noise": 0.2}),
        ({"clip_skip": 1}, {"clip_skip": None}), ({"clip_skip": 2}, {"clip_skip": 2}),
        ({"clip_skip": 3}, {"clip_skip": None}),
        ({"clip_skip": 3, "sdxl": False, "pretrained_model_name_or_path": "sd15.ckpt"}, {"clip_skip": 3}),
        ({"clip_skip": 0, "sdxl": False, "pretrained_model_name_or_path": "sd15.ckpt"}, {"clip_skip": None}),
        ({"unet_lr": 0, "text_encoder_lr": 0}, {"components": ("unet", "text_encoder", "text_encoder_2"), "unet_lr": 3e-5,
                                                "text_encoder_lr": 3e-5}),
        ({"unet_lr": 0}, {"components": ("text_encoder", "text_encoder_2"), "text_encoder_lr": 3e-5}),
        ({"text_encoder_lr": 0}, {"components": ("unet",), "unet_lr": 3e-5}),
        ({"stop_text_encoder_training": 30}, {"text_encoder_until": 0.3}),
        ({"lr_scheduler": "cosine_with_restarts"}, {"scheduler": "cosine-with-restarts", "cycles": 50}),
        ({"lr_scheduler": "cosine_with_restarts", "lr_scheduler_num_cycles": "3"}, {"cycles": 3}),
    ],
)  # fmt: skip
def test_what_kohya_ss_saves_counts_as_far_as_it_passes_it_on(
    tmp_path: Path, saved: dict[str, Any], wanted: dict[str, Any]
) -> None:
    """By its kohya_gui/lora_gui.py, and by sd-scripts, where clip skip has no effect on Stable Diffusion XL."""
    file = tmp_path / "gui.json"
    file.write_text(json.dumps(GUI | saved), "utf-8")
    config, _ = imported(tmp_path, file)
    assert {name: getattr(config, name) for name in wanted} == wanted


def test_a_training_of_kohya_gives_its_dataset_file_what_that_does_not_say(tmp_path: Path) -> None:
    (tmp_path / "data.toml").write_text('[[datasets]]\n[[datasets.subsets]]\nimage_dir = "a"\nclass_tokens = "cat"', "utf-8")
    file = tmp_path / "kohya.toml"
    file.write_text('network_dim = 8\ndataset_config = "data.toml"\nresolution = 768\nshuffle_caption = true', "utf-8")
    config, _ = imported(tmp_path, file)
    assert config.dataset == (
        pd.Dataset("a", repeats=1, resolution=768, shuffle_tags=True, captions="files", caption="cat", subfolders=False,
                   upscale=True, max_aspect=1.0),
    )  # fmt: skip


@pytest.mark.slow
def test_a_configuration_of_onetrainer_becomes_ours(tmp_path: Path) -> None:
    place = draw(tmp_path / "cats", "a", caption="a cat")
    (tmp_path / "concepts.json").write_text(json.dumps([concept(place, image={"enable_random_flip": True})]), "utf-8")
    # As training_presets/#sdxl 1.0 LoRA.json, and what the window adds.
    given = {
        "base_model_name": "stabilityai/stable-diffusion-xl-base-1.0", "model_type": "STABLE_DIFFUSION_XL_10_BASE",
        "training_method": "LORA", "output_model_destination": "models/lora.safetensors", "output_dtype": "BFLOAT_16",
        "batch_size": 4, "learning_rate": 0.0003, "layer_filter_preset": "attn-mlp", "resolution": "1024",
        "epochs": 20,
        "concept_file_name": "concepts.json", "unet": {"train": True, "weight_dtype": "FLOAT_16"}, "lora_rank": 8,
        "text_encoder": {"train": True, "learning_rate": 1e-5, "stop_training_after": 5,
                         "stop_training_after_unit": "EPOCH"},
        "text_encoder_2": {"train": False}, "vae": {"weight_dtype": "FLOAT_32"}, "loss_weight_fn": "MIN_SNR_GAMMA",
        "loss_weight_strength": 5.0, "optimizer": {"optimizer": "ADAFACTOR", "weight_decay": 0.0},
        "train_dtype": "BFLOAT_16",
        "learning_rate_scheduler": "REX", "learning_rate_warmup_steps": 100, "timestep_shift": 2.0, "ema": "OFF",
    }  # fmt: skip
    file = tmp_path / "config.json"
    file.write_text(json.dumps(given), "utf-8")
    config, absent = imported(tmp_path, file)
    wanted = {
        "base": "stabilityai/stable-diffusion-xl-base-1.0", "output": Path("models/lora.safetensors"), "batch_size": 4,
        "unet_lr": 3e-4, "text_encoder_lr": 1e-5, "components": ("unet", "text_encoder"), "text_encoder_until": 0.25,
        "epochs": 10.0, "rank": 8, "alpha": 1.0, "min_snr_gamma": 5.0, "optimizer": "adafactor", "weight_decay": 0.0,
        "precision": "bfloat16", "save_dtype": "bf16", "warmup": 100, "target": "attention+ff", "resolution": 1024,
        "masks": "off", "method": "lora", "max_aspect": 4.0,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in wanted} == wanted
    assert [one.folder for one in config.dataset] == [place] and config.dataset[0].flip
    assert [line.partition(": ")[2].partition(" = ")[0] for line in absent] == ["learning_rate_scheduler", "timestep_shift"]
    # Its warm-up counts batches, and its restarts, unless they are hard, are waves up to the full rate.
    for scheduler, wanted_scheduler in (("COSINE_WITH_HARD_RESTARTS", 1), ("COSINE_WITH_RESTARTS", 2)):
        more = {"gradient_accumulation_steps": 4, "learning_rate_scheduler": scheduler}
        file.write_text(json.dumps(given | more), "utf-8")
        config, absent = imported(tmp_path, file)
        assert (config.warmup, config.accumulation, len(absent)) == (25, 4, wanted_scheduler)
        assert (config.scheduler == "cosine-with-restarts") == (wanted_scheduler == 1)
    # Where masks are trained with, the rest of a picture counts a little there, and not at all here.
    of_rest = {"unmasked_probability": 0.1, "unmasked_weight": 0.1}
    for masked, told in ((True, 4), (False, 2)):
        file.write_text(json.dumps(given | of_rest | {"masked_training": masked}), "utf-8")
        config, absent = imported(tmp_path, file)
        assert config.masks == ("files" if masked else "off") and len(absent) == told
    # F.huber_loss has one delta at all timesteps.
    huber = {"huber_strength": 1.0, "huber_delta": 0.2}
    for squared, wanted_loss in ((0.0, ("huber", "constant", 0.2)), (1.0, ("l2", "snr", 0.1))):
        file.write_text(json.dumps(given | huber | {"mse_strength": squared}), "utf-8")
        config, absent = imported(tmp_path, file)
        assert (config.loss, config.huber_schedule, config.huber_c) == wanted_loss
        assert any("huber_strength" in line for line in absent) == bool(squared)
    file.write_text(json.dumps(given | {"model_type": "FLUX_DEV_1"}), "utf-8")
    with pytest.raises(pd.UserError, match="is a LORA of a FLUX_DEV_1"):
        imported(tmp_path, file)


@pytest.mark.slow
def test_the_command_lists_what_has_no_counterpart_and_its_file_trains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, ours = tmp_path / "kohya.toml", tmp_path / "run.toml"
    file.write_text(KOHYA.format(tmp_path), "utf-8")
    assert main(["import-config", str(file), "-o", str(ours)]) == 0
    told = capsys.readouterr().out
    assert "no counterpart:" in told and "scale_weight_norms = 1.0" in told and "train --config" in told
    assert main(["import-config", str(file), "-o", str(ours)]) == 1
    assert "is there already" in capsys.readouterr().err
    assert main(["train", "--config", str(ours)]) == 1
    assert f"there is no folder {tmp_path / 'train'}" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_a_data_set_by_flag_file_and_name_of_another_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run.toml"
    run.write_text('[[dataset]]\nfolder = "no such"\nresolution = [64, 32]\nflip = true\ncaption = """a\nb"""\n', "utf-8")
    assert main(["train", "--config", str(run)]) == 1
    assert "there is no folder no such" in capsys.readouterr().err
    assert main(["train", "--dataset", "'my cats' repeats=0"]) == 1
    assert "--repeats must be 1 or more, not 0" in capsys.readouterr().err
    run.write_text('[[dataset]]\nfolder = "a"\nnum_repeats = 3\n', "utf-8")
    assert main(["train", "--config", str(run)]) == 1
    assert "[[dataset]]: there is no setting 'num_repeats'; here it is repeats" in capsys.readouterr().err
    assert main(["train", "a", "--concept_file_name", "x"]) == 2
    assert "Here it is --dataset-config" in capsys.readouterr().err
    assert main(["train", "--dataset_config", "gone.toml"]) == 1
    assert "gone.toml cannot be read" in capsys.readouterr().err
