"""Words as they are looked for: of any script, without case, accents and plurals. Imports no torch."""

import re
import unicodedata

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
