"""What an encoder is, and how nearness is made of its answers. Imports no torch."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

Array: TypeAlias = "np.ndarray[Any, Any]"
Kind: TypeAlias = Literal["text", "caption", "picture"]
"""What was embedded: what calls an adapter and what it always shows; a caption; a picture."""

REFERENCE: tuple[str, ...] = (
    "a red apple on a table", "a portrait of a woman", "an old man with a hat", "a city street at night", "a small dog",
    "a sports car", "a mountain lake in the morning", "a bowl of soup", "a wooden chair", "a ship on the sea",
    "a castle on a hill", "a bird on a branch", "a robot", "a bunch of flowers", "a knight with a sword", "a laptop",
    "a pencil sketch", "an oil painting", "a flat vector icon", "a black and white photograph", "a watercolor", "pixel art",
    "anime girl with long hair", "a green dragon", "a snowy forest", "a guitar", "a smile", "a yellow house",
    "a space station", "a football player", "a cup of coffee", "a clock on the wall",
)  # fmt: skip
"""Prompts of all kinds, to which an encoder's answers are compared: what they have in common tells nothing."""


class Encoder(Protocol):
    """Embeds texts, and perhaps pictures.

    Attributes:
        name: As ``--encoder`` takes it.
        fingerprint: Which weights these are.
        trust: How much nearness counts beside words, from 0 to 1.
        sees: Whether it embeds pictures.
        floor: The cosine of texts that have nothing to do with each other, and a chance more.
        scale: What cosines of texts and pictures are multiplied by before they are compared; 0 where it sees none.
    """

    name: str
    fingerprint: str
    trust: float
    sees: bool
    floor: float
    scale: float

    def texts(self, texts: Sequence[str]) -> Array:
        """Embed texts that are compared with texts.

        Args:
            texts: Any.

        Returns:
            (count, width), float32, of length 1; zeros for a text of which it knows no word.
        """
        ...

    def pictures(self, images: "Sequence[Image.Image]") -> tuple[Array, Array]:
        """Embed pictures.

        Args:
            images: RGB pictures.

        Returns:
            (count, width), float32, of length 1; and (count,) how likely each is to show any of the reference prompts, as
            the logarithm of a sum of exponentials.
        """
        ...

    def asked(self, text: str) -> Array:
        """Embed what is looked for.

        Args:
            text: A prompt.

        Returns:
            (width, 2), float32: as compared with texts, and as compared with pictures.
        """
        ...


def floor_of(vectors: Array) -> float:
    """Measure how near texts are that have nothing to do with each other.

    Args:
        vectors: Those of the reference prompts, of length 1.

    Returns:
        The mean of their cosines, and two deviations more; at most 0.95, for an encoder that hardly tells texts apart.
    """
    cosines = (vectors @ vectors.T)[np.triu_indices(len(vectors), 1)]
    return min(float(cosines.mean() + 2 * cosines.std()), _HIGHEST_FLOOR)


def unit(vectors: Array) -> Array:
    """Bring vectors to length 1.

    Args:
        vectors: (count, width).

    Returns:
        The same, float32; zeros stay.
    """
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    made: Array = (vectors / np.maximum(lengths, 1e-12)).astype(np.float32)
    return made


def caption_weights(captions: Array) -> Array:
    """Tell how much texts count: captions less, as they tell what was drawn with an adapter, and not what it is.

    Args:
        captions: (texts,), whether each is a caption.

    Returns:
        (texts,), float32, at most 1.
    """
    made: Array = np.where(captions, _OF_CAPTIONS, 1.0).astype(np.float32)
    return made


def near_texts(encoder: Encoder, cosines: Array, weights: Array) -> Array:
    """Make of cosines of texts how likely it is that the same is meant.

    Args:
        encoder: What embedded them.
        cosines: (texts,).
        weights: (texts,), as `caption_weights` gives them.

    Returns:
        (texts,) from 0 to 1: where the cosine is between that of unrelated texts, 0, and that of the same, 1.
    """
    found: Array = np.clip((cosines - encoder.floor) * (1 / (1 - encoder.floor)), 0, 1)
    found *= weights
    found *= encoder.trust
    return found


def near_pictures(encoder: Encoder, cosines: Array, offsets: Array) -> Array:
    """Make of cosines of a text and pictures how likely it is that these show it.

    Args:
        encoder: What embedded them.
        cosines: (pictures,).
        offsets: (pictures,), as `Encoder.pictures` gives them.

    Returns:
        (pictures,) from 0 to 1: how likely CLIP holds the text among the reference prompts, which is how it classifies
        without examples.
    """
    made: Array = _OF_PICTURES * encoder.trust / (1 + np.exp(-np.clip(encoder.scale * cosines - offsets, -30, 30)))
    return made


_OF_CAPTIONS, _OF_PICTURES = 0.6, 0.8
_HIGHEST_FLOOR = 0.95  # of 1 or more, unlike texts would be nearer than like ones
