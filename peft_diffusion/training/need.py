"""What a run takes of its device, in bytes and in words. Imports no torch."""

from dataclasses import dataclass

_SPARE = 1.05  # what a device must have over the prediction, for workspaces and fragments


@dataclass(frozen=True)
class Need:
    """Bytes that a run takes on its device: the base, the adapter with its optimizer, and the most that a step adds.

    ``away`` is what lies elsewhere during a step and comes back between steps for previews, and at the end. ``drawing`` is
    the most that previews add to that. What ``recorded`` steps take stays theirs while previews are drawn.
    """

    weights: int
    adapter: int
    step: int
    away: int = 0
    drawing: int = 0
    recorded: bool = False

    @property
    def total(self) -> int:
        """The predicted peak."""
        return self.weights + self.adapter + (self.step + self._between if self._beside else max(self.step, self._between))

    @property
    def _between(self) -> int:
        return self.away + self.drawing

    @property
    def _beside(self) -> bool:
        return self.recorded and self.drawing > 0

    def __str__(self) -> str:
        parts = f"base {mib(self.weights)}, adapter and optimizer {mib(self.adapter)}, a step {mib(self.step)}"
        if self._beside or self._between > self.step:
            parts += f", {'and' if self._beside else 'but'} between steps what draws pictures {mib(self._between)}"
        return f"{mib(self.total)} at most: {parts}"


def mib(size: int) -> str:
    """Describe bytes.

    Args:
        size: How many.

    Returns:
        In MiB, or in GiB where these are many.
    """
    return f"{size / 2**20:.0f} MiB" if size < 10 * 2**30 else f"{size / 2**30:.1f} GiB"


def fits(need: Need, there: int | None) -> bool:
    """Tell whether a run finds room.

    Args:
        need: What it takes.
        there: Bytes that there are; None where that cannot be told, and it is tried.

    Returns:
        Whether it does.
    """
    return there is None or need.total * _SPARE <= there
