"""What goes into the layers of a base while it draws with an adapter: the Gram matrices of their inputs."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..bases import LanguageModel, components, load_base
from ..core.errors import UserError
from ..core.weight_change import serves
from ..generation import Adapters
from .activations import draw, input_rows, usual_prompts
from .sources import Source, Where
from .watch import Watch

_CHECKED = 128  # inputs of a call, evenly spaced, by which an error is told


@dataclass
class Gram:
    """The mean of the products of inputs by inputs, over all positions.

    Attributes:
        sums: The sum of them, (inputs, inputs), float32 on the CPU.
        rows: How many inputs there were.
    """

    sums: Tensor
    rows: int = 0

    def add(self, x: Tensor) -> None:
        """Take inputs.

        Args:
            x: (rows, inputs).
        """
        self.sums += (x.T @ x).cpu()
        self.rows += len(x)

    def mean(self) -> Tensor:
        """The mean, (inputs, inputs), float64."""
        return self.sums.double() / max(1, self.rows)


@dataclass(frozen=True)
class Seen:
    """What went into a layer while one adapter drew.

    Attributes:
        fit: On the pictures that something is fitted on.
        check: On a picture that was kept apart, some inputs of each call of the layer, (rows, inputs) each: enough to tell
            an error, where a Gram matrix takes as much memory as that of all other pictures.
    """

    fit: Gram
    check: list[Tensor]

    def checked(self) -> Tensor:
        """The inputs of the picture that was kept apart, (rows, inputs)."""
        return torch.cat(self.check) if self.check else torch.zeros(1, len(self.fit.sums))


class _Collector:
    """Layers while the base draws; a context that watches them inside."""

    def __init__(self, layers: Mapping[Where, nn.Module]) -> None:
        self.layers = layers
        self.apart = False
        self.found: dict[Where, Seen] = {}
        self._last: tuple[Tensor, Seen] | None = None
        self._stack = ExitStack()

    def __enter__(self) -> "_Collector":
        for where, layer in self.layers.items():
            hook = layer.register_forward_pre_hook(lambda module, args, where=where: self._see(where, module, args[0]))
            self._stack.callback(hook.remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._last = None
        self._stack.close()

    @torch.no_grad()
    def _see(self, where: Where, layer: nn.Module, x: Tensor) -> None:
        # Queries, keys and values are computed of one tensor, one after the other: they share what was seen of it.
        last = self._last if isinstance(layer, nn.Linear) else None
        if last is not None and last[0] is x and self.found.setdefault(where, last[1]) is last[1]:
            return
        rows = input_rows(layer, x)
        if where not in self.found:
            side = rows.shape[1]
            self.found[where] = Seen(Gram(torch.zeros(side, side)), [])
        seen = self.found[where]
        if self.apart:
            seen.check.append(rows[:: -(-len(rows) // _CHECKED)].cpu())
        else:
            seen.fit.add(rows)
        self._last = (x, seen) if isinstance(layer, nn.Linear) else None


def collected(
    sources: Sequence[Source], sites: Sequence[Where], base: str, prompts: Mapping[str, Sequence[str]], watch: Watch
) -> list[dict[Where, Seen]]:
    """Draw with each adapter alone, at its strength, and see what goes into layers.

    Args:
        sources: The adapters.
        sites: The layers; those that are neither Linear nor a convolution without groups are left out.
        base: The base, with its weights.
        prompts: What is drawn with each adapter, by its name; for one that is not named what its file tells of its captions,
            and common subjects. The last is kept apart for `Seen.check`; of a single one, another picture is.
        watch: Is told how far it is.

    Returns:
        For each adapter, what went into each layer that ran.

    Raises:
        UserError: The base cannot be read, does not fit, or is a language model.
    """
    pipe: Any = load_base(base, dtype="float32")
    if isinstance(pipe, LanguageModel):
        raise UserError("outputs are matched by what goes into layers while pictures are drawn, and this base writes text")
    parts, adapters = components(pipe), Adapters(pipe)
    modules = {where: parts[where[0]].get_submodule(where[1]) for where in sites if where[0] in parts}
    layers = {where: module for where, module in modules.items() if serves(module)}
    plans = [_asked(source, prompts) for source in sources]
    drawn = [(number, one) for number, own in enumerate(plans) for one in enumerate(own)]
    found: list[dict[Where, Seen]] = [{} for _ in sources]
    loaded: tuple[int, str, _Collector] | None = None
    for number, (place, prompt) in watch.each("drawing to see what goes into layers", drawn):
        if loaded is None or loaded[0] != number:
            if loaded is not None:
                adapters.remove(loaded[1])
            loaded = number, _loaded(adapters, sources[number]), _Collector(layers)
            found[number] = loaded[2].found
        with loaded[2] as collector:
            collector.apart = place == len(plans[number]) - 1
            draw(pipe, prompt, place)
    return found


def _loaded(adapters: Adapters, source: Source) -> str:
    return adapters.load(source.plan, name="seen", strength=source.strength)


def _asked(source: Source, prompts: Mapping[str, Sequence[str]]) -> list[str]:
    """The prompts of an adapter, two at least."""
    own = list(prompts.get(source.name, ())) or usual_prompts(source.plan)
    return own if len(own) > 1 else own * 2
