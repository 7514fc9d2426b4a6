"""How much an adapter changes at each site: the norms of its changes, as numbers and as a picture."""

import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter, method_of, parts_of
from ..core.errors import FoldError, UserError, first_line
from ..core.files import write_bytes
from ..core.meta import shapes_alone
from ..core.weight_change import change_of
from ..formats import Plan
from ..formats.planning import SitePlan

if TYPE_CHECKING:
    from .sources import Source, Where

_PICTURES = (".png", ".svg", ".pdf")
_COLOURS = ("#2171b5", "#d94801", "#238b45", "#6a51a3")


@dataclass(frozen=True)
class Norm:
    """What an adapter does at a site, at strength 1.

    Attributes:
        component: Its component.
        site: Its name, with underscores.
        methods: What changes it.
        weight: The Frobenius norm of the change of the weight; None where it has none, or only the base tells it.
        bias: The norm of the change of the bias; None where it has none.
        note: Why there is no norm of the weight; "" where there is one.
    """

    component: str
    site: str
    methods: tuple[str, ...]
    weight: float | None
    bias: float | None
    note: str = ""


def norms(found: Plan, base: str | None = None) -> tuple[Norm, ...]:
    """Measure the changes of an adapter file.

    Args:
        found: The file. All that it holds is read.
        base: Its base, as `ConvertConfig.base`; None: by what the file holds.

    Returns:
        The norms of each site, in the order of the file. Those of a method whose change depends on the base's weight, as of
        a DoRA, are known where the base is named with its weights.

    Raises:
        UserError: The file is damaged or was changed since it was planned, or the base that is named cannot be used.
    """
    tensors = found.tensors()
    sites = [(component, name, one) for component, name, one in found.each() if one.methods]
    shown = all(method.weight_shape(one.shapes) for _, _, one in sites for method in one.methods)
    source, places = (None, {}) if shown and base is None else _opened(found, base)  # which takes a moment
    measured = []
    for component, name, one in sites:
        where = places.get(one.sources[0].name)
        read = partial(_alone, one, tensors) if source is None or where is None else partial(_bound, source, where)
        measured.append(_norm(component, name, tuple(method.name for method in one.methods), read))
    return tuple(measured)


def _opened(found: Plan, base: str | None) -> "tuple[Source | None, Mapping[str, Where]]":
    """The file on the base that is named or that it fits, and by its tensors' names the sites there."""
    from .sources import open_sources  # with all that makes bases, which takes seconds

    try:
        (source,), _ = open_sources([found], base, lambda _: None)
    except UserError:
        if base is not None:
            raise
        return None, {}
    return source, {one.name: where for where, site in source.bound.sites.items() for one in site.plan.sources}


_Parts = list[tuple[Adapter, nn.Module]]
"""The adapters of a site, one of each method, and the module that each is for."""


def _bound(source: "Source", where: "Where") -> _Parts:
    """Those of a site of a base."""
    module = source.module(where)
    return [(part, module) for part in parts_of(source.adapter(where, module))]


def _alone(one: SitePlan, tensors: Mapping[str, Tensor]) -> _Parts:
    """Those of a site of which nothing but the file is known. Raises UserError where that does not tell the change."""
    if any(source.place.piece for source in one.sources):
        raise UserError("is no change of a weight")
    if any(source.place.whole for source in one.sources):
        raise UserError("is the weight itself and not its change, which only the base tells: name it with --base")
    values = {suffix: torch.tensor(value) for suffix, value in one.constants.items()}
    for source in one.sources:
        tensor, change = tensors[source.name], source.place.change
        values[source.place.suffix] = tensor if change is None else change(tensor)
    found = []
    for method in one.methods:
        own = {suffix: tensor for suffix, tensor in values.items() if suffix in method.suffixes}
        site = _stand_in(method.weight_shape(one.shapes), own)
        if site is None:
            raise UserError(f"{method.name} is no change of a weight whose shape its tensors tell")
        found.append((method.read(site, own), site))
    return found


@torch.no_grad()
def _norm(component: str, name: str, methods: tuple[str, ...], read: Callable[[], _Parts]) -> Norm:
    weights: list[float] = []
    biases: list[float] = []
    try:
        changes = []
        for part, site in read():
            unsaid = f"{method_of(part)} is no change of a weight"
            changes.append(change_of(part, site, f"{component}.{name}"))
    except FoldError:
        return Norm(component, name, methods, None, None, unsaid)
    except UserError as error:
        return Norm(component, name, methods, None, None, first_line(error))
    for changed in changes:
        if changed.pair is not None:
            down, up = changed.pair.down.double(), changed.pair.up.double()
            weights.append(math.sqrt(max(0.0, float(((up.T @ up) * (down @ down.T)).sum()))))
        elif changed.weight is not None:
            weights.append(float(changed.weight.double().norm()))
        if changed.bias is not None:
            biases.append(float(changed.bias.double().norm()))
    weight, bias = (math.hypot(*found) if found else None for found in (weights, biases))
    return Norm(component, name, methods, weight, bias, "" if weight is not None else "changes no weight")


def _stand_in(shape: tuple[int, ...], own: Mapping[str, Tensor]) -> nn.Module | None:
    """A module without weights that a change of such a shape is one of; None where the shape is not known."""
    with shapes_alone():
        if len(shape) == 2:
            return nn.Linear(shape[1], shape[0])
        if len(shape) == 4:
            return nn.Conv2d(shape[1], shape[0], (shape[2], shape[3]))
        lengths = {tensor.shape[0] for tensor in own.values() if tensor.ndim == 1 and tensor.is_floating_point()}
        return nn.LayerNorm(lengths.pop()) if not shape and len(lengths) == 1 else None


def draw(path: Path, title: str, found: Sequence[Norm]) -> None:
    """Draw the norms of an adapter, a bar for each site, a colour for each component.

    Args:
        path: A file that ends in .png, .svg or .pdf.
        title: What stands above.
        found: The norms.

    Raises:
        UserError: The file has another ending, cannot be written, or there is nothing to draw.
    """
    if path.suffix.lower() not in _PICTURES:
        raise UserError(f"--plot {path}: a plot is a file that ends in {', '.join(_PICTURES)}")
    known = [one for one in found if one.weight is not None]
    if not known:
        raise UserError(f"--plot: no norm of {title} is known without its base")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(8.0, min(40.0, len(known) / 8)), 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, component in enumerate(dict.fromkeys(one.component for one in known)):
        places = [at for at, one in enumerate(known) if one.component == component]
        heights = [known[at].weight or 0.0 for at in places]
        axes.bar(places, heights, width=1.0, color=_COLOURS[number % len(_COLOURS)], label=component)
    starts = _block_starts(known)
    axes.set_xticks([at for at, _ in starts], [name for _, name in starts], rotation=90, fontsize=7)
    axes.set(ylabel="norm of the change", title=title, ylim=(0, None))
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix.lower().removeprefix("."), dpi=110)
    write_bytes(path, picture.getvalue())


def _block_starts(found: Iterable[Norm]) -> list[tuple[int, str]]:
    """Where blocks begin among the sites, and their names: what a site's name holds up to its second number."""
    starts: list[tuple[int, str]] = []
    for at, one in enumerate(found):
        words, block, numbers = one.site.split("_"), [], 0
        for word in words:
            block.append(word)
            numbers += word.isdigit()
            if numbers == 2:
                break
        name = "_".join(block if numbers else words[:2])
        if not starts or starts[-1][1] != name:
            starts.append((at, name))
    return starts
