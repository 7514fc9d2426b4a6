"""``report.html``: a run as one page that needs nothing else, made anew from what the run folder holds. Imports no torch."""

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from ...core.files import write_bytes
from . import charts
from .run_record import PATHS, PLACES, PREVIEW, PREVIEWS, THUMBNAILS, Curve, Record, differing, shown

NAME = "report.html"
_ROWS = 12  # of previews; of more, evenly spread ones are shown
_SIDE = 256  # pixels of a preview in the page
_LAYERS = 40  # bars; the others stand in a table
_LETTERS = 400  # of a value


@dataclass(frozen=True)
class Row:
    """The previews of a step, as addresses that hold the picture; None where one is missing."""

    label: str
    pictures: list[str | None]
    kept: bool


@dataclass(frozen=True)
class Setting:
    """A setting as it is, and what the preset says where that is something else."""

    name: str
    value: str
    default: str | None


def write(folder: Path) -> Path:
    """Write the page of a run folder.

    Args:
        folder: The run folder.

    Returns:
        The file.

    Raises:
        UserError: The disk refuses.
    """
    path = folder / NAME
    write_bytes(path, page(Record(folder)).encode())
    return path


def page(record: Record) -> str:
    """Make the page of a run.

    Args:
        record: The run.

    Returns:
        HTML.
    """
    kept = record.figures.get("kept_step")
    layers = record.changes
    return render(
        "report.html",
        {
            "record": record,
            "title": record.name,
            "text": record.command.startswith("text"),
            "tiles": tiles(record),
            "warnings": [*record.facts.get("warnings", []), *record.damage],
            "verdict": record.figures.get("warning"),
            "charts": curves(record),
            "previews": previews(record),
            "prompts": record.facts.get("prompts", []),
            "layers": charts.bars(dict(list(layers.items())[:_LAYERS]), "change of each layer") if layers else "",
            "more_layers": {name: charts.written(value, "percent") for name, value in list(layers.items())[_LAYERS:]},
            "settings": settings(record),
            "items": _items(record),
            "hidden_items": len(record.data) - len(shown(len(record.data))),
            "commands": record.facts.get("commands", {}),
            "said": record.facts.get("said", []),
            "kept": kept,
        },
    )


def compared(first: Record, second: Record) -> str:
    """Make a page of two runs side by side, their curves on the same axes.

    Args:
        first: A run.
        second: Another.

    Returns:
        HTML.
    """
    records = [first, second]
    limits: dict[str, tuple[float, float]] = {}
    for name in ("loss", "leakage", "memorised", "nearest"):
        drawn = [curve for record in records for curve in _curves(record)[name] if curve.points]
        if drawn:
            limits[name] = charts.room_for(drawn)
    end = max((record.step for record in records), default=1)
    return render(
        "compare.html",
        {
            "title": " / ".join(record.name for record in records),
            "records": records,
            "differing": [(name, [_plain(value, name) for value in values]) for name, values in differing(records).items()],
            "tiles": [tiles(record) for record in records],
            "charts": [curves(record, limits, end) for record in records],
            "previews": [previews(record) for record in records],
            "prompts": [record.facts.get("prompts", []) for record in records],
        },
    )


def tiles(record: Record) -> list[tuple[str, str, str]]:
    """List the figures of a run.

    Args:
        record: The run.

    Returns:
        A label, the value, and a remark that may be empty.
    """
    figures, about = record.figures, record.facts.get("about", {})
    before, after = record.before, record.after
    change = f"{after / before - 1:+.1%} from {before:.4g}" if before and after else "nothing is kept apart"
    found = [("loss on unseen", f"{after:.4f}" if after is not None else "-", change)]
    if figures.get("suggested_strength") is not None:
        found.append(("suggested strength", f"{figures['suggested_strength']:g}", "lowest loss on unseen"))
    kept = figures.get("kept_step")
    planned = record.config.get("steps")
    done = f"{record.step} of {planned}" if planned and planned != record.step else f"{record.step}"
    found.append(("steps", done, f"written: those of step {kept}" if kept is not None and kept != record.step else ""))
    if about.get("parameters"):
        found.append(("parameters", f"{about['parameters']:,}", str(about.get("layers", ""))))
    if record.seconds is not None:
        found.append(("time", _seconds(record.seconds), ""))
    if figures.get("memory"):
        found.append(("peak memory", f"{figures['memory'] / 2**20:,.0f} MiB", str(figures.get("memory_of", ""))))
    if about.get("base"):
        found.append(("base", str(about["base"]), f"fingerprint {about.get('fingerprint', '-')}"))
    return found


def curves(
    record: Record, limits: Mapping[str, tuple[float, float]] | None = None, end: float | None = None
) -> list[tuple[str, str, list[tuple[charts.Look, str]], Markup]]:
    """Draw the charts of a run.

    Args:
        record: The run.
        limits: Those of the axes, by chart.
        end: The last step of the axis of steps.

    Returns:
        Heading, explanation, the look and name of each curve, and the drawing.
    """
    text = record.command.startswith("text")
    told: dict[str, tuple[str, str]] = {
        "loss": ("Loss", "nats per token" if text else "how far predicted noise is from the true one; lower is better"),
        "leakage": (
            "Leakage",
            "how far the answers to words without the trigger moved from the base's: what the adapter changes unasked",
        ),
        "memorised": (
            "Memorisation",
            "how much further the loss fell on what is trained on than on what is not: learned by heart, not understood",
        ),
        "nearest": (
            "Nearest picture",
            "how near the previews are to training pictures, as many times as these are to one another; near 0 is a copy",
        ),
    }
    kept = record.figures.get("kept_step")
    found = []
    for name, own in _curves(record).items():
        form: charts.Format = "number" if name in ("loss", "nearest") or (text and name == "leakage") else "percent"
        drawn = charts.lines(own, told[name][0], form, kept, (limits or {}).get(name), end)
        if drawn:
            found.append((*told[name], [(curve.look, curve.name) for curve in own if curve.points], drawn))
    return found


def _curves(record: Record) -> dict[str, list[charts.Curve]]:
    losses = record.curve("loss")
    return {
        "loss": [
            charts.Curve("training, each step", losses, "faint"),
            charts.Curve("training, running mean", charts.running(losses), "first"),
            charts.Curve("unseen", record.unseen, "second", dots=True),
        ],
        "leakage": [_alone("leakage", record.curve("leakage"))],
        "memorised": [_alone("memorisation", record.memorised)],
        "nearest": [_alone("previews", record.nearest)],
    }


def _alone(name: str, points: Curve) -> charts.Curve:
    return charts.Curve(name, points, "second", dots=True)


def previews(record: Record) -> list[Row]:
    """List the previews in time order, the base's first.

    Args:
        record: The run.

    Returns:
        One row a step.
    """
    rows: dict[int, dict[int, Path]] = {}
    for path in sorted((record.path / PREVIEWS).glob("*.png")):
        if match := PREVIEW.fullmatch(path.name):
            rows.setdefault(int(match[1] or 0), {})[int(match[2])] = path
    steps = sorted(rows)
    if len(steps) > _ROWS:
        steps = [steps[round(place * (len(steps) - 1) / (_ROWS - 1))] for place in range(_ROWS)]
    columns = max((max(row) + 1 for row in rows.values()), default=0)
    kept = record.figures.get("kept_step")
    return [
        Row(
            f"step {step}" if step else "base",
            [picture(rows[step][column]) if column in rows[step] else None for column in range(columns)],
            step == kept,
        )
        for step in steps
    ]


def picture(path: Path) -> str | None:
    """Make an address that holds a picture, no larger than a page needs.

    Args:
        path: The picture.

    Returns:
        The address; None where it cannot be read.
    """
    try:
        found = path.stat()
        return _encoded(path, (found.st_ino, found.st_mtime_ns, found.st_size))
    except Exception:  # as decoders meet damage
        return None


@lru_cache(maxsize=256)
def _encoded(path: Path, version: tuple[int, int, int]) -> str:
    """The address of a picture, made once for each version of its file: a run writes its page with every checkpoint."""
    with Image.open(path) as file:
        return inlined(file, _SIDE)


def inlined(image: Image.Image, side: int) -> str:
    """Make an address that holds a picture.

    Args:
        image: The picture.
        side: The most pixels of its longer side.

    Returns:
        The address.
    """
    small = image.convert("RGB")
    small.thumbnail((side, side))
    data = io.BytesIO()
    small.save(data, "WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"


def settings(record: Record) -> tuple[list[Setting], list[Setting]]:
    """List the settings of a run.

    Args:
        record: The run.

    Returns:
        Those that are not the preset's, and the others.
    """
    changed = record.changed()
    own, usual = [], []
    for name, value in record.config.items():
        default = changed.get(name)
        if default is None or name in PLACES:
            usual.append(Setting(_flag(name), _plain(value, name), None))
        else:
            own.append(Setting(_flag(name), _plain(value, name), _plain(default[1], name)))
    return own, usual


def _items(record: Record) -> list[tuple[str, str, str | None]]:
    """Name, caption and thumbnail of what was learned from, spread over all of it."""
    found = []
    for place in shown(len(record.data)):
        item, path = record.data[place], record.path / THUMBNAILS / f"{place:06}.webp"
        found.append((str(item.get("name", "")), str(item.get("caption", "")), picture(path) if path.exists() else None))
    return found


def _plain(value: Any, name: str) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(_plain(one, name) for one in value) or "none"
    if value is None or value == "":
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    words = Path(value).name if name in PATHS and isinstance(value, str) else str(value)  # a report is made to be sent
    return words if len(words) <= _LETTERS else f"{words[:_LETTERS]}…"


def _flag(name: str) -> str:
    return name.replace("_", "-")


def _seconds(value: float) -> str:
    if value < 120:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"


@cache
def _environment() -> Environment:
    """The templates, which are compiled once: a run writes its page with every checkpoint."""
    places = FileSystemLoader(Path(__file__).parent / "templates")
    # Captions and names are anybody's words: nothing is markup unless it was made as such here.
    return Environment(loader=places, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def render(template: str, values: Mapping[str, object]) -> str:
    """Fill a template in.

    Args:
        template: A file of ``templates``.
        values: By the names that it uses.

    Returns:
        HTML.
    """
    return _environment().get_template(template).render(values)
