"""The kohya / LyCORIS layout, which ComfyUI, A1111, diffusers and the trainers read.

Each site is ``<prefix><path with _ for .>``, its tensors ``<site>.<suffix>``. See ``networks/lora.py`` of kohya's
sd-scripts and ``lycoris/modules`` of LyCORIS.
"""

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ... import methods
from ...bases import family as families
from ...bases.family import Family, Version
from ...core import targets
from ...core.adapter import Adapter, parts_of
from ...core.errors import UserError
from ..spec import KEY, Spec
from . import kohya_network
from .names import LYCORIS, OWN, written_prefix
from .names import prefixes as prefixes_of
from .original import original_names

# transformers 5 dropped "text_model." from the paths of CLIPTextModel; files keep it.
_TEXT_MODEL = "text_model."

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
    "ss_training_started_at": "started_at",
    "ss_training_finished_at": "finished_at",
    "ss_tag_frequency": "tag_frequency",
    "ss_dataset_dirs": "dataset_dirs",
    "ss_bucket_info": "bucket_info",
}


def site_keys(components: Mapping[str, nn.Module]) -> dict[str, tuple[str, str]]:
    """Every name that a file may use for a module, with the component and path that it means.

    Raises UserError should two modules share a name, which no Stable Diffusion does.
    """
    keys: dict[str, tuple[str, str]] = {}
    for component, module in components.items():
        prefixes = dict.fromkeys((*prefixes_of(component), *_of_lycoris(component, components)))
        originals = original_names(module)
        for path in targets.modules(module):
            for name in (*_aliases(component, path), *([originals[path]] if path in originals else [])):
                for prefix in prefixes if path else prefixes_of(component):
                    key = prefix + name.replace(".", "_")
                    if keys.setdefault(key, (component, path)) != (component, path):
                        raise UserError(f"{component}.{path} and {'.'.join(keys[key])} would share the name {key}")
    return keys


def _of_lycoris(component: str, components: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """LyCORIS' own prefix; of two text encoders it would not say which one is meant, so it is taken for neither."""
    readers = [name for name in components if families.role_of(name) == "text encoder"]
    claims = families.components()[component].lycoris if component in families.components() else ()
    return () if not claims or (component in readers and len(readers) > 1) else (LYCORIS,)


def write(adapters: Mapping[str, Mapping[str, Adapter]], spec: Spec) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file, from the adapters per component and path."""
    tensors: dict[str, Tensor] = {}
    for component, built in adapters.items():
        prefix = written_prefix(component, str(spec.base.get("family", "")))
        for path, adapter in built.items():
            site = prefix + _aliases(component, path)[-1].replace(".", "_")
            for part in parts_of(adapter):
                key = f"{OWN}{component}.{path}" if part.own_layout else site
                tensors.update({f"{key}.{suffix}": tensor for suffix, tensor in part.state().items()})
    return tensors, metadata(spec, any(map(_has_kernel, tensors.items())))


def _has_kernel(named: tuple[str, Tensor]) -> bool:
    """Whether this is the tensor of a rank, on a convolution with a kernel."""
    (_, _, suffix), tensor = named[0].partition("."), named[1]
    ranked = any(suffix in method.ranked for method in methods.known().values())
    return ranked and tensor.ndim > 2 and tensor[0, 0].numel() > 1


def metadata(spec: Spec, kernels: bool) -> dict[str, str]:
    """The spec, and what other programs look for: ``modelspec.*`` and ``ss_*``; ``kernels`` as for ``network``."""
    found: dict[str, Any] = {key: spec.training.get(name) for key, name in _SS_KEYS.items()}
    family = families.find(str(spec.base.get("family", "")))
    version = family.version(str(spec.base.get("prediction_type", "")))
    found |= {
        "ss_sd_model_name": spec.base.get("name"),
        "ss_base_model_version": version.base_model if version else "other",
        "ss_v2": family.name == "sd2",
    }
    chosen = kohya_network.network(spec.methods, kernels)
    found |= kohya_network.to_metadata(chosen) if chosen else {}
    modelspec = _modelspec(spec, family, version) if family.denoiser else _language_modelspec(spec)
    found |= {f"modelspec.{key}": value for key, value in modelspec.items()}
    return {KEY: spec.to_json()} | {key: _text(value) for key, value in found.items() if value not in (None, "")}


def _language_modelspec(spec: Spec) -> dict[str, Any]:
    return {
        "sai_model_spec": "1.0.1",
        "architecture": f"{spec.base.get('architecture', 'causal-lm')}/lora",
        "implementation": "https://github.com/huggingface/transformers",
        "title": spec.title,
        "description": spec.description,
        "date": spec.training.get("finished_at"),
    }


def _modelspec(spec: Spec, family: Family, version: Version | None) -> dict[str, Any]:
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


def _predicts_v(spec: Spec) -> bool:
    return spec.base.get("prediction_type") == "v_prediction"


def place(name: str, keys: Mapping[str, tuple[str, str]]) -> tuple[str, str, str] | None:
    """Component, path and suffix that a tensor's name means, by the names of ``site_keys``; None where it has no site."""
    if name.startswith(OWN):
        path, _, suffix = name.removeprefix(OWN).rpartition(".")
        component, _, path = path.partition(".")
        return (component, path, suffix) if (component, path) in keys.values() else None
    site, _, suffix = name.partition(".")
    return (*keys[site], suffix) if site in keys else None


def _aliases(component: str, path: str) -> tuple[str, ...]:
    """The paths that mean one module; the last is the one that is written."""
    if families.role_of(component) != "text encoder" or not path:
        return (path,)
    bare = path.removeprefix(_TEXT_MODEL)
    return (bare, _TEXT_MODEL + bare) if bare.startswith(("encoder.", "embeddings.", "final_layer_norm")) else (path,)


def _text(value: Any) -> str:
    if isinstance(value, (str, bool)):
        return str(value)  # sd-scripts writes True, and A1111 looks for that
    return json.dumps(value, sort_keys=True, ensure_ascii=False)
