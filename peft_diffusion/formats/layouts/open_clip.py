"""Names of open_clip, in which Stable Diffusion 2 and XL came with their text encoders.

``lora_te2_transformer_resblocks_0_mlp_c_fc.lora_down.weight``, or with dots; all else is as in the layouts of kohya and
diffusers. One layer of it, ``attn.in_proj``, makes queries, keys and values, which are three here. Nothing is written so:
every program that reads these names reads kohya's too.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING, ClassVar

from ... import methods
from ...bases import family as families
from ..container import Header
from ..layout import Place, Reading, ReadOnly, register
from ..names import Rows, dotted_starts, known_rows, prefixes
from . import dotted, kohya

if TYPE_CHECKING:
    from torch import Tensor, nn

_BLOCK = re.compile(r"(?:model[._])?(?:transformer[._])?resblocks[._]\d+[._]")
_FUSED = re.compile(r"(.*attn[._])in_proj")
_PARTS = ("q_proj", "k_proj", "v_proj")  # in the order of the rows of in_proj
_LAYERS = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.q_proj": "attn.q_proj",
    "self_attn.k_proj": "attn.k_proj",
    "self_attn.v_proj": "attn.v_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_STARTS = ("", "transformer.", "model.transformer.")
CANNOT_PART = "change queries, keys and values in one, of a method whose tensors cannot be parted"


class OpenClip(ReadOnly):
    """The text encoders' modules under the names of open_clip."""

    name: ClassVar[str] = "open_clip"

    def claims(self, name: str) -> int | None:
        """Names of text encoders whose path begins as only open_clip's do."""
        known = _starts(known_rows())
        if not name.startswith(known):  # asked for the names of all layouts
            return None
        starts = [start for start in known if name.startswith(start)]
        matches = [len(start) + len(match[0]) for start in starts if (match := _BLOCK.match(name.removeprefix(start)))]
        return max(matches, default=None)

    def read(self, header: Header, names: Sequence[str]) -> Reading:
        """As the flat and the dotted names that they are; what is of a fused layer is of three."""
        flat = [name for name in names if name.startswith(tuple(prefixes()))]
        parts = (kohya.read(flat), dotted.read(header, [name for name in names if name not in flat]))
        leftovers = {name: why for part in parts for name, why in part.leftovers.items()}
        places: dict[str, Place] = {}
        further: dict[str, tuple[Place, ...]] = {}
        for name, place in ((name, place) for part in parts for name, place in part.places.items()):
            found = _parted(place, header.tensors[name].shape)
            if found:
                places[name], further[name] = found[0], found[1:]
            else:
                leftovers[name] = CANNOT_PART
        constants = {
            one: value for part in parts for place, value in part.constants.items() for one in _parted(place, ()) or (place,)
        }
        warnings = tuple(warning for part in parts for warning in part.warnings)
        return Reading(places, leftovers, constants, warnings, further)

    def sites(self, component: str, module: "nn.Module") -> Mapping[str, str]:
        """The paths of open_clip."""
        from ...core import targets

        if families.role_of(component) != "text encoder":
            return {}
        found: dict[str, str] = {}
        for path in targets.modules(module):
            match = re.fullmatch(r"(?:text_model\.)?encoder\.layers\.(\d+)\.(.+)", path)
            if match and match[2] in _LAYERS:
                found |= {f"{start}resblocks.{match[1]}.{_LAYERS[match[2]]}": path for start in _STARTS}
        return found


@cache
def _starts(known: Rows) -> tuple[str, ...]:
    """What the names of text encoders begin with, of the families that are known."""
    starts = {**prefixes(), **dotted_starts()}
    return tuple(start for start, component in starts.items() if families.role_of(component) == "text encoder")


def _parted(place: Place, shape: tuple[int, ...]) -> tuple[Place, ...]:
    """The places of a tensor: the one that it has, or three where it is of a fused layer; none where it cannot be parted."""
    match = _FUSED.fullmatch(place.site)
    if match is None:
        return (place,)
    known = methods.known().values()
    by_output = place.suffix in frozenset[str]().union(*(one.by_output for one in known))
    partable = place.suffix in frozenset[str]().union(*(one.suffixes for one in known if one.by_output))
    if not partable or (by_output and (not shape or shape[0] % len(_PARTS))):
        return ()
    places = [replace(place, site=f"{match[1]}{part}") for part in _PARTS]
    if not by_output:
        return tuple(places)
    own = (shape[0] // len(_PARTS), *shape[1:])
    return tuple(replace(one, shape=own, change=partial(_rows, place.change, index)) for index, one in enumerate(places))


def _rows(change: "Callable[[Tensor], Tensor] | None", index: int, tensor: "Tensor") -> "Tensor":
    """The rows of one of the three."""
    return (tensor if change is None else change(tensor)).chunk(len(_PARTS))[index].clone()


register(OpenClip())
