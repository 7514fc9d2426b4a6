"""What a run's report tells that its settings and measurements do not."""

import io
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ...core.files import explained, write_bytes
from ...core.peak_memory import peak_memory
from ...data.folder import TrainingImage, open_picture
from ...data.images import MAX_PIXELS
from .run_record import shown

_SIDE = 128  # pixels of a thumbnail


def about(what: str, parameters: int, base: str, fingerprint: str) -> dict[str, Any]:
    """Describe the adapter and its base.

    Args:
        what: Methods and layers, in words.
        parameters: How many are trained.
        base: What the base is called.
        fingerprint: Which weights it has.

    Returns:
        Facts by heading.
    """
    return {"what": what, "parameters": parameters, "base": base, "fingerprint": fingerprint}


def commands(command: str, run: Path, generate: str) -> dict[str, str]:
    """List what to type to use what was learned, and to go on.

    Args:
        command: The command that trained.
        run: The run folder.
        generate: What to type to use it.

    Returns:
        Commands by what they are for.
    """
    settings = shlex.quote(str(run / "config.toml"))
    return {
        "To use it": generate,
        "To go on, where it was stopped or with a longer --steps": (
            f"peft-diffusion {command} --config {settings} --resume"
        ),
        "To compare it with another run": f"peft-diffusion runs {shlex.quote(str(run))} OTHER --html both.html",
    }


def memory() -> dict[str, Any]:
    """The most memory in use so far, in bytes, and whose; nothing where the system does not tell."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return {"memory": torch.cuda.max_memory_allocated(), "memory_of": "of the GPU"}
    peak = peak_memory()
    return {"memory": peak, "memory_of": "of the process"} if peak else {}


def thumbnails(folder: Path, pictures: Sequence[TrainingImage], background: str) -> None:
    """Make small copies of the pictures that the report shows, by their place.

    Args:
        folder: Where they go.
        pictures: Those that are trained on.
        background: The colour behind transparency.

    Raises:
        UserError: A picture is gone.
    """
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for place in shown(len(pictures)):
        path = folder / f"{place:06}.webp"
        image = open_picture(pictures[place].path, background, MAX_PIXELS, pictures[place].digest)
        image.thumbnail((_SIDE, _SIDE))
        data = io.BytesIO()
        image.save(data, "WEBP", quality=80)
        write_bytes(path, data.getvalue())
