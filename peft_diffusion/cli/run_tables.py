"""Tables of runs, for ``peft-diffusion runs``."""

from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from ..core.errors import UserError
from ..training.record.run_record import Record, differing
from .screen import Screen
from .terminal import say

_COLOURS = {"finished": "green", "running": "cyan", "stopped": "yellow", "failed": "red"}


def show_list(records: Sequence[Record], folder: Path) -> None:
    """Print a table of runs.

    Args:
        records: The runs.
        folder: Where they lie.
    """
    # Narrow enough for ten columns in 80 letters: names are folded before numbers are.
    title = Text(str(folder), style="bold")
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0, show_edge=False)
    for name in ("run", "state", "base", "method"):
        table.add_column(name, overflow="fold", no_wrap=name == "state")
    for name in ("rank", "steps", "unseen\nloss", "after", "best\nstep", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    for record in records:
        table.add_row(*_row(record, folder))
    damage = [f"{_within(record, folder)}: {what}" for record in records for what in record.damage]
    console = Screen()
    console.show(table)
    for line in damage:
        console.print(Text(line, style="yellow"), soft_wrap=True)


def _within(record: Record, folder: Path) -> str:
    """What a list calls a run: its place in the folder that is listed."""
    within = record.path.relative_to(folder)
    return record.name if within == Path() else str(within)


def _row(record: Record, folder: Path) -> list[Text]:
    """The cells of a run; one that cannot be read has but a few."""
    name = Text(_within(record, folder))
    try:
        state = Text(record.state, style=_COLOURS[record.state])
        return [name, state, *map(Text, (_base(record), record.method, *_numbers(record)))]
    except UserError:
        return [name, Text("damaged", style="red"), Text("cannot be read")]


def _base(record: Record) -> str:
    return str(record.facts.get("about", {}).get("base") or record.config.get("base", "?"))


def _numbers(record: Record) -> list[str]:
    """Rank, steps, losses on what is kept apart, the best step and seconds."""
    planned = record.config.get("steps")
    steps = str(record.step) if planned in (None, record.step) else f"{record.step}/{planned}"
    unseen = {step: loss for step, loss in record.unseen if step}
    best = min(unseen, key=lambda step: unseen[step], default=None)
    seconds = record.seconds
    return [
        str(record.config.get("rank", "-")),
        steps,
        "-" if record.before is None else f"{record.before:.4f}",
        "-" if record.after is None else f"{record.after:.4f}",
        "-" if best is None else str(best),
        "-" if seconds is None else f"{seconds:.0f}",
    ]


def show_compared(first: Record, second: Record, html: Path | None) -> None:
    """Print two runs side by side.

    Args:
        first: A run.
        second: The other.
        html: The page that is written of both; None for none.
    """
    records = (first, second)
    console = Screen()
    settings = differing(records)
    console.print(_table("settings that differ", records, {name: [str(v) for v in own] for name, own in settings.items()}))
    labels = ("rank", "steps", "unseen loss before", "unseen loss after", "best step", "seconds")
    columns = [_numbers(record) for record in records]
    figures: dict[str, list[str]] = {
        "state": [record.state for record in records],
        "base": [_base(record) for record in records],
    }
    figures |= {label: [column[place] for column in columns] for place, label in enumerate(labels)}
    figures["suggested strength"] = [str(record.figures.get("suggested_strength", "-")) for record in records]
    console.print(_table("figures", records, figures))
    for record in records:
        if record.figures.get("warning"):
            console.print(Text(f"{record.name}: {record.figures['warning']}", style="yellow"), soft_wrap=True)
    if html is not None:
        from ..core.files import explained, write_bytes
        from ..training.record.report import compared

        with explained(html):
            html.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(html, compared(first, second).encode())
        say(html)


def _table(title: str, records: Sequence[Record], rows: dict[str, list[str]]) -> Table:
    table = Table(title=Text(title, style="bold"), title_justify="left")
    table.add_column("", style="cyan", no_wrap=True)
    for record in records:
        table.add_column(Text(record.name), overflow="fold")
    for name, values in rows.items():
        table.add_row(name.replace("_", "-") if title != "figures" else name, *(Text(value) for value in values))
    if not rows:
        table.add_row("none", *("" for _ in records))
    return table
