"""How much of each adapter is applied: one tensor (adapter, block, image) per component, written in place."""

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeGuard, cast

import torch
from torch import Tensor

from . import regions
from .adapter import KeepsPrecision
from .block_names import shown, unknown, weighed
from .errors import UserError, did_you_mean
from .strength_schedule import ByPart, Schedule, Timed

Strength: TypeAlias = "float | Sequence[float] | Tensor | Mapping[str, float | Sequence[float]]"
"""A number; one number per image; or either per block, by the block's name (blocks not named get 0)."""
OverSteps: TypeAlias = "Strength | Schedule | Timed"
"""A strength of one component, or a schedule of them over the steps of a generation."""
Amount: TypeAlias = "OverSteps | ByPart | Sequence[float | ByPart]"
"""A strength, a schedule, or what differs between components, blocks and steps, also for each image."""


def of_component(amount: Amount, component: str, blocks: Sequence[str]) -> OverSteps:
    """Say what an amount is for one component.

    Args:
        amount: The amount.
        component: The name of the component.
        blocks: Its blocks.

    Returns:
        The same, without what is said of parts.
    """
    if isinstance(amount, ByPart):
        parts = [amount]
    elif isinstance(amount, (list, tuple)) and any(isinstance(one, ByPart) for one in amount):
        parts = [one if isinstance(one, ByPart) else ByPart(one) for one in amount]
    else:
        return cast(OverSteps, amount)
    found = Timed(tuple(one.timed(component, blocks) for one in parts))
    return found if over_steps(amount) else found.mean


def over_steps(amount: Amount) -> bool:
    """Tell whether an amount changes over the steps.

    Args:
        amount: The amount.

    Returns:
        Whether it does.
    """
    many = amount if isinstance(amount, (list, tuple)) else [amount]
    return any(isinstance(one, (Schedule, Timed)) or (isinstance(one, ByPart) and one.over_steps) for one in many)


def named_blocks(amount: Amount) -> Mapping[str, object]:
    """Tell which blocks an amount names.

    Args:
        amount: The amount.

    Returns:
        By name.
    """
    many = amount if isinstance(amount, (list, tuple)) else [amount]
    found: dict[str, object] = {}
    for one in many:
        found |= {**one.blocks, **one.block_steps} if isinstance(one, ByPart) else one if isinstance(one, Mapping) else {}
    return found


def with_blocks(amount: Amount, meant: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> Amount:
    """Name the blocks of an amount otherwise.

    Args:
        amount: The amount.
        meant: Gives the same by other names.

    Returns:
        The amount by those.
    """
    if isinstance(amount, ByPart):
        return replace(amount, blocks=meant(amount.blocks))
    if isinstance(amount, Mapping):
        return meant(amount)
    if isinstance(amount, (list, tuple)):
        return [replace(one, blocks=meant(one.blocks)) if isinstance(one, ByPart) else one for one in amount]
    return amount


def refuse_unknown(wanted: Mapping[str, object], blocks: Sequence[str]) -> None:
    """See that blocks are there.

    Args:
        wanted: By the names that a person gave.
        blocks: Those that there are.

    Raises:
        UserError: One is not.
    """
    lost = unknown(wanted, blocks)
    if lost:
        near = did_you_mean(lost[0], blocks)
        raise UserError(f"there is no block {', '.join(map(str, lost))}; there are: {shown(blocks)}{near}")


@dataclass(frozen=True)
class _Step:
    """The strengths of a step: those of ``Strengths``, for one thread."""

    owner: "weakref.ref[Strengths]"
    values: Tensor
    active: frozenset[str]
    change: int


class _Steps(threading.local):
    """The step that a thread is at. A network is called for one step at a time, which is told right before."""

    present: _Step | None = None


_steps = _Steps()
_writing = threading.RLock()  # steps write what all threads see as well, and a table is made of the one before

_ROWS = 8  # of the first table; from there on it doubles


class Strengths(KeepsPrecision):
    """The strengths of one component's adapters.

    ``values`` is (rows, blocks, images) in float32, with one column where every image gets the same. Blocks are all that
    takes a strength of its own, down to single layers: see ``targets.units``. An adapter has a row for as long as it is
    there; rows of none are 0, and there are more rows than adapters, in steps. So the tensor keeps its
    address while the number of columns stays, also where adapters come and go, and a compiled or captured model sees the
    new values. With a number of columns that it had before, it has that address again.

    Threads that share the component share all of it but the steps of a schedule: each reads those of its own, except in a
    compiled model, which knows one place for them.
    """

    values: Tensor

    def __init__(self, blocks: Sequence[str], device: torch.device) -> None:
        super().__init__()
        self.blocks = tuple(blocks)
        self.names: list[str] = []
        self.schedules: dict[str, Schedule | Timed] = {}  # of those whose strength changes over the steps
        self._active: frozenset[str] = frozenset()
        self.full: frozenset[str] = frozenset()  # those with a strength of 1 everywhere, known without asking the device
        self.changes = 0  # how often anything but the step was changed, which ends what threads know of their steps
        self.merged = False  # the weights hold the adapters, so sites add nothing
        self._learned: Tensor | None = None
        self._places: dict[str, int] = {}
        self._tables: dict[torch.Size, Tensor] = {}  # what ``values`` was, by its shape
        self._told = torch.zeros(0, len(self.blocks), 1)  # ``values`` on the CPU: to ask a device is to wait for it
        self.register_buffer("values", torch.zeros(0, len(self.blocks), 1, device=device), persistent=False)

    def add(self, name: str) -> None:
        """Make room for an adapter, at strength 1.

        Args:
            name: What it is called.
        """
        taken = set(self._places.values())
        row = next(number for number in range(len(taken) + 1) if number not in taken)
        with _writing:
            if row == len(self._told):
                more = max(_ROWS, len(self._told))
                self._told = torch.cat([self._told, torch.zeros(more, *self._told.shape[1:])])
            self._places[name] = row
            self._told[row] = 1.0
            self._publish()
            self.names.append(name)
            self.changes += 1
            self._active |= {name}
            self.full |= {name}

    def remove(self, name: str) -> None:
        """Forget an adapter.

        Args:
            name: What it is called.
        """
        with _writing:
            self._told[self._places.pop(name)] = 0.0
            self._publish()
            self.names.remove(name)
            self.changes += 1
            self.schedules = {own: one for own, one in self.schedules.items() if own != name}
            self._active -= {name}
            self.full -= {name}

    def write(self, amounts: Mapping[str, OverSteps]) -> None:
        """Set the strengths of the adapters named; the others keep theirs.

        Args:
            amounts: A strength or a schedule by the name of an adapter. A schedule stands at its mean, which it keeps in a
                component that does not run once a step, until ``at_progress`` says how far the steps are.

        Raises:
            UserError: There is no such adapter or block, a value is not finite, two adapters name different numbers of
                images, or the adapters are merged. Nothing is changed then.
        """
        schedules = {name: amount for name, amount in amounts.items() if isinstance(amount, (Schedule, Timed))}
        with _writing:
            rows = self._planned(amounts)
            self.schedules = {name: one for name, one in self.schedules.items() if name not in amounts} | schedules
            self.changes += 1
            self._put(rows)

    def check(self, amounts: Mapping[str, OverSteps]) -> None:
        """Raise as `write` does, and change nothing.

        Args:
            amounts: By the name of the adapter.
        """
        self._planned(amounts)

    def at_progress(self, progress: float) -> None:
        """Bring the adapters that have a schedule to their strength at a step, for what this thread computes next.

        Args:
            progress: How many of the steps are done, from 0 to 1.
        """
        with _writing:
            if self.schedules:
                rows = self._planned({name: schedule.at(progress) for name, schedule in self.schedules.items()})
                _steps.present = _Step(weakref.ref(self), *self._put(rows), self.changes)

    @property
    def active(self) -> frozenset[str]:
        """The adapters with a strength other than 0, at the step where this thread is."""
        step = self._step()
        return self._active if step is None else step.active

    @property
    def present(self) -> Tensor:
        """``values`` at the step of a schedule where this thread is, or those that are learned."""
        if self._learned is not None:
            return self._learned
        step = self._step()
        return self.values if step is None else step.values

    def _step(self) -> _Step | None:
        """The step of a schedule where this thread is; None where there is none, and in a graph that outlives it."""
        if torch.compiler.is_compiling() or not self.schedules or recording():
            return None
        step = _steps.present
        return step if step is not None and step.owner() is self and step.change == self.changes else None

    def steps(self, places: Sequence[float]) -> Tensor:
        """Give the strengths at several points of the steps, without changing any.

        Args:
            places: How many of the steps are done at each, from 0 to 1.

        Returns:
            (places, rows, blocks, images), where ``values`` is.
        """
        tables = []
        for place in places:
            rows = self._planned({name: schedule.at(place) for name, schedule in self.schedules.items()})
            tables.append(self._table(rows))
        return torch.stack(tables).to(self.values.device)

    def _planned(self, amounts: Mapping[str, OverSteps]) -> "dict[str, float | Tensor]":
        """The strengths of the adapters named: one number for all, or (blocks, images or 1). Raises as ``write`` does."""
        unknown = [name for name in amounts if name not in self._places]
        if unknown:
            there, near = ", ".join(self.names) or "none", did_you_mean(unknown[0], self.names)
            raise UserError(f"no adapter {', '.join(unknown)} is attached; there are: {there}{near}")
        if self.merged:
            raise UserError("the adapters are merged into the weights; unmerge them before you change a strength")
        plain = {name: one.mean if isinstance(one, (Schedule, Timed)) else one for name, one in amounts.items()}
        rows = {name: one if _is_plain(one) else self._rows(name, one) for name, one in plain.items()}
        counts = set(self._counted(rows).values()) - {1}
        if len(counts) > 1:
            raise UserError(f"adapters have strengths for different numbers of images: {sorted(counts)}")
        return rows

    def _counted(self, rows: "Mapping[str, float | Tensor]") -> dict[str, int]:
        """For how many images each adapter has strengths when these are written."""
        images = self._told.shape[2]
        kept = dict.fromkeys(self._places, 1)
        if images > 1:
            differ = (self._told != self._told[:, :, :1]).flatten(1).any(1).tolist()
            kept |= {name: images for name, place in self._places.items() if differ[place]}
        return kept | {name: row.shape[1] if isinstance(row, Tensor) else 1 for name, row in rows.items()}

    def _put(self, rows: "Mapping[str, float | Tensor]") -> tuple[Tensor, frozenset[str]]:
        """Write strengths, for all threads. Returns the values, apart from those, and the names of what is not 0."""
        table = self._table(rows)
        self._told = table
        self._publish()
        on = {name for name, row in rows.items() if (bool(row.any()) if isinstance(row, Tensor) else row != 0)}
        full = {name for name, row in rows.items() if (bool((row == 1).all()) if isinstance(row, Tensor) else row == 1)}
        self._active = self._active - rows.keys() | on
        self.full = self.full - rows.keys() | full
        # Another thread may write into `values` afterwards, so a step keeps what it was told itself.
        return table.to(self.values.device, copy=True) if self.schedules else self.values, self._active

    def _table(self, rows: "Mapping[str, float | Tensor]") -> Tensor:
        """The strengths of every adapter as `values` has them, on the CPU, with some changed."""
        images = max(self._counted(rows).values(), default=1)
        told = (self._told if images == self._told.shape[2] else self._told[:, :, :1].expand(-1, -1, images)).clone()
        for name, row in rows.items():
            told[self._places[name]] = row
        return told

    @torch.no_grad()
    def _publish(self) -> None:
        """Bring ``values`` to what was told."""
        if self.values.shape == self._told.shape:
            self.values.copy_(self._told)
        else:
            # A recording that was made with so many images reads where their strengths were then.
            place, device = self._tables.get(self._told.shape), self.values.device
            if place is None or place.device != device:
                self._tables[self._told.shape] = place = self._told.to(device, copy=True)
            else:
                place.copy_(self._told)
            self.values = place

    @property
    def images(self) -> int:
        """How many images have strengths of their own; 1 where all have the same."""
        return self.values.shape[2]

    @property
    def stepwise(self) -> bool:
        """Whether strengths depend on the step, or on which image is drawn."""
        return bool(self.schedules) or self.images > 1

    @contextmanager
    def without(self, name: str) -> Iterator[None]:
        """Put an adapter at strength 0 inside; nothing waits for the device, so a recording can hold it.

        Args:
            name: What it is called.

        Yields:
            Once; afterwards the strength is what it was.
        """
        row, own = self.values[self.index(name)], {name}
        before, active, full = row.clone(), self._active & own, self.full & own
        row.zero_()
        with _writing:
            self._active, self.full = self._active - own, self.full - own
        try:
            yield
        finally:
            row.copy_(before)
            with _writing:  # others may have been set meanwhile
                self._active, self.full = self._active - own | active, self.full - own | full

    def learn(self, rows: Tensor, values: Tensor) -> None:
        """Put a tensor in the place of ``values``, in every thread, through which gradients reach what it was made of.

        It stays until `stop_learning` or another one: a backward pass that computes blocks again reads what the forward
        pass read. Fast paths read ``values`` alone, so nothing is to be computed by one meanwhile.

        Args:
            rows: The rows of adapters in ``values``, (adapters,); all are active.
            values: Their strengths, (adapters, blocks, images).
        """
        others = self.values[:, :, :1].detach().expand(-1, -1, values.shape[2])
        self._learned = others.index_copy(0, rows, values.to(others))

    @property
    def learning(self) -> bool:
        """Whether a tensor that is learned stands in the place of ``values``, of which what was recorded knows nothing."""
        return self._learned is not None

    def stop_learning(self) -> None:
        """Give the strengths back that were set."""
        self._learned = None

    def index(self, name: str) -> int:
        """Find the row of an adapter in ``values``.

        Args:
            name: What it is called.

        Returns:
            The row.
        """
        return self._places[name]

    def at(self, rows: int | Tensor, block: int, y: Tensor) -> Tensor:
        """Give the strengths at a block. Guidance calls for each image two or three times (classifier-free guidance and
        perturbed attention, https://arxiv.org/abs/2403.17377), over which they are then repeated.

        Args:
            rows: One row of ``values``, or several.
            block: The index of the block.
            y: The output that they will multiply, (batch, ...).

        Returns:
            (n,) for one row, (n, rows) for several, in the dtype of ``y``; n is 1 or the batch.

        Raises:
            UserError: The batch is neither once, twice nor three times the number of images, nor that of their prompts.
        """
        values = self.present[rows, block].to(y.dtype)
        if values.ndim == 2:
            values = values.transpose(0, 1)
        return self.over(values, len(y))

    def spread(self, rows: int | Tensor, block: int, y: Tensor, *, channels_first: bool = True) -> Tensor:
        """Give the strengths at a block as they multiply an output there; where pictures have regions, by their masks.

        Args:
            rows: One row of ``values``, or one for each channel.
            block: The index of the block.
            y: What they multiply, (batch, ...).
            channels_first: Whether channels are the second of four dimensions, and not the last.

        Returns:
            What broadcasts against ``y``, in its dtype.

        Raises:
            UserError: As `at`, or as ``Layout.spread``.
        """
        layout = None if torch.compiler.is_compiling() else regions.present()
        if layout is not None and self.present.shape[2] > 1:
            values = self.present[rows, block]
            return layout.spread(values[:, None] if values.ndim == 1 else values.t(), y)
        strength = self.at(rows, block, y)
        strength = strength[:, None] if strength.ndim == 1 else strength
        if channels_first and y.ndim == 4:
            return strength[:, :, None, None]
        return strength.view(len(strength), *[1] * (y.ndim - 2), -1)

    def over(self, values: Tensor, batch: int) -> Tensor:
        """Repeat strengths of images over a batch that holds each image once or more: see `at`.

        Args:
            values: (images, ...).
            batch: How many rows there are.

        Returns:
            (batch, ...); as it was where all images have the same.

        Raises:
            UserError: As `at`.
        """
        images = len(values)
        if images == 1:
            return values
        if images % batch == 0:  # each prompt once, as a text encoder reads it for the several images that it is for
            return self._one_a_prompt(values, batch)
        if batch not in (2 * images, 3 * images):
            raise UserError(f"there are strengths for {images} images, but the batch holds {batch}")
        return values.repeat(batch // images, *[1] * (values.ndim - 1))

    def _one_a_prompt(self, values: Tensor, prompts: int) -> Tensor:
        """The strengths of each prompt, whose images follow one another. Raises UserError where they differ among these."""
        images = values.shape[0]
        if images == prompts:
            return values
        each = values.view(prompts, images // prompts, *values.shape[1:])
        if bool((each != each[:, :1]).any()):
            raise UserError(
                f"there are strengths for {images} images, but the batch holds {prompts}: a prompt that is read once cannot"
                f" have {images // prompts} strengths; give a prompt for each image, in place of num_images_per_prompt"
            )
        return each[:, 0]

    def scalar(self, name: str) -> Tensor:
        """Give the strengths of an adapter that hold for all images.

        Args:
            name: What it is called.

        Returns:
            (blocks,).

        Raises:
            UserError: Images differ, or the strength changes over the steps.
        """
        rows = self._told[self.index(name)]
        if bool((rows != rows[:, :1]).any()):
            raise UserError(f"adapter {name!r} has another strength for each image; merging needs one for all")
        return rows[:, 0]

    def kept(self, name: str) -> OverSteps:
        """Give what `write` takes for an adapter to have what it has.

        Args:
            name: What it is called.

        Returns:
            Its schedule; without one its strength, by block where blocks differ.
        """
        if name in self.schedules:
            return self.schedules[name]
        rows = self._kept(name)
        if bool((rows == rows[:1]).all()):
            own: list[float] = rows[0].tolist()
            return own[0] if len(own) == 1 else own
        return dict(zip(self.blocks, rows.tolist(), strict=True))

    def _rows(self, name: str, strength: Strength) -> Tensor:
        """A strength as (blocks, images), images being 1 where it does not say."""
        if isinstance(strength, Mapping):
            amounts = list(strength.values()) if tuple(strength) == self.blocks else self._by_block(strength)
            whole = _whole(amounts)
            if whole is not None:
                return whole
            per_block = [self._images(name, amount) for amount in amounts]
            images = max(len(row) for row in per_block)
            rows = torch.stack([row.expand(images) if len(row) in (1, images) else self._ragged(name) for row in per_block])
        else:
            rows = self._images(name, strength).expand(len(self.blocks), -1)
        return rows

    def _by_block(self, strength: "Mapping[str, float | Sequence[float]]") -> "list[float | Sequence[float]]":
        """What is said of each block, by whatever name. Raises UserError for a block that is not there."""
        meant = {block: block for block in self.blocks if block in strength}
        if not len(meant) == len(strength) == len(self.blocks):
            refuse_unknown(strength, self.blocks)
            meant = weighed(strength, self.blocks)
        return [strength[meant[block]] if block in meant else 0.0 for block in self.blocks]

    def _images(self, name: str, strength: "float | Sequence[float] | Tensor") -> Tensor:
        wanted = f"the strength of {name!r} must be a number, or one for each image, not"
        try:
            row = torch.as_tensor(strength, dtype=torch.float32, device="cpu")
        except (TypeError, ValueError, RuntimeError):  # as torch refuses what is no number
            raise UserError(f"{wanted} {strength!r}") from None
        if row.ndim > 1:
            raise UserError(f"{wanted} a table of {tuple(row.shape)}")
        if not row.numel() or not bool(row.isfinite().all()):
            raise UserError(f"the strength of {name!r} must be finite numbers, not {strength}")
        return row.reshape(-1)

    def _ragged(self, name: str) -> Tensor:
        raise UserError(f"the strengths of {name!r} name different numbers of images in different blocks")

    def _kept(self, name: str) -> Tensor:
        """The present strength of an adapter, in one column where all images have the same."""
        rows = self._told[self.index(name)]
        return rows if bool((rows != rows[:, :1]).any()) else rows[:, :1]


def _is_plain(strength: object) -> "TypeGuard[float]":
    """Whether a strength is one number that float32 has."""
    return type(strength) in (float, int) and abs(cast(float, strength)) <= torch.finfo(torch.float32).max


def _whole(amounts: Sequence[object]) -> Tensor | None:
    """Numbers, and lists of one number or of as many as others, as (amounts, numbers) at once; None for anything else."""
    if any(type(one) not in (list, float, int) for one in amounts):
        return None
    lists = [one if type(one) is list else [one] for one in amounts]
    images = max(map(len, lists))
    try:
        rows = torch.tensor([one if len(one) == images else one * images for one in lists], dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError):  # as of lists of tensors, and of other lengths
        return None
    return rows if rows.ndim == 2 and rows.numel() and bool(rows.isfinite().all()) else None


def recording() -> bool:
    """Tell whether a CUDA graph is being recorded, which outlives the strengths that it is made with.

    Returns:
        Whether one is, by this thread's stream.
    """
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
