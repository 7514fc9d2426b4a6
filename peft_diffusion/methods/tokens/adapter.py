"""What learned words compute at an embedding."""

from ..shared.learned_vectors import LearnedVectors
from . import VECTORS, WORDS


class TokensAdapter(LearnedVectors):
    """The vectors of new words, which the tokenizer is taught under their own names."""

    suffixes = (VECTORS, WORDS)
