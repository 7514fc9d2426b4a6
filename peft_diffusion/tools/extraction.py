"""``extract``: what was trained into a checkpoint, as an adapter of low rank."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..bases import family as families
from ..core.errors import UserError
from ..core.events import Noted, Observer
from ..core.files import at_home
from ..core.reduction import Truncation, reduced_matrix
from ..core.weight_change import Change, has_kernel, serves
from ..core.wording import number_of
from ..formats import Spec
from ..formats.file import DTYPES
from .original_names import VAE, bare
from .results import Adapters, LayerError, Made, base_told
from .sources import Where
from .tool_settings import ExtractConfig
from .watch import Watch, watched
from .weights import Weights, open_weights

_PART = 1 << 20  # numbers that are compared at once


def extract(config: ExtractConfig, *, observers: Sequence[Observer] = ()) -> Made:
    """Write what a checkpoint was trained to, beyond its base, as a LoRA, or with ``conv_rank`` a LoCon.

    The weights of both are read and let go one at a time.

    Args:
        config: The two checkpoints, and how many ranks of each site are kept.
        observers: Are told how far it is, what is left out, and last of all what was made.

    Returns:
        What was made, with the error of every site.

    Raises:
        UserError: A checkpoint cannot be read, they are of different architectures, or nothing differs.
    """
    with watched(observers) as watch:
        config.check()
        tuned, base = open_weights(config.tuned), open_weights(config.original)
        _refuse_different(tuned, base)
        made = Adapters(base.skeleton, DTYPES[config.dtype], at_home(config.output))
        left, errors = _Left(), list[LayerError]()
        found = list(_sites(base, config))
        for where in watch.each("extracting sites", found):
            errors += _extracted(made, tuned, base, where, config, left)
        left.count_others(tuned, base, {(one[0], bare(f"{one[1]}.weight")) for one in found}, watch)
        if not made.count:
            raise UserError(
                f"no weight of {config.tuned} differs from {config.original} by more than --smallest {config.smallest:g}"
            )
        _write(config, made, tuned, base)
        left.tell(watch, errors)
        return watch.made(at_home(config.output), made.count, errors)


@dataclass
class _Left:
    """What differs and is in no site of the file: squared norms of the differences."""

    tensors: int = 0
    square: float = 0.0
    kinds: set[str] = field(default_factory=set)

    def count(self, kind: str, square: float) -> None:
        """Count a difference that is not taken, by the square of its norm."""
        if square:
            self.tensors += 1
            self.square += square
            self.kinds.add(kind)

    def count_others(self, tuned: Weights, base: Weights, taken: set[Where], watch: Watch) -> None:
        """Count what differs beside the weights that were looked at."""
        kinds = {component: _kinds(module) for component, module in base.parts.items()}
        others = [where for where in base.places if where[0] != VAE and where not in taken and tuned.has(*where)]
        for component, key in watch.each("looking for other differences", others):
            own, other = base.read(component, key), tuned.read(component, key)
            if own.is_floating_point() and not torch.equal(own, other):
                self.count(kinds[component].get(key, key), _squared_distance(own, other))

    def tell(self, watch: Watch, errors: Sequence[LayerError]) -> None:
        """Tell a person."""
        if self.tensors:
            whole = math.sqrt(self.square + sum(one.norm**2 for one in errors))
            share = math.sqrt(self.square) / whole
            told = f"what differs in {number_of(self.tensors, 'tensor')} ({', '.join(sorted(self.kinds))})"
            watch.tell(Noted(f"the file does not hold {told}: {share:.2%} of the norm of all differences"))


def _squared_distance(own: Tensor, other: Tensor) -> float:
    """The square of the norm of a difference, in no memory of its size: both may be the largest thing there is."""
    parts = zip(own.flatten().split(_PART), other.flatten().split(_PART), strict=True)
    return sum(float(theirs.float().sub_(mine).norm()) ** 2 for mine, theirs in parts)


def _kinds(component: nn.Module) -> dict[str, str]:
    """What each tensor of a component is, in words."""
    return {
        bare(f"{path}.{name}"): f"{name}{'es' if name == 'bias' else 's'} of {type(module).__name__}"
        for path, module in component.named_modules()
        for name, _ in module.named_parameters(recurse=False)
    }


def _refuse_different(tuned: Weights, base: Weights) -> None:
    """Raises UserError where a tensor of both has another shape, or the components are others."""
    mine = {key: place.shape for key, place in tuned.places.items() if key[0] != VAE}
    for key, place in base.places.items():
        if key in mine and mine[key] != place.shape:
            raise UserError(
                f"{tuned.path} and {base.path} are of different architectures: {'.'.join(key)} is {mine[key]} in one and"
                f" {place.shape} in the other"
            )
    if not any(key in mine for key in base.places):
        raise UserError(f"{tuned.path} and {base.path} have no tensor in common")


def _sites(base: Weights, config: ExtractConfig) -> Iterator[Where]:
    """The sites that are looked at."""
    roles = families.components("text encoder")
    for component, module in base.skeleton.parts.items():
        if component in roles and not config.text_encoders:
            continue
        for path, site in module.named_modules():
            if serves(site) and (not has_kernel(site) or config.conv_rank is not None):
                yield component, path


@torch.no_grad()
def _extracted(
    made: Adapters, tuned: Weights, base: Weights, where: Where, config: ExtractConfig, left: _Left
) -> list[LayerError]:
    component, path = where
    key = bare(f"{path}.weight")
    if not (tuned.has(component, key) and base.has(component, key)):
        return []
    own = base.read(component, key)
    norm = float(torch.linalg.vector_norm(own, dtype=torch.float32))
    difference = tuned.read(component, key).float().sub_(own)
    del own  # a weight may be the largest thing in memory
    if not float(difference.norm()) > config.smallest * norm:
        left.count("rounding", float(difference.norm()) ** 2)
        return []
    site = base.parts[component].get_submodule(path)
    rank = config.conv_rank if has_kernel(site) else config.rank
    found = reduced_matrix(difference.flatten(1), Truncation(rank, config.energy, config.frobenius, config.ratio))
    made.add_change(component, path, Change(pair=found.pair))
    return [LayerError.of(".".join(where), found)]


def _write(config: ExtractConfig, made: Adapters, tuned: Weights, base: Weights) -> None:
    path = at_home(config.output)
    spec = Spec(made.spec_methods(()), base_told(base.skeleton), title=path.stem)
    metadata = {"ss_training_comment": f"extracted from {tuned.path.name} less {base.path.name}"}
    made.write(path, config.to, spec, metadata)
