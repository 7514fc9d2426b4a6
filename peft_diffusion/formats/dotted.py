"""LoRA files of diffusers, peft and ComfyUI, whose names keep the dots of the paths, brought to the kohya layout.

- diffusers: ``unet.<path>.lora_A.weight``, of older scripts ``.lora.down.weight`` and ``.lora_linear_layer.down.weight``, or
  ``<attention>.processor.to_q_lora.down.weight``; alpha in the metadata, or else it is the rank;
- peft: ``base_model.model.<path>.lora_A.weight``, DoRA, LoHa and LoKr; alpha in ``adapter_config.json`` beside the file;
- ComfyUI and others: ``diffusion_model.<path of the original>.lora_down.weight``, with or without alpha.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import UserError
from .layout import LYCORIS, OWN, PREFIXES

if TYPE_CHECKING:
    from torch import Tensor

_METADATA = "lora_adapter_metadata"
_PEFT = "base_model.model."
# What names begin with, and what they begin with here; a bare path is any component's.
_STARTS = {
    "unet.": PREFIXES["unet"][1],
    "text_encoder.": PREFIXES["text_encoder"][1],
    "text_encoder_2.": PREFIXES["text_encoder_2"][1],
    "diffusion_model.": PREFIXES["unet"][1],
    _PEFT: LYCORIS,
    "": LYCORIS,
}
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
    **{name: name for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")},
    **{name: name for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")},
}
_KINDS = "|".join(re.escape(suffix) for suffix in sorted(_SUFFIXES, key=len, reverse=True))
_NAME = re.compile(rf"(.*\..*)\.({_KINDS})(?:\.default)?(?:\.weight)?")
_PROCESSOR = re.compile(r"(.*)\.processor\.(to_q|to_k|to_v|to_out)_lora\.(down|up)\.weight")
_RANKED = frozenset(("lora_down.weight", "hada_w1_b", "lokr_w2_b"))  # the tensor of a site whose first size is the rank


def kohya_name(name: str) -> str:
    """The name that a tensor has in the kohya layout; its own where it has another meaning, or that already."""
    if name.startswith((OWN, LYCORIS, "lora_")):
        return name
    if match := _PROCESSOR.fullmatch(name):
        name = f"{match[1]}.{match[2]}{'.0' if match[2] == 'to_out' else ''}.lora.{match[3]}.weight"
    match = _NAME.fullmatch(name)
    if match is None:
        return name
    start, path = _split(match[1])
    return f"{_STARTS[start]}{path.replace('.', '_')}.{_SUFFIXES[match[2]]}"


def _split(name: str) -> tuple[str, str]:
    """What a name begins with, and the rest of it."""
    start = next(start for start in _STARTS if name.startswith(start))
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
    found = {new: _shaped(new, tensors[name]) for name, new in renamed.items()}
    for name, new in renamed.items():
        site, _, suffix = new.partition(".")
        if suffix in _RANKED and f"{site}.alpha" not in found and new != name:
            alpha = _alpha(name, len(found[new]), told)
            if alpha is not None:
                found[f"{site}.alpha"] = torch.tensor(alpha)
    unsure = of_peft and not told
    assumed = [f"{path}: no {beside.name} is beside it to tell alpha, so it is taken to be the rank"] if unsure else []
    return found, assumed


def _shaped(new: str, tensor: "Tensor") -> "Tensor":
    """A magnitude as the kohya layout has it: peft's is flat for a Linear."""
    return tensor[:, None] if new.endswith(".dora_scale") and tensor.ndim == 1 else tensor


def _told(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The configurations that diffusers keeps in the metadata, by ``<component>.<name>``."""
    try:
        found = json.loads(metadata.get(_METADATA, "{}"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no configuration of peft")
    return found


def _alpha(name: str, rank: int, told: Mapping[str, Any]) -> float | None:
    """The alpha that a configuration tells for a tensor's site, as the kohya layout means it; None where it tells none."""
    start, path = _split(name)
    # diffusers puts the component before each name, unless there is but one.
    own = {key.removeprefix(start): value for key, value in told.items() if key.startswith(start)} if start != _PEFT else {}
    settings = own or told
    alpha = settings.get("lora_alpha", settings.get("alpha"))
    patterns = settings.get("alpha_pattern")
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        try:
            if re.match(rf"(.*\.)?({pattern})\.", path):
                alpha = value
                break
        except re.error as error:
            raise UserError(f"alpha_pattern {pattern!r} of {name} is no regular expression: {error}") from None
    if not isinstance(alpha, (int, float)):
        return None
    # peft divides by the root of the rank there; the kohya layout always by the rank.
    return float(alpha) * math.sqrt(rank) if settings.get("use_rslora") else float(alpha)
