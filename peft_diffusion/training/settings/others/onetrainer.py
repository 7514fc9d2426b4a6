"""A configuration of OneTrainer, as its window saves it.

Where nothing is said, what its ``modules/util/config/TrainConfig.py`` takes then is written out. Imports no torch.
"""

from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from ....core.errors import UserError
from ....core.parsing import number_in
from . import onetrainer_data
from .taking import Found, Options, existing, parsed_of

_KINDS = ("STABLE_DIFFUSION_15", "STABLE_DIFFUSION_15_INPAINTING", "STABLE_DIFFUSION_20", "STABLE_DIFFUSION_20_BASE",
          "STABLE_DIFFUSION_21", "STABLE_DIFFUSION_21_BASE", "STABLE_DIFFUSION_20_INPAINTING")  # fmt: skip
_XL = ("STABLE_DIFFUSION_XL_10_BASE", "STABLE_DIFFUSION_XL_10_BASE_INPAINTING")
_ABSENT: dict[str, Any] = {
    "epochs": 100, "batch_size": 1, "learning_rate": 3e-6, "learning_rate_scheduler": "CONSTANT",
    "learning_rate_warmup_steps": 200.0, "lora_rank": 16, "lora_alpha": 1.0, "resolution": "512",
    "concept_file_name": "training_concepts/concepts.json", "peft_type": "LORA",
}  # fmt: skip
_SCHEDULERS = {
    "constant": "constant", "linear": "linear", "cosine": "cosine",
    "cosine_with_hard_restarts": "cosine-with-restarts",  # those that are not hard come back to the full rate by a wave
}  # fmt: skip
_OPTIMIZERS = {
    "adamw": "adamw", "adam": "adamw", "adamw_8bit": "adamw8bit", "adafactor": "adafactor", "lion": "lion", "came": "came",
    "prodigy": "prodigy", "schedule_free_adamw": "schedule-free", "prodigy_plus_schedule_free": "prodigy-plus",
}  # fmt: skip
_PRECISIONS = {"float_16": "float16", "bfloat_16": "bfloat16", "float_32": "float32", "tfloat_32": "float32"}
_DTYPES = {"float_16": "fp16", "bfloat_16": "bf16", "float_32": "float32"}
_METHODS = {"lora": "lora", "loha": "loha", "lokr": "lokr", "oft_2": "oft", "oft": "oft"}
_LAYERS = {"attn-mlp": "attention+ff", "attn-only": "attention", "full": "all"}
_DISTRIBUTIONS = {"uniform": "none", "logit_normal": "logit-normal"}
_SILENT = (
    "training_method", "model_type", "workspace_dir", "cache_dir", "debug_mode", "debug_dir", "tensorboard_expose",
    "tensorboard_port", "tensorboard_always_on", "validate_after", "validate_after_unit", "include_train_config",
    "clear_cache_before_training", "dataloader_threads", "caching_threads", "temp_device", "train_device",
    "fallback_train_dtype", "enable_autocast_cache", "attention_mechanism", "compile", "latent_caching", "image_caching",
    "text_caching", "optimizer_defaults", "secrets", "cloud", "prior", "transformer", "unconditional_transformer", "vae",
    "text_encoder_3", "text_encoder_4", "effnet_encoder", "decoder", "decoder_text_encoder", "decoder_vqgan", "embedding",
    "embedding_weight_dtype", "preserve_embedding_norm", "__version",
    "sample_definition_file_name", "samples", "sample_image_format", "sample_video_format", "sample_audio_format",
    "samples_to_tensorboard", "non_ema_sampling", "backup_after", "backup_after_unit", "rolling_backup",
    "rolling_backup_count", "backup_before_save", "save_skip_first", "save_filename_prefix", "gradient_reduce_precision",
    "fused_gradient_reduce", "async_gradient_reduce", "async_gradient_reduce_buffer",
    "bundle_additional_embeddings", "huggingface_cache_dir",
    "output_model_format",
    "sample_after", "sample_after_unit", "sample_skip_first", "device_indexes", "lora_decompose_norm_epsilon",
    "continue_last_backup", "save_every_unit", "weight_dtype", "svd_rank",
)  # fmt: skip

# What means nothing where it is as it is by default.
_USUAL: dict[str, Any] = {
    "frames": "25", "mse_strength": 1.0, "lora_weight_dtype": "FLOAT_32", "vb_loss_strength": 1.0,
    "timestep_shift": 1.0, "ema_update_step_interval": 5, "loss_scaler": "NONE", "learning_rate_scaler": "NONE",
    "text_encoder_sequence_length": 512, "text_encoder_2_sequence_length": 77, "oft_block_size": 32, "lokr_dim": 16,
    "lokr_decompose_factor": -1, "lokr_vec_trick": True, "lokr_dora_on_output": True,
    "loss_weight_strength": 5.0, "async_offloading": True, "layer_filter": "",
}  # fmt: skip


def read(file: Path, given: Mapping[str, Any]) -> Found:
    """Read a configuration.

    Args:
        file: The file.
        given: What is in it.

    Returns:
        What it says.

    Raises:
        UserError: It trains another kind of model or otherwise, or a value cannot be.
    """
    kind, method = (str(given.get(name, "")) for name in ("model_type", "training_method"))
    if method not in ("LORA", "EMBEDDING") or (kind and kind not in (*_KINDS, *_XL)):
        raise UserError(
            f"{file} is a {method or 'FINE_TUNE'} of a {kind}; adapters of Stable Diffusion 1, 2 and XL are trained here"
        )
    concepts = given.get("concepts")
    if not isinstance(concepts, list):
        place = existing(str(given.get("concept_file_name") or _ABSENT["concept_file_name"]), file)
        concepts = parsed_of(place) if place.is_file() else []
        file_of_concepts = place
    else:
        file_of_concepts = file
    found = onetrainer_data.read(file_of_concepts, concepts) if concepts else Found()
    options = Options(_ABSENT | dict(given), str(file), found)
    found.settings |= {"held_out": 0.0, "caption_dropout": 0.0, "debiased": False, "min_snr_gamma": 0.0}
    if not concepts:
        options.lack("concept_file_name", str(file_of_concepts), "there is no such file")
    _data(options, found)
    _learning(options, found)
    _parts(options, found, kind in _XL)
    _adapter(options, found, method)
    options.take("concepts", "concept_file_name")
    for name, usual in _USUAL.items():
        if options.left.get(name) == usual:
            options.take(name)
    if found.settings["masks"] == "off":
        options.take("unmasked_probability", "unmasked_weight")
    options.rename(_SILENT)
    return found


def _data(options: Options, found: Found) -> None:
    """What of the data is said of all concepts."""
    sizes = onetrainer_data.resolutions(options, "resolution") or (512,)
    found.settings["resolution"] = max(sizes)
    if len(sizes) > 1:
        found.datasets = [one if one.resolution else replace(one, resolution=sizes) for one in found.datasets]
        found.longer *= len(sizes)  # there, each draw has one of the sizes
    # Its buckets, mgds' AspectBucketing, are 1:1 to 1:4.
    found.settings["max_aspect"] = 1.0 if options.given.get("aspect_ratio_bucketing") is False else 4.0
    options.take("aspect_ratio_bucketing")
    found.settings["upscale"] = True  # as all pictures are brought to the resolution there
    found.settings["masks"] = "files" if options.take("masked_training") else "off"


def _learning(options: Options, found: Found) -> None:
    epochs = options.number("epochs")
    found.settings["epochs"] = float(Fraction(epochs or 1) / found.longer)
    found.settings["warmup"] = 0
    warmup = options.number("learning_rate_warmup_steps")
    if warmup is not None and warmup > 1:  # there it counts batches
        batches = number_in(str(options.given.get("gradient_accumulation_steps"))) or 1
        found.settings["warmup"] = int(warmup / batches)
    elif warmup:
        del found.settings["warmup"]
        options.lack("learning_rate_warmup_steps", warmup, "--warmup counts steps")
    options.choose("learning_rate_scheduler", _SCHEDULERS, "scheduler")
    optimizer = options.take("optimizer")
    of = Options(
        optimizer if isinstance(optimizer, dict) else {"optimizer": optimizer}, f"{options.where}, optimizer", found
    )
    of.choose("optimizer", _OPTIMIZERS, "optimizer", "ADAMW")
    if (decay := of.number("weight_decay")) is not None:
        found.settings["weight_decay"] = decay
    options.choose("train_dtype", _PRECISIONS, "precision")
    options.choose("output_dtype", _DTYPES, "save_dtype")
    weights, strength = str(options.take("loss_weight_fn") or "CONSTANT"), options.number("loss_weight_strength")
    if weights == "MIN_SNR_GAMMA":
        found.settings["min_snr_gamma"] = 5.0 if strength is None else strength
    elif weights == "DEBIASED_ESTIMATION":
        found.settings["debiased"] = True
    elif weights != "CONSTANT":
        options.lack("loss_weight_fn", weights, "--min-snr-gamma or --debiased")
    _huber(options, found)
    options.choose("timestep_distribution", _DISTRIBUTIONS, "timestep_bias")
    least, most = options.number("min_noising_strength") or 0.0, options.number("max_noising_strength")
    if (least, most) not in ((0.0, None), (0.0, 1.0)):
        found.settings["timesteps"] = f"{round(least * 1000)}-{round((1.0 if most is None else most) * 1000)}"
    if (offset := options.number("offset_noise_weight")) is not None:
        found.settings["noise_offset"] = offset
    if options.take("rescale_noise_scheduler_to_zero_terminal_snr"):
        found.settings["zero_terminal_snr"] = True
    for name, said in (("force_v_prediction", "v"), ("force_epsilon_prediction", "epsilon")):
        if options.take(name):
            found.settings["prediction"] = said
    if str(options.take("ema") or "OFF") != "OFF":
        found.settings["ema"] = options.number("ema_decay") or 0.999
    options.take("ema_decay")
    if (clip := options.number("clip_grad_norm")) is not None:
        found.settings["clip"] = clip
    if options.take("tensorboard"):
        found.settings["log_with"] = "tensorboard"


def _huber(options: Options, found: Found) -> None:
    """The loss that is linear from an error on, the same one at every timestep there; it may stand beside the squared."""
    strength, squared = options.number("huber_strength"), options.given.get("mse_strength", 1.0)
    delta = options.number("huber_delta") or 1.0
    if strength and squared:
        options.lack("huber_strength", strength, f"beside mse_strength = {squared}, and a run has one --loss")
    elif strength and not 0 < delta <= 1:
        options.lack("huber_delta", delta, "--huber-c is at most 1")
    elif strength:
        found.settings |= {"loss": "huber", "huber_schedule": "constant", "huber_c": delta}


def _parts(options: Options, found: Found, xl: bool) -> None:
    """Which components learn, and how fast."""
    rate = options.number("learning_rate")
    names = ["unet", "text_encoder", *(["text_encoder_2"] if xl else [])]
    learned = []
    for name in ("unet", "text_encoder", "text_encoder_2"):
        part = options.take(name)
        if name not in names:
            continue
        of = Options(part if isinstance(part, dict) else {}, f"{options.where}, {name}", found)
        own = of.number("learning_rate")
        if of.given.get("train", True):
            learned.append(name)
            found.settings[f"{name}_lr"] = own if own is not None else rate
        if name == "text_encoder" and (share := of.number("dropout_probability")):
            found.settings["caption_dropout"] = share
        stop, unit = of.number("stop_training_after"), str(of.take("stop_training_after_unit") or "NEVER")
        epochs = options.given.get("epochs")
        if stop and unit == "EPOCH" and name == "text_encoder" and epochs:
            found.settings["text_encoder_until"] = min(1.0, stop / float(epochs))
        elif stop and unit != "NEVER":
            of.lack("stop_training_after", stop, "--text-encoder-until is a share of the run")
    if not learned:
        raise UserError(f"{options.where} trains neither the unet nor a text encoder")
    found.settings["components"] = tuple(learned)
    skip = options.whole("text_encoder_layer_skip") or 0
    if skip:  # counted from the layer that the base was trained with
        found.settings["clip_skip"] = skip + (2 if xl else 1)


def _adapter(options: Options, found: Found, method: str) -> None:
    if method == "EMBEDDING":
        found.settings |= {"method": "tokens"}
        for name in ("lora_rank", "lora_alpha", "peft_type"):
            options.take(name)
    else:
        options.choose("peft_type", _METHODS, "method")
        if options.take("lora_decompose"):
            found.settings["method"] = "dora"
        kind = found.settings.get("method", "lora")
        rank, alpha = options.whole("lora_rank"), options.number("lora_alpha")
        if kind == "lokr":
            rank, factor = options.whole("lokr_dim") or 16, options.whole("lokr_decompose_factor") or -1
            found.settings["option"] = (f"factor={factor}",) if factor > 0 else ()
        if kind == "oft":
            found.settings["option"] = (f"block_size={options.whole('oft_block_size') or 32}", "on_input=true")
        else:
            found.settings |= {"rank": rank, "alpha": alpha}
        options.choose("layer_filter_preset", _LAYERS, "target", "full")
        if options.take("layer_filter_regex") or found.settings.get("target") is None:
            found.settings.pop("target", None)
    base, output = options.take("base_model_name"), options.take("output_model_destination")
    if base:
        found.settings["base"] = str(base)
    if output:
        place = Path(str(output))
        found.settings["output"] = place if place.suffix == ".safetensors" else place.with_name(f"{place.name}.safetensors")
    if weights := options.take("lora_model_name"):
        found.settings["init_from"] = Path(str(weights))
    every, unit = options.whole("save_every"), str(options.given.get("save_every_unit", "NEVER"))
    if every and unit == "STEP":
        found.settings["save_every"] = every
    elif every and unit != "NEVER":
        options.lack("save_every", f"{every} {unit}", "--save-every counts steps")
