"""What the blocks of a network are called: by paths, in short, and by the numbers of the community. Imports no torch."""

import re
from collections.abc import Container, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType

_SHORT = re.compile(r"(down|up|mid)(\..+)?")
_COMMUNITY = re.compile(r"(IN|M|OUT)(\d\d)", re.IGNORECASE)
_LAYERS = 3  # of a block of a UNet in the numbers of the community: two with or without attention, and what resizes
_OF_PRESETS = (
    "IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "M00",
    "OUT03", "OUT04", "OUT05", "OUT06", "OUT07", "OUT08", "OUT09", "OUT10", "OUT11",
)  # fmt: skip
_MIDDLE = 6  # the place of M00

PRESETS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "INS": _OF_PRESETS[:3],
        "IND": _OF_PRESETS[3:6],
        "INALL": _OF_PRESETS[:6],
        "MIDD": _OF_PRESETS[3:11],
        "OUTD": _OF_PRESETS[7:11],
        "OUTS": _OF_PRESETS[11:],
        "OUTALL": _OF_PRESETS[7:],
    }
)
"""The blocks that act in each preset of "LoRA Block Weight" (https://github.com/hako-mikan/sd-webui-lora-block-weight)."""


def is_community(name: str) -> bool:
    """Tell whether a block is named by the numbers of the community, which name blocks that smaller networks lack.

    Args:
        name: Such as IN05, M00 or OUT11.

    Returns:
        Whether it is.
    """
    return _COMMUNITY.fullmatch(name) is not None


def _paths(name: str) -> tuple[str, ...]:
    """The modules that a name means, each with all that is in it.

    The numbers are those of the original UNet, ``input_blocks`` and ``output_blocks``.
    """
    if short := _SHORT.fullmatch(name):
        return (f"{short[1]}_block{'' if short[1] == 'mid' else 's'}{short[2] or ''}",)
    found = _COMMUNITY.fullmatch(name)
    if found is None:
        return (name,)
    side, number = found[1].upper(), int(found[2])
    if side == "M":
        return ("mid_block",)
    if side == "IN" and number == 0:
        return ("conv_in",)
    block, layer = divmod(number - 1 if side == "IN" else number, _LAYERS)
    place = f"{'down' if side == 'IN' else 'up'}_blocks.{block}"
    if side == "IN" and layer == _LAYERS - 1:
        return (f"{place}.downsamplers",)
    resized = (f"{place}.upsamplers",) if side == "OUT" and layer == _LAYERS - 1 else ()
    return (f"{place}.resnets.{layer}", f"{place}.attentions.{layer}", *resized)


@lru_cache(maxsize=64)
def _under(blocks: tuple[str, ...]) -> Mapping[str, Sequence[str]]:
    """By the path of a module the blocks in it, itself too. There is one for each layer of a network, and names as many."""
    found: dict[str, list[str]] = {}
    for block in blocks:
        for end in (*(place for place, letter in enumerate(block) if letter == "."), len(block)):
            found.setdefault(block[:end], []).append(block)
    return found


def weighed(wanted: Mapping[str, object], blocks: Sequence[str]) -> dict[str, str]:
    """Find the name by which each block is meant: the one that says most of its path.

    Args:
        wanted: Names of blocks, as a person gives them.
        blocks: Those of a component.

    Returns:
        A name of ``wanted`` by block; nothing for a block that none means.
    """
    meant: dict[str, tuple[int, str]] = {}
    under = _under(tuple(blocks))
    for name in wanted:
        for path in _paths(name) if isinstance(name, str) else ():  # whatever a person puts in a table
            for block in under.get(path, ()):
                if meant.get(block, (0, ""))[0] <= len(path):
                    meant[block] = (len(path), name)
    return {block: name for block, (_, name) in meant.items()}


def holder(name: str, wanted: Container[str]) -> str | None:
    """Find the name of a block that a block or a layer is, or lies in.

    Args:
        name: Its own name.
        wanted: Names of blocks, as networks have them.

    Returns:
        The longest; None where there is none.
    """
    while name and name not in wanted:
        name = name.rpartition(".")[0]
    return name or None


def unknown(wanted: Mapping[str, object], blocks: Sequence[str]) -> list[str]:
    """List the names that mean no block.

    Args:
        wanted: Names of blocks, as a person gives them.
        blocks: Those of all components.

    Returns:
        The names. Of the community's numbers, which are the same for networks of several sizes, one must mean a block.
    """
    lost = [name for name in wanted if not weighed({name: 1}, blocks)]
    return lost if len(lost) == len(wanted) else [name for name in lost if not is_community(name)]


def shown(blocks: Sequence[str]) -> str:
    """List blocks in words.

    Args:
        blocks: Their names.

    Returns:
        The names of the larger ones, which hold the others.
    """
    large = dict.fromkeys(".".join(block.split(".")[:2]) for block in blocks)
    return ", ".join(name for name in large if name.rpartition(".")[0] not in large)
