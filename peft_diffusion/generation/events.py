"""What happens while pictures are drawn or texts are written, as data. Imports no torch.

Beside these, `core.events` has `Progress` with the denoising steps done, `Noted` and `Warned` for what the person should
know of adapters and prompts, and `Ended`, which comes last.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.events import Event

if TYPE_CHECKING:
    from .generate import Picture
    from .text import Written


@dataclass(frozen=True)
class PictureMade(Event):
    """A picture was drawn, and is written."""

    picture: "Picture"


@dataclass(frozen=True)
class SheetMade(Event):
    """A sheet of all pictures is written."""

    path: Path


@dataclass(frozen=True)
class TextWritten(Event):
    """A text is written to its end."""

    written: "Written"
