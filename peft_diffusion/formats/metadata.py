"""What a file's metadata say of it: the spec, and what other programs look for, ``modelspec.*`` and ``ss_*``.

See ``library/sai_model_spec.py`` and ``train_network.py`` of kohya's sd-scripts. Imports no torch.
"""

import json
from collections.abc import Mapping
from typing import Any

from ..bases import family as families
from ..bases.family import Family, Version
from . import network
from .spec import KEY, Spec

# Names of training options (see Spec.training) and the ss_ keys that hold them.
_SS_KEYS: dict[str, str] = {
    "ss_output_name": "output_name",
    "ss_learning_rate": "unet_lr",
    "ss_unet_lr": "unet_lr",
    "ss_text_encoder_lr": "text_encoder_lr",
    "ss_num_train_images": "images",
    "ss_steps": "steps_done",
    "ss_max_train_steps": "steps",
    "ss_num_epochs": "epochs_done",
    "ss_batch_size_per_device": "batch_size",
    "ss_total_batch_size": "total_batch_size",
    "ss_gradient_accumulation_steps": "accumulation",
    "ss_lr_scheduler": "scheduler",
    "ss_lr_warmup_steps": "warmup",
    "ss_network_dropout": "dropout",
    "ss_mixed_precision": "precision",
    "ss_resolution": "resolution",
    "ss_seed": "seed",
    "ss_noise_offset": "noise_offset",
    "ss_min_snr_gamma": "min_snr_gamma",
    "ss_multires_noise_discount": "multires_noise",
    "ss_zero_terminal_snr": "zero_terminal_snr",
    "ss_debiased_estimation": "debiased",
    "ss_loss_type": "loss",
    "ss_huber_c": "huber_c",
    "ss_huber_schedule": "huber_schedule",
    "ss_prior_loss_weight": "prior_weight",
    "ss_num_reg_images": "class_pictures",
    "ss_max_grad_norm": "clip",
    "ss_caption_dropout_rate": "caption_dropout",
    "ss_clip_skip": "clip_skip",
    "ss_training_started_at": "started_at",
    "ss_training_finished_at": "finished_at",
    "ss_tag_frequency": "tag_frequency",
    "ss_dataset_dirs": "dataset_dirs",
    "ss_bucket_info": "bucket_info",
}

OF_THE_BYTES = frozenset({"format", "sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"})
"""What of a file's metadata is no longer true when it is written anew."""

_OF_LAYOUTS = frozenset({"lora_adapter_metadata", "peft_diffusion.words"})


def base_of(spec: Spec | None, told: Mapping[str, str]) -> dict[str, str]:
    """Tell what a file says of its base.

    Args:
        spec: What the file says of itself; None in files of other programs.
        told: The metadata of its header.

    Returns:
        Name, family and the like, from the spec, or from kohya's metadata where another program wrote it.
    """
    if spec is not None and spec.base:
        return {key: str(value) for key, value in spec.base.items()}
    version = families.of_version(told.get("ss_base_model_version", ""))
    found = {"name": told.get("ss_sd_model_name", "")}
    if version is not None:
        family, prediction = version
        found = {"family": family.name, "prediction_type": prediction, **found}
    return {key: value for key, value in found.items() if value}


def lasting(told: Mapping[str, str]) -> dict[str, str]:
    """Choose what of a file's metadata stays true when it is written anew with the same content.

    Args:
        told: The metadata of its header.

    Returns:
        All but hashes of its bytes, and what belongs to its layout, which the new one writes as it needs it.
    """
    return {key: value for key, value in told.items() if key not in OF_THE_BYTES and key not in _OF_LAYOUTS}


def of_any(spec: Spec) -> dict[str, str]:
    """Make the metadata that files of every layout have.

    Args:
        spec: What the file says of itself.

    Returns:
        The spec, and ``modelspec.*``.
    """
    family = families.find(str(spec.base.get("family", "")))
    told = _modelspec(spec, family) if family.denoiser else _language_modelspec(spec)
    return {KEY: spec.to_json()} | _texts({f"modelspec.{key}": value for key, value in told.items()})


def of_kohya(spec: Spec, kernels: bool) -> dict[str, str]:
    """Make the metadata of a file in kohya's layout.

    Args:
        spec: What the file says of itself.
        kernels: Whether a pair sits on a convolution with a kernel, as for `network.network`.

    Returns:
        The metadata of every layout, and ``ss_*``.
    """
    found: dict[str, Any] = {key: spec.training.get(name) for key, name in _SS_KEYS.items()}
    most = spec.training.get("max_tokens")
    found["ss_max_token_length"] = int(most) if most in ("150", "225") else None  # where sd-scripts has none, it reads 75
    family = families.find(str(spec.base.get("family", "")))
    version = _version(spec, family)
    found |= {
        "ss_sd_model_name": spec.base.get("name"),
        "ss_base_model_version": version.base_model if version else "other",
        "ss_v2": version is not None and version.v2,
    }
    chosen = network.network(spec.methods, kernels)
    found |= network.to_metadata(chosen) if chosen else {}
    return of_any(spec) | _texts(found)


def _language_modelspec(spec: Spec) -> dict[str, Any]:
    return {
        "sai_model_spec": "1.0.1",
        "architecture": f"{spec.base.get('architecture', 'causal-lm')}/lora",
        "implementation": "https://github.com/huggingface/transformers",
        "title": spec.title,
        "description": spec.description,
        "date": spec.training.get("finished_at"),
    }


def _modelspec(spec: Spec, family: Family) -> dict[str, Any]:
    version = _version(spec, family)
    return {
        "sai_model_spec": "1.0.1",
        "architecture": f"{version.architecture if version else 'stable-diffusion'}/lora",
        "implementation": family.implementation,
        "title": spec.title,
        "description": spec.description,
        "date": spec.training.get("finished_at"),
        "resolution": f"{spec.base['resolution']}x{spec.base['resolution']}" if "resolution" in spec.base else None,
        "prediction_type": "v" if _predicts_v(spec) else "epsilon",
        "trigger_phrase": ", ".join(spec.triggers),
    }


def _version(spec: Spec, family: Family) -> Version | None:
    return family.version(str(spec.base.get("prediction_type", "")))


def _predicts_v(spec: Spec) -> bool:
    return spec.base.get("prediction_type") == "v_prediction"


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    """Values as a file holds them, without those that are not told."""
    return {key: _text(value) for key, value in values.items() if value not in (None, "")}


def _text(value: Any) -> str:
    if isinstance(value, (str, bool)):
        return str(value)  # sd-scripts writes True, and A1111 looks for that
    return json.dumps(value, sort_keys=True, ensure_ascii=False)
