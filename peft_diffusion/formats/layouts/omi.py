"""The names of the Open Model Initiative, which OneTrainer writes where it is asked to.

``unet.<path of the original>.lora_down.weight``, ``clip_l.<path>`` and ``clip_g.<path>``, with dots; the tensors are those
of kohya's layout, and new words stand in a bundle. See ``modules/util/convert/lora`` of OneTrainer. Names that end as those
of diffusers or ComfyUI do are read as the layouts ``original`` and ``diffusers`` read them, the others here.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import ClassVar

from ...bases import family as families
from ...core.errors import UserError
from ..aliases import aliases
from ..container import Header
from ..layout import Content, Layout, Place, Reading, Written, register
from ..names import Rows, known_rows, with_text_model
from . import kohya, original


class Omi(Layout):
    """The original's paths with their dots, for the UNet."""

    name: ClassVar[str] = "omi"

    def claims(self, name: str) -> int | None:
        """Names that begin with a component and end as in kohya's layout alone."""
        found = None if aliases().parts(name) is not None else _parts(name)
        return None if found is None else len(found[0])

    def read(self, header: Header, names: Sequence[str]) -> Reading:
        """By the names alone."""
        places: dict[str, Place] = {}
        for name in names:
            if (found := _parts(name)) is not None:
                start, component, suffix = found
                site = name[len(start) : -len(suffix) - 1]
                places[name] = Place(component, site, suffix, stem=start + site)
        return Reading(places)

    def write(self, content: Content) -> Written:
        """What kohya's layout says too, where the initiative has names for the components."""
        kohya.refuse_own(self.name, content)
        starts = {component: start for start, component in _starts(known_rows()).items()}
        unknown = next((component for component in content.adapters if component not in starts), None)
        if unknown is not None:
            raise UserError(f"the layout {self.name!r} has no name for {unknown}; take the layout {kohya.Kohya.name!r}")
        denoises = any(families.role_of(component) == "denoiser" for component in content.adapters)
        spelled = original.spelling(content) if denoises else with_text_model
        return kohya.write(content, lambda component, path: starts[component] + spelled(component, path), words_alone=False)


@cache
def _starts(known: Rows) -> Mapping[str, str]:
    """The components by what names begin with."""
    return {f"{one.omi}.": one.name for one in families.components().values() if one.omi}


def _parts(name: str) -> tuple[str, str, str] | None:
    """What a name begins with, the component that this means, and the suffix; None for a name of another layout."""
    starts = _starts(known_rows())
    if not name.startswith(tuple(starts)):  # asked for the names of all layouts
        return None
    start = next(start for start in starts if name.startswith(start))
    suffix = max((one for one in aliases().own if name.endswith(f".{one}")), key=len, default=None)
    if suffix is None or len(name) <= len(start) + len(suffix) + 1:
        return None
    return start, starts[start], suffix


register(Omi())
