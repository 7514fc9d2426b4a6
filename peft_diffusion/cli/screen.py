"""The console of rich that the commands draw tables and bars on."""

import os
from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from .terminal import plain

_WIDE = 1000  # letters, more than any table has


class Screen(Console):
    """A console that passes no control characters on but its own."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render as rich does, and take control characters out of every text.

        Args:
            renderable: What is drawn.
            options: Of rich.

        Yields:
            Pieces of text; those that steer the terminal are rich's own.
        """
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=plain(segment.text))

    def show(self, table: Table) -> None:
        """Print a table, which need not be narrow in a file or for a program.

        Args:
            table: The table.
        """
        if not self.is_terminal and "COLUMNS" not in os.environ:
            self.width = max(self.width, self.measure(table, options=self.options.update(width=_WIDE)).maximum)
        self.print(table)

    def labelled(self, title: str, rows: Iterable[tuple[str, str]]) -> None:
        """Print what is known of a thing, a line for each label.

        Args:
            title: What it is.
            rows: Labels and values.
        """
        table = Table(title=Text(title, style="bold"), title_justify="left", show_header=False)
        table.add_column(style="cyan", no_wrap=True)
        table.add_column(overflow="fold")
        for label, value in rows:
            table.add_row(label, Text(value))
        self.print(table)
