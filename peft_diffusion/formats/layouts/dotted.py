"""LoRA files of diffusers, peft and ComfyUI, whose names keep the dots of the paths, brought to the kohya layout.

- diffusers: ``unet.<path>.lora_A.weight``, of older scripts ``.lora.down.weight`` and ``.lora_linear_layer.down.weight``, or
  ``<attention>.processor.to_q_lora.down.weight``; alpha in the metadata, or else it is the rank;
- peft: ``base_model.model.<path>.lora_A.weight``, DoRA, LoHa and LoKr; alpha in ``adapter_config.json`` beside the file;
- ComfyUI and others: ``diffusion_model.<path of the original>.lora_down.weight``, with or without alpha, and
  ``text_encoders.<encoder>.transformer.<path>.lora_up.weight``.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...bases import family as families
from ...core.errors import UserError
from .names import LYCORIS, OWN, prefixes

if TYPE_CHECKING:
    from torch import Tensor

_METADATA = "lora_adapter_metadata"
_PEFT = "base_model.model."
_SUFFIXES = {
    "lora_A": "lora_down.weight",
    "lora_B": "lora_up.weight",
    "lora.down": "lora_down.weight",
    "lora.up": "lora_up.weight",
    "lora_down": "lora_down.weight",
    "lora_up": "lora_up.weight",
    "lora_linear_layer.down": "lora_down.weight",
    "lora_linear_layer.up": "lora_up.weight",
    "lora_magnitude_vector": "dora_scale",
    "alpha": "alpha",
    "dora_scale": "dora_scale",
    "diff_b": "diff_b",
    **{name: name for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")},
    **{name: name for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")},
}
_KINDS = "|".join(re.escape(suffix) for suffix in sorted(_SUFFIXES, key=len, reverse=True))
_NAME = re.compile(rf"(.*\..*)\.({_KINDS})(?:\.default)?(?:\.weight)?")
_PROCESSOR = re.compile(r"(.*)\.processor\.(to_q|to_k|to_v|to_out)_lora\.(down|up)\.weight")
_SHORT = re.compile(rf"((?:lora|lycoris)_[^.]+)\.({_KINDS})(?:\.default)?(?:\.weight)?")  # a site's name is there already
# The tensor of a site whose first size is the rank.
_RANKED = frozenset(("lora_down.weight", "hada_w1_b", "lokr_w1_b", "lokr_w2_b"))
# Beginnings of peft that change the base's weights, which a file then needs and does not hold.
_CHANGED = ("pissa", "olora", "corda", "loftq", "lora_ga")


def kohya_name(name: str) -> str:
    """The name that a tensor has in the kohya layout; its own where it has another meaning, or that already."""
    if name.startswith(OWN):
        return name
    if match := _SHORT.fullmatch(name):
        return f"{match[1]}.{_SUFFIXES[match[2]]}"
    module, kind = _parts(name)
    if not kind:
        return name
    start, path = _split(module)
    return f"{_starts()[start]}{path.replace('.', '_')}.{_SUFFIXES[kind]}"


def _parts(name: str) -> tuple[str, str]:
    """The module that a tensor's name begins with, and what the tensor is there; "" for a name of another layout."""
    if match := _PROCESSOR.fullmatch(name):
        return f"{match[1]}.{match[2]}{'.0' if match[2] == 'to_out' else ''}", f"lora.{match[3]}"
    match = None if name.startswith((LYCORIS, "lora_")) else _NAME.fullmatch(name)
    return (match[1], match[2]) if match else (name, "")


def _starts() -> dict[str, str]:
    """What names begin with, and what they begin with here; a bare path is any component's."""
    rows = [one for family in families.every() for one in family.components]
    found = {start: prefixes(one.name)[-1] for one in rows for start in one.dotted}
    return {**found, _PEFT: LYCORIS, "": LYCORIS}


def _split(name: str) -> tuple[str, str]:
    """What a name begins with, and the rest of it."""
    start = next(start for start in _starts() if name.startswith(start))
    return start, name.removeprefix(start)


def adopted(
    tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str], path: Path
) -> tuple[dict[str, "Tensor"], list[str]]:
    """The tensors under the names of the kohya layout, with alphas where they are told beside; and what had to be assumed.

    Raises UserError for a configuration that cannot be read, and for two names of one tensor.
    """
    import torch

    renamed = {name: kohya_name(name) for name in tensors}
    if all(name == new for name, new in renamed.items()):
        return dict(tensors), []
    if len(set(renamed.values())) < len(renamed):
        twice = next(new for new, count in Counter(renamed.values()).items() if count > 1)
        both = " and ".join(name for name, new in renamed.items() if new == twice)
        raise UserError(f"{path}: {both} are one tensor under two names; the file is damaged")
    of_peft = any(name.startswith(_PEFT) for name in tensors)
    beside = path.parent / "adapter_config.json"
    told = _json(beside) if of_peft and beside.is_file() else _told(metadata)
    found = {new: _shaped(name, tensors[name]) for name, new in renamed.items()}
    for name, new in renamed.items():
        site, _, suffix = new.partition(".")
        if suffix in _RANKED and f"{site}.alpha" not in found and new != name and found[new].ndim:
            alpha = _alpha(name, len(found[new]), told)
            if alpha is not None:
                found[f"{site}.alpha"] = torch.tensor(alpha)
        elif suffix == "lokr_w1" and f"{site}.lokr_w2" in found and name.startswith(_PEFT):
            found[new] = found[new] * _whole_scale(name, told)
    unsure = of_peft and not told
    assumed = [f"{path}: no {beside.name} is beside it to tell alpha, so it is taken to be the rank"] if unsure else []
    began = told.get("init_lora_weights")
    if isinstance(began, str) and began.startswith(_CHANGED):
        assumed.append(
            f"{path} began with {began}, which changed the weights of its base, and holds nothing of that; with peft's"
            " save_pretrained(..., path_initial_model_for_weight_conversion=...) it is right without"
        )
    return found, assumed


def _shaped(name: str, tensor: "Tensor") -> "Tensor":
    """A magnitude as the kohya layout has it: peft's is flat for a Linear, and (1, out, 1, 1) for a convolution."""
    _, kind = _parts(name)
    if _SUFFIXES.get(kind) != "dora_scale":
        return tensor
    if tensor.ndim == 1:
        return tensor[:, None]
    return tensor.transpose(0, 1) if kind == "lora_magnitude_vector" and tensor.ndim > 2 else tensor


def _whole_scale(name: str, told: Mapping[str, Any]) -> float:
    """What peft multiplies a LoKr of two whole factors with; the kohya layout has no scale there."""
    path = _split(_parts(name)[0])[1]
    rank = _by_pattern(told.get("rank_pattern"), path, told.get("r"))
    alpha = _alpha(name, 1, told)
    if alpha is None or not isinstance(rank, (int, float)) or rank <= 0:
        return 1.0
    return alpha / (math.sqrt(rank) if told.get("use_rslora") else rank)


def _told(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The configurations that diffusers keeps in the metadata, by ``<component>.<name>``."""
    try:
        found = json.loads(metadata.get(_METADATA, "{}"))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no configuration of peft")
    return found


def _alpha(name: str, rank: int, told: Mapping[str, Any]) -> float | None:
    """The alpha that a configuration tells for a tensor's site, as the kohya layout means it; None where it tells none."""
    start, path = _split(_parts(name)[0])
    # diffusers puts the component before each name, unless there is but one.
    own = {key.removeprefix(start): value for key, value in told.items() if key.startswith(start)} if start != _PEFT else {}
    settings = own or told
    alpha = _by_pattern(settings.get("alpha_pattern"), path, settings.get("lora_alpha", settings.get("alpha")))
    if not isinstance(alpha, (int, float)):
        return None
    # peft divides by the root of the rank there; the kohya layout always by the rank.
    return float(alpha) * math.sqrt(rank) if settings.get("use_rslora") else float(alpha)


def _by_pattern(patterns: Any, path: str, otherwise: Any) -> Any:
    """The value of the first pattern that means a module, as peft reads them: whole, or after a dot."""
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        try:
            if re.fullmatch(rf"(.*\.)?({pattern})", path):
                return value
        except re.error as error:
            raise UserError(f"the pattern {pattern!r} of the configuration is no regular expression: {error}") from None
    return otherwise
