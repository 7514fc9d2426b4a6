"""What happens while adapters are evaluated."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..core.events import Event

if TYPE_CHECKING:
    from .measured import Evaluation


@dataclass(frozen=True)
class Evaluated(Event):
    """All is measured, and written."""

    evaluation: "Evaluation"
