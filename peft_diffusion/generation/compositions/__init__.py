"""How several adapters meet in a picture: a file each, which says what it does, and a row here. Imports no torch.

To add one, write ``compositions/NAME.py`` with a class of `Composition`, and add its instance to ``_EVERY`` below. That is
all: ``--compose`` and its help, TOML, grids, recipes and the sampler read the table. A file imports no torch when it is
imported, as ``--help`` imports it; what computes imports it inside of the method.
"""

from typing import TYPE_CHECKING, Literal, TypeAlias

from ...core.wording import any_of
from .add import Add
from .composite import Composite
from .declared import Composition
from .k_lora import KLora
from .learned import Learned
from .switch import Switch

_EVERY: tuple[Composition, ...] = (Add(), Switch(), Composite(), KLora(), Learned())

COMPOSITIONS: dict[str, Composition] = {one.name: one for one in _EVERY}
"""By name, the default first."""

LEARNED = Learned.name
"""The one that takes a file."""

if TYPE_CHECKING:
    Compose: TypeAlias = str
else:
    Compose: TypeAlias = Literal[tuple(COMPOSITIONS)]


def explanation() -> str:
    """Tell what there is, as the help of ``--compose``.

    Returns:
        A sentence.
    """
    return f"How several adapters meet: {any_of([f'{one.words} ({one.name})' for one in _EVERY])}."
