"""``peft-diffusion runs``: the runs that there are, two of them side by side, and ``runs export``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cyclopts import App
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from ..core.errors import UserError
from ..core.settings import PARAMETERS, Flag, explained, setting, settle
from ..training.record.run_record import Record, differing, find, only
from .app import RUNS_COMMANDS
from .flags import reads
from .screen import Screen
from .terminal import say

_COLOURS = {"finished": "green", "running": "cyan", "stopped": "yellow", "failed": "red"}


@explained
@dataclass(frozen=True)
class RunsConfig:
    """Which runs to show."""

    folders: tuple[Path, ...] = setting(
        (Path("runs"),),
        "A folder of run folders, to list them; or two run folders, to compare them.",
        PARAMETERS,
        flag=Flag(negative=True),
    )
    html: Path | None = setting(
        None,
        "With two run folders: write their curves and previews side by side into this page.",
        PARAMETERS,
    )

    def __post_init__(self) -> None:
        settle(self)


@reads(RunsConfig)
def runs(config: RunsConfig) -> None:
    """List the runs of a folder, or compare two runs.

    Nothing is loaded: the run folders tell all of it. `report.html` in each of them tells more.
    """
    folders = config.folders
    if len(folders) > 2:
        raise UserError(f"{len(folders)} folders were given: name one to list its runs, or two run folders to compare them")
    if len(folders) == 1 and config.html is not None:
        raise UserError("--html shows two runs side by side; name two run folders")
    if len(folders) == 2:
        _compare(only(folders[0]), only(folders[1]), config.html)
    else:
        _list(find(folders[0]), folders[0])


def _list(records: Sequence[Record], folder: Path) -> None:
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


def _compare(first: Record, second: Record, html: Path | None) -> None:
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


command = App(name="runs")
command.default(runs)
command.command("peft_diffusion.cli.export:export", name="export", help=RUNS_COMMANDS["export"])
