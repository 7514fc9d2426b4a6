"""What a composition learns: to take the noise out of the pictures of all its adapters, by weighing these alone."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...bases import denoiser_of
from ...bases.pipelines import Pipeline
from ...core import site, targets
from ...core.block_names import holder
from ...core.learned_strengths import KINDS, LearnedStrengths, imbalance, pooled
from ...core.strength import Strengths
from ..events import Signals
from ..loop.seeds import global_seed
from .diffusion import DiffusionSettings, DiffusionTask, Examples

_NOT_LEARNED = "composed"  # the name of an adapter that nothing carries: the task's own is none


def strengths_of(pipe: Pipeline) -> Strengths:
    """Find the strengths of the adapters of the network that denoises.

    Args:
        pipe: A pipeline that carries adapters there.

    Returns:
        The strengths.

    Raises:
        ValueError: It carries none.
    """
    found = site.strengths(denoiser_of(pipe).network)
    if found is None:
        raise ValueError("the network carries no adapter")
    return found


def acting_layers(pipe: Pipeline, names: Sequence[str]) -> dict[int, str]:
    """List where in the network adapters act.

    Args:
        pipe: A pipeline that carries them.
        names: What they are called.

    Returns:
        The block of each layer that one acts in, by the layer's place among what takes a strength, in order.
    """
    network, there = denoiser_of(pipe).network, strengths_of(pipe).blocks
    blocks = frozenset(targets.blocks(network, parts=True).names)
    slots = site.slots(network).values()
    places = sorted({slot.block for slot in slots if any(name in slot.adapters for name in names)})
    return {place: holder(there[place], blocks) or there[place] for place in places}


class ComposingTask(DiffusionTask):
    """The loss of a pipeline whose adapters are weighed by what is learned; everything else is frozen.

    In text encoders adapters have the strength that they are carried at. ``balance`` adds their `imbalance` to the loss.

    Args:
        pipe: The pipeline, which carries the adapters.
        names: What they are called.
        kind: What is learned, of `KINDS`.
        balance: The weight of the imbalance; 0 for kinds whose strengths are no shares.
        settings: How the loss is made.
        train: The pictures of all adapters.
        held_out: Pictures that are never trained on; None for none.
    """

    def __init__(
        self,
        pipe: Pipeline,
        names: Sequence[str],
        kind: str,
        balance: float,
        settings: DiffusionSettings,
        train: Examples,
        held_out: Examples | None = None,
    ) -> None:
        super().__init__(pipe, _NOT_LEARNED, settings, train, held_out)
        layers = acting_layers(pipe, names)
        self.blocks = tuple(dict.fromkeys(layers.values()))
        self.balance = balance
        self.present = strengths_of(pipe)
        self._rows = torch.tensor([self.present.index(name) for name in names], device=self.device)
        self._layers = torch.tensor(list(layers), device=self.device)
        self._held = torch.tensor([self.blocks.index(block) for block in layers.values()], device=self.device)
        self._given: Tensor | None = None
        self._vectors = self._prompt_vectors()
        with global_seed(torch.device("cpu"), settings.seed, "composition"):
            fresh = KINDS[kind].fresh(len(names), len(self.blocks), self._vectors)
        self.learned: LearnedStrengths = fresh.to(self.device)

    def _prompt_vectors(self) -> Tensor:
        """What `pooled` gives for each prompt of the pictures once, (prompts, width), on the CPU."""
        if self.embeddings is None:
            raise ValueError("captions of a composition are fixed")
        prompts = list(dict.fromkeys(self.train.plain(self.settings.rules)))
        return torch.cat([pooled(self.embeddings.stack([prompt])).cpu() for prompt in prompts])

    def answer(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Ask the network with the strengths that are learned so far: see `DiffusionTask.answer`.

        Args:
            inputs: As there.

        Returns:
            As there.
        """
        encoding = [inputs[name] for name in ("hidden", "summary") if name in inputs]
        noise = inputs["timesteps"] / (len(self.powers) - 1)
        prompts = pooled(encoding) if self.learned.reads_prompts else None
        self._given = self.learned(prompts, noise).permute(1, 2, 0)
        shape = (len(self._rows), len(self.present.blocks), self._given.shape[2])
        of_layers = self._given.index_select(1, self._held)
        self.present.learn(self._rows, self._given.new_zeros(shape).index_copy(1, self._layers, of_layers))
        return super().answer(inputs)

    def loss(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Compute the loss of one micro-batch: see `DiffusionTask.loss`.

        Args:
            inputs: From `inputs`, on the device.

        Returns:
            A float32 scalar with gradients to what is learned.
        """
        found = super().loss(inputs)
        if not self.balance or self._given is None:
            return found
        return found + self.balance * imbalance(self._given.permute(2, 0, 1))

    def signals(self) -> Signals:
        """Nothing besides the loss on what is kept apart."""
        return Signals()

    def measured(self, entries: Sequence[int]) -> float:
        """Measure the plain loss on some of the pictures, on fixed noise.

        Args:
            entries: Of the cache of training pictures.

        Returns:
            The mean.
        """
        return self._fixed_loss(self.train, self._chunks(self.train, set(entries)))

    def release(self) -> None:
        """Give the adapters the strengths back that they are carried at."""
        self.present.stop_learning()

    def summary(self) -> dict[str, Any]:
        """Tell what was learned, in numbers of each adapter.

        Returns:
            The mean strength of each over blocks, noise levels and the prompts of the pictures, under ``mean_strengths``.
        """
        vectors = self._vectors.to(self.device)
        with torch.no_grad():
            levels = torch.linspace(0, 1, 8, device=self.device)
            given = [self.learned(vectors, level.expand(len(vectors))).mean((0, 2)) for level in levels]
        return {"mean_strengths": [round(value, 4) for value in torch.stack(given).mean(0).tolist()]}
