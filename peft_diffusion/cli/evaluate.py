"""``peft-diffusion evaluate``: adapters measured on pictures that they never saw."""

from typing import TYPE_CHECKING

from ..core.events import Event
from ..evaluation.events import Evaluated
from ..evaluation.judges import JUDGES
from ..evaluation.measured import Evaluation
from ..evaluation.settings import EvaluateConfig
from .commands import reads
from .lean import import_lean
from .progress import GenerationConsole
from .terminal import say

if TYPE_CHECKING:
    from .screen import Screen


@reads(EvaluateConfig)
def evaluate(config: EvaluateConfig) -> None:
    """Measure what adapters do on pictures that they never saw, over strengths, alone and with each other.

    Tells the loss, style, subject and prompt, what changes unasked and what is copied, each with an interval, and how far
    the judge can be trusted. Writes one page with curves and pictures.
    """
    config.check()  # before torch is imported, which takes seconds
    import_lean(config.base, config.quantize, bool(JUDGES[config.judge].model))
    from ..evaluation.evaluate import evaluate as run

    with GenerationConsole("evaluating") as console:
        run(config, observers=[console, _show])


def _show(event: Event) -> None:
    if isinstance(event, Evaluated):
        _tables(event.evaluation)
        say(event.evaluation.report)


def _tables(found: Evaluation) -> None:
    from rich.text import Text

    from ..evaluation import report  # brings jinja2 and the settings of trainings
    from .screen import Screen

    screen = Screen()
    screen.print(Text(f"the judge: {found.trust.judge}", style="bold"))
    for line in found.trust.lines():
        screen.print(Text(f"  {line}"), soft_wrap=True)
    for one in found.alone:
        about = f"{one.parameters:,} parameters, {one.size:,} bytes, {one.unseen} unseen pictures"
        _print(screen, f"{one.name}: {about}", ["strength", *report.headings(one)], report.rows(one))
    names = [one.name for one in found.alone]
    for title, explained, lines in report.matrices(found):
        _print(screen, f"{title}: {explained}", ["", *(f"{name} on" for name in names)], lines)
    if found.together:
        screen.print(Text(f"\n{report.TOGETHER}: {report.TOGETHER_EXPLAINED}", style="bold"), soft_wrap=True)
    for pair in found.together:
        screen.print(Text(f"  {pair.words()}"), soft_wrap=True)


def _print(screen: "Screen", title: str, headings: list[str], rows: list[tuple[str, list[str]]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    screen.print(Text(f"\n{title}", style="bold"), soft_wrap=True)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="right" if place else "left")
    for name, cells in rows:
        table.add_row(name, *cells)
    screen.show(table)
