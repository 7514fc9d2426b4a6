"""Pictures that join others under way: at each step those that wait come in, and those that are done leave.

Each has a scheduler, a step and a number of steps of its own; they share the calls of the network alone. The pipeline itself
prepares each picture and makes it of its latents, so that it is the one that it is when it is drawn alone.
"""

from collections import deque
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils import _pytree as trees

from ..bases import denoiser_of
from ..bases.pipelines import guides, place
from ..core.changes import one_at_a_time
from ..core.errors import Interrupted, UserError
from ..core.events import Never, Noted, Observer, Observers, Stop
from ..core.slot import state_of
from ..core.strength import OverSteps, Strength, Strengths
from ..core.strength_schedule import Schedule, Timed
from ..fast.cuda_graph import to_device
from ..fast.drawing import engine_of, records_on
from .batching import Request, as_drawn
from .sampler import Cell, FirstCall, called_by, finished, first_call, paint
from .settings import Sampling
from .tiling import seamless

if TYPE_CHECKING:
    from .adapters import Adapters, LoadedAdapter


@dataclass(eq=False)
class Ticket:
    """A picture that was asked for: see `Queue.submit`.

    Attributes:
        alone: Why it is drawn by itself; None where it is drawn beside others.
        step: How many calls of the network it has had.
        steps: How many it needs; 0 for one that is drawn by itself.
        done: Whether nothing more comes of it: it is drawn, has failed or was given up.
    """

    alone: str | None = None
    step: int = 0
    steps: int = 0
    done: bool = False
    _image: Image.Image | None = field(default=None, init=False, repr=False)
    _error: Exception | None = field(default=None, init=False, repr=False)
    _given_up: bool = field(default=False, init=False, repr=False)

    @property
    def image(self) -> Image.Image:
        """The picture.

        Raises:
            UserError: It is not there yet, or was given up.
            Exception: It failed: what was raised then.
        """
        if self._error is not None:
            raise self._error
        if self._image is None:
            raise UserError("the picture was given up" if self._given_up else "the picture is not drawn yet; call step()")
        return self._image

    @property
    def given_up(self) -> bool:
        """Whether it was given up before it was drawn."""
        return self._given_up

    @property
    def failed(self) -> bool:
        """Whether it could not be drawn; `image` then raises why."""
        return self._error is not None

    def cancel(self) -> None:
        """Give it up: it takes no part in the next step."""
        self._given_up = self._given_up or not self.done
        self.done = True

    def _fail(self, error: Exception) -> None:
        if not self.done:
            self._end(error=error)

    def _end(self, image: Image.Image | None = None, error: Exception | None = None) -> None:
        self.done, self._image, self._error = True, image, error


@dataclass(eq=False)
class _Own:
    """A picture that can share steps: where it is, and what is its own of a step."""

    ticket: Ticket
    call: FirstCall
    tell: Observer
    amounts: Mapping[str, OverSteps]
    adapters: Mapping[str, "LoadedAdapter"]
    times: Sequence[float]
    latents: Tensor
    guided: bool

    @classmethod
    def of(
        cls,
        ticket: Ticket,
        call: FirstCall,
        tell: Observer,
        amounts: Mapping[str, OverSteps],
        adapters: Mapping[str, "LoadedAdapter"],
    ) -> "_Own":
        times = [float(one) for one in call.scheduler.timesteps.tolist()]
        ticket.steps = len(times)
        return cls(ticket, call, tell, amounts, adapters, times, call.latents, call.guided)

    @property
    def rows(self) -> int:
        """How many rows of a batch it takes."""
        return 1 + self.guided

    @property
    def now(self) -> Any:
        """The timestep that it is at, as its scheduler has it."""
        return self.call.scheduler.timesteps[self.ticket.step]

    def told(self) -> dict[str, Any]:
        """What the network is called with for its rows, beside latents and timestep: without guidance for the prompt."""
        named = dict(self.call.named)
        return named if self.guided or not self.call.guided else trees.tree_map_only(Tensor, _second_half, named)

    def sample(self) -> Tensor:
        """Its latents as the network takes them, a row each."""
        scaled: Tensor = self.call.scheduler.scale_model_input(self.latents, self.now)
        return scaled.expand(self.rows, -1, -1, -1)

    def strengths(self) -> dict[str, Any]:
        """How much of each adapter acts at its step."""
        progress = place(self.times, self.times[self.ticket.step])
        return {name: one.at(progress) if isinstance(one, (Schedule, Timed)) else one for name, one in self.amounts.items()}

    def advance(self, predicted: Tensor, pipe: Any) -> None:
        """Take a step by what the network predicts for its rows."""
        sampling = self.call.sampling
        if self.guided:
            against, towards = predicted.chunk(2)
            predicted = against + sampling.guided_by * (towards - against)
        self.latents = self.call.scheduler.step(predicted, self.now, self.latents, **self.call.extra, return_dict=False)[0]
        self.ticket.step += 1
        if self.guided and self.ticket.step < len(self.times):
            self.guided = guides(pipe, self.times[self.ticket.step], sampling.guidance_stop)

    @property
    def drawn(self) -> bool:
        """Whether it has had all steps."""
        return self.ticket.step == len(self.times)

    @cached_property  # it is the same at every step, and asked for at each while the picture waits
    def kind(self) -> Hashable:
        """What must be equal within a batch: shapes, and what the whole network is told."""
        leaves, layout = trees.tree_flatten(dict(self.call.named))
        halved = 1 + self.call.guided
        shapes = [(len(one) // halved, one.shape[1:], one.dtype) if isinstance(one, Tensor) else repr(one) for one in leaves]
        return self.latents.shape, self.latents.dtype, str(layout), tuple(shapes), self.call.sampling.tile


@dataclass(eq=False)
class _Alone:
    """A picture that is drawn by itself."""

    ticket: Ticket
    cell: Cell
    sampling: Sampling
    tell: Observer


def _second_half(rows: Tensor) -> Tensor:
    return rows.chunk(2)[1]


def why_alone(adapters: "Adapters", cell: Cell, sampling: Sampling) -> str | None:
    """Tell why a picture cannot share its steps with pictures at other steps.

    Args:
        adapters: Those of the pipeline that draws.
        cell: The picture.
        sampling: How it is drawn.

    Returns:
        Why; None where it can.
    """
    if not denoiser_of(adapters.pipe).steps_alike:
        return f"a {type(adapters.pipe).__name__} has steps of its own kind"
    reasons = {
        "it has a second pass": sampling.second_pass is not None,
        "pictures steer it": bool(sampling.control),
        "its adapters are composed": sampling.composition != "add",
        "it has regions": cell.division is not None,
        "the base waits on the CPU": sampling.offload is not None or _is_offloaded(adapters.pipe),
    }
    return next((why for why, holds in reasons.items() if holds), None)


def _is_offloaded(pipe: Any) -> bool:
    """Whether hooks bring parts of the network to the device while a pipeline draws."""
    return any(hasattr(one, "_hf_hook") or hasattr(one, "_diffusers_hook") for one in denoiser_of(pipe).network.modules())


class Queue:
    """Draws pictures that come one after another, those at once that can share steps.

    ``submit`` as requests come, and ``step`` as long as it is `busy`: before each step pictures that wait join those under
    way, in order, as far as there is room, and those that are done leave. Sizes and lengths of prompts must be the same
    within a batch; steps, schedulers, guidance, seeds, adapters and their schedules need not be. One that cannot join waits
    until those under way are done, and those behind it wait too, so that nobody waits forever. Not for several threads.

    Strengths may be set and pictures be drawn otherwise between two steps: those under way keep their own. Where an adapter
    of theirs is removed, or another gets its name, they fail.

    Args:
        adapters: Those of the pipeline that draws. Their strengths are those of the last step; see `Adapters.queue`.
        at_most: Pictures computed at once, 1 or more.

    Raises:
        UserError: It is less, or the base is a language model.
    """

    def __init__(self, adapters: "Adapters", *, at_most: int = 8) -> None:
        if at_most < 1:
            raise UserError(f"at_most must be 1 or more, not {at_most}")
        denoiser_of(adapters.pipe)
        self.adapters = adapters
        self.at_most = at_most
        self._waiting: deque[_Own | _Alone] = deque()
        self._under_way: list[_Own] = []
        self._written: Any = False  # for which rows strengths were last written
        self._closed = False
        self._left: Any = None  # how strengths and adapters were left by what was last done here
        self._told: tuple[Any, dict[str, Any]] | None = None

    @property
    def busy(self) -> bool:
        """Whether there is anything to draw."""
        return bool(self._waiting or self._under_way)

    @property
    def under_way(self) -> int:
        """How many pictures are being drawn."""
        return len(self._under_way)

    @property
    def room(self) -> int:
        """How many more pictures the next step could begin with."""
        return max(0, self.at_most - len(self._under_way) - len(self._waiting))

    def submit(self, request: Request, tell: Observer = Observers()) -> Ticket:  # noqa: B008 -- has no state
        """Ask for a picture. Its prompt is read now.

        Args:
            request: What is wanted.
            tell: Is told what the person who asks should know, such as why it is drawn by itself.

        Returns:
            By which to know when it is done.

        Raises:
            UserError: It names an adapter that is not there, or cannot be drawn; or the queue is closed.
        """
        return self.put(*as_drawn(self.adapters, request), tell)

    @torch.no_grad()
    def put(self, cell: Cell, sampling: Sampling, tell: Observer) -> Ticket:
        """Ask for a picture as the sampler knows it.

        Args:
            cell: The picture, with strengths.
            sampling: How it is drawn.
            tell: As for `submit`.

        Returns:
            As `submit`.

        Raises:
            UserError: As `submit`.
        """
        self._check_open()
        ticket = Ticket(why_alone(self.adapters, cell, sampling))
        if ticket.alone is not None:
            tell(Noted(f"a picture is drawn by itself: {ticket.alone}"))
            self._waiting.append(_Alone(ticket, cell, sampling, tell))
            return ticket
        self._written = False
        call, strengths = first_call(self.adapters, cell, sampling, tell), self._strengths
        amounts: dict[str, OverSteps] = {}
        if strengths is not None:  # which are those of the picture now
            amounts = {name: strengths.kept(name) for name in cell.amounts if name in strengths.names}
        acting = {name: self.adapters[name] for name in amounts if cell.amounts[name] != 0}
        self._waiting.append(_Own.of(ticket, call, tell, amounts, acting))
        return ticket

    @torch.no_grad()
    def step(self, stop: Stop = Never()) -> list[Ticket]:  # noqa: B008 -- has no state
        """Let pictures join and leave, and take a step with those under way; where one is drawn by itself, all its steps.

        Args:
            stop: Where it is set, a picture that is drawn by itself is not begun.

        Returns:
            Those that are done now: drawn, failed or given up.

        Raises:
            UserError: The queue is closed.
            Exception: Whatever the network raised. All that was under way has failed with it.
        """
        self._check_open()
        self._look()
        gone = self._leave()
        alone = self._join()
        if alone is not None:
            self._draw(alone, stop)
        elif self._under_way:
            try:
                self._advance()
            except Exception as error:
                for own in self._under_way:
                    own.ticket._end(error=error)
                self._leave()
                raise
        return [*gone, *self._leave()]

    def run(self) -> list[Ticket]:
        """Draw all that was asked for.

        Returns:
            In the order in which they are done.

        Raises:
            Exception: As `step`.
        """
        done: list[Ticket] = []
        while self.busy:
            done += self.step()
        return done

    def close(self) -> None:
        """Give up what is not drawn. Nothing can be asked for any more: strengths are no longer the queue's to write."""
        for one in (*self._waiting, *self._under_way):
            one.ticket.cancel()
        self._leave()
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise UserError("the queue is closed, as its with block has ended; open another with adapters.queue()")

    @property
    def _strengths(self) -> Strengths | None:
        """Those of the network; None where it carries no adapters."""
        state = state_of(denoiser_of(self.adapters.pipe).network)
        return None if state is None else state.strengths

    @property
    def _present(self) -> tuple[Any, ...]:
        """What changes with every strength and adapter of the network."""
        strengths = self._strengths
        return (None,) if strengths is None else (strengths, strengths.changes, strengths.merged)

    def _look(self) -> None:
        """Where somebody has changed strengths or adapters since, have strengths written again, and fail pictures whose
        adapters are gone or others now: what is left of them would be drawn without."""
        if self._present == self._left:
            return
        self._written = False
        for own in (*self._under_way, *(one for one in self._waiting if isinstance(one, _Own))):
            try:
                lost = [name for name, known in own.adapters.items() if self.adapters[name] != known]
            except UserError as error:
                own.ticket._fail(error)
                continue
            if lost:
                own.ticket._fail(UserError(f"the adapter {lost[0]!r} is another now than when the picture was asked for"))

    def _join(self) -> _Alone | None:
        """Begin with those that wait, in order. Returns the first one where it is to be drawn by itself now."""
        while self._waiting and len(self._under_way) < self.at_most:
            first = self._waiting[0]
            if first.ticket.done:
                self._waiting.popleft()
            elif isinstance(first, _Alone):
                return None if self._under_way else first
            elif not self._under_way or first.kind == self._under_way[0].kind:
                self._under_way.append(first)
                self._waiting.popleft()
                self._written = False
            else:
                break
        return None

    def _leave(self) -> list[Ticket]:
        """Part with those that are done, and make pictures of what they drew."""
        left = [own for own in self._under_way if own.ticket.done or own.drawn]
        gone = [one for one in self._waiting if one.ticket.done]
        if left or gone:
            self._under_way = [own for own in self._under_way if own not in left]
            self._waiting = deque(one for one in self._waiting if one not in gone)
            self._written = False
            self._told = None
        for own in left:
            if not own.ticket.done:
                try:
                    own.ticket._end(finished(self.adapters, own.call, own.latents, own.tell))
                except Exception as error:  # which is for whoever asked for this picture
                    own.ticket._end(error=error)
        return [one.ticket for one in (*left, *gone)]

    def _draw(self, alone: _Alone, stop: Stop) -> None:
        """Draw a picture by itself."""
        self._written = False
        try:
            (image,) = paint(self.adapters, [alone.cell], alone.sampling, tell=alone.tell, stop=stop)
            alone.ticket._end(image)
        except Exception as error:
            alone.ticket._end(error=error)
        except Interrupted:
            alone.ticket.cancel()

    def _advance(self) -> None:
        """Take a step with all that are under way."""
        pipe, own = self.adapters.pipe, self._under_way
        network = denoiser_of(pipe).network
        device, rows = next(network.parameters()).device, [one.rows for one in own]
        total = self._rows(sum(rows))
        fill = total - sum(rows)
        self._weigh(rows, fill)
        named = self._named(rows, fill)
        samples = [one.sample() for one in own]
        times = [one.times[one.ticket.step] for one in own for _ in range(one.rows)]
        told = {
            "sample": torch.cat([*samples, *(samples[0][:1] for _ in range(fill))]),
            "timestep": torch.tensor([*times, *times[:1] * fill], dtype=torch.float32),
        }
        told = to_device(told, device)
        with seamless(pipe, own[0].call.sampling.tile), self._by_engine():
            found = called_by(pipe)(told["sample"], told["timestep"], **named)[0]
        for one, predicted in zip(own, found[: sum(rows)].split(rows), strict=True):
            one.advance(predicted, pipe)

    @contextmanager
    def _by_engine(self) -> Iterator[None]:
        """Have the engine of the network know inside that it is one drawing from step to step."""
        engine = engine_of(denoiser_of(self.adapters.pipe).network)
        if engine is not None:
            engine.drawn = self
        try:
            yield
        finally:
            if engine is not None:
                engine.drawn = None

    def _rows(self, rows: int) -> int:
        """How many rows are computed: where steps are recorded powers of two, so that few sizes are ever recorded."""
        network = denoiser_of(self.adapters.pipe).network
        if engine_of(network) is None or not records_on(next(network.parameters()).device):
            return rows
        return max(rows, min(1 << (rows - 1).bit_length(), 2 * self.at_most))

    def _named(self, rows: Sequence[int], fill: int) -> dict[str, Any]:
        """What the network is told beside latents and timesteps: the same tensors as long as the same pictures are drawn.

        By these the engine knows that keys and values of prompts are still those that it has computed.
        """
        key = tuple(zip(self._under_way, rows, strict=True)), fill
        if self._told is None or self._told[0] != key:
            parts = [one.told() for one in self._under_way]
            first, *others = parts
            together = {
                name: trees.tree_map(lambda *ones: _stacked(ones, fill), value, *(other[name] for other in others))
                for name, value in first.items()
            }
            self._told = key, together
        return self._told[1]

    def _weigh(self, rows: Sequence[int], fill: int) -> None:
        """Write the strengths of a step, a column for each row, where they are not those of the step before."""
        strengths = self._strengths
        if strengths is None:
            return
        key = tuple(rows), fill
        scheduled = any(isinstance(one, (Schedule, Timed)) for own in self._under_way for one in own.amounts.values())
        if self._written == key and not scheduled:
            return
        wanted = [own.strengths() for own in self._under_way]
        self._bring({name for own in wanted for name in own})
        columns = [own for own, count in zip(wanted, rows, strict=True) for _ in range(count)] + [{}] * fill
        if len(self._under_way) == 1 and not fill:
            columns = columns[:1]
        _write(strengths, columns)
        self._written, self._left = key, self._present

    def _bring(self, names: set[str]) -> None:
        """Bring back adapters that have left the base for lack of room. Raises UserError where there is none."""
        if names & set(self.adapters.waiting):
            self.adapters.set({name: float(name in names) for name in (*self.adapters.names, *names)})


@one_at_a_time
def _write(strengths: Strengths, columns: Sequence[Mapping[str, Any]]) -> None:
    """Write strengths by adapter, a column for each row of a batch: adapters that a row does not name get 0."""
    strengths.write({name: _column([own.get(name, 0.0) for own in columns], strengths.blocks) for name in strengths.names})


def _column(values: Sequence[Any], blocks: Sequence[str]) -> Strength:
    """One adapter's strengths for several rows, each a number, or a number by block."""
    if not any(isinstance(one, Mapping) for one in values):
        return values[0] if len(values) == 1 else [float(one) for one in values]
    by_row = [one if isinstance(one, Mapping) else dict.fromkeys(blocks, one) for one in values]
    return {block: [_number(row[block]) for row in by_row] for block in blocks}


def _number(value: Any) -> float:
    """A strength of one picture, which may be a list of that one."""
    return float(value[0] if isinstance(value, list) else value)


def _stacked(ones: Sequence[Any], fill: int) -> Any:
    """Tensors of several pictures below each other, the first row again for rows that are left free; of anything else that
    of all."""
    if not isinstance(ones[0], Tensor):
        return ones[0]
    return torch.cat([*ones, *(ones[0][:1] for _ in range(fill))])
