"""Captions: what a drawing is called in training, in many ways, and the one way it is asked for in a check."""

import random

from .packed import Drawing
from .sources import STYLES

EMPTY_SHARE = 0.1
PLAIN_SHARE = 0.08
ARTICLE_SHARE = 0.35
TAGS_SHARE = 0.3
SHORT_SHARE = 0.06
OTHER_NAME_SHARE = 0.35
STYLE_LAST_SHARE = 0.1


def caption(style: str, subject: str) -> str:
    """The plain caption of a subject in a style: "noto emoji of red apple"."""
    return STYLES[style].template.format(subject)


def with_article(subject: str) -> str:
    """The subject with "a" or "an" before it, unless it reads as a plural, a name or a number."""
    first, last = subject.split()[0], subject.split()[-1]
    if first in ("flag", "brand", "letter", "keycap") or first[0].isdigit() or (last[-1] == "s" and last[-2:] != "ss"):
        return subject
    return f"an {subject}" if first[0] in "aeiou" else f"a {subject}"


def _subject_phrase(drawing: Drawing, rng: random.Random) -> str:
    words = drawing.subject.split()
    phrase, is_emoji = drawing.subject, STYLES[drawing.style].is_emoji
    if is_emoji and drawing.tags and len(words) > 1 and rng.random() < SHORT_SHARE:
        phrase = " ".join(words[:-1]) if words[-1] in ("face", "button", "symbol", "sign") else words[-1]
    elif not is_emoji and drawing.tags and rng.random() < OTHER_NAME_SHARE:
        phrase = rng.choice(drawing.tags)  # an icon's are names that the emoji sets have for it
    if rng.random() < ARTICLE_SHARE:
        phrase = with_article(phrase)
    if is_emoji and drawing.tags and rng.random() < TAGS_SHARE:
        phrase = ", ".join([phrase, *rng.sample(drawing.tags, min(len(drawing.tags), rng.randint(1, 3)))])
    return phrase


def varied_caption(drawing: Drawing, rng: random.Random) -> str:
    """One caption of the many a drawing is trained with; sometimes empty, for guidance."""
    if rng.random() < EMPTY_SHARE:
        return ""
    phrase = _subject_phrase(drawing, rng)
    template = STYLES[drawing.style].template
    draw = rng.random()
    if draw < PLAIN_SHARE:
        return phrase
    if draw < PLAIN_SHARE + STYLE_LAST_SHARE:
        return f"{phrase}, {template.removesuffix(' of {}')}"
    return template.format(phrase)
