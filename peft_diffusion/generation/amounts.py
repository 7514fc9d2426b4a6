"""How much of an adapter, as people write it: ``0.8``, ``unet:0.8,te:0.2``, ``mid:1,up.1:0.5``, ``0:1,0.6:0``. No torch."""

import math
import re

from ..bases import family as families
from ..core.block_names import PRESETS
from ..core.errors import UserError
from ..core.parsing import number_in
from ..core.strength_schedule import ByPart, Schedule

_EXAMPLES = "a number as 0.8, parts as unet:0.8,te:0.2, blocks as mid:1,up.1:0.5 or a preset as MIDD, steps as 0:1,0.6:0"


def parse(text: str, of: str) -> tuple[float, ByPart | None]:
    """Read a strength.

    Args:
        text: A number, and what it is multiplied by in components, in blocks and over the steps, each ``NAME:NUMBER``, with
            commas between. ``te`` is every text encoder, ``te1`` and ``te2`` are each; blocks are named as in `ByPart`, by
            presets, and by what they are known for in a family of bases. Steps are places from 0 to 1, with straight lines
            between them.
        of: Whose strength it is, for errors.

    Returns:
        The number, by default 1, and what differs between parts, of strength 1; None where nothing does.

    Raises:
        UserError: It is none.
    """
    whole: list[float] = []
    encoders = list(families.components("text encoder"))
    short = {"te": encoders, "base": encoders, **{f"te{n}": [one] for n, one in enumerate(encoders, 1)}}
    components: dict[str, float] = {}
    blocks: dict[str, float] = {}
    steps: list[tuple[float, float]] = []
    for part in text.split(","):
        key, value = _pair(part.strip(), text, of)
        place = number_in(key)
        if not key:
            whole.append(value)
        elif place is not None:
            steps.append((place, value))
        elif key.upper() in PRESETS:
            blocks |= dict.fromkeys(PRESETS[key.upper()], value)
        elif key.lower() in short or key in families.components():
            components |= dict.fromkeys(short.get(key.lower(), [key]), value)
        else:
            blocks[key] = value
    if len(whole) > 1:  # as a decimal comma makes them
        raise UserError(f"the strength of {of} must be {_EXAMPLES}, not {text!r}")
    places = [place for place, _ in steps]
    if places != sorted(places) or not all(0 <= place <= 1 for place in places):
        raise UserError(f"the strength of {of} is {text!r}: steps are places from 0 to 1, in order, as 0:1,0.6:0")
    schedule = Schedule([value for _, value in steps], places) if steps else None
    by_part = ByPart(1.0, components, blocks, schedule) if components or blocks or steps else None
    return whole[0] if whole else 1.0, by_part


def _pair(part: str, text: str, of: str) -> tuple[str, float]:
    """A name, "" for none, and its number. Raises UserError."""
    key, _, told = re.sub("=", ":", part, count=1).rpartition(":")
    if part.upper() in PRESETS or part in families.block_names():
        return part, 1.0
    value = number_in(told)
    if value is None:
        raise UserError(f"the strength of {of} must be {_EXAMPLES}, not {text!r}")
    if not math.isfinite(value):
        raise UserError(f"the strength of {of} must be a finite number, not {told}")
    return key.strip(), value


def of_text_and_network(whole: float, parts: ByPart | None) -> tuple[float, float]:
    """Tell a strength as A1111 has it, without blocks and steps.

    Args:
        whole: The number.
        parts: What differs between parts.

    Returns:
        That of the first text encoder, and that of the network that denoises.
    """
    shares = {} if parts is None else parts.components
    text, network = (next(iter(families.components(role)), "") for role in ("text encoder", "denoiser"))
    return whole * shares.get(text, 1.0), whole * shares.get(network, 1.0)


def text_of(parts: ByPart | None) -> str:
    """Write what differs between parts so that `parse` reads it.

    Args:
        parts: What differs; its own strength is left out.

    Returns:
        The text; "" for nothing.
    """
    if parts is None:
        return ""
    steps = () if parts.steps is None else zip(parts.steps.places, parts.steps.values, strict=True)
    told = [*parts.components.items(), *parts.blocks.items(), *((repr(place), value) for place, value in steps)]
    return ",".join(f"{name}:{value!r}" for name, value in told)
