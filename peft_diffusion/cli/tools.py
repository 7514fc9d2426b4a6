"""What the commands on adapter files show of what they made."""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..tools.results import Made


def tell(made: "Made", errors: bool, say: Callable[[str], None]) -> None:
    """Show what was made.

    Args:
        made: That.
        errors: Whether the error of every site is shown.
        say: Writes a line.
    """
    for one in sorted(made.errors, key=lambda one: one.site) if errors else ():
        say(f"{one.error:8.3%}  rank {one.rank:4}  {one.site}")
    for line in made.lines():
        say(line)
