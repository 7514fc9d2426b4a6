"""Packed pairs of low rank as drawing multiplies with them: side by side for layers of one input, at addresses that stay.

A recorded step reads its operands here. Adapters that are set, exchanged, loaded or removed are copied to where their site
has room, so that the recording holds; only a site, or a total of ranks, that there is no room for makes another layout.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from ..core import regions
from ..core.site import is_plain_linear, rebase
from ..core.slot import Slot, slot_of, using, walk
from ..core.strength import Strengths
from .low_rank import stacked

_LEAST = 32  # ranks that a site has room for at least; more come in powers of two


@dataclass(frozen=True)
class Group:
    """Linear layers of one input and one shape, which are computed together.

    Attributes:
        layers: The layers.
        room: How many ranks each has room for; 0 where none has carried a pair.
        start: The first of its ranks among those of its width: layer after layer.
        offset: The first of its ranks among all.
        up: Where its (layers, room, out) begin in the buffer of them.
    """

    layers: tuple[nn.Linear, ...]
    room: int
    start: int = 0
    offset: int = 0
    up: int = 0

    @property
    def width(self) -> int:
        """Of the input."""
        return self.layers[0].in_features

    @property
    def ranks(self) -> int:
        """Of all layers."""
        return self.room * len(self.layers)


class _Present(threading.local):
    """The operands that the present thread computes with; None for layers as they are."""

    operands: "Operands | None" = None


_present = _Present()


def present() -> "Operands | None":
    """Tell what the present thread computes with.

    Returns:
        The operands; None for layers as they are.
    """
    return _present.operands


class Operands:
    """The pairs of all Linear layers of a network, with their strengths.

    Attributes:
        merged: Whether the weights hold the adapters, so that pairs add nothing.
        by_image: Whether strengths differ between the images of a batch.
        told: What the present step tells attention, (batch, tokens, width).
        known: The keys and values of that by the attention, computed before the step.
    """

    def __init__(self, network: nn.Module) -> None:
        parameter = next(network.parameters())
        self.network = network
        self.device, self.dtype = parameter.device, parameter.dtype
        self.merged = False
        self.by_image = False
        self._groups: dict[nn.Module, Group] = {}
        self._down: dict[int, Tensor] = {}
        self._scaled: dict[int, Tensor] = {}
        self._up = torch.empty(0, device=self.device, dtype=self.dtype)
        self._rows = self._blocks = torch.empty(0, dtype=torch.long, device=self.device)
        self._strength: dict[torch.Size, Tensor] = {}
        self._amounts = self._up
        self._tails: dict[nn.Module, _Tailed] = {}
        self.told: Tensor | None = None
        self.known: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def follow(self) -> bool:
        """Take over the pairs that the network carries now.

        Returns:
            Whether operands came to lie elsewhere, which ends recordings.
        """
        wanted = self._wanted()
        served = all(
            (held := self._groups.get(group.layers[0])) is not None
            and held.layers == group.layers
            and held.room >= group.room
            for group in wanted
        )
        moved = not served or len(wanted) != len(self._groups)
        if moved:
            self._lay_out(wanted)
        self._fill()
        return moved

    def _wanted(self) -> list[Group]:
        """The groups that the network's layers make now, those that had room keeping it."""
        together: list[tuple[nn.Linear, ...]] = []
        modules = [module for _, module in walk(self.network)]
        for attention in modules:
            if isinstance(attention, Attention):
                layers = _read_alike(attention)
                if _alike(layers) and self._serves(layers[0]):
                    together.append(layers)
        taken = {layer for layers in together for layer in layers}
        alone: list[tuple[nn.Linear, ...]] = [
            (one,) for one in modules if is_plain_linear(one) and one not in taken and self._serves(one)
        ]
        wanted = []
        for group in [*together, *alone]:
            held = self._groups.get(group[0])
            before = held.room if held is not None and held.layers == group else 0
            room = max(before, _room(max(_ranks(layer) for layer in group)))
            if room or len(group) > 1:
                wanted.append(Group(group, room))
        return wanted

    def _serves(self, layer: nn.Linear) -> bool:
        return _served(layer) and layer.weight.dtype == self.dtype

    def _lay_out(self, wanted: Sequence[Group]) -> None:
        """Make buffers for groups: ranks of one width lie together, as do their strengths."""
        self._groups, self._strength, places = {}, {}, 0
        offset = 0
        for width in sorted({group.width for group in wanted}):
            start = 0
            for group in wanted:
                if group.width == width:
                    self._groups[group.layers[0]] = Group(group.layers, group.room, start, offset + start, places)
                    start += group.ranks
                    places += group.ranks * group.layers[0].out_features
            self._down[width] = torch.zeros(start, width, device=self.device, dtype=self.dtype)
            self._scaled[width] = torch.zeros_like(self._down[width])
            offset += start
        self._up = torch.zeros(places, device=self.device, dtype=self.dtype)
        self.release()
        for layers in _attending(self.network):
            made = self._groups.get(layers[0])
            if made is not None and made.layers == layers and made.room:
                self._tails[layers[0]] = _Tailed.of(made)

    def release(self) -> None:
        """Give weights that lie before ranks memory of their own again."""
        for tailed in self._tails.values():
            tailed.release()
        self._tails.clear()

    def _fill(self) -> None:
        """Copy the pairs to their places, and note where each rank has its strength."""
        for down in self._down.values():
            down.zero_()
        self._up.zero_()
        ranks = sum(group.ranks for group in self._groups.values())
        rows = torch.zeros(ranks, dtype=torch.long, device=self.device)  # free places are 0, whatever their strength
        blocks = torch.zeros(ranks, dtype=torch.long)
        places: list[Tensor] = []
        held: list[Tensor] = []
        row_places: list[Tensor] = []
        held_rows: list[Tensor] = []
        for group in self._groups.values():
            for number, layer in enumerate(group.layers):
                slot = slot_of(layer)
                if slot is None or slot.packed is None:
                    continue
                view, first = slot.packed.view, number * group.room
                count, begin = len(view.down), group.offset + first
                places += [self._down[group.width][group.start + first :][:count], self._ups(group)[number, :count]]
                held += [view.down, view.up]
                row_places.append(rows[begin : begin + count])
                held_rows.append(view.rows)
                blocks[begin : begin + count] = slot.block
        if places:
            torch._foreach_copy_(places, held)
            torch._foreach_copy_(row_places, held_rows)
        self._rows, self._blocks = rows, blocks.to(self.device)

    def _ups(self, group: Group) -> Tensor:
        """(layers, room, out)."""
        out = group.layers[0].out_features
        return self._up[group.up :][: group.ranks * out].view(len(group.layers), group.room, out)

    @torch.no_grad()
    def weigh(self, strengths: Strengths | None, batch: int) -> None:
        """Take over strengths.

        Args:
            strengths: Those of the network, at the present step; None where there are none.
            batch: How many rows of latents are computed.

        Raises:
            UserError: There are strengths for another number of images.
        """
        self.merged = strengths is not None and strengths.merged
        self.by_image = strengths is not None and strengths.images > 1
        if strengths is None or self.merged or not len(self._rows):
            return
        found = strengths.values[self._rows, self._blocks].t()
        if self.by_image:
            layout = regions.present()
            found = strengths.over(found, batch) if layout is None else found  # which `Layout.spread` repeats itself
            place = self._strength.setdefault(found.shape, torch.empty(found.shape, device=self.device, dtype=self.dtype))
            place.copy_(found)
            self._amounts = place
        else:
            column, start = found[0].to(self.dtype).unsqueeze(1), 0
            for width, down in self._down.items():
                torch.mul(down, column[start:][: len(down)], out=self._scaled[width])
                start += len(down)
        downs = self._down if self.by_image else self._scaled
        tails = [(tailed.tail, self._groups[first]) for first, tailed in self._tails.items()]
        if tails:
            held = [downs[group.width][group.start :][: group.ranks] for _, group in tails]
            torch._foreach_copy_([tail for tail, _ in tails], held)

    def knows(self, attention: nn.Module, told: Tensor) -> tuple[Tensor, Tensor] | None:
        """Find the keys and values that were computed before the step.

        Args:
            attention: The attention.
            told: What it is told.

        Returns:
            Keys and values; None where they are not known.
        """
        return self.known.get(attention) if told is self.told else None

    @contextmanager
    def used(self) -> Iterator[None]:
        """Compute with these operands inside, in this thread.

        Yields:
            Once.
        """
        plain = [layer for group in self._groups.values() for layer in group.layers if type(layer) is nn.Linear]
        before, _present.operands = _present.operands, self
        try:
            for layer in plain:  # what it carried may come back, and a recording has to know of it
                rebase(layer, _Routed)
            with using(_Path()):
                yield
        finally:
            _present.operands = before
            for layer in plain:
                rebase(layer, nn.Linear)

    def computed(self, layers: Sequence[nn.Module], x: Tensor) -> Sequence[Tensor] | None:
        """Compute layers of one input with their pairs.

        Args:
            layers: The layers.
            x: (..., in).

        Returns:
            What each gives, (..., out); None where they are no group.
        """
        group = self._groups.get(layers[0])
        if group is None or group.layers != tuple(layers) or x.dtype != self.dtype:
            return None
        tailed = self._tails.get(layers[0])
        if tailed is not None and not self.merged:
            return self._at_once(group, tailed, x)
        weights = [layer.weight for layer in group.layers]
        together = stacked(weights) if len(weights) > 1 else weights[0][None]
        bias, paired = group.layers[0].bias, bool(group.ranks) and not self.merged
        hidden = self._hidden(group, x) if paired else None
        if together is not None:
            y = F.linear(x, together.flatten(0, 1), bias)
            if hidden is not None:
                _add(y, hidden, self._ups(group))
            return y.chunk(len(weights), -1)
        found = [F.linear(x, weight) for weight in weights]
        if hidden is not None:
            for y, part, up in zip(found, hidden.chunk(len(weights), -1), self._ups(group), strict=True):
                _add(y, part, up[None])
        return found

    def _hidden(self, group: Group, x: Tensor) -> Tensor:
        """What the pairs make of ``x`` in between, strengths included, (..., layers * room)."""
        rows = slice(group.start, group.start + group.ranks)
        if not self.by_image:
            return F.linear(x, self._scaled[group.width][rows])
        return F.linear(x, self._down[group.width][rows]) * self._by_image(group, x)

    def _by_image(self, group: Group, x: Tensor) -> Tensor:
        """The strengths of a group's ranks for each row of the batch, to be multiplied with what is made of ``x``."""
        strength, layout = self._amounts[:, group.offset :][:, : group.ranks], regions.present()
        if layout is None:
            return strength.view(len(strength), *[1] * (x.ndim - 2), -1)
        return layout.spread(strength, x)

    def _at_once(self, group: Group, tailed: "_Tailed", x: Tensor) -> Sequence[Tensor]:
        """Layers and their downs by one product: ``x`` is read once, and there is a kernel less."""
        y = F.linear(x, tailed.weight, tailed.bias)
        own = len(tailed.weight) - group.ranks
        hidden = y[..., own:]
        if self.by_image:
            hidden.mul_(self._by_image(group, x))
        _add(y[..., :own], hidden, self._ups(group))
        return y[..., :own].chunk(len(group.layers), -1)


@dataclass(frozen=True)
class _Tailed:
    """The weights of a group with its ranks below them: ``weight`` (layers * out + ranks, in), ``bias`` as long, or None."""

    weight: Tensor
    bias: Tensor | None
    ranks: int
    layers: tuple[nn.Linear, ...]

    @classmethod
    def of(cls, group: Group) -> "_Tailed":
        """Of layers, whose weights and biases are views of it from now on."""
        first = group.layers[0]
        out = first.out_features
        weight = first.weight.new_zeros(len(group.layers) * out + group.ranks, group.width)
        for number, layer in enumerate(group.layers):
            place = weight[number * out :][:out]
            place.copy_(layer.weight)
            layer.weight.data = place
        bias = None
        if first.bias is not None:
            bias = first.bias.new_zeros(len(weight))
            bias[:out].copy_(first.bias)
            first.bias.data = bias[:out]
        return cls(weight, bias, group.ranks, group.layers)

    @property
    def tail(self) -> Tensor:
        """(ranks, in)."""
        return self.weight[len(self.weight) - self.ranks :]

    def release(self) -> None:
        """Give what still lies here memory of its own."""
        mine = {one.untyped_storage().data_ptr() for one in (self.weight, self.bias) if one is not None}
        for layer in self.layers:
            for own in (layer.weight, layer.bias):
                if own is not None and own.untyped_storage().data_ptr() in mine:
                    own.data = own.data.clone()


class _Path:
    """Sites ask it first: see `slot.FastPath`."""

    def output(self, site: nn.Module, slot: Slot, x: Tensor) -> Tensor | None:
        """The site's output with its pairs; None for another thread's, and for a site that is in no group by itself."""
        return _alone(site, x)


class _Routed(nn.Linear):
    """A layer that carries no pair now, and has room for one."""

    def forward(self, input: Tensor) -> Tensor:
        """As before, with what stands where its pair would."""
        found = _alone(self, input)
        return super().forward(input) if found is None else found


def _alone(layer: nn.Module, x: Tensor) -> Tensor | None:
    operands = present()
    found = None if operands is None else operands.computed((layer,), x)
    return None if found is None else found[0]


def _add(y: Tensor, hidden: Tensor, up: Tensor) -> None:
    """``y += hidden @ up`` in place, layer by layer: (..., layers * out), (..., layers * room), (layers, room, out)."""
    rows, ranks = y.view(-1, y.shape[-1]), hidden.reshape(-1, hidden.shape[-1])
    if len(up) == 1:
        rows.addmm_(ranks, up[0])
    else:
        by_layer = rows.view(len(rows), len(up), -1).transpose(0, 1)
        by_layer.baddbmm_(ranks.view(len(ranks), len(up), -1).transpose(0, 1), up)


def _read_alike(attention: Any) -> tuple[nn.Linear, ...]:
    """The projections of an attention that read the same."""
    every = attention.to_q, attention.to_k, attention.to_v
    return every[1:] if attention.is_cross_attention else every


def _attending(network: nn.Module) -> Iterator[tuple[nn.Linear, ...]]:
    """The layers of attention that run in every step; what follows them reads rows that lie apart."""
    for attention in network.modules():
        if isinstance(attention, Attention):
            yield (attention.to_q,) if attention.is_cross_attention else _read_alike(attention)
            if attention.to_out is not None:
                yield (attention.to_out[0],)


def _served(layer: nn.Module) -> bool:
    """Whether a layer is a frozen Linear with nothing on it, or pairs alone."""
    slot = slot_of(layer)
    if not is_plain_linear(layer) or any(own.requires_grad for own in layer.parameters(recurse=False)):
        return False
    return slot is None or slot.packed is not None


def holds_pair(module: nn.Module) -> bool:
    """Tell whether the adapters of a module are a pair that operands take over.

    Args:
        module: A site.

    Returns:
        Whether they are; else what they hold is read where it lies.
    """
    return _served(module) and slot_of(module) is not None


def _alike(layers: Sequence[nn.Module | None]) -> bool:
    """Whether layers can be computed as one."""
    linear = [layer for layer in layers if layer is not None and is_plain_linear(layer) and _served(layer)]
    shapes = {layer.weight.shape for layer in linear}
    return len(linear) == len(layers) and len(shapes) == 1 and all(layer.bias is None for layer in linear)


def _ranks(layer: nn.Module) -> int:
    slot = slot_of(layer)
    return 0 if slot is None or slot.packed is None else len(slot.packed.view.down)


def _room(ranks: int) -> int:
    """Room for so many ranks, and some more."""
    return 0 if not ranks else max(_LEAST, 1 << (ranks - 1).bit_length())
