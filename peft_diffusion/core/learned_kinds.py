"""What ``compose train`` can learn: a row each, which settings, files and what is shown of them read. Imports no torch.

The class of each is in `learned_strengths`, under the same name.
"""

from dataclasses import dataclass

from .wording import any_of


@dataclass(frozen=True)
class LearnedKind:
    """A kind of learned strengths.

    Attributes:
        name: What ``--kind`` and files call it.
        words: What it is, for people.
        rate: The learning rate where none is chosen.
        fewest: How many adapters it needs.
        balance: The weight of `learned_strengths.imbalance` in the loss where none is chosen; None where it has no part.
    """

    name: str
    words: str
    rate: float
    fewest: int = 1
    balance: float | None = None


_EVERY = (
    LearnedKind("strengths", "a number for each adapter, block and quarter of the steps, the same for every prompt", 0.02),
    LearnedKind("gates", "a small router that gives each adapter its share by prompt and step", 0.01, 2, 0.001),
)

LEARNED_KINDS: dict[str, LearnedKind] = {one.name: one for one in _EVERY}
"""By name, the default first."""


def explanation() -> str:
    """Tell what there is, as the help of ``--kind``.

    Returns:
        A sentence.
    """
    return f"What is learned: {any_of([f'{one.words} ({one.name})' for one in _EVERY])}."
