"""What training is told of the adapters that a base carries already while it trains another. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Other:
    """An adapter that another one is trained beside.

    Attributes:
        name: What it is called on the base.
        told: What the new file says of it: the name of its file, its SHA-256 and its strength.
        trigger: The words that call it, as a trigger of captions with ``{}`` for the caption; "" where it names none.
    """

    name: str
    told: Mapping[str, Any]
    trigger: str = ""
