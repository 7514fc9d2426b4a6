"""What turns texts and pictures into vectors that are near where both mean the same. Imports no torch.

- ``icons``: the word embeddings of the embedded base's text encoder, averaged, without what all have in common (Arora,
  Liang and Ma 2017, "A simple but tough-to-beat baseline for sentence embeddings"). The embedded encoder was trained to
  steer a network, not to tell texts apart: what it knows of words is in its table, and behind its layers all texts are near
  each other. It takes neither torch nor a pass through the network, and sees no pictures.
- CLIP (Radford et al. 2021, https://arxiv.org/abs/2103.00020), by folder or hub id, which sees pictures too.
- A base of Stable Diffusion, by folder or hub id: the pooled output of its text encoder, which is CLIP's. It sees no
  pictures.
"""

from functools import cache

from ..bases.embedded import ICONS
from ..core.errors import UserError
from .encoder import Encoder
from .word_vectors import WordVectors

NONE = "none"
"""In place of an encoder: words alone."""


def encoder_of(name: str) -> Encoder | None:
    """Load an encoder, once in a process.

    Args:
        name: ``icons``, ``none``, or a folder or hub id of CLIP or of a base.

    Returns:
        The encoder; None for ``none``.

    Raises:
        UserError: There is no such model, or it is of another kind.
    """
    return None if name == NONE else _loaded(name)


@cache
def _loaded(name: str) -> Encoder:
    if name == ICONS:
        return WordVectors()
    from . import clip  # which brings torch

    return clip.load(name)


def refuse_other(encoder: Encoder, told: str) -> None:
    """See that embeddings are of the weights that an encoder has now.

    Args:
        encoder: The encoder.
        told: The fingerprint of what embedded them.

    Raises:
        UserError: They are of others.
    """
    if told != encoder.fingerprint:
        raise UserError(
            f"the library was embedded by other weights of {encoder.name!r} than there are now; embed it again with:"
            f" peft-diffusion library add --encoder {encoder.name}"
        )
