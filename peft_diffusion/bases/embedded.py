"""Files that travel with the package: the bases `icons` and `tiny-lm`, and the samples."""

from pathlib import Path

from ..core.errors import UserError

ICONS = "icons"
TINY_LM = "tiny-lm"


def embedded(relative: str) -> Path:
    """Find something under ``samples/``, in a checkout as in a wheel.

    Args:
        relative: Its path there.

    Returns:
        The path.

    Raises:
        UserError: It is not there.
    """
    package = Path(__file__).resolve().parent.parent
    for root in (package / "samples", package.parent / "samples"):
        if (root / relative).exists():
            return root / relative
    raise UserError(f"samples/{relative} is neither in the installed package nor beside it; install peft_diffusion again")
