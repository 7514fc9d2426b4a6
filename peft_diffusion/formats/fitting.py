"""Which base a file was made for, where none is at hand: the skeleton that its sites and shapes fit."""

from collections.abc import Iterator
from pathlib import Path

from torch import nn

from ..bases import components
from ..bases import family as families
from ..bases.base import Skeleton
from ..bases.embedded import ICONS, TINY_LM
from ..bases.skeleton import PUBLISHED, published, skeleton
from ..core.errors import UserError
from ..core.method import Method
from . import metadata
from .file import paths_by_name
from .origin import NOT_RUN, origin
from .planning import Plan, SitePlan, some

_NAMES = (*PUBLISHED, ICONS, TINY_LM)
_CONV_IN = "conv_in"
_OF_INPAINTING = 9  # channels that the UNet of an inpainting base takes


def fitting(found: Plan, base: str | Path | None = None) -> Skeleton:
    """Choose the skeleton that the adapters of a file can be built on.

    Args:
        found: The file.
        base: Its base as a person names it: see `bases.skeleton.skeleton`. None: by what the file says of its base, by
            the sites that it names and by the shapes of the weights that it changes.

    Returns:
        The skeleton, for ``formats.file.load``.

    Raises:
        UserError: The base that is named cannot be used, or none is and the file fits no architecture that is known.
    """
    if base is not None:
        return skeleton(base)
    best: tuple[int, int] = (0, 0)
    chosen: Skeleton | None = None
    whole = sum(bool(one.methods) for _, _, one in found.each())
    if not whole:
        raise found.is_none()
    for name in _candidates(found):
        one = _of_name(name, found)
        fit = _fit(found, one)
        if fit > best:
            best, chosen = fit, one
        if fit == (whole, whole):
            break
    if chosen is None:
        told = origin(found.header)
        if told.name in NOT_RUN:
            raise UserError(
                f"{found.path} is for {told.name}, told by {told.why}; this package runs none of that: inspect tells"
                " what the file holds, and metadata what it says of itself"
            )
        raise UserError(
            f"{found.path}: its sites ({some([f'{part}.{name}' for part, name, _ in found.each()])}) and their shapes are"
            f" those of no base that is known without its files ({', '.join(_NAMES)}); give the base, of which only the"
            " configurations are read, with --base"
        )
    return chosen


def _of_name(name: str, found: Plan) -> Skeleton:
    kind = next((one for one in PUBLISHED if one == name), None)
    if kind is None:
        return skeleton(name)
    first = found.sites.get("unet", {}).get(_CONV_IN)
    shapes = [] if first is None else [method.weight_shape(first.shapes) for method in first.methods]
    return published(kind, any(shape[1:2] == (_OF_INPAINTING,) for shape in shapes))


def _candidates(found: Plan) -> Iterator[str]:
    """The names of skeletons, those first that the file itself names."""
    told = metadata.base_of(found.spec, found.header.metadata)
    named = [one for one in _NAMES if told.get("name") == one]
    same = [one for one in PUBLISHED if told.get("family") == one]
    yield from dict.fromkeys((*named, *same, *_NAMES))


def _fit(found: Plan, base: Skeleton) -> tuple[int, int]:
    """How many sites of a file are in a base with weights of their shapes, and how many are named as in its family."""
    rows = {one.name: one for one in families.find(base.info.family).components}
    fits = named = 0
    for component, module in components(base).items():
        paths = paths_by_name(component, module)
        for held, name, one in found.each():
            place = one.sources[0].place if one.sources else None
            if not one.methods or place is None or name not in paths or component not in (held, *place.others):
                continue
            if _has_shape(module.get_submodule(paths[name]), one):
                fits += 1
                row = rows.get(component)
                named += row is not None and (not place.stem.startswith("lora_") or place.stem.startswith(row.kohya))
    return fits, named


def _has_shape(site: nn.Module, one: SitePlan) -> bool:
    """Whether what a file holds for a site does not contradict the shape of its weight."""
    weight = getattr(site, "weight", None)
    if weight is None:
        return True
    own = _bare(tuple(weight.shape))
    for method in one.methods:
        if method.embedding is not None and _vectors_width(method, one) not in (None, own[-1]):
            return False
        shape = method.weight_shape(one.shapes)
        if shape and _bare(shape) != own:
            return False
    return True


def _vectors_width(method: type[Method], one: SitePlan) -> int | None:
    shape = one.shapes.get(method.embedding[0]) if method.embedding is not None else None
    return shape[-1] if shape else None


def _bare(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without a kernel of one: a Linear and such a convolution have the same weights."""
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape
