"""Names of the original Stable Diffusion, which kohya's SDXL files and ComfyUI use for the UNet.

They stand in flat names, ``lora_unet_input_blocks_4_1_proj_in.lora_down.weight``, which is what is written, and in dotted
ones, ``diffusion_model.input_blocks.4.1.proj_in.lora_down.weight``. All else in such a file is as in kohya's layout.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

from ...bases import family as families
from ...core.errors import UserError
from ..aliases import aliases
from ..container import Header
from ..layout import Content, Layout, Reading, Written, register
from ..names import LYCORIS, Rows, known_rows, length_of, rows, with_text_model
from . import dotted, kohya

if TYPE_CHECKING:
    from torch import nn

_BLOCKS = ("input_blocks", "middle_block", "output_blocks")
_OUTER = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_OF_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


class Original(Layout):
    """The UNet's modules under the names that they had before diffusers."""

    name: ClassVar[str] = "original"
    told_by: ClassVar[frozenset[str] | None] = dotted.Diffusers.told_by

    def claims(self, name: str) -> int | None:
        """Names whose path begins as only the original's do."""
        known = known_rows()
        if not name.startswith(_beginnings(known)):
            return None
        if "." in name.partition(".")[2] and not name.startswith(_flat_starts(known)) and aliases().parts(name) is None:
            return None  # of OneTrainer, which keeps the dots and names tensors as kohya's layout does
        return length_of(name, _beginnings(known))

    def read(self, header: Header, names: Sequence[str]) -> Reading:
        """As the flat and the dotted names that they are."""
        flat = [name for name in names if name.startswith(_flat_starts(known_rows()))]
        parts = (kohya.read(flat), dotted.read(header, [name for name in names if name not in flat]))
        return Reading(
            {name: place for part in parts for name, place in part.places.items()},
            {name: why for part in parts for name, why in part.leftovers.items()},
            {place: value for part in parts for place, value in part.constants.items()},
            tuple(warning for part in parts for warning in part.warnings),
        )

    def write(self, content: Content) -> Written:
        """Flat names, as kohya's trainer writes them for SDXL."""
        return kohya.write(content, kohya.flat(content, spelling(content)))

    def sites(self, component: str, module: "nn.Module") -> Mapping[str, str]:
        """The original's paths."""
        return {name: path for path, name in original_names(module).items()}


def spelling(content: Content) -> kohya.Spelling:
    """Spell paths of UNets as the original does, and those of text encoders as files do.

    Args:
        content: What a file is to hold.

    Returns:
        The spelling, which raises UserError for a module that the original does not have.

    Raises:
        UserError: There is a component beside text encoders, and none had other names in the original.
    """
    names = {component: original_names(module) for component, module in content.components.items()}
    if not any(names.values()) and any(families.role_of(component) != "text encoder" for component in names):
        raise UserError(f"{', '.join(names)} had no other names in the original; take the layout {kohya.Kohya.name!r}")

    def spelled(component: str, path: str) -> str:
        if not names.get(component):
            return with_text_model(component, path)
        if path not in names[component]:
            raise UserError(
                f"the original Stable Diffusion has no module such as {component}.{path}; take the layout"
                f" {kohya.Kohya.name!r}"
            )
        return names[component][path]

    return spelled


@cache
def _flat_starts(known: Rows) -> tuple[str, ...]:
    """What flat names of the UNet begin with."""
    return (*(start for one in _unets() for start in (one.kohya, *one.flat)), LYCORIS)


@cache
def _beginnings(known: Rows) -> tuple[str, ...]:
    """What names begin with that only the original has, the longest first."""
    first = dict.fromkeys([*_BLOCKS, *(name.partition(".")[0] for name in _OUTER.values())])
    flat = (f"{start}{name}_" for start in _flat_starts(known) for name in first)
    dotted = (f"{start}{name}." for one in _unets() for start in one.dotted for name in first)
    return tuple(sorted((*flat, *dotted), key=len, reverse=True))


def _unets() -> list[families.Component]:
    """The rows of UNets."""
    unets = [family.denoiser for family in families.every() if family.kind == families.UNET_KIND]
    return [row for row in rows() if row in unets]


def original_names(component: "nn.Module") -> dict[str, str]:
    """Name the modules of a UNet as the original does.

    Args:
        component: The component.

    Returns:
        The original's path of each module that it has, by ours; nothing for what is no UNet.
    """
    from ...core import targets

    config: Any = getattr(component, "config", None)
    if targets.architecture(component) != "UNet2DConditionModel" or not isinstance(config.layers_per_block, int):
        return {}
    attended = tuple("CrossAttn" in kind for kind in config.up_block_types)
    named = ((path, _original(path, config.layers_per_block, attended)) for path in targets.modules(component))
    return {path: name for path, name in named if name is not None}


@lru_cache(maxsize=20_000)  # asked for with the first file of each shape
def _original(path: str, layers: int, attended: tuple[bool, ...]) -> str | None:
    if path in _OUTER:
        return _OUTER[path]
    if match := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)(?:\.(.+))?", path):
        number = (layers + 1) * int(match[2]) + int(match[4])
        place = f"input_blocks.{number + 1}" if match[1] == "down" else f"output_blocks.{number}"
        return _inner(place, match[3], match[5])
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)(?:\.(.+))?", path):
        # A resnet, the attention, a resnet.
        number = 2 * int(match[2]) if match[1] == "resnets" else 1
        return _join(f"middle_block.{number}", match[3], _OF_RESNET if match[1] == "resnets" else None)
    if match := re.fullmatch(r"down_blocks\.(\d+)\.downsamplers\.0\.conv", path):
        return f"input_blocks.{(layers + 1) * (int(match[1]) + 1)}.0.op"
    if match := re.fullmatch(r"up_blocks\.(\d+)\.upsamplers\.0\.conv", path):
        block = int(match[1])
        return f"output_blocks.{(layers + 1) * block + layers}.{2 if attended[block] else 1}.conv"
    return None


def _inner(place: str, kind: str, rest: str | None) -> str | None:
    return _join(f"{place}.0", rest, _OF_RESNET) if kind == "resnets" else _join(f"{place}.1", rest, None)


def _join(place: str, rest: str | None, names: Mapping[str, str] | None) -> str | None:
    if rest is None:
        return place
    inner = rest if names is None else names.get(rest)
    return None if inner is None else f"{place}.{inner}"


register(Original())
