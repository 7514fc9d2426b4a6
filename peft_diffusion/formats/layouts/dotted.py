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
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ... import methods
from ...bases import family as families
from ...core.errors import UserError
from ...core.method import Method
from .names import LYCORIS, OWN, prefixes

if TYPE_CHECKING:
    from torch import Tensor

_METADATA = "lora_adapter_metadata"
_PEFT = "base_model.model."
_PROCESSOR = re.compile(r"(.*)\.processor\.(to_q|to_k|to_v|to_out)_lora\.(down|up)\.weight")
# Beginnings of peft that change the base's weights, which a file then needs and does not hold.
_CHANGED = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class _Aliases:
    """What other programs call the tensors of methods, and the expressions that find them in names."""

    suffixes: Mapping[str, str]  # by alias
    methods: Mapping[str, type[Method]]  # the first that has an alias
    ranked: frozenset[str]
    dotted: re.Pattern[str]
    short: re.Pattern[str]  # of names in which a site's name is there already


def _aliases() -> _Aliases:
    """Those of all methods that are known now."""
    return _aliases_of(tuple(methods.known().values()))


@cache
def _aliases_of(known: tuple[type[Method], ...]) -> _Aliases:
    suffixes = {alias: suffix for one in known for alias, suffix in one.aliases.items()}
    owners = {alias: one for one in reversed(known) for alias in one.aliases}
    kinds = "|".join(re.escape(alias) for alias in sorted(suffixes, key=len, reverse=True))
    end = rf"({kinds})(?:\.default)?(?:\.weight)?"
    ranked = frozenset[str]().union(*(one.ranked for one in known))
    dotted, short = (re.compile(rf"{start}\.{end}") for start in (r"(.*\..*)", r"((?:lora|lycoris)_[^.]+)"))
    return _Aliases(suffixes, owners, ranked, dotted, short)


def kohya_name(name: str) -> str:
    """The name that a tensor has in the kohya layout; its own where it has another meaning, or that already."""
    if name.startswith(OWN):
        return name
    aliases = _aliases()
    if match := aliases.short.fullmatch(name):
        return f"{match[1]}.{aliases.suffixes[match[2]]}"
    module, kind = _parts(name)
    if not kind:
        return name
    start, path = _split(module)
    return f"{_starts()[start]}{path.replace('.', '_')}.{aliases.suffixes[kind]}"


def _parts(name: str) -> tuple[str, str]:
    """The module that a tensor's name begins with, and what the tensor is there; "" for a name of another layout."""
    if match := _PROCESSOR.fullmatch(name):
        return f"{match[1]}.{match[2]}{'.0' if match[2] == 'to_out' else ''}", f"lora.{match[3]}"
    match = None if name.startswith((LYCORIS, "lora_")) else _aliases().dotted.fullmatch(name)
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
    ranked = _aliases().ranked
    for name, new in renamed.items():
        site, _, suffix = new.partition(".")
        if suffix in ranked and f"{site}.alpha" not in found and new != name and found[new].ndim:
            alpha = _alpha(name, len(found[new]), told)
            if alpha is not None:
                found[f"{site}.alpha"] = torch.tensor(alpha)
    if of_peft:
        _scale_whole(found, {new: name for name, new in renamed.items() if name.startswith(_PEFT)}, told)
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
    """A tensor as its method's files have it."""
    _, kind = _parts(name)
    owner = _aliases().methods.get(kind)
    return tensor if owner is None else owner.from_alias(kind, tensor)


def _scale_whole(found: dict[str, "Tensor"], names: Mapping[str, str], told: Mapping[str, Any]) -> None:
    """Scale what peft does where a file of ours knows no scale, in place; ``names`` are those of the file, by ours."""
    sites: dict[str, set[str]] = {}
    for new in names:
        site, _, suffix = new.partition(".")
        sites.setdefault(site, set()).add(suffix)
    for site, suffixes in sites.items():
        for method in methods.known().values():
            scaled = method.scaled_tensor(suffixes)
            if scaled is not None:
                new = f"{site}.{scaled}"
                found[new] = found[new] * _whole_scale(names[new], told)


def _whole_scale(name: str, told: Mapping[str, Any]) -> float:
    """What peft multiplies a site's change with where no tensor has the rank."""
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
