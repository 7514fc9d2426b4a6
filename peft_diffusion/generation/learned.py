"""What `compose train` learned, set on adapters for a pipeline that is called by hand."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..bases.prompts import Encoding
from ..core.errors import UserError
from ..core.events import Observer, Warned
from ..core.strength import Amount
from ..core.strength_schedule import ByPart
from ..formats import composition
from ..formats.spec import other_weights
from .compositions import COMPOSITIONS, LEARNED
from .compositions.declared import Drawing
from .sampler import Cell
from .settings import Sampling
from .telling import Telling

if TYPE_CHECKING:
    from .adapters import Adapters


def composed(
    adapters: "Adapters",
    file: Path,
    prompts: Sequence[str],
    amounts: Mapping[str, float | ByPart],
    folder: Path | None,
    steps: int | None,
) -> tuple[str, ...]:
    """Set strengths as were learned: see `Adapters.compose`.

    Args:
        adapters: Those on the base.
        file: The file of the composition.
        prompts: One for each image.
        amounts: What is multiplied, by name.
        folder: Another folder where adapters are looked for.
        steps: Denoising steps.

    Returns:
        The names of the adapters of the composition.

    Raises:
        UserError: As there.
    """
    told = composition.read(file)
    names = _loaded(adapters, told, folder)
    unknown = [name for name in amounts if name not in names]
    if unknown:
        raise UserError(f"{told.path} composes no adapter {unknown[0]}; there are: {', '.join(names)}")
    sampling = Sampling(steps=steps)
    telling = Telling(adapters.pipe, sampling, [word for name in names for word in adapters[name].spec.triggers])
    drawing = Drawing(adapters, adapters.pipe.scheduler, sampling.taken_steps, partial(_read, adapters, telling), told.path)
    if drawing.learned[1].reads_prompts and not prompts:
        raise UserError(f"{told.path} weighs adapters by the prompt; give those that will be drawn")
    plain: dict[str, float | ByPart] = {name: amounts.get(name, 1.0) for name in names}
    way = COMPOSITIONS[LEARNED]
    rows = [way.strengths(Cell(prompt, 0, plain), drawing) or {} for prompt in prompts or ("",)]
    wanted: dict[str, Amount] = {name: [row[name] for row in rows] if len(rows) > 1 else rows[0][name] for name in names}
    adapters.set(wanted)
    return names


def tell_base(adapters: "Adapters", file: Path | None, tell: Observer) -> None:
    """Warn where adapters are weighed as was learned on a base of other weights.

    Args:
        adapters: Those on the base that draws.
        file: The file of the composition; None where there is none.
        tell: Is told.
    """
    if file is None:
        return
    differs = other_weights(file, composition.read(file).base, adapters.base.fingerprint, "learned")
    if differs is not None:
        tell(Warned(differs))


def _read(adapters: "Adapters", telling: Telling, cell: Cell) -> Encoding:
    adapters.set(cell.strengths or {})
    return telling.as_learned(cell.prompt)


def _loaded(adapters: "Adapters", told: composition.CompositionSpec, folder: Path | None) -> tuple[str, ...]:
    """The name of each adapter of a composition, after loading those that are missing."""
    present = {adapters[name].sha256: name for name in (*adapters.names, *adapters.waiting)}
    paths = [path for digest in present if (path := adapters[present[digest]].path) is not None]
    files = told.find(paths, folder)
    return tuple(
        present[member.sha256] if member.sha256 in present else adapters.load(path, strength=0.0)
        for member, path in zip(told.adapters, files, strict=True)
    )
