"""What a method adds at a site."""

import itertools
import math
from collections.abc import Callable, KeysView, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from .errors import FoldError, UserError
from .method import METHODS

Site = nn.Module  # any Linear, Conv2d, norm or embedding of a base


class LowRank(NamedTuple):
    """A residual ``up(down(x))``: ``down`` (rank, in, ...) is applied as the site is, ``up`` is (out, rank)."""

    down: Tensor
    up: Tensor


class Factors(NamedTuple):
    """The trained matrices of a Linear site whose change is ``scale * up(down(x))``: (rank, in) and (out, rank)."""

    down: Tensor
    up: Tensor
    scale: float


class Matrices(NamedTuple):
    """A residual ``scale * up(down(x))``: ``down`` (rank, in, ...) and ``up`` (out, rank), of any dtype."""

    down: Tensor
    up: Tensor
    scale: float


class Pair(Protocol):
    """What says the change of a site as a pair of low rank.

    Attributes:
        rank: Of the pair.
    """

    @property
    def rank(self) -> int: ...

    def matrices(self) -> Matrices:
        """Give the pair as it is now.

        Returns:
            Its matrices.
        """
        ...


class Described(NamedTuple):
    """What a header tells of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PairForm:
    """How a file holds the pair of a site; files of one shape share it.

    Attributes:
        down: The suffix of the tensor that is ``down``.
        up: The suffix of ``up``.
        alpha: The suffix of the tensor with the number that the scale is made of; None where ``constant`` is it.
        constant: That number, where no tensor holds it.
        down_shape: (rank, in, ...), in the shape of the weight.
        up_shape: (out, rank).
        scale: Makes what the product is multiplied with, of that number; None of one that only `Method.read` can judge.
        build: Makes the adapter, of the site, ``down``, ``up`` and the number.
    """

    down: str
    up: str
    alpha: str | None
    constant: float
    down_shape: tuple[int, ...]
    up_shape: tuple[int, int]
    scale: "Callable[[float, int], float | None]"
    build: "Callable[[Site, Tensor, Tensor, float], Adapter]"

    @property
    def rank(self) -> int:
        """Of the pair."""
        return self.down_shape[0]


class Piece(NamedTuple):
    """Where a matrix begins: the flat tensor that it lies in, and how many numbers are before it there."""

    flat: Tensor
    start: int


class StoredPair:
    """The pair that a file holds for a site. An adapter is made of it when somebody asks for one: drawing needs none.

    Its tensors are never written, and copies share them. They are cut out of the numbers of the file when they are asked
    for, as a network has hundreds of sites.

    Args:
        form: Its shapes.
        down: Where (rank, in, ...) lies.
        up: Where (out, rank) lies.
        number: What the scale is made of.
        scale: What the product is multiplied with.

    Attributes:
        rank: Of the pair.
    """

    __slots__ = ("down", "form", "number", "rank", "scale", "up")

    def __init__(self, form: PairForm, down: Piece, up: Piece, number: float, scale: float) -> None:
        self.form = form
        self.down = down
        self.up = up
        self.number = number
        self.scale = scale
        self.rank = form.rank

    def matrices(self) -> Matrices:
        """The matrices, on the CPU."""
        form = self.form
        return Matrices(cut(*self.down, form.down_shape), cut(*self.up, form.up_shape), self.scale)

    def build(self, site: Site) -> "Adapter":
        """Make the adapter.

        Args:
            site: The module that it will sit on.

        Returns:
            A new one, with parameters of its own.
        """
        down, up, _ = self.matrices()
        return self.form.build(site, down, up, self.number)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.form, self.down, self.up, self.number, self.scale)


@lru_cache(maxsize=1000)
def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Tell the strides of a contiguous tensor.

    Args:
        shape: Its shape.

    Returns:
        As many numbers.
    """
    return tuple(math.prod(shape[place + 1 :]) for place in range(len(shape)))


def cut(flat: Tensor, start: int, shape: tuple[int, ...]) -> Tensor:
    """Look at a part of a flat tensor, which takes one operation.

    Args:
        flat: Of one dimension, without gaps.
        start: How many of its numbers are before the part.
        shape: Of the part.

    Returns:
        A view.
    """
    return flat.as_strided(shape, contiguous(shape), flat.storage_offset() + start)


class KeepsPrecision(nn.Module):
    """Follows its component to another device, but never to another dtype: adapters stay float32 on a half base."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def move(tensor: Tensor) -> Tensor:
            return tensor.to(fn(tensor.new_empty(0)).device)

        moved: Self = super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return moved


class Adapter(KeepsPrecision):
    """The change of one site. With ``y = site(x)`` it returns the new ``y``.

    The default is a residual, ``y + strength * residual(x, y, base)``; a method that is none overrides ``forward``.
    Parameters are float32; results have the dtype of ``y``.
    """

    own_layout: ClassVar[bool] = False  # whether files hold it under keys of our own, as no other program has the method
    precedes: ClassVar[bool] = False  # whether its learned words stand before every prompt, and not where they are written

    _place: tuple[Site, ...] = ()  # in a tuple, so that the site is no child of its own child

    @property
    def site(self) -> Site:
        """The module that it is attached to."""
        return self._place[0]

    def bind(self, site: Site) -> None:
        """Remember the module that it sits on, whose weight or bias the method may read. `attach` calls this.

        Args:
            site: The module.
        """
        self._place = (site,)

    def prepare(self, x: Tensor) -> Tensor:
        """Change what the site itself is given: an embedding knows no ids of new tokens.

        Args:
            x: What the site was called with.

        Returns:
            What it is given in place of that, of the same shape.
        """
        return x

    def residual(self, x: Tensor, y: Tensor, base: Tensor) -> Tensor:
        """Compute the change at strength 1.

        Args:
            x: The input of the site.
            y: Its output, with what the adapters before this one made of it.
            base: Its output before any adapter.

        Returns:
            The change, of the shape and dtype of ``y``.

        Raises:
            NotImplementedError: The method is no residual, and overrides ``forward``.
        """
        raise NotImplementedError

    def forward(self, x: Tensor, y: Tensor, strength: Tensor, base: Tensor) -> Tensor:
        """Compute the new output.

        Args:
            x: The input of the site.
            y: Its output, with what the adapters before this one made of it.
            strength: How much of the change is applied; broadcasts against ``y``.
            base: Its output before any adapter.

        Returns:
            The new ``y``.
        """
        return y + strength * self.residual(x, y, base)

    def run(self, x: Tensor, y: Tensor, strength: Tensor, base: Tensor, call: Mapping[str, Any]) -> Tensor:
        """Compute the new output, for a method that needs what else the site was called with: a mask, a cache.

        Args:
            x: The input of the site.
            y: Its output, with what the adapters before this one made of it.
            strength: How much of the change is applied; broadcasts against ``y``.
            base: Its output before any adapter.
            call: The further arguments of the site, by name.

        Returns:
            The new ``y``.
        """
        changed: Tensor = self(x, y, strength, base)
        return changed

    def low_rank_factors(self) -> Factors | None:
        """The matrices that make up all of the change, as it is now, at a Linear site.

        What computes a site and its change in one (`slot.FastPath`) asks for them.

        Returns:
            The matrices; None where the change is anything else, as while inputs are dropped.
        """
        return None

    def learned_words(self) -> Mapping[str, Sequence[int]]:
        """The words that a tokenizer has to be taught for it, at a token embedding.

        Returns:
            By word, the tokens of the base that its vectors began as, one a vector; "" is a word that nobody writes.
        """
        return {}

    def bind_ids(self, ids: Sequence[int] | None) -> None:
        """Serve the ids that a tokenizer was taught for its words.

        Args:
            ids: One a vector, in the order of ``learned_words``; None: those that the vectors began as.
        """

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Compute what the adapter adds to the site's weight and bias at strength 1.

        Args:
            weight: The site's, in float32.
            bias: The site's, in float32; None where it has none.

        Returns:
            The changes of both; None leaves one as it is.

        Raises:
            FoldError: No change of weight and bias says what this adapter does.
        """
        raise FoldError(f"{method_of(self)} is no affine map of its input, so it cannot be merged into the weights")

    def low_rank(self) -> LowRank | None:
        """The residual as one pair of matrices, where it is one: several such run as one at inference."""
        return None

    def by_rate(self) -> dict[float, list[nn.Parameter]]:
        """Its parameters by how many times their component's learning rate they are trained with."""
        return {1.0: list(self.parameters())}

    @torch.no_grad()
    def begin_as(self, other: "Adapter") -> float | None:
        """Take over what another adapter of the same site is, before this one is trained.

        Args:
            other: The other, which is bound to the site.

        Returns:
            The Frobenius norm of what is left out over that of the whole, 0 where all is taken over; None where this adapter
            cannot be what the other one is, and stays as it was.
        """
        own, theirs = dict(self.named_parameters()), dict(other.named_parameters())
        if type(self) is not type(other) or _shapes(own) != _shapes(theirs) or not _alike(self, other):
            return None
        for name, parameter in own.items():
            parameter.copy_(theirs[name])
        return 0.0

    def state(self) -> dict[str, Tensor]:
        """Give the tensors that a file holds.

        Returns:
            Tensors by suffix: those of the kohya / LyCORIS layout where that has the method, or names without a dot.

        Raises:
            NotImplementedError: The method does not say.
        """
        raise NotImplementedError

    def _load_from_state_dict(self, *_: object) -> None:
        # The base's state dict holds the base alone (see Slot): nothing of an adapter is missing from it.
        pass


def method_of(adapter: Adapter) -> str:
    """Name what made an adapter, for a person.

    Args:
        adapter: One part.

    Returns:
        The name of the method that its tensors are of; that of its class, where none is.
    """
    suffixes: Set[str]
    try:
        suffixes = adapter.state().keys()
    except NotImplementedError:
        suffixes = frozenset()
    return next((one.name for one in METHODS.values() if one.recognizes(suffixes)), type(adapter).__name__)


class Chain(Adapter):
    """Several methods' parts at one site under one name, applied in order."""

    def __init__(self, parts: Sequence[Adapter]) -> None:
        """Raises UserError where a file could not tell the parts' tensors apart.

        That is where two would store different ones under one name, as two scales named alpha, and where one's would be
        read as another's, as the magnitudes of one method beside a LoRA.
        """
        super().__init__()
        self.parts = nn.ModuleList(parts)
        stored: dict[str, Tensor] = {}
        for part in parts:
            for suffix, tensor in part.state().items():
                shared = stored.setdefault(suffix, tensor)
                learned = tensor.requires_grad and shared is not tensor  # equal now, and not for long
                if learned or not torch.equal(shared.cpu(), tensor.cpu()):
                    kinds = " and ".join(map(method_of, parts))
                    raise UserError(
                        f"{kinds} cannot share a site under one name: a file has one {suffix!r} for both and theirs"
                        " differ; give them different targets, or equal values"
                    )
        readers = [reader for reader in METHODS.values() if reader.recognizes(stored.keys())]
        read = sorted(sorted(stored.keys() & reader.suffixes) for reader in readers)
        if read != sorted(sorted(part.state()) for part in parts):
            methods = ", ".join(reader.name for reader in readers)
            raise UserError(
                f"{' and '.join(map(method_of, parts))} cannot share a site under one name: a file of their"
                f" tensors ({', '.join(stored)}) would be read as {methods or 'no method'}; give them different targets"
            )

    def bind(self, site: Site) -> None:
        """Bind every part."""
        super().bind(site)
        for part in self.each():
            part.bind(site)

    def each(self) -> list[Adapter]:
        """The parts."""
        return [part for part in self.parts if isinstance(part, Adapter)]

    def prepare(self, x: Tensor) -> Tensor:
        """Prepared by every part."""
        for part in self.each():
            x = part.prepare(x)
        return x

    def forward(self, x: Tensor, y: Tensor, strength: Tensor, base: Tensor) -> Tensor:
        """Each part on what the one before it made."""
        for part in self.each():
            y = part(x, y, strength, base)
        return y

    def run(self, x: Tensor, y: Tensor, strength: Tensor, base: Tensor, call: Mapping[str, Any]) -> Tensor:
        """The same, with what the site was called with."""
        for part in self.each():
            y = part.run(x, y, strength, base, call)
        return y

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Only parts that do not see one another fold at any strength; merging therefore folds part by part."""
        raise FoldError("a chain is folded part by part")

    def state(self) -> dict[str, Tensor]:
        """The tensors of all parts."""
        return {suffix: tensor for part in self.each() for suffix, tensor in part.state().items()}


def chained(parts: Sequence[Adapter]) -> Adapter:
    """Make one adapter of several parts.

    Args:
        parts: At least one, in the order in which they run.

    Returns:
        A single part itself; a `Chain` of several.
    """
    return parts[0] if len(parts) == 1 else Chain(parts)


def parts_of(adapter: Adapter) -> list[Adapter]:
    """List the parts of an adapter.

    Args:
        adapter: Any.

    Returns:
        The parts of a `Chain`; of any other adapter, itself.
    """
    return adapter.each() if isinstance(adapter, Chain) else [adapter]


def begin(module: nn.Module) -> None:
    """Do what ``nn.Module.__init__`` does, several times faster: a network has hundreds of sites.

    Args:
        module: One that was just made, that is never called and has no parameters, buffers or state dict of its own, so that
            all such share what stays empty. An object that is not made needs not be looked at in the search for garbage.
    """
    shared, made = _beginning()
    own = vars(module)
    own.update(shared)
    for name, kind in made:
        own[name] = kind()


_OWN = frozenset(("_parameters", "_buffers", "_modules"))
"""What torch puts members into when it moves or replaces them; all else that a new module has stays empty in those here."""


@cache
def _beginning() -> tuple[dict[str, Any], list[tuple[str, type]]]:
    """What a new module has: what all may share, and of which kinds each has empty ones of its own."""
    own = vars(nn.Module())
    made = {name: type(value) for name, value in own.items() if name in _OWN}
    return {name: value for name, value in own.items() if name not in made}, list(made.items())


class AdapterDict(nn.Module):
    """The adapters of one site, in the order of attachment. Those that a file holds are built when they are asked for."""

    _stored: dict[str, StoredPair]  # of those that are not built; they have a place among the modules too
    _site: tuple[Site, ...]  # in a tuple, so that the site is no child of its own child

    def __init__(self) -> None:
        begin(self)
        # Not by nn.Module.__setattr__, which looks through all kinds of members each time: a network has hundreds of sites.
        vars(self).update(_stored={}, _site=())

    def store(self, name: str, pair: StoredPair, site: Site) -> None:
        """Take an adapter that is not built yet.

        Args:
            name: What it is called.
            pair: What a file holds of it.
            site: The module that it sits on.
        """
        self._modules[name] = None
        self._stored[name] = pair
        if not self._site:
            vars(self)["_site"] = (site,)  # as in __init__

    def exchange(self, name: str, pair: StoredPair) -> None:
        """Put another pair in the place of one that is not built yet.

        Args:
            name: What it is called.
            pair: The new one.
        """
        self._stored[name] = pair

    def stored(self, name: str) -> StoredPair | None:
        """Give what a file holds of an adapter.

        Args:
            name: What it is called.

        Returns:
            The pair; None where the adapter was built.
        """
        return self._stored.get(name)

    @property
    def unbuilt(self) -> Mapping[str, StoredPair]:
        """What files hold of the adapters that are not built, by name."""
        return self._stored

    def built(self) -> list[Adapter]:
        """The adapters that are built, in the order of attachment; those that are not do no more than add a pair."""
        return [module for module in self._modules.values() if isinstance(module, Adapter)]

    def names(self) -> KeysView[str]:
        """The names, in the order of attachment."""
        return self._modules.keys()

    def __getitem__(self, name: str) -> Adapter:
        if name in self._stored:
            with torch.inference_mode(False), torch.no_grad():  # it may be trained later
                self[name] = self._made(name)
        adapter = self._modules[name]
        if not isinstance(adapter, Adapter):
            raise TypeError(f"{name} is no adapter")
        return adapter

    def _made(self, name: str) -> Adapter:
        (site,) = self._site
        adapter = self._stored[name].build(site)
        device = next(
            (own.device for own in itertools.chain(site.parameters(recurse=False), site.buffers(recurse=False))), None
        )
        adapter.to(device).train(site.training).bind(site)
        return adapter

    def __setitem__(self, name: str, adapter: Adapter) -> None:
        self._modules[name] = adapter  # not add_module, which refuses names such as "type" or "half"
        self._stored.pop(name, None)

    def __delitem__(self, name: str) -> None:
        del self._modules[name]
        self._stored.pop(name, None)

    def __contains__(self, name: str) -> bool:
        return name in self._modules

    def __len__(self) -> int:
        return len(self._modules)

    def items(self) -> list[tuple[str, Adapter]]:
        """Names and adapters, in the order of attachment."""
        return [(name, self[name]) for name in self._modules]


def _shapes(parameters: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in parameters.items()}


def _alike(one: Adapter, other: Adapter) -> bool:
    """Whether two of a kind have the same of all that is not trained, such as their scales."""
    fixed = [{name: tensor for name, tensor in each.state().items() if not tensor.requires_grad} for each in (one, other)]
    return fixed[0].keys() == fixed[1].keys() and all(torch.equal(fixed[0][name], fixed[1][name]) for name in fixed[0])


def float32_parameter(tensor: Tensor) -> nn.Parameter:
    """Make a trainable copy.

    Args:
        tensor: Of any dtype.

    Returns:
        A float32 parameter with its values.
    """
    return nn.Parameter(tensor.detach().to(torch.float32).clone())
