"""What a soft prompt computes at an embedding."""

from ..shared.learned_vectors import LearnedVectors
from . import VECTORS, WORDS


class SoftPromptAdapter(LearnedVectors):
    """The vectors of new tokens that the taught tokenizer puts before every prompt."""

    suffixes = (VECTORS, WORDS)
    precedes = True
