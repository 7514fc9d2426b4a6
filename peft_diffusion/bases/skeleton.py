"""Bases without their weights: what reading and rewriting an adapter file needs of one.

A command that converts, merges or resizes files has no base. It builds the adapters of a file on a skeleton: the components
of a published architecture, or of a folder's configurations, on torch's meta device. No weight is read or fetched.
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, get_args

import diffusers
import transformers
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import snapshot_download
from torch import nn
from transformers.utils import logging as transformers_logging

from ..core.errors import UserError, did_you_mean, first_line
from ..core.files import at_home
from ..core.meta import shapes_alone
from ..core.parsing import json_value, refusing
from . import family as families
from . import single_file
from .architectures import Architecture, Kind, write_tokenizer
from .base import BaseInfo, Skeleton, components, describe, text_encoders
from .causal_lm import LanguageInfo
from .embedded import ICONS, TINY_LM, embedded
from .loading import is_hub_id, named_source, quiet, refuse_beyond
from .stable_diffusion import load_base
from .unet import family_of

PUBLISHED: tuple[Kind, ...] = get_args(Kind)
"""The architectures that are known without a file of theirs, by the names that stand for them."""

_Configs = Mapping[str, Mapping[str, Any]]
_VAE_BLOCKS = (128, 256, 512, 512)  # of every published autoencoder of Stable Diffusion


def skeleton(source: str | Path) -> Skeleton:
    """Make the skeleton of a base.

    Args:
        source: The name of a published architecture (`PUBLISHED`), ``"icons"`` or ``"tiny-lm"`` (embedded), a folder of
            diffusers or transformers, a single-file checkpoint, or a hub id, of which the configurations are fetched.

    Returns:
        The skeleton. Of a name that is embedded or published, the same one at every call.

    Raises:
        UserError: There is no such base, or its configurations cannot be used.
    """
    name = named_source(source, "a Skeleton")
    kind = next((one for one in PUBLISHED if one == name), None)
    if kind is not None:
        return published(kind)
    if name in (ICONS, TINY_LM):
        return _embedded(name)
    path = at_home(Path(name))
    with refusing(f"base {name!r} has a configuration that cannot be used"):
        if path.is_dir():
            return _folder(path, path.resolve().name)
        if path.is_file():
            return _of_architecture(single_file.architecture(path), path.name)
        if is_hub_id(name) and not path.parent.is_dir():
            return _folder(_fetched(name), name)
    known = [*PUBLISHED, ICONS, TINY_LM]
    raise UserError(
        f"there is no base {name!r}: neither one of {', '.join(known)}, nor a folder, a file or a hub id (owner/name)"
        f"{did_you_mean(name, known)}"
    )


def published(kind: Kind, inpainting: bool = False) -> Skeleton:
    """Make the skeleton of a published architecture.

    Args:
        kind: Which.
        inpainting: Whether its UNet is told a masked picture.

    Returns:
        The skeleton, the same one at every call.
    """
    return _published(kind, inpainting)


@cache
def _published(kind: Kind, inpainting: bool) -> Skeleton:
    return _of_architecture(Architecture(kind, inpainting), kind)


@cache
def _embedded(name: str) -> Skeleton:
    return _folder(embedded("base" if name == ICONS else "text/base"), name)


def _of_architecture(found: Architecture, name: str) -> Skeleton:
    configs = found.configs()
    tokenizers = [one.tokenizer for key, one in families.components().items() if key in configs and one.tokenizer]
    return _diffusion(name, configs, dict.fromkeys(tokenizers, _clip_tokenizer))


@cache
def _clip_tokenizer() -> Any:
    """The tokenizer of every published Stable Diffusion."""
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder) / "tokenizer"
        where.mkdir()
        write_tokenizer(where)
        return transformers.CLIPTokenizer.from_pretrained(str(where))


def _fetched(hub_id: str) -> Path:
    """The configurations and tokenizers of a base of the hub, without its weights."""
    try:
        return Path(snapshot_download(hub_id, allow_patterns=["*.json", "*.txt", "*.model"]))
    except Exception as error:  # of the network, the hub and its library
        raise UserError(f"the configurations of base {hub_id!r} cannot be fetched: {first_line(error)}") from None


def _folder(path: Path, name: str) -> Skeleton:
    """The skeleton of a folder by its configurations. Raises UserError where they are those of no base."""
    refuse_beyond(path)
    if not (path / "model_index.json").is_file():
        return _language(path, name)
    rows = families.components()
    told = {key: path / key / "config.json" for key in (*rows, "vae")}
    configs = {key: _json(file) for key, file in told.items() if file.is_file()}
    schedule = path / "scheduler" / "scheduler_config.json"
    if schedule.is_file():
        configs["scheduler"] = _json(schedule)
    if any(_class_of(config) is None for key, config in configs.items() if key in rows):
        return _whole(path)
    tokenizers = {
        one.tokenizer: partial(_tokenizer, path / one.tokenizer)
        for key, one in rows.items()
        if key in configs and one.tokenizer is not None
    }
    return _diffusion(name, configs, tokenizers)


def _whole(path: Path) -> Skeleton:
    """The skeleton of a base whose classes a plug-in brings, which alone can build them: it is read with its weights."""
    base = load_base(str(path), device="cpu", download=False)
    info = replace(describe(base), fingerprint="")  # while the weights are there, which it is told of
    parts = {key: part.to("meta") for key, part in components(base).items()}
    return Skeleton(info, parts, {name: partial(getattr, base, name) for name in text_encoders(base).values()})


def _diffusion(name: str, configs: _Configs, tokenizers: Mapping[str, Callable[[], Any]]) -> Skeleton:
    with quiet(diffusers_logging, transformers_logging):
        parts = {key: _module(configs[key]) for key in families.components() if key in configs}
    denoisers = [key for key in families.components("denoiser") if key in parts]
    if not denoisers:
        raise UserError(f"base {name!r} has no network that denoises, of a family that is known here")
    network: Any = parts[denoisers[0]]
    factor = 2 ** (len(configs.get("vae", {}).get("block_out_channels", _VAE_BLOCKS)) - 1)  # pixels a side for a latent
    info = BaseInfo(
        name=name,
        family=_family(denoisers[0], network).name,
        prediction_type=str(configs.get("scheduler", {}).get("prediction_type", "epsilon")),
        resolution=factor * _side(network.config.get("sample_size")),
        step=factor * 2 ** (len(network.config.get("block_out_channels", (0,))) - 1),
        fingerprint="",
    )
    return Skeleton(info, parts, tokenizers)


def _side(sample: Any) -> int:
    return int(min(sample) if isinstance(sample, (list, tuple)) else sample or 0)


def _family(denoiser: str, network: Any) -> families.Family:
    if type(network).__name__ == "UNet2DConditionModel":
        return family_of(network.config)
    found = (one for one in families.every() if one.denoiser is not None and one.denoiser.name == denoiser)
    return next(found, families.SMALL_DIFFUSION)


def _language(path: Path, name: str) -> Skeleton:
    """The skeleton of a causal language model. Raises UserError where the folder holds none."""
    if not (path / "config.json").is_file():
        raise UserError(f"{path} is no folder of a base: it holds neither model_index.json nor config.json")
    with quiet(transformers_logging):
        config = transformers.AutoConfig.from_pretrained(str(path.resolve()), local_files_only=True)
        with shapes_alone():
            model = transformers.AutoModelForCausalLM.from_config(config)
    context = int(getattr(config, "max_position_embeddings", 0) or 0)
    info = LanguageInfo(name, type(model).__name__, int(config.vocab_size), context, "")
    row = next(iter(families.LANGUAGE.components))
    return Skeleton(info, {row.name: model.eval()}, {"tokenizer": partial(_tokenizer, path)})


def _tokenizer(path: Path) -> Any:
    with refusing(f"{path} holds no tokenizer that can be read"), quiet(transformers_logging):
        return transformers.AutoTokenizer.from_pretrained(str(path.resolve()), local_files_only=True)


def _class_of(config: Mapping[str, Any]) -> Any | None:
    """The class of a component by its configuration; None where neither library has it."""
    if "_class_name" in config:
        return getattr(diffusers, str(config["_class_name"]), None)
    named = config.get("architectures")
    return getattr(transformers, str(named[0]), None) if isinstance(named, list) and named else None


def _module(config: Mapping[str, Any]) -> nn.Module:
    """A component on the meta device."""
    kind: Any = _class_of(config)
    with shapes_alone():
        if "_class_name" in config:
            model = kind.from_config(dict(config))
        else:
            model = kind(kind.config_class.from_dict(dict(config)))
    made: nn.Module = model.eval().requires_grad_(False)
    return made


def _json(path: Path) -> dict[str, Any]:
    with refusing(f"{path} cannot be read"):
        found = json_value(path.read_text("utf-8"))
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no configuration")
    return found
