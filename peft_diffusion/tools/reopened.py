"""Adapter files opened by the loaders of diffusers, peft and LyCORIS themselves, where they are installed.

The base has no weights of its own: the loaders put their layers beside zeros that take no memory, and what they add to a
weight is asked of them. What depends on the weight itself is only known where the base was given with its weights.
"""

import copy
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import diffusers
import torch
from diffusers.utils import logging as diffusers_logging
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from ..bases import family as families
from ..bases.base import Skeleton
from ..bases.loading import quiet
from ..core.errors import first_line
from ..formats.layouts.original import original_names
from ..formats.names import LYCORIS, with_text_model, written_prefix
from .key_maps import Taken, Theirs, WeightOf, flattened
from .sources import Source, Where

_ADAPTER = "verified"
_CONFIG = "adapter_config.json"
_SCALED_TWICE = ("LohaModule", "LokrModule")  # where LyCORIS' get_diff_weight, of its merge, takes the scale once more
_MAGNITUDES = ("dora_scale", "lora_magnitude_vector")


def reopened(source: Source, tensors: Mapping[str, Tensor], weight_of: WeightOf) -> Iterator[Taken]:
    """Open a file with every loader that is installed and that such a file is for.

    Args:
        source: The file.
        tensors: Its tensors.
        weight_of: Reads the weight of a site, for methods whose change depends on it.

    Yields:
        What each makes of it.
    """
    if any(families.role_of(component) == "denoiser" for component in source.bound.parts):
        yield _diffusers(source, tensors, weight_of)
    if (source.path.parent / _CONFIG).is_file():
        yield _peft(source, tensors, weight_of)
    if importlib.util.find_spec("lycoris") is not None:
        yield from _lycoris(source, tensors, weight_of)


def _names(source: Source) -> dict[Where, dict[str, str]]:
    """The names of tensors by site and suffix."""
    return {where: {one.place.suffix: one.name for one in source.bound.sites[where].plan.sources} for where in source.sites}


def _diffusers(source: Source, tensors: Mapping[str, Tensor], weight_of: WeightOf) -> Taken:
    found = Taken("diffusers")
    xl = "text_encoder_2" in source.bound.parts
    pipeline: Any = diffusers.StableDiffusionXLPipeline if xl else diffusers.StableDiffusionPipeline
    parts = {name: _with_zeros(part) for name, part in source.bound.parts.items()}
    with _quiet():
        try:
            unet: Any = parts.get("unet")
            state, alphas, told = pipeline.lora_state_dict(
                dict(tensors) if source.plan.loaded is not None else str(source.path),
                unet_config=getattr(unet, "config", None),
                return_lora_metadata=True,
            )
            if any("lora" not in name for name in state):
                raise ValueError("Invalid LoRA checkpoint: not all of its names hold 'lora'")
            shared = {"adapter_name": _ADAPTER, "low_cpu_mem_usage": True, "metadata": told}
            if unet is not None:
                pipeline.load_lora_into_unet(dict(state), alphas, unet, **shared)
            for name in ("text_encoder", "text_encoder_2"):
                if name in parts:
                    pipeline.load_lora_into_text_encoder(dict(state), alphas, parts[name], prefix=name, **shared)
        except Exception as error:  # of another program, which raises what it likes
            found.refused = first_line(error)
            return found
    for where, names in _names(source).items():
        _of_peft(found, parts[where[0]].get_submodule(where[1]), where, names, weight_of)
    _rest(found, tensors, "its loader finds no place for it")
    return found


def _peft(source: Source, tensors: Mapping[str, Tensor], weight_of: WeightOf) -> Taken:
    found = Taken("peft")
    ((component, bare),) = [item for item in source.bound.parts.items() if item[0] in {one[0] for one in source.sites}][:1]
    part = _with_zeros(bare)
    with _quiet():
        try:
            PeftModel.from_pretrained(part, str(source.path.parent), adapter_name=_ADAPTER, low_cpu_mem_usage=True)
        except Exception as error:  # as above
            found.refused = first_line(error)
            return found
    for where, names in _names(source).items():
        if where[0] == component:
            _of_peft(found, part.get_submodule(where[1]), where, names, weight_of)
    _rest(found, tensors, "its loader finds no place for it")
    return found


def _with_zeros(part: nn.Module) -> Any:
    """A copy of a component whose parameters are zeros that take no memory, and where loaders put what is theirs."""
    made = copy.deepcopy(part)
    for module in made.modules():
        for name, own in module.named_parameters(recurse=False):
            zeros = torch.zeros(1, dtype=own.dtype).expand(own.shape)
            module.register_parameter(name, nn.Parameter(zeros, requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, torch.zeros(buffer.shape, dtype=buffer.dtype))
    return made


def _of_peft(found: Taken, layer: nn.Module, where: Where, names: Mapping[str, str], weight_of: WeightOf) -> None:
    """Take in what a layer of peft holds, which is how diffusers keeps them too."""
    if not isinstance(layer, BaseTunerLayer):
        return
    held: Any = layer
    decomposed = _ADAPTER in getattr(held, "lora_magnitude_vector", {})
    for suffix, name in names.items():
        if suffix in _MAGNITUDES and not decomposed:
            found.dropped[name] = "it reads no magnitudes from such a file, and draws the rest as a LoRA"
        else:
            found.names.add(name)

    def change() -> Tensor | None:
        return _merged(held, weight_of(where)) if decomposed else held.get_delta_weight(_ADAPTER).flatten(1)

    found.changes[where] = Theirs(change)


def _merged(layer: Any, weight: Tensor | None) -> Tensor | None:
    """What a layer of peft adds to a weight when it merges itself; None where the weight is not at hand."""
    if weight is None:
        return None
    inside = layer.get_base_layer()
    zeros, inside.weight = inside.weight, nn.Parameter(weight.clone(), requires_grad=False)
    try:
        layer.merge(adapter_names=[_ADAPTER])
        merged: Tensor = inside.weight.detach() - weight
        return merged.flatten(1)
    finally:
        inside.weight = zeros
        layer.merged_adapters.clear()


def _lycoris(source: Source, tensors: Mapping[str, Tensor], weight_of: WeightOf) -> Iterator[Taken]:
    """LyCORIS finds the tensors of a module by what the network calls it that it is given. That is a UNet of diffusers, but
    of XL in kohya's scripts, which have that UNet under the original's names."""
    base = source.bound.base
    family = base.info.family if isinstance(base, Skeleton) else ""
    own = {where: with_text_model(*where) for where in source.sites}
    both = {
        where: (f"{LYCORIS}{flattened(path)}", f"{written_prefix(where[0], family)}{flattened(path)}")
        for where, path in own.items()
    }
    xl = family == "sdxl" and any(families.role_of(component) == "denoiser" for component, _ in own)
    yield _by_lycoris(Taken("LyCORIS", note=_ON_DIFFUSERS if xl else ""), source, tensors, both, weight_of)
    if xl:
        named = {name: original_names(part) for name, part in source.bound.parts.items()}
        stems = {
            where: (f"{written_prefix(where[0], family)}{flattened(named[where[0]].get(where[1], path))}",)
            for where, path in own.items()
        }
        yield _by_lycoris(Taken("LyCORIS in kohya's scripts", note=_ON_KOHYA), source, tensors, stems, weight_of)


_ON_DIFFUSERS = "it looks for the names of the UNet that it is given, here that of diffusers"
_ON_KOHYA = "kohya's scripts have the UNet of XL under the original's names, which --to kohya-sgm writes"


def _by_lycoris(
    found: Taken,
    source: Source,
    tensors: Mapping[str, Tensor],
    stems: Mapping[Where, Sequence[str]],
    weight_of: WeightOf,
) -> Taken:
    from lycoris.modules import get_module, make_module

    state, there = dict(tensors), {name.partition(".")[0] for name in tensors}
    for where in source.sites:
        stem = next((one for one in stems[where] if one in there), None)
        if stem is None:
            continue
        try:
            kind, values = get_module(state, stem)
            if kind is None:
                continue
            made: Any = make_module(kind, values, stem, source.module(where))
        except Exception as error:  # as above
            own = [name for name in tensors if name.startswith(f"{stem}.")]
            found.dropped |= dict.fromkeys(own, f"its loader fails: {first_line(error)}")
            continue
        found.names |= {f"{stem}.{one}" for one in kind.weight_list if f"{stem}.{one}" in tensors}
        found.changes[where] = Theirs(_change_in(made, partial(weight_of, where)))
    _rest(found, tensors, "its loader finds no place for it")
    return found


def _change_in(made: Any, weight_of: Callable[[], Tensor | None]) -> Callable[[], Tensor | None]:
    def change() -> Tensor | None:
        if made is None:
            return None
        scaled_once = type(made).__name__ in _SCALED_TWICE
        added = made.get_weight(None) if scaled_once else made.get_diff_weight(1.0)[0]
        if added is None or added.is_meta:
            return None
        if not getattr(made, "wd", False):
            plain: Tensor = added.detach().float()
            return plain
        weight = weight_of()
        if weight is None:
            return None
        merged: Tensor = made.apply_weight_decompose(weight + added.view_as(weight))
        return merged.detach() - weight

    return change


def _rest(found: Taken, tensors: Mapping[str, Tensor], why: str) -> None:
    for name in tensors:
        if name not in found.names:
            found.dropped.setdefault(name, why)


@contextmanager
def _quiet() -> Iterator[None]:
    with quiet(diffusers_logging, transformers_logging), torch.no_grad():
        yield
