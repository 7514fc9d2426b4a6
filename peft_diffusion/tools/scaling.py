"""``strength``: an adapter that does at strength 1 what another does at a given one."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from .. import methods
from ..core.adapter import Adapter, LowRank, chained, parts_of
from ..core.errors import FoldError, UserError
from ..core.events import Noted, Observer
from ..core.files import at_home
from ..core.method import Method
from ..core.weight_change import Change, change_of, with_weights
from ..methods.shared.hyper_parameters import ALPHA
from .results import Adapters, Made, write_changed
from .sources import Source, Where, file_dtype, open_sources
from .tool_settings import StrengthConfig
from .watch import Watch, watched

_State = Mapping[str, Tensor]
_Scaling = Callable[[_State], _State]
_CLOSE = 1e-4  # relative, of float32


def strength(config: StrengthConfig, *, observers: Sequence[Observer] = ()) -> Made:
    """Write an adapter file that does at strength 1 what another does at a given one.

    A method stays what it is where its file can say a scale: alpha, or its tensors themselves. Otherwise, as with DoRA, the
    change of the weight is written whole, for which the base is needed.

    Args:
        config: Which file, and the strength.
        observers: Are told how far it is, and last of all what was made.

    Returns:
        What was made.

    Raises:
        UserError: The file cannot be read or written, or holds what no file can hold at another strength.
    """
    with watched(observers) as watch:
        config.check()
        (source,), bones = open_sources([config.plan], config.base, watch.tell)
        made = Adapters(bones, file_dtype([source], config.dtype), at_home(config.output))
        scaler = _Scaler(config.strength)
        for where in watch.each("scaling sites", source.sites):
            _scale(made, source, where, scaler, watch)
        comment = f"{source.path.name} at strength {config.strength:g}"
        write_changed(made, source.plan, at_home(config.output), config.to, comment)
        return watch.made(at_home(config.output), made.count)


def _scale(made: Adapters, source: Source, where: Where, scaler: "_Scaler", watch: Watch) -> None:
    bare = made.bones.parts[where[0]].get_submodule(where[1])
    scaled = scaler.scaled(source.adapter(where), bare)
    if scaled is not None:
        made.add(*where, scaled)
        return
    _, change = source.opened(where)
    if change is None:
        raise UserError(
            f"{source.path}: what {'.'.join(where)} holds is no change of a weight, so that no file can hold it at another"
            f" strength; give the strength where it is used, as in {source.path.name}={scaler.by:g}"
        )
    watch.tell(Noted(f"{'.'.join(where)}: becomes a whole change, as a file of its method knows no strength"))
    pair = None if change.pair is None else LowRank(change.pair.down, change.pair.up * scaler.by)
    weight, bias = (None if one is None else one * scaler.by for one in (change.weight, change.bias))
    made.add_change(*where, Change(pair, weight, bias))


class _Scaler:
    """Scales adapters by what their methods' files can say. How is found out at the first site of each kind, on random
    numbers in the place of its own and of the weight's, and holds for all that have the same tensors: rotations of zeros or
    of small angles would pass for what they are not."""

    def __init__(self, by: float) -> None:
        self.by = by
        self._known: dict[frozenset[str], _Scaling | None] = {}

    def scaled(self, adapter: Adapter, site: nn.Module) -> Adapter | None:
        """The adapter at the strength; None where its methods' files cannot say that."""
        parts = [self._scaled(part, site) for part in parts_of(adapter)]
        found = [part for part in parts if part is not None]
        return chained(found) if len(found) == len(parts) else None

    def _scaled(self, part: Adapter, site: nn.Module) -> Adapter | None:
        state = part.state()
        kind = frozenset(state)
        method = next((one for one in methods.known().values() if one.recognizes(kind)), None)
        if method is None:
            return None
        if kind not in self._known:
            self._known[kind] = next(
                (one for one in self._ways(method, state) if _is_true(method, state, site, one, self.by)), None
            )
        way = self._known[kind]
        return None if way is None else method.read(site, way(state))

    def _ways(self, method: type[Method], state: _State) -> Iterator[_Scaling]:
        """Ways to say a scale, the least of a change first."""
        one = method.scaled_tensor(state.keys()) or ALPHA
        if one in state:
            yield lambda own: {**own, one: own[one] * self.by}
        yield lambda own: {key: value if key in method.constants else value * self.by for key, value in own.items()}


@torch.no_grad()
def _is_true(method: type[Method], state: _State, site: nn.Module, way: _Scaling, by: float) -> bool:
    """Whether a way scales what random tensors of these shapes change of a random weight by the strength."""
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(own.shape, generator=generator) for name, own in site.named_parameters(recurse=False)}
    module, learned = with_weights(site, weights), dict(state)
    for name, own in state.items():
        if name not in method.constants and own.is_floating_point():
            learned[name] = torch.randn(own.shape, generator=generator)
    try:
        wanted = change_of(method.read(module, learned), module, "")
        found = change_of(method.read(module, way(learned)), module, "")
    except (FoldError, UserError, RuntimeError):
        return False
    pairs = ((wanted.matrix(), found.matrix()), (wanted.bias, found.bias))
    return all(_close(one, other, by) for one, other in pairs)


def _close(one: Tensor | None, other: Tensor | None, by: float) -> bool:
    if one is None or other is None:
        return one is other
    return bool((other - by * one).norm() <= _CLOSE * abs(by) * one.norm())
