"""Names of a UNet's modules in the original Stable Diffusion, which kohya's SDXL files and ComfyUI use."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ...core import targets

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


def original_names(component: nn.Module) -> dict[str, str]:
    """The original's path of each module that it has, by ours; of a UNet, and of nothing else."""
    config: Any = getattr(component, "config", None)
    if targets.architecture(component) != "UNet2DConditionModel" or not isinstance(config.layers_per_block, int):
        return {}
    attended = ["CrossAttn" in kind for kind in config.up_block_types]
    named = ((path, _original(path, config.layers_per_block, attended)) for path in targets.modules(component))
    return {path: name for path, name in named if name is not None}


def _original(path: str, layers: int, attended: Sequence[bool]) -> str | None:
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
