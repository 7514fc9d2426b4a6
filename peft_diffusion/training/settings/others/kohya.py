"""A training of kohya's sd-scripts: a file for its ``--config_file`` (TOML), or one that the GUI kohya_ss saved (JSON).

Where nothing is said, what sd-scripts takes then is written out, as it is otherwise here. Imports no torch.
"""

import re
from collections.abc import Mapping
from dataclasses import fields
from fractions import Fraction
from pathlib import Path
from typing import Any

from .... import methods
from ....core.errors import UserError
from ....core.parsing import number_in
from . import kohya_data
from .taking import Found, Options, existing, parsed_of

# What sd-scripts adapts: the linear layers of the transformers, also those that lead into and out of them.
_LINEAR = (
    r".*\.(attn[12]\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2)|proj_in|proj_out"
    r"|self_attn\.(q|k|v|out)_proj|mlp\.fc[12])"
)
_CONVOLUTIONS = r".*\.(conv1|conv2|downsamplers\.0\.conv|upsamplers\.0\.conv)"  # 3x3, which conv_dim is of
_SHORTCUTS = r".*\.conv_shortcut"  # 1x1, of the other rank
_DEFAULTS: dict[str, Any] = {
    "scheduler": "constant", "min_snr_gamma": 0.0, "caption_dropout": 0.0,
    "batch_size": 1, "held_out": 0.0, "timestep_bias": "none", "debiased": False,
}  # fmt: skip
_METHODS = {
    "standard": "lora", "networks.lora": "lora", "kohya locon": "lora", "kohya dylora": "lora", "lycoris/locon": "lora",
    "locon": "lora", "lora": "lora", "lycoris/loha": "loha", "loha": "loha", "lycoris/lokr": "lokr", "lokr": "lokr",
    "lycoris/ia3": "ia3", "ia3": "ia3", "lycoris/diag-oft": "oft", "diag-oft": "oft", "networks.oft": "oft",
    "lycoris/glora": "glora", "glora": "glora", "lycoris/native fine-tuning": "full", "full": "full",
}  # fmt: skip
_OPTIMIZERS = {
    "adamw": "adamw", "adamw8bit": "adamw8bit", "pagedadamw8bit": "adamw8bit", "adafactor": "adafactor", "lion": "lion",
    "lion8bit": "lion", "came": "came", "prodigy": "prodigy", "adamwschedulefree": "schedule-free",
    "prodigyplusschedulefree": "prodigy-plus",
    "prodigyplus.prodigyplusschedulefree": "prodigy-plus", "pytorch_optimizer.came": "came",
}  # fmt: skip
_SCHEDULERS = {
    "constant": "constant", "constant_with_warmup": "constant", "cosine": "cosine", "linear": "linear",
    "cosine_with_restarts": "cosine-with-restarts", "polynomial": "polynomial",
    "warmup_stable_decay": "warmup-stable-decay", "adafactor": "constant",
}  # fmt: skip
_PRECISIONS = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}
_DTYPES = {"float": "float32", "fp16": "fp16", "bf16": "bf16"}
_LOSSES = {"l2": "l2", "huber": "huber", "smooth_l1": "smooth-l1"}
_TOKENS = {"75": "75", "150": "150", "225": "225"}
_SILENT = (
    "xformers", "sdpa", "mem_eff_attn", "max_data_loader_n_workers", "persistent_data_loader_workers", "cache_latents",
    "vae_batch_size", "no_half_vae", "sdxl_no_half_vae", "training_comment", "num_cpu_threads_per_process",
    "save_model_as", "save_state", "logging_dir", "log_prefix", "full_bf16", "full_fp16", "sdxl", "v2", "train_on_input",
    "dynamo_backend", "num_processes", "num_machines", "multi_gpu", "gpu_ids", "model_list", "max_token_padding",
    "cache_text_encoder_outputs", "sdxl_cache_text_encoder_outputs", "metadata_author", "metadata_title", "lowram",
    "highvram", "console_log_level", "noise_offset_type", "sample_sampler", "extra_accelerate_launch_args", "unit",
    "num_cpu_threads", "main_process_port", "epoch", "additional_parameters", "decompose_both", "factor", "use_cp",
)  # fmt: skip
_WHY = {
    "scale_weight_norms": "--clip and --weight-decay hold weights down",
    "save_every_n_epochs": "--save-every counts steps",
    "sample_every_n_epochs": "--preview-every counts steps",
    "cache_latents_to_disk": "--cache FOLDER keeps them",
    "wandb_api_key": "--log-with tensorboard",
    "ip_noise_gamma": "noise is added once",
    "adaptive_noise_scale": "--noise-offset alone",
    "random_crop": "pictures are encoded before",
    "color_aug": "pictures are encoded before",
}


def read(file: Path, given: Mapping[str, Any]) -> Found:
    """Read a training.

    Args:
        file: The file.
        given: What is in it; options in sections are taken as if they had none, as sd-scripts does.

    Returns:
        What it says.

    Raises:
        UserError: A value cannot be.
    """
    flat: dict[str, Any] = {}
    for name, value in given.items():
        flat |= value if isinstance(value, dict) else {name: value}
    found = Found()
    options = Options(_passed(flat) if "LoRA_type" in flat else flat, str(file), found)
    _data(file, options)
    _length(options, found)
    _rates(options, found)
    _choices(options, found)
    _method(options, found)
    _files(file, options, found)
    options.rename((*_SILENT, *kohya_data.SUBSET_DEFAULTS), _WHY)
    found.settings = _DEFAULTS | found.settings
    return found


def _passed(saved: Mapping[str, Any]) -> dict[str, Any]:
    """What kohya_ss passes on of what it saved, as its ``kohya_gui/lora_gui.py`` does: it saves what is switched off too."""
    given = dict(saved)

    def without(*names: str) -> None:
        for name in names:
            given.pop(name, None)

    def off(name: str) -> bool:
        return not number_in(str(given.get(name)))

    kind = str(given.get("LoRA_type")).lower()
    if kind in ("standard", "lora-fa"):  # of those that adapt convolutions alone
        without("conv_dim", "conv_alpha")
    if "noise_offset_type" in given:
        many = str(given["noise_offset_type"]).lower() == "multires"
        without(*(("noise_offset",) if many else ("multires_noise_iterations", "multires_noise_discount")))
    if given.get("lr_scheduler") == "cosine_with_restarts" and given.get("lr_scheduler_num_cycles") in (None, ""):
        given["lr_scheduler_num_cycles"] = given.get("epoch")
    without(*(name for name in ("max_train_epochs", "max_train_steps") if off(name)))
    if not given.keys() & {"max_train_epochs", "max_train_steps"} and not given.get("dataset_config"):
        given["max_train_epochs"] = given.get("epoch")  # by which it counts the steps
    if "unet_lr" in given and "text_encoder_lr" in given:
        unet, text = off("unet_lr"), off("text_encoder_lr")
        given["network_train_unet_only"], given["network_train_text_encoder_only"] = text and not unet, unet and not text
        without(*(name for name, zero in (("unet_lr", unet), ("text_encoder_lr", text)) if zero))
    return given


def _is_xl(options: Options) -> bool:
    base = str(options.given.get("pretrained_model_name_or_path", ""))
    return bool(options.given.get("sdxl")) or re.search(r"xl|pony|illustrious|noob", base, re.IGNORECASE) is not None


def _data(file: Path, options: Options) -> None:
    """The folders: a dataset file, or the ``10_name`` folders in one."""
    found, config = options.found, options.take("dataset_config")
    size = kohya_data.shape(options)
    steps = options.whole("bucket_reso_steps")
    if steps not in (None, 64):
        options.lack("bucket_reso_steps", steps, "sides are multiples of what the base works in")
    if config:
        path = existing(str(config), file)
        other = kohya_data.read(path, parsed_of(path), options.given)
        found.settings |= other.settings
        found.datasets, found.longer = other.datasets, other.longer
        found.absent += other.absent
        for name in ("train_data_dir", "reg_data_dir", "in_json", *kohya_data.FALLBACKS):
            options.take(name)
        return
    found.settings |= {name: value for name, value in size.items() if name != "resolution"}
    if "resolution" in size:
        found.settings["resolution"] = size["resolution"][0]
    if options.take("caption_extension") not in (None, ".txt", ".caption"):
        options.lack("caption_extension", options.given["caption_extension"], "a [[dataset]] has one")
    if options.given.get("flip_aug"):
        found.longer = Fraction(2)  # both sides in an epoch, there one by chance
    reg = options.take("reg_data_dir")
    folder = options.take("train_data_dir", "image_dir")
    if folder:
        found.settings["folder"] = (existing(str(folder), file),)
    if reg:
        found.settings["regularisation"] = (existing(str(reg), file),)
        found.settings["prior_target"] = "noise"  # there, they are learned as they are


def _length(options: Options, found: Found) -> None:
    epochs, steps = options.number("max_train_epochs"), options.whole("max_train_steps")
    if epochs:
        found.settings["epochs"] = float(Fraction(epochs) / found.longer)
    else:
        found.settings["steps"] = steps or 1600
    warmup, share = options.number("lr_warmup_steps"), options.number("lr_warmup")
    found.settings["warmup"] = 0
    if warmup is not None and warmup >= 1:
        found.settings["warmup"] = int(warmup)
    elif (part := warmup or (share or 0) / 100) and not epochs:
        found.settings["warmup"] = round(part * found.settings["steps"])
    elif part:
        del found.settings["warmup"]
        options.lack("lr_warmup_steps", warmup or share, "of a run in epochs, --warmup counts steps")
    minimum, maximum = options.whole("min_timestep") or 0, options.whole("max_timestep") or 1000
    if (minimum, maximum) != (0, 1000):
        found.settings["timesteps"] = f"{minimum}-{maximum}"


def _rates(options: Options, found: Found) -> None:
    """Rates, and which components learn: all of them, unless something says otherwise."""
    rate, unet = options.number("learning_rate"), options.number("unet_lr")
    of_text = options.several("text_encoder_lr")
    texts = Options({str(place): one for place, one in enumerate(of_text)}, options.where, found)
    rates = [one for place in range(len(of_text)) if (one := texts.number(str(place))) is not None]
    rates[0:1] = [one for one in (options.number("text_encoder_lr1"),) if one is not None] or rates[0:1]
    second = options.number("text_encoder_lr2")
    rates[1:2] = [second] if second is not None else rates[1:2]
    unet_rate = rate if unet is None else unet
    if unet_rate is not None:
        found.settings["unet_lr"] = unet_rate
    text_rates = rates or ([rate] if rate is not None else [])
    encoders = ("text_encoder", "text_encoder_2") if _is_xl(options) else ("text_encoder",)
    trained = ["unet", *encoders]
    if options.take("network_train_unet_only") or (text_rates and not any(text_rates)):
        trained = ["unet"]
    elif options.take("network_train_text_encoder_only"):
        trained = list(encoders)
    for name, one in zip(encoders, text_rates, strict=False):
        if name in trained:
            found.settings[f"{name}_lr"] = one
    found.settings["components"] = tuple(trained)
    older, until = (options.number(f"stop_text_encoder_training{ending}") for ending in ("_pct", ""))
    until = older or until
    if until and "text_encoder" in trained:
        found.settings["text_encoder_until"] = until / 100


def _choices(options: Options, found: Found) -> None:
    """What has other names for its values here."""
    options.choose("lr_scheduler", _SCHEDULERS, "scheduler")
    options.choose("optimizer_type", _OPTIMIZERS, "optimizer", options.take("optimizer") or "AdamW")
    options.choose("mixed_precision", _PRECISIONS, "precision")
    options.choose("save_precision", _DTYPES, "save_dtype")
    options.choose("loss_type", _LOSSES, "loss")
    options.choose("max_token_length", _TOKENS, "max_tokens", "75")
    iterations, discount = options.whole("multires_noise_iterations"), options.number("multires_noise_discount")
    if iterations:
        found.settings["multires_noise"] = discount or 0.3
    skip = options.whole("clip_skip")
    if skip is not None and skip > 2 and _is_xl(options):
        options.lack("clip_skip", skip, "it has no effect on Stable Diffusion XL there")
    elif skip is not None and skip > 1:  # 1 is the usual there, and for XL, where it has no effect, 2 is here
        found.settings["clip_skip"] = skip
    if options.take("gradient_checkpointing"):
        found.settings["memory"] = "low"
    if options.take("v_parameterization"):
        found.settings["prediction"] = "v"
    if options.take("masked_loss", "alpha_mask"):
        found.settings["masks"] = "alpha" if options.given.get("alpha_mask") else "files"
    for told in _pairs(options.take("optimizer_args")).items():
        if told[0] == "weight_decay" and (read := Options(dict([told]), options.where, found).number(told[0])) is not None:
            found.settings["weight_decay"] = read
        else:
            options.lack(f"optimizer_args {told[0]}", told[1])


def _method(options: Options, found: Found) -> None:
    """The method with its hyper-parameters, and convolutions where they have a rank of their own."""
    more = _pairs(options.take("network_args"))
    module = str(options.take("network_module") or "networks.lora")
    gui = options.take("LoRA_type")
    name = str(gui or (more.pop("algo", "locon") if "lycoris" in module else module)).lower()
    kind = _METHODS.get(name)
    if kind is None:
        options.lack(
            "LoRA_type" if gui else "network_module", gui or name, f"--method has {', '.join(sorted(methods.lines()))}"
        )
        kind = methods.DEFAULT
    gui_names = ("factor", "conv_dim", "conv_alpha")
    own = {one: options.take(one) for one in gui_names} | more
    parts = Options(own, f"{options.where}, network_args", found)
    rank, alpha = parts.left.pop("rank", None), parts.number("conv_alpha")
    convolutions = parts.whole("conv_dim")
    known = {field.name for field in fields(methods.find(kind))}
    written = []
    for there, here in (
        ("factor", "factor"),
        ("loraplus_lr_ratio", "b_rate_ratio"),
        ("weight_decompose", "weight_decompose"),
    ):
        value = parts.take(there, "dora_wd") if here == "weight_decompose" else parts.take(there)
        if value is not None and here in known and str(value) not in ("-1", "False", "false"):
            written.append(f"{here}={str(value).lower()}")
        elif here == "weight_decompose" and str(value).lower() == "true" and kind == "lora":
            kind, known = "dora", {field.name for field in fields(methods.find("dora"))}
        elif value is not None and str(value) not in ("-1", "False", "false"):
            parts.lack(there, value)
    parts.left |= {} if rank is None else {"rank": rank}
    for one, value in parts.left.items():
        if one not in ("preset", "use_tucker", "decompose_both"):
            parts.lack(one, value)
    dims = {"rank": options.whole("network_dim") or 4, "alpha": options.number("network_alpha") or 1.0}  # as there
    found.settings |= {one: value for one, value in dims.items() if one in known}
    if "dropout" not in known:
        options.take("network_dropout")
    _place(found, kind, written, convolutions, alpha)


def _place(found: Found, kind: str, options: list[str], convolutions: int | None, alpha: float | None) -> None:
    if not convolutions or "rank" not in {field.name for field in fields(methods.find(kind))}:
        found.settings |= {"method": kind, "option": tuple(options)} | ({"target": _LINEAR} if kind != "ia3" else {})
        return
    rest = "".join(f" {one}" for one in options)
    blocks = [f"{part} {_LINEAR} {kind}{rest}" for part in found.settings["components"]]
    if "unet" in found.settings["components"]:
        blocks.append(f"unet {_SHORTCUTS} {kind}{rest}")
        blocks.append(f"unet {_CONVOLUTIONS} {kind} rank={convolutions} alpha={alpha or 1:g}{rest}")
    found.settings["block"] = tuple(blocks)


def _files(file: Path, options: Options, found: Found) -> None:
    name, place = options.take("output_name"), options.take("output_dir")
    if name or place:
        found.settings["output"] = Path(str(place or ".")) / f"{name or 'last'}.safetensors"
    base = options.take("pretrained_model_name_or_path")
    if base:
        found.settings["base"] = str(base)
    prompts = options.take("sample_prompts")
    if prompts and existing(str(prompts), file).is_file():
        found.settings["preview_prompts_file"] = existing(str(prompts), file)
    elif prompts:
        found.settings["preview_prompts"] = tuple(line for line in str(prompts).splitlines() if line.strip())
    weights = options.take("network_weights", "lora_network_weights")
    if weights:
        found.settings["init_from"] = existing(str(weights), file)
    kept = options.number("save_last_n_steps")
    if kept:
        options.lack("save_last_n_steps", kept, "--keep-last counts files")
    if (every := options.whole("save_every_n_steps")) is not None and every > 0:
        found.settings["save_every"] = every
    log = options.take("log_with")
    if log == "tensorboard":
        found.settings["log_with"] = log
    elif log:
        options.lack("log_with", log, "--log-with tensorboard")
    strengths, others = options.several("base_weights_multiplier"), options.several("base_weights")
    if others:
        pairs = [f"{one}={strengths[place]}" if place < len(strengths) else str(one) for place, one in enumerate(others)]
        found.settings["beside"] = tuple(pairs)


def _pairs(given: Any) -> dict[str, str]:
    """``NAME=VALUE`` texts, in a list or with spaces between."""
    texts = given.split() if isinstance(given, str) else given if isinstance(given, list) else []
    found = {}
    for text in texts:
        name, equals, value = str(text).partition("=")
        if not equals:
            raise UserError(f"{text!r} is no NAME=VALUE")
        found[name.strip()] = value.strip().strip("'\"")
    return found
