"""The prompt that a picture says it was drawn from, as a caption. No torch."""

import re
from typing import TYPE_CHECKING, NamedTuple, get_args

from ..bases.prompt_syntax import Weights, escaped, words
from ..core.parsing import json_value
from .picture_formats import a1111_text, own_text
from .prompts import words_of

if TYPE_CHECKING:
    from PIL import Image

_MOST_LETTERS = 2**16  # of a prompt; a longer one is no prompt
_REST = re.compile(r"(?:^|\n)(?:Negative prompt:|Steps: \d)")  # what A1111 writes behind the prompt


class Told(NamedTuple):
    """What a picture tells of its prompt.

    Attributes:
        prompt: Words alone, in one line, brackets among them escaped; "" for none.
        wrong: Why it cannot be read although the picture carries a recipe; "" where nothing is wrong.
    """

    prompt: str = ""
    wrong: str = ""


NOTHING = Told()
"""What a picture tells that was not drawn, or does not say from what."""


def a1111_prompt(text: str) -> str:
    """Take the prompt out of what A1111 writes into pictures.

    Args:
        text: The prompt, perhaps a line "Negative prompt: ...", and a line "Steps: 20, Sampler: Euler a, ...".

    Returns:
        The prompt in one line, as it was given.
    """
    return " ".join(_REST.split(text, maxsplit=1)[0].split())


def drawn_from(image: "Image.Image") -> Told:
    """Read what a picture was drawn from, as this package or A1111 wrote it into PNG, JPEG and WebP files.

    Args:
        image: The picture, whose pixels are read already, as text may stand behind them.

    Returns:
        Its prompt as it is learned: without the adapters that it named, other instructions, weights and ``BREAK``.
    """
    told = _own(image)
    if not told.prompt:
        found = a1111_prompt(a1111_text(image))
        told = Told(_words(found, "a1111"), told.wrong) if len(found) <= _MOST_LETTERS else told
    return told


def _own(image: "Image.Image") -> Told:
    """What our own recipe tells; nothing for the recipes of a sheet, which shows many pictures."""
    try:
        text = own_text(image)
        told = None if text is None else json_value(text)
        recipe = None if told is None or "sheet" in told else told["recipe"]
        prompt = "" if recipe is None else recipe["prompt"]
        given = None if recipe is None else recipe.get("prompt_weights")
        weights: Weights = next(one for one in get_args(Weights) if one == (given or "a1111"))
        if not isinstance(prompt, str) or len(prompt) > _MOST_LETTERS:
            raise ValueError("its prompt is no text that is read")
    except Exception:  # what a parser raises on damaged texts is never known whole, and the picture is sound
        return Told(wrong="its recipe is damaged, so that the prompt that it was drawn from is not known")
    return Told(_words(prompt, weights))


def _words(prompt: str, weights: Weights) -> str:
    """A prompt as a caption, which is read with and without weights as the words that it shows."""
    return escaped(words(words_of(prompt).text, weights))
