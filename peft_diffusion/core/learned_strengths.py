"""What makes strengths of frozen adapters by block and noise level, and is learned: a table of numbers, or a router."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

BINS = 4
"""Parts of the noise levels, from pure noise to none, in each of which a number of a table holds."""
_HIDDEN = 32  # the width of a router
_WAVES = 8  # cosines that tell a router the noise level


class LearnedStrengths(nn.Module, ABC):
    """Strengths of several adapters, in each block of a network, for images at noise levels.

    Attributes:
        kind: What files call it: a name of `learned_kinds.LEARNED_KINDS`.
        reads_prompts: Whether they depend on the prompt.
    """

    kind: ClassVar[str]
    reads_prompts: ClassVar[bool]

    @classmethod
    @abstractmethod
    def fresh(cls, adapters: int, blocks: int, prompts: Tensor) -> "LearnedStrengths":
        """Make one that has learned nothing yet: all adapters have equal parts, which sum to 1.

        Args:
            adapters: How many there are.
            blocks: How many blocks take a strength.
            prompts: What `pooled` gives for the prompts that it will learn from, (prompts, width).

        Returns:
            It, on the CPU, with chance from torch's generator.
        """

    @classmethod
    @abstractmethod
    def of(cls, tensors: "dict[str, Tensor]") -> "LearnedStrengths":
        """Make one of what its ``state_dict`` was.

        Args:
            tensors: By name.

        Returns:
            It.

        Raises:
            ValueError: A tensor is missing, or of another shape than the others ask for.
        """

    def fits(self, prompts: Tensor) -> bool:
        """Tell whether prompts are of the width that it reads.

        Args:
            prompts: What `pooled` gives, (images, width).

        Returns:
            Whether they are.
        """
        return True

    def tensors(self) -> dict[str, Tensor]:
        """Give what `of` takes.

        Returns:
            Tensors by name, apart from those that learn.
        """
        return {name: tensor.detach().cpu().clone() for name, tensor in self.state_dict().items()}

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """How many adapters and blocks there are."""

    @abstractmethod
    def forward(self, prompts: Tensor | None, noise: Tensor) -> Tensor:
        """Give the strengths.

        Args:
            prompts: What `pooled` gives for each image, (images, width); None where prompts are not read.
            noise: How far the noise level of each is from none, 0, to pure noise, 1: (images,).

        Returns:
            (images, adapters, blocks), float32.
        """


class StrengthTable(LearnedStrengths):
    """A number for each adapter, block and quarter of the noise levels, the same for all prompts; of any size and sign."""

    kind = "strengths"
    reads_prompts = False

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values)

    @classmethod
    def fresh(cls, adapters: int, blocks: int, prompts: Tensor) -> "StrengthTable":
        """All numbers are 1 over the number of adapters."""
        return cls(torch.full((adapters, blocks, BINS), 1 / adapters))

    @classmethod
    def of(cls, tensors: "dict[str, Tensor]") -> "StrengthTable":
        """Of the one tensor, (adapters, blocks, bins)."""
        if set(tensors) != {"values"} or tensors["values"].ndim != 3 or tensors["values"].shape[2] != BINS:
            raise ValueError(f"it is no table of adapters, blocks and {BINS} parts of the noise levels")
        return cls(tensors["values"].float())

    @property
    def shape(self) -> tuple[int, int]:
        """How many adapters and blocks there are."""
        return self.values.shape[0], self.values.shape[1]

    def forward(self, prompts: Tensor | None, noise: Tensor) -> Tensor:
        """Take the numbers of the part of the noise levels that each image is in."""
        place = ((1 - noise) * BINS).long().clamp(0, BINS - 1)
        return self.values[:, :, place].permute(2, 0, 1)


class Gates(LearnedStrengths):
    """A small router: from the prompt and the noise level to the share of each adapter in each block.

    As in mixtures of LoRA experts (MoLE, Wu et al. 2024, https://arxiv.org/abs/2404.13628) the shares are a softmax over
    the adapters: each acts at most as it was trained, and a prompt that nothing was learned of gets parts that sum to 1,
    where independent gates could sum to all adapters in full. There the layer's own outputs are routed; here, as in
    AdapterFusion's use of what is asked (Pfeiffer et al. 2021, https://arxiv.org/abs/2005.00247), the prompt and the noise
    level are, which are known before a step, so that a step can be recorded.

    Args:
        mean: The mean of the prompts that it learned from, (width,).
        scale: The root mean square of what is left of them, (1,).
        adapters: How many adapters there are.
        blocks: How many blocks there are.
    """

    kind = "gates"
    reads_prompts = True
    mean: Tensor
    scale: Tensor

    def __init__(self, mean: Tensor, scale: Tensor, adapters: int, blocks: int) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)
        self.prompt = nn.Linear(len(mean), _HIDDEN)
        self.level = nn.Linear(_WAVES, _HIDDEN, bias=False)
        self.out = nn.Linear(_HIDDEN, adapters * blocks)
        self._shape = adapters, blocks

    @classmethod
    def fresh(cls, adapters: int, blocks: int, prompts: Tensor) -> "Gates":
        """The last layer is 0, so that all shares are equal."""
        mean = prompts.float().mean(0)
        made = cls(mean, (prompts.float() - mean).square().mean().sqrt().clamp(min=1e-6)[None], adapters, blocks)
        nn.init.zeros_(made.out.weight)
        nn.init.zeros_(made.out.bias)
        return made

    @classmethod
    def of(cls, tensors: "dict[str, Tensor]") -> "Gates":
        """Of all its tensors, and ``shape``, which is (adapters, blocks)."""
        known = {name: tensor.float() for name, tensor in tensors.items() if name != "shape"}
        try:
            adapters, blocks = (int(number) for number in tensors["shape"].tolist())
            if (
                adapters < 1
                or blocks < 1
                or known["out.bias"].shape != (adapters * blocks,)
                or known["mean"].ndim != 1
                or known["scale"].shape != (1,)
            ):
                raise ValueError("its tensors do not fit each other")
            made = cls(known["mean"], known["scale"], adapters, blocks)
            made.load_state_dict(known)
        except (KeyError, RuntimeError, TypeError) as error:  # as load_state_dict refuses other names and shapes
            raise ValueError(f"a tensor is missing or of another shape ({type(error).__name__})") from None
        return made

    def fits(self, prompts: Tensor) -> bool:
        """Whether they are as wide as those that it learned from."""
        return prompts.shape[1] == len(self.mean)

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors, and ``shape``."""
        return super().tensors() | {"shape": torch.tensor(self._shape)}

    @property
    def shape(self) -> tuple[int, int]:
        """How many adapters and blocks there are."""
        return self._shape

    def forward(self, prompts: Tensor | None, noise: Tensor) -> Tensor:
        """Route each image."""
        if prompts is None:
            raise ValueError("gates read prompts")
        waves = torch.arange(_WAVES, device=noise.device) * math.pi
        level = (noise.float()[:, None] * waves).cos()
        hidden = nn.functional.silu(self.prompt((prompts.float() - self.mean) / self.scale) + self.level(level))
        shares: Tensor = self.out(hidden).unflatten(1, self._shape).softmax(1)
        return shares


KINDS: dict[str, type[LearnedStrengths]] = {one.kind: one for one in (StrengthTable, Gates)}
"""By what files call them."""


def pooled(encoding: Sequence[Tensor]) -> Tensor:
    """Make one vector of what a network is told of a prompt.

    Args:
        encoding: Hidden states, (prompts, tokens, width), and of bases that have it the summary, (prompts, width).

    Returns:
        The mean over the tokens, and the summary behind it: (prompts, widths).
    """
    hidden, *summary = encoding
    return torch.cat([hidden.float().mean(1), *(one.float() for one in summary)], 1)


def imbalance(shares: Tensor) -> Tensor:
    """Measure how unevenly adapters are used: the gating balance loss of MoLE (https://arxiv.org/abs/2404.13628).

    It is 0 where all have equal shares in the mean, whatever they have for one prompt or in one block, and grows without
    end where one is never used.

    Args:
        shares: (images, adapters, blocks), which sum to 1 over the adapters.

    Returns:
        A scalar.
    """
    means = shares.mean((0, 2))
    return -(means * len(means)).log().sum()
