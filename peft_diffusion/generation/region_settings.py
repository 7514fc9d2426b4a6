"""A region of a picture, as ``--region`` and ``[[region]]`` say it. Imports no torch."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ..core.errors import UserError
from ..core.settings import NATURAL, PARAMETERS, OptionalPath, Texts, explained, setting, settings_class, settle

if TYPE_CHECKING:
    from ..core.settings import _Taken

    Floats: TypeAlias = _Taken[tuple[float, ...], float | Sequence[float]]
else:
    Floats = tuple[float, ...]

FEATHER = 0.05
"""How wide the edges of regions are, where nothing is said."""
ISOLATED_SUBJECTS = 0.3
"""How long regions with adapters of their own do not attend to each other, where nothing is said."""
_COLOR = re.compile(r"#[0-9a-fA-F]{6}")


@explained
@settings_class()
class Region:
    """A part of a picture with a prompt and adapters of its own. A box, a mask or a colour says where it is.

    Raises:
        UserError: It is nowhere, in two ways at once, or a box is none.
    """

    _: KW_ONLY
    box: Floats = setting(
        (),
        "Left, top, right and lower edge: from 0 to 1 in shares of the picture's sides, or in pixels.",
        PARAMETERS,
        NATURAL,
    )
    mask: OptionalPath = setting(
        None,
        "A picture that is white in the region, and black elsewhere; it is brought to the size of what is drawn.",
        PARAMETERS,
    )
    painted: OptionalPath = setting(
        None, "A picture in which regions are painted in colours; color says which of them is this one.", PARAMETERS
    )
    color: str = setting("", "The colour of the region in the painted picture, as #ff0000.", PARAMETERS)
    prompt: str | None = setting(
        None,
        "What the region shows; by default what the whole picture does. It may name adapters, as <lora:NAME:0.8>.",
        PARAMETERS,
    )
    adapter: Texts = setting(
        (),
        "An adapter that acts in the region, as --adapter takes it, by its file or by the name of one given; outside it has "
        "the strength that --adapter gives it, or none. Give it again for more.",
        PARAMETERS,
    )

    def __post_init__(self) -> None:
        settle(self)
        said = [name for name in ("box", "mask", "painted") if getattr(self, name)]
        if len(said) != 1:
            told = f"{' and '.join(said)} at once" if said else "nothing that says where it is"
            raise UserError(f"a region has {told}; give box, mask, or painted with its color, one of them")
        if self.painted is not None and not _COLOR.fullmatch(self.color):
            raise UserError(f"a painted region has the colour {self.color!r}; say which it is, with a color as #ff0000")
        if self.painted is None and self.color:
            raise UserError("color is of a painted picture; give that too, as painted")
        if self.box:
            self._check_box()

    def _check_box(self) -> None:
        box = tuple(self.box)
        if len(box) != 4 or box[0] >= box[2] or box[1] >= box[3]:
            raise UserError(f"box {','.join(f'{one:g}' for one in box)} is none: left, top, right, bottom, as 0,0,0.5,1")
        if max(box) > 1 and any(one != int(one) for one in box):
            raise UserError(f"box {','.join(f'{one:g}' for one in box)} mixes pixels and shares; give all of one kind")

    def check(self) -> None:
        """Find out what can be told without the base.

        Raises:
            UserError: A picture is missing.
        """
        for path in (self.mask, self.painted):
            if path is not None and not Path(path).is_file():
                raise UserError(f"there is no picture {path} of a region")


def says_of_edges(feather: float, isolation: float | None) -> bool:
    """Tell whether anything is said of the edges of regions, which has no effect where there are none.

    Args:
        feather: How wide they are.
        isolation: How long regions do not attend to each other; None where nothing is said.

    Returns:
        Whether either is another than where nothing is said.
    """
    return feather != FEATHER or isolation not in (None, 0.0)


def check_compose(compose: str) -> None:
    """See that adapters meet so that regions can say where.

    Args:
        compose: How they meet.

    Raises:
        UserError: They meet otherwise than by adding.
    """
    if compose != "add":
        raise UserError(f"regions say where adapters meet, so --compose {compose} has no place; leave one away")


if TYPE_CHECKING:
    _Given = Region | str | Mapping[str, Any]
    Regions: TypeAlias = _Taken[tuple[Region, ...], _Given | Sequence[_Given]]
else:
    Regions = tuple[Region, ...]
