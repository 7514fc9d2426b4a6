"""The low-rank adapters of a component in one piece of memory, which its sites look into.

Each site has a region with room for some ranks. An adapter takes free ranks of it when it comes and gives them back as zeros
when it goes; all else stays where it is, so that what was recorded or compiled sees other adapters and needs not be made
anew. Where a site has too little room, all regions move once to larger memory, in steps.
"""

import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple, Self, TypeAlias

import torch
from torch import Tensor, nn

from .adapter import Adapter, LowRank, Matrices, Pair, StoredPair, contiguous, cut
from .arena import ALIGNMENT

_LEAST_ROOM = 8  # ranks of a region; from there on it doubles

_ROWS = "rows"  # what the rows of the strengths are called among the buffers, beside dtypes


class LivePair:
    """The pair of an adapter that is built, as its parameters are."""

    __slots__ = ("_adapter", "_rank")

    def __init__(self, adapter: Adapter, rank: int) -> None:
        self._adapter = adapter
        self._rank = rank

    @property
    def rank(self) -> int:
        """Of the pair."""
        return self._rank

    def matrices(self) -> Matrices:
        """Give the matrices as they are now.

        Returns:
            Them, where the adapter is, with the scale in ``up``.

        Raises:
            TypeError: The change of the adapter is of low rank no more.
        """
        pair = self._adapter.low_rank()
        if pair is None:
            raise TypeError("an adapter whose change was of low rank is none any more")
        return Matrices(pair.down.detach(), pair.up.detach(), 1.0)


class SiteView(NamedTuple):
    """What a site sees of a slab: ``down`` (room, in, ...), ``up`` (room, out), and ``rows`` (room,) of the strengths.

    Ranks that no adapter has are 0 in both, whatever their strength.
    """

    down: Tensor
    up: Tensor
    rows: Tensor


class Wanted(NamedTuple):
    """What the region of a site is to hold.

    Attributes:
        path: Of the site. Those that are parts of one module lie side by side.
        shape: Of the weight, (out, in, ...).
        dtype: What the site computes in.
        names: Of all its adapters.
        pairs: Those that are to be written, by the name of the adapter, each with its row of the strengths.
    """

    path: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    names: AbstractSet[str]
    pairs: Mapping[str, tuple[int, Pair]]


@dataclass(slots=True)
class _Held:
    """Ranks of a region that an adapter has."""

    start: int
    rank: int
    row: int
    pair: Pair


@dataclass(slots=True)
class _Region:
    """The part of a slab that a site has; ``down`` and ``up`` are where it begins in the flat tensor of its dtype."""

    parent: str
    role: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    room: int = 0
    held: dict[str, _Held] = field(default_factory=dict)
    down: int = 0
    up: int = 0
    rows: int = 0
    width: int = 0

    @classmethod
    def of(cls, wanted: Wanted) -> "_Region":
        """Make an empty one. A rank of ``down`` has ``width`` numbers; sites of one ``role`` are in like blocks."""
        return cls(*_parent_and_role(wanted.path), wanted.shape, wanted.dtype, width=math.prod(wanted.shape[1:]))

    def gap(self, rank: int) -> int | None:
        """The first place with so many free ranks one after the other."""
        taken = 0
        for one in self.held.values():
            taken |= ((1 << one.rank) - 1) << one.start
        return _gap(taken, self.room, rank)


@lru_cache(maxsize=20_000)  # asked for whenever a network gets its first adapter
def _parent_and_role(path: str) -> tuple[str, str]:
    """The path around that of a site, and the path without the numbers of blocks."""
    return path.rpartition(".")[0], ".".join([part for part in path.split(".") if not part.isdecimal()])


_Places: TypeAlias = tuple[int, int, int, int, int]
"""Where ``down``, ``up`` and ``rows`` of a site begin in the slab, and where ``down`` and ``up`` begin in the file."""


@dataclass(slots=True)
class Series:
    """Ranks of sites that lie at equal distances in the slab, and in their file: one view is all of them.

    Attributes:
        region: Of the first site.
        rank: How many ranks each site has.
        row: Of the strengths, where an adapter has the ranks.
        pair: What the first site is to hold there; None where nothing is written.
        first: Where the ranks of the first site begin.
        last: Where those of the last one do.
        steps: How far it is from one to the next; None of a single one.
        number: How many sites there are.
    """

    region: _Region
    rank: int
    row: int
    pair: Pair | None
    first: _Places
    last: _Places
    steps: _Places | None = None
    number: int = 1

    def takes(self, at: _Places) -> bool:
        """Take in the ranks of one more site, where they lie as far on as they would have to.

        Args:
            at: Where they lie.

        Returns:
            Whether they were taken in.
        """
        down, up, rows, file_down, file_up = self.last
        steps = at[0] - down, at[1] - up, at[2] - rows, at[3] - file_down, at[4] - file_up
        if steps != self.steps:
            if self.steps is not None or min(steps) < 0 or 0 in steps[:3]:  # no view goes backwards
                return False
            self.steps = steps
        self.last = at
        self.number += 1
        return True

    def strides(self, place: int, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Tell the strides of a view of one part of each site.

        Args:
            place: Of the part in `first`.
            shape: Of the part of one site, which is contiguous.

        Returns:
            Those of (number, *shape).
        """
        return (math.prod(shape) if self.steps is None else self.steps[place], *contiguous(shape))

    def in_slab(self, flats: Mapping[torch.dtype, Tensor]) -> tuple[Tensor, Tensor]:
        """Look at the ranks in the slab.

        Args:
            flats: Its flat tensors by dtype.

        Returns:
            Views of ``down``, (number, rank, in, ...), and of ``up``, (number, rank, out).
        """
        flat, (outputs, *inputs) = flats[self.region.dtype], self.region.shape
        begin, width, height = flat.storage_offset(), (self.rank, *inputs), (self.rank, outputs)
        down = flat.as_strided((self.number, *width), self.strides(0, width), begin + self.first[0])
        return down, flat.as_strided((self.number, *height), self.strides(1, height), begin + self.first[1])

    def in_rows(self, rows: Tensor) -> Tensor:
        """Look at the rows of the strengths that the ranks have.

        Args:
            rows: Those of the whole slab.

        Returns:
            A view, (number, rank).
        """
        return rows.as_strided((self.number, self.rank), self.strides(2, (self.rank,)), self.first[2])


@lru_cache(maxsize=1000)  # sites that carry the same adapters have the same gaps
def _gap(taken: int, room: int, rank: int) -> int | None:
    """The first of so many free ranks one after the other among ``room``, of which the bits of ``taken`` are not free."""
    free = ~taken & ((1 << room) - 1)
    left = rank
    while left > 1 and free:  # a bit stays where so many above it are free too
        half = left // 2
        free &= free >> half
        left -= half
    return (free & -free).bit_length() - 1 if free else None


class Slab(nn.Module):
    """The pairs of all sites of a component.

    It follows the component to another dtype, and is made anew of what files and adapters hold then: a pair that was rounded
    once would not get its precision back on a wider base.

    Attributes:
        moves: How often the regions moved to other memory, which ends what was recorded of them.
        views: What each site sees, by its place.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.moves = 0
        self.views: list[SiteView | None] = []
        self._regions: list[_Region | None] = []
        self._seen: list[int] = []
        self._place({}, torch.zeros(0, dtype=torch.int64, device=device))
        self._host_rows = torch.zeros(0, dtype=torch.int64)

    def hold(self, wanted: Mapping[int, Wanted], new: Sequence[Wanted]) -> list[int]:
        """Bring regions to what sites carry. What is there already is left as it is, but for pairs of built adapters, whose
        parameters may have changed.

        Args:
            wanted: By place, of sites that have a region.
            new: Of sites that have none.

        Returns:
            The places of the new ones.
        """
        places = [place for place, region in enumerate(self._regions) if region is None][: len(new)]
        more = len(new) - len(places)
        places += range(len(self._regions), len(self._regions) + more)
        self._regions += [None] * more
        self.views += [None] * more
        for place, one in zip(places, new, strict=True):
            self._regions[place] = _Region.of(one)
        gone: list[tuple[int, _Held]] = []
        placed: list[tuple[int, _Held]] = []
        moving = False
        for place, one in (*wanted.items(), *zip(places, new, strict=True)):
            region = self._region(place)
            held = region.held
            if region.dtype != one.dtype:
                moving, region.dtype = True, one.dtype
            if not held.keys() <= one.names:
                gone += [(place, held.pop(name)) for name in held.keys() - one.names]
            for name, (row, pair) in one.pairs.items():
                before, rank = held.get(name), pair.rank
                if before is not None and before.rank != rank:
                    gone.append((place, held.pop(name)))
                    before = None
                start = region.gap(rank) if before is None else before.start
                moving = moving or start is None
                held[name] = now = _Held(0 if start is None else start, rank, row, pair)
                placed.append((place, now))
        if moving:
            self._move()
        elif gone or placed:
            self._clear(gone)
            self._fill(placed)
        return places

    def rewrite(self, name: str, pairs: Mapping[int, StoredPair]) -> None:
        """Put other pairs of the same ranks in the places of those of an adapter.

        Args:
            name: What it is called.
            pairs: The new ones, by place.
        """
        placed = []
        for place, pair in pairs.items():
            held = self._region(place).held
            before = held[name]
            held[name] = now = _Held(before.start, before.rank, before.row, pair)
            placed.append((place, now))
        self._fill(placed)

    def ranks(self, place: int, name: str) -> int:
        """Tell how many ranks an adapter has at a site.

        Args:
            place: Of the site.
            name: What the adapter is called.

        Returns:
            The number; 0 where it has none.
        """
        held = self._region(place).held.get(name)
        return 0 if held is None else held.rank

    def computes(self, place: int) -> torch.dtype:
        """Tell what a site computes in.

        Args:
            place: Of the site.

        Returns:
            The dtype of its region.
        """
        return self._region(place).dtype

    def missing(self, place: int, pairs: Mapping[str, Pair], dtype: torch.dtype) -> list[str]:
        """Tell which pairs of a site are yet to be written.

        Args:
            place: Of the site.
            pairs: Those that it carries, by the name of the adapter.
            dtype: What it computes in.

        Returns:
            The names of those that are not in its region as they are.
        """
        region = self._region(place)
        if region.dtype != dtype:
            return list(pairs)
        held = region.held
        return [name for name, pair in pairs.items() if (found := held.get(name)) is None or found.pair is not pair]

    def weighed(self, values: Tensor, blocks: Mapping[int, int]) -> dict[int, LowRank]:
        """Give the pairs of sites at their strengths, as files hold them: what was rounded to what the base computes in is
        taken from the files again.

        Args:
            values: The strengths, (rows, blocks), where the slab lies.
            blocks: The block of each site, by its place.

        Returns:
            In float32, ``down`` (room, inputs) and ``up`` (outputs, room), by place; nothing for a site with a pair of
            parameters, which may have changed.
        """
        regions = {place: region for place in blocks if (region := self._regions[place]) is not None and _is_stored(region)}
        if not regions:
            return {}
        each = torch.zeros(len(self._rows), dtype=torch.int64)
        for place, region in regions.items():
            each[region.rows : region.rows + region.room] = blocks[place]
        amounts = values[self._rows, each.to(self._rows.device)].unsqueeze(1)
        flats = {dtype: flat.float() for dtype, flat in self._flats.items()}
        # Never of float32, which is exact: those flat tensors are no copies.
        rounded = [
            (place, one)
            for place, region in regions.items()
            for one in region.held.values()
            if isinstance(one.pair, StoredPair) and not _is_exact(one.pair, region.dtype)
        ]
        _write(self._series(rounded, apart=True), flats, self.device)
        found = {}
        for place, region in regions.items():
            down, up = _matrices(region, flats)
            found[place] = LowRank(down.flatten(1), (up * amounts[region.rows : region.rows + region.room]).t())
        return found

    def vacate(self, places: Sequence[int]) -> None:
        """Give up the regions of sites. Their memory is used again when the others move.

        Args:
            places: Theirs.
        """
        for place in places:
            self._regions[place] = self.views[place] = None

    def release(self, name: str, places: Sequence[int]) -> None:
        """Free the ranks of an adapter.

        Args:
            name: What it is called.
            places: Of the sites that it leaves and that keep their regions.
        """
        found = [(place, held) for place in places if (held := self._region(place).held.pop(name, None)) is not None]
        self._clear(found)

    def _region(self, place: int) -> _Region:
        found = self._regions[place]
        if found is None:
            raise IndexError(f"no site has the place {place}")
        return found

    def _move(self) -> None:
        """Lay all regions out anew, with room for what they hold, and fill them from what files and adapters hold."""
        sizes: dict[torch.dtype, int] = {}
        rows = 0
        there = [region for region in self._regions if region is not None]
        for region in there:
            start = 0
            for held in region.held.values():
                held.start, start = start, start + held.rank
            region.room = max(_LEAST_ROOM, 1 << (start - 1).bit_length() if start else 0)
            region.rows, rows = rows, rows + region.room
        # Sites of one parent and shape lie side by side, first their downs, then their ups: together they are one matrix.
        for _, group in itertools.groupby(there, lambda one: (one.parent, one.shape, one.dtype, one.room)):
            alike = list(group)
            for region in alike:
                region.down = _reserve(sizes, region.dtype, region.room * region.width)
            for region in alike:
                region.up = _reserve(sizes, region.dtype, region.room * region.shape[0])
        flats = {dtype: torch.zeros(size, dtype=dtype, device=self.device) for dtype, size in sizes.items()}
        self._place(flats, torch.zeros(rows, dtype=torch.int64, device=self.device))
        self._host_rows = torch.zeros(rows, dtype=torch.int64)
        self.moves += 1
        self._look()
        everything = ((place, region) for place, region in enumerate(self._regions) if region is not None)
        self._fill([(place, held) for place, region in everything for held in region.held.values()])

    def follow(self) -> None:
        """Look at the numbers where they are now: a host may have put other memory under the buffers, as diffusers' group
        offloading does by ``tensor.data``, of which views learn nothing."""
        if self._seen != self._addresses():
            self.device = self._rows.device
            self.moves += 1
            self._look()

    def _addresses(self) -> list[int]:
        """Where the buffers lie."""
        return [buffer.data_ptr() for buffer in self.buffers()]

    def _look(self) -> None:
        """Make the views."""
        flats, rows = self._flats, self._rows
        self._seen = self._addresses()
        self.views = [None] * len(self._regions)
        joined: dict[Hashable, list[tuple[Series, list[int]]]] = {}
        for place, region in enumerate(self._regions):
            if region is not None:
                at, alike = (
                    (region.down, region.up, region.rows, 0, 0),
                    (region.role, region.shape, region.dtype, region.room),
                )
                found = joined.setdefault(alike, [])
                if not found or not found[-1][0].takes(at):
                    found.append((Series(region, region.room, 0, None, at, at), []))
                found[-1][1].append(place)
        for series, places in itertools.chain.from_iterable(joined.values()):
            parts = (*series.in_slab(flats), series.in_rows(rows))
            for place, *own in zip(places, *(part.unbind() for part in parts), strict=True):
                self.views[place] = SiteView(*own)

    @torch.no_grad()
    def _clear(self, gone: Iterable[tuple[int, _Held]]) -> None:
        series = self._series(gone, apart=False)
        if series:
            flats = self._flats
            torch._foreach_zero_([part for one in series for part in one.in_slab(flats)])

    @torch.no_grad()
    def _fill(self, placed: Iterable[tuple[int, _Held]]) -> None:
        """Write pairs to where they are held, those of one file with one copy to the device."""
        series = self._series(placed, apart=True)
        _write(series, self._flats, self.device)
        for one in series:
            one.in_rows(self._host_rows).fill_(one.row)
        self._rows.copy_(self._host_rows)

    def _series(self, placed: Iterable[tuple[int, _Held]], *, apart: bool) -> list[Series]:
        """The ranks that adapters have at sites, joined where they lie at equal distances, as in blocks that are alike. With
        ``apart`` what is of other files, or has other scales or rows, is not joined."""
        found: list[Series] = []
        latest: dict[Hashable, Series] = {}
        regions = self._regions
        for place, held in placed:
            region, pair, start, rank, row = regions[place], held.pair, held.start, held.rank, held.row
            if region is None:
                continue
            shape = region.shape
            down, up, rows = region.down + start * region.width, region.up + start * shape[0], region.rows + start
            alike: Hashable
            if not apart:
                at, alike = (down, up, rows, 0, 0), (region.role, shape, region.dtype, rank)
            elif isinstance(pair, StoredPair):
                (flat, begin), (other, above) = pair.down, pair.up
                at = (down, up, rows, begin, above)
                alike = (region.role, shape, region.dtype, rank, row, pair.scale, id(flat), id(other))
            else:
                found.append(Series(region, rank, row, pair, (down, up, rows, 0, 0), (down, up, rows, 0, 0)))
                continue
            before = latest.get(alike)
            if before is None or not before.takes(at):
                latest[alike] = one = Series(region, rank, row, pair, at, at)
                found.append(one)
        return found

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if not self._flats:
            self.device = fn(torch.empty(0, device=self.device)).device
            return self
        dtypes = {dtype: fn(flat.new_empty(0)).dtype for dtype, flat in self._flats.items()}
        rows = fn(self._rows)
        if rows is self._rows and all(before == now for before, now in dtypes.items()):
            return self
        self.device = rows.device
        if all(before == now for before, now in dtypes.items()):
            self._place({dtype: fn(flat) for dtype, flat in self._flats.items()}, rows)
            self.moves += 1
            self._look()
            return self
        for region in self._regions:
            if region is not None:
                region.dtype = dtypes[region.dtype]
        self._move()
        return self

    @property
    def _flats(self) -> dict[torch.dtype, Tensor]:
        """The numbers of all regions, by their dtype."""
        return {held.dtype: held for name, held in self._buffers.items() if held is not None and name != _ROWS}

    @property
    def _rows(self) -> Tensor:
        """The rows of the strengths, of all regions."""
        return self.get_buffer(_ROWS)

    def _place(self, flats: Mapping[torch.dtype, Tensor], rows: Tensor) -> None:
        """Take other memory, as buffers, by which it is found."""
        self._buffers.clear()
        for dtype, flat in flats.items():
            self.register_buffer(str(dtype).replace("torch.", "pairs_"), flat, persistent=False)
        self.register_buffer(_ROWS, rows, persistent=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "views": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._look()


def _write(series: Sequence[Series], flats: Mapping[torch.dtype, Tensor], device: torch.device) -> None:
    """Write pairs to where they are held, in the flat tensors of a slab by the dtypes of regions."""
    if not series:
        return
    places = [one.in_slab(flats) for one in series]
    pairs = uploaded(series, device)
    # Apart, as tensors of one arrangement are few launches: those of the ups lie the other way round in files.
    torch._foreach_copy_([down for down, _ in places], [pair.down for pair in pairs])
    _fill_scaled([up.transpose(1, 2) for _, up in places], pairs)


def _fill_scaled(places: list[Tensor], pairs: Sequence[Matrices]) -> None:
    """Write the ups with their scales in them, each rounded once."""
    ups = [pair.up for pair in pairs]
    scaled = [number for number, pair in enumerate(pairs) if pair.scale != 1]
    # What a place holds as it is can be multiplied there.
    rounded = [one for one in scaled if places[one].dtype not in (ups[one].dtype, torch.float32)]
    if rounded:
        products = torch._foreach_mul([ups[one].float() for one in rounded], [pairs[one].scale for one in rounded])
        for number, product in zip(rounded, products, strict=True):
            ups[number] = product
    torch._foreach_copy_(places, ups)
    held = sorted(set(scaled) - set(rounded))
    if held:
        torch._foreach_mul_([places[one] for one in held], [pairs[one].scale for one in held])


def uploaded(series: Sequence[Series], device: torch.device) -> list[Matrices]:
    """Bring pairs to a device, with one copy for all that lie in one flat tensor, as those of a file do.

    Args:
        series: Of pairs on the CPU, or where they are to be.
        device: The device.

    Returns:
        Their matrices there, (number, rank, in, ...) and (number, out, rank); on the CPU those of files are where they were
        read.
    """
    flats = _copied(series, device)
    found = []
    for one in series:
        pair = one.pair
        if isinstance(pair, StoredPair):
            width, height = pair.form.down_shape, pair.form.up_shape
            (down, before), (up, above) = flats[id(pair.down.flat)], flats[id(pair.up.flat)]
            downs = down.as_strided((one.number, *width), one.strides(3, width), one.first[3] + before)
            ups = up.as_strided((one.number, *height), one.strides(4, height), one.first[4] + above)
            found.append(Matrices(downs, ups, pair.scale))
        elif pair is not None:
            own, other, scale = pair.matrices()
            downs, ups = (matrix.to(device, non_blocking=True)[None] for matrix in (own, other))
            found.append(Matrices(downs, ups, scale))
    return found


def _is_there(flat: Tensor, device: torch.device) -> bool:
    return flat.device == device


def _copied(series: Sequence[Series], device: torch.device) -> dict[int, tuple[Tensor, int]]:
    """The flat tensors of pairs on a device, as far as pairs lie there, and what to add to a place in the first to have it
    in the storage of the other; by the address of the first."""
    spans: dict[int, tuple[int, int]] = {}
    flats: dict[int, Tensor] = {}
    for one in series:
        pair = one.pair
        if isinstance(pair, StoredPair):
            form = pair.form
            for flat, first, last, shape in (
                (pair.down.flat, one.first[3], one.last[3], form.down_shape),
                (pair.up.flat, one.first[4], one.last[4], form.up_shape),
            ):
                flats[id(flat)] = flat
                begin, end = spans.get(id(flat), (first, 0))
                spans[id(flat)] = min(begin, first), max(end, last + math.prod(shape))
    found = {}
    for key, flat in flats.items():
        if _is_there(flat, device):
            found[key] = flat, int(flat.storage_offset())
        else:
            begin, end = spans[key]
            copy = flat[begin:end].to(device, non_blocking=True)
            found[key] = copy, int(copy.storage_offset()) - begin
    return found


def _matrices(region: _Region, flats: Mapping[torch.dtype, Tensor]) -> tuple[Tensor, Tensor]:
    """What a region has of the flat tensors: (room, in, ...) and (room, out)."""
    flat, room = flats[region.dtype], region.room
    return cut(flat, region.down, (room, *region.shape[1:])), cut(flat, region.up, (room, region.shape[0]))


def _is_stored(region: _Region) -> bool:
    """Whether all that a region holds is of files."""
    return all(isinstance(held.pair, StoredPair) for held in region.held.values())


def _is_exact(pair: StoredPair, dtype: torch.dtype) -> bool:
    """Whether a pair is in a dtype what it is in float32, with the scale in its up."""
    if dtype == torch.float32:
        return True
    scale = pair.scale
    turned = scale == 1 or (dtype == torch.bfloat16 and math.frexp(scale)[0] == 0.5)  # a power of 2 moves no digit
    return turned and pair.down.flat.dtype == pair.up.flat.dtype == dtype


def _reserve(sizes: dict[torch.dtype, int], dtype: torch.dtype, size: int) -> int:
    start = sizes.get(dtype, 0)
    sizes[dtype] = start + -(-size // ALIGNMENT) * ALIGNMENT
    return start
