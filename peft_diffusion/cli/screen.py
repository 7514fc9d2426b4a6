"""The console of rich that the commands draw tables and bars on."""

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from .terminal import plain


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
