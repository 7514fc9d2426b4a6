"""What the commands on adapter files show of what they made."""

from typing import TYPE_CHECKING

from .terminal import say

if TYPE_CHECKING:
    from ..tools.results import Made


def tell(made: "Made", errors: bool) -> None:
    """Show what was made.

    Args:
        made: That.
        errors: Whether the error of every site is shown.
    """
    for one in sorted(made.errors, key=lambda one: one.site) if errors else ():
        say(f"{one.error:8.3%}  rank {one.rank:4}  {one.site}")
    for own in sorted(made.outputs, key=lambda one: (one.adapter, one.site)) if errors else ():
        if own.norm:
            say(f"{own.missed / own.norm:8.3%}  by adding {own.added / own.norm:8.3%}  {own.adapter}  {own.site}")
    for line in made.lines():
        say(line)
