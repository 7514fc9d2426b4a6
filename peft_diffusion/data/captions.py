"""Captions as prompts: the trigger put in, words dropped, tags shuffled; pure functions of an explicit generator."""

import random
import re
from dataclasses import dataclass

from peft_diffusion.core.errors import UserError


def check_trigger(trigger: str) -> None:
    """Raise `UserError` for a trigger whose `{}` cannot be filled in."""
    if "{" in trigger.replace("{}", "", 1) or "}" in trigger.replace("{}", "", 1):
        raise UserError(f'the trigger "{trigger}" may hold one {{}}, for the caption, and no other braces')


def with_trigger(caption: str, trigger: str) -> str:
    """The caption called by `trigger`: "a red apple" with "ink style" is "ink style, a red apple".

    A trigger with `{}` is a template: "ink style of {}" gives "ink style of a red apple". A caption that already has
    the trigger's words as a whole phrase, in any case of letters, stays as it is; so does any with an empty trigger.
    """
    check_trigger(trigger)
    caption, trigger = caption.strip(), trigger.strip()
    if not trigger or _holds(caption, trigger):
        return caption
    if "{}" in trigger:
        return " ".join(trigger.replace("{}", caption).split())
    return f"{trigger}, {caption}" if caption else trigger


def _holds(caption: str, trigger: str) -> bool:
    parts = [part for part in (part.strip(" ,;:") for part in trigger.split("{}")) if part]
    if not parts:
        return False
    phrases = (r"(?<!\w)" + r"\s+".join(map(re.escape, part.split())) + r"(?!\w)" for part in parts)
    return re.search(".*".join(phrases), caption, re.IGNORECASE) is not None


def drop_caption(caption: str, probability: float, rng: random.Random) -> str:
    """The empty caption with this probability (0 to 1), which keeps guidance working. Draws exactly one number."""
    return "" if rng.random() < probability else caption


def shuffle_tags(caption: str, rng: random.Random, keep: int = 0) -> str:
    """Comma-separated tags in a random order, but for the first `keep`; empty tags fall away."""
    tags = [tag for tag in (tag.strip() for tag in caption.split(",")) if tag]
    fixed, loose = tags[:keep], tags[keep:]
    rng.shuffle(loose)
    return ", ".join(fixed + loose)


_WILDCARD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")


def pick_wildcards(caption: str, rng: random.Random | None) -> str:
    """The caption with one alternative of each `{a|b}`, as in sd-scripts; `{{` and `}}` are braces themselves.

    Without a generator it is the first of each.
    """

    def pick(match: re.Match[str]) -> str:
        if match[1] is None:
            return match[0][0]
        alternatives = match[1].split("|")
        return alternatives[0] if rng is None else rng.choice(alternatives)

    return " ".join(_WILDCARD.sub(pick, caption).split())


@dataclass(frozen=True)
class CaptionRules:
    """How a caption becomes the prompt of one training step: wildcards are picked, tags shuffled, the trigger put in, all
    of it dropped.

    `dropout` is a probability; `keep_tags` tags at the front of the caption, as it was written, stay in place.
    """

    trigger: str = ""
    dropout: float = 0.0
    shuffle: bool = False
    keep_tags: int = 0
    wildcards: bool = False

    @property
    def varies(self) -> bool:
        """Whether a caption can become more prompts than its own and the empty one."""
        return self.shuffle or self.wildcards

    def plain(self, caption: str) -> str:
        """The prompt to measure and to draw with: all of the caption, in its order, the first of each wildcard."""
        return with_trigger(pick_wildcards(caption, None) if self.wildcards else caption, self.trigger)

    def __post_init__(self) -> None:
        check_trigger(self.trigger)
        if not 0 <= self.dropout <= 1:
            raise UserError(f"caption dropout is a probability from 0 to 1, not {self.dropout}")
        if self.keep_tags < 0:
            raise UserError(f"the number of tags to keep in place cannot be {self.keep_tags}")

    def prompt(self, caption: str, rng: random.Random) -> str:
        """The prompt for one step; the same caption and state of `rng` give the same prompt."""
        words = pick_wildcards(caption, rng) if self.wildcards else caption
        words = shuffle_tags(words, rng, self.keep_tags) if self.shuffle else words
        return drop_caption(with_trigger(words, self.trigger), self.dropout, rng)
