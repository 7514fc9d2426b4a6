"""Files of a report on adapters: JSON, or heat maps with a column for each layer."""

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from ..core.errors import UserError
from ..core.files import write_bytes
from .on_activations import Acting, Conflict
from .overlap import BlendReport, PairOverlap, Size

T = TypeVar("T", Size, PairOverlap, Acting, Conflict)
_Row = tuple[str, Sequence[float | None]]


def write(path: Path, report: BlendReport) -> None:
    """Write a report.

    Args:
        path: A file that ends in .json, or in .png, .svg or .pdf for heat maps.
        report: The report.

    Raises:
        UserError: The file cannot be written, or there is nothing to draw.
    """
    if path.suffix.lower() == ".json":
        write_bytes(path, (json.dumps(report.as_json(), indent=1) + "\n").encode())
    else:
        write_bytes(path, _drawn(report, path.suffix.lower().removeprefix(".")))


def _drawn(report: BlendReport, kind: str) -> bytes:
    """Heat maps of all figures by layer, with the names of blocks where these begin. Raises UserError for no layer."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    every: tuple[Size | Acting, ...] = (*report.sizes, *report.acting)
    layers = list(dict.fromkeys((one.component, one.block, one.site) for one in every))
    if not layers:
        raise UserError("--report: the adapters change no weights, so there is nothing to draw; write .json")
    maps = {
        "change against the weight": _rows(report.sizes, layers, lambda one: one.adapter, lambda one: one.relative),
        "what is added against the output": _rows(report.acting, layers, lambda one: one.adapter, lambda one: one.relative),
        "cosine of both changes": _rows(report.overlaps, layers, _both, lambda one: one.cosine),
        "overlap of what both read": _rows(report.overlaps, layers, _both, lambda one: one.reads),
        "overlap of what both write": _rows(report.overlaps, layers, _both, lambda one: one.writes),
        "cosine of what both add to the output": _rows(report.conflicts, layers, _both, lambda one: one.cosine),
    }
    maps = {title: rows for title, rows in maps.items() if rows}
    figure = Figure(figsize=(max(8.0, min(40.0, len(layers) / 8)), 2 + 1.6 * len(maps)), layout="constrained")
    FigureCanvasAgg(figure)
    starts = [at for at, layer in enumerate(layers) if not at or layer[:2] != layers[at - 1][:2]]
    for number, (title, rows) in enumerate(maps.items(), 1):
        axes = figure.add_subplot(len(maps), 1, number)
        values = [[float("nan") if value is None else value for value in row] for _, row in rows]
        signed = title.startswith("cosine")
        least, most, colours = (-1, 1, "RdBu_r") if signed else (0, None, "viridis")
        picture = axes.imshow(values, aspect="auto", interpolation="nearest", vmin=least, vmax=most, cmap=colours)
        figure.colorbar(picture, ax=axes)
        axes.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=7)
        last = number == len(maps)
        labels = [f"{layers[at][0]} {layers[at][1]}" if last else "" for at in starts]
        axes.set_xticks(starts, labels, rotation=90, fontsize=7)
        axes.set_title(title, fontsize=9)
    drawn = io.BytesIO()
    figure.savefig(drawn, format=kind, dpi=110)
    return drawn.getvalue()


def _both(one: PairOverlap | Conflict) -> str:
    return f"{one.first} x {one.second}"


def _rows(
    found: Sequence[T],
    layers: Sequence[tuple[str, str, str]],
    name: Callable[[T], str],
    value: Callable[[T], float | None],
) -> list[_Row]:
    """A row for each adapter or pair, of a value for each layer; None where it has none there."""
    known = {(name(one), (one.component, one.block, one.site)): value(one) for one in found}
    return [(of, [known.get((of, layer)) for layer in layers]) for of in dict.fromkeys(name(one) for one in found)]
