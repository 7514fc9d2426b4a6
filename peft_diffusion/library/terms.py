"""Words as they are looked for: of any script, without case, accents and plurals. Imports no torch."""

import re
import unicodedata
from collections.abc import Iterable, Sequence

# A letter or digit of a script that writes no spaces is a term of its own: Chinese, Japanese and Korean.
_ALONE = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
_TERM = re.compile(rf"[{_ALONE}]|[^\W_{_ALONE}]+")
_TAG = re.compile(r"<(?:lora|lyco|hypernet):[^<>]*>", re.IGNORECASE)  # of prompts: names of files, no words
_SAY_NOTHING = frozenset(
    ("a", "an", "the", "of", "in", "on", "at", "by", "to", "for", "from", "with", "without", "and", "or", "as", "is")
)
_LONGEST = 40  # letters; what is longer is no word


def terms_of(text: str) -> tuple[str, ...]:
    """Take the words out of a text.

    Args:
        text: A prompt, caption, tag or name.

    Returns:
        The terms in order, with repetitions, without those that say nothing ("of the").
    """
    plain = unicodedata.normalize("NFKD", _TAG.sub(" ", text)).casefold()
    letters = "".join(letter for letter in plain if not unicodedata.combining(letter))
    # NFKD takes Korean syllables apart; they are put together again.
    found = (match[0] for match in _TERM.finditer(unicodedata.normalize("NFKC", letters)))
    return tuple(_singular(term) for term in found if len(term) <= _LONGEST and term not in _SAY_NOTHING)


def call_of(trigger: str) -> list[list[str]]:
    """Tell what a prompt has to hold to call an adapter.

    Args:
        trigger: One of its triggers, perhaps with ``{}`` for the caption. Of a list with commas the first is what calls it,
            and the others say what else it shows.

    Returns:
        The terms of each part; nothing for a trigger without any.
    """
    parts = trigger.split("{}") if "{}" in trigger else [trigger.split(",")[0]]
    return [list(terms) for part in parts if (terms := terms_of(part))]


def calls(terms: Sequence[str], parts: Iterable[Sequence[str]]) -> bool:
    """Tell whether a prompt calls an adapter by a trigger.

    Args:
        terms: Those of the prompt.
        parts: What `call_of` gave of the trigger.

    Returns:
        Whether the prompt holds the terms of each part one after the other.
    """
    return all(_holds(terms, part) for part in parts)


def _holds(terms: Sequence[str], part: Sequence[str]) -> bool:
    """Whether terms stand one after the other among others."""
    width = len(part)
    return any(list(terms[start : start + width]) == list(part) for start in range(len(terms) - width + 1))


def _singular(term: str) -> str:
    """A word without the ending of a plural: the S stemmer (Harman 1991, "How effective is suffixing?"), which is wrong less
    often than stemmers that cut more."""
    if len(term) > 4 and term.endswith("ies") and not term.endswith(("eies", "aies")):
        return f"{term[:-3]}y"
    if len(term) > 4 and term.endswith("es") and not term.endswith(("aes", "ees", "oes")):
        return term[:-1]
    if len(term) > 3 and term.endswith("s") and not term.endswith(("us", "ss")):
        return term[:-1]
    return term
