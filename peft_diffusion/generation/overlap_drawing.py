"""What drawing tells of adapters that are to go together: see `overlap.Drawn`."""

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING

from ..core.errors import UserError
from ..core.events import Never, Stop
from ..core.strength_schedule import ByPart
from ..data.captions import with_trigger
from .calibration import calibrated, suggested
from .on_activations import acting
from .on_pictures import Losses, suggested_on_pictures
from .overlap import Drawn
from .sampler import Cell
from .settings import Sampling

if TYPE_CHECKING:
    from .adapters import Adapters


def drawn(
    adapters: "Adapters",
    prompts: Mapping[str, Sequence[str]],
    seed: int,
    sampling: Sampling,
    stop: Stop = Never(),  # noqa: B008 -- has no state
    *,
    amounts: Mapping[str, float | ByPart] | None = None,
    beside: Mapping[str, float | ByPart] | None = None,
    effects: Mapping[str, float] | None = None,
    losses: Losses | None = None,
) -> Drawn:
    """Draw with adapters, and see what each does and how nearly they go together.

    Args:
        adapters: Those on the base. They keep the strengths of the last picture.
        prompts: By the name of each that is looked at, prompts that call it.
        seed: That of the noise.
        sampling: How pictures are drawn.
        stop: Where it is set, nothing is drawn after the present picture.
        amounts: At which strength each is alone; by default 1.
        beside: Strengths of adapters that stand beside those.
        effects: What each changes of predictions, where that was measured.
        losses: Those of real pictures, by which strengths are found; by default what the adapters predict finds them.

    Returns:
        What was seen.

    Raises:
        UserError: As `sampler.paint`.
        Interrupted: It was stopped.
    """
    names, more = list(prompts), dict(beside or {})
    own = {name: [Cell(prompt, seed, more) for prompt in several] for name, several in prompts.items()}
    # In turn, so that the first few have some of each.
    every = [cell for cells in zip_longest(*own.values()) for cell in cells if cell is not None]
    wanted: Mapping[str, float | ByPart] = dict.fromkeys(names, 1.0) if amounts is None else amounts
    sizes, conflicts = acting(adapters, names, every, sampling, stop)
    known = calibrated(adapters, wanted, every, sampling, stop).effects if effects is None else effects
    if losses is None:
        suggestion = suggested(adapters, wanted, own, sampling, stop)
    else:
        suggestion = suggested_on_pictures(losses, wanted, stop)
    return Drawn(known, suggestion, sizes, conflicts)


def own_prompts(
    adapters: "Adapters", names: Sequence[str], prompts: Sequence[str] | Mapping[str, Sequence[str]]
) -> dict[str, list[str]]:
    """Tell which prompts call each adapter.

    Args:
        adapters: Those on the base.
        names: Which are asked about.
        prompts: By the name of each its own; or a sequence for all, which get the trigger that the file of each names.

    Returns:
        The prompts by name.

    Raises:
        UserError: There is none for one of them.
    """
    if not isinstance(prompts, Mapping):
        return {name: [with_trigger(prompt, adapters[name].spec.trigger) for prompt in prompts] for name in names}
    missing = [name for name in names if not prompts.get(name)]
    if missing:
        raise UserError(f"there is no prompt that calls {', '.join(missing)}; give some for each adapter, or for all")
    return {name: list(prompts[name]) for name in names}
