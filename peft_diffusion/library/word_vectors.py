"""The words of the embedded base as an encoder: see `encoders`. Imports no torch."""

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..bases.embedded import ICONS
from ..bases.readers import embedded_words
from .encoder import REFERENCE, Array, Encoder, floor_of, unit
from .terms import terms_of

if TYPE_CHECKING:
    from PIL import Image


class WordVectors(Encoder):
    """The word embeddings of the embedded base's text encoder: see `encoders`.

    Raises:
        UserError: The package is incomplete.
    """

    name = ICONS
    trust = 0.5  # a rough sense: unlike words come near each other too
    sees = False
    scale = 0.0

    def __init__(self) -> None:
        self._tokenizer, table = embedded_words()
        self._table: Array = table
        self.fingerprint = hashlib.sha256(table.tobytes()).hexdigest()[:16]
        self._common = np.zeros(table.shape[1], np.float32)
        self._common = self._means(REFERENCE).mean(0)
        self.floor = floor_of(self.texts(REFERENCE))

    def texts(self, texts: Sequence[str]) -> Array:
        """Embed texts that are compared with texts."""
        return unit(self._means(texts))

    def pictures(self, images: "Sequence[Image.Image]") -> tuple[Array, Array]:
        """Nothing: it sees none."""
        return np.zeros((0, self._table.shape[1]), np.float32), np.zeros(0, np.float32)

    def asked(self, text: str) -> Array:
        """Embed what is looked for."""
        return np.stack([self.texts([text])[0]] * 2, 1)

    def _means(self, texts: Sequence[str]) -> Array:
        """The mean of the words of each text, each word as long as any other, without what all have in common."""
        made = np.zeros((len(texts), self._table.shape[1]), np.float32)
        for row, text in zip(made, texts, strict=True):
            words = [self._tokenizer.encode(term, add_special_tokens=False).ids for term in dict.fromkeys(terms_of(text))]
            vectors = [self._table[ids].mean(0) - self._common for ids in words if ids]
            if vectors:
                row += unit(np.stack(vectors)).mean(0)
        return made
