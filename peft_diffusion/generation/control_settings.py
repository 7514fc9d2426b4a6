"""Pictures that steer what is drawn, as ``--control`` names them. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path

from ..core.errors import UserError, did_you_mean
from ..core.files import at_home
from ..core.parsing import number_in

KINDS = ("controlnet", "ip-adapter", "t2i-adapter")
"""ControlNet (Zhang et al. 2023, https://arxiv.org/abs/2302.05543), IP-Adapter (Ye et al. 2023,
https://arxiv.org/abs/2308.06721) and T2I-Adapter (Mou et al. 2023, https://arxiv.org/abs/2302.08453)."""
_SHAPE = "KIND:MODEL=PICTURE or KIND:MODEL=PICTURE@SCALE"


@dataclass(frozen=True)
class Control:
    """A picture that steers what is drawn.

    Attributes:
        kind: One of `KINDS`.
        model: The folder or hub id of the model, or of a ControlNet its file; of an IP-Adapter its file, or a hub id and the
            file's path there.
        picture: What it looks at.
        scale: How much it steers; 1 is as trained, 0 nothing.
    """

    kind: str
    model: str
    picture: Path
    scale: float = 1.0


def parse(text: str) -> Control:
    """Read a control as the command line names it.

    Args:
        text: ``KIND:MODEL=PICTURE``, and perhaps ``@SCALE``.

    Returns:
        The control.

    Raises:
        UserError: It is none, or the picture is missing.
    """
    kind, colon, rest = text.partition(":")
    model, equals, picture = rest.rpartition("=")
    if kind not in KINDS:
        raise UserError(
            f"--control is {_SHAPE}; there is no kind {kind!r} but {', '.join(KINDS)}{did_you_mean(kind, KINDS)}"
        )
    if not (colon and equals and model and picture):
        raise UserError(
            f"--control is {_SHAPE}, as controlnet:lllyasviel/control_v11p_sd15_canny=edges.png@0.8, not {text!r}"
        )
    scale, path = 1.0, at_home(Path(picture))
    if not path.is_file() and "@" in picture:
        picture, _, told = picture.rpartition("@")
        found = number_in(told)
        if found is None:
            raise UserError(f"--control {text}: {told!r} is no scale; it is a number, as 0.8")
        scale, path = found, at_home(Path(picture))
    if not path.is_file():
        raise UserError(f"there is no picture {path} for --control {kind}:{model}")
    return Control(kind, model, path, scale)
