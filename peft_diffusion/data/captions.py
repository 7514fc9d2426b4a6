"""Turn captions into prompts: add the trigger, drop words, shuffle tags. Pure functions of an explicit generator."""

import random
import re
from dataclasses import dataclass

from peft_diffusion.core.errors import UserError


def check_trigger(trigger: str) -> None:
    """Check that the `{}` of a trigger can be filled in.

    Args:
        trigger: Words, with at most one `{}` for the caption.

    Raises:
        UserError: It holds other braces.
    """
    if "{" in trigger.replace("{}", "", 1) or "}" in trigger.replace("{}", "", 1):
        raise UserError(f'the trigger "{trigger}" may hold one {{}}, for the caption, and no other braces')


_PLACE = re.compile(r"\[(?:trigger|name)\]")


def has_place(caption: str) -> bool:
    """Tell whether a caption says where the trigger goes, as ai-toolkit has it: ``[trigger]`` or ``[name]``.

    Args:
        caption: The caption.

    Returns:
        Whether it does.
    """
    return _PLACE.search(caption) is not None


def with_trigger(caption: str, trigger: str) -> str:
    """Add the trigger to a caption: "a red apple" with "ink style" is "ink style, a red apple".

    Where the caption holds ``[trigger]`` or ``[name]``, as for ai-toolkit, the trigger's words go there.
    A caption that already has the trigger's words as a whole phrase, in any case of letters, stays as it is.

    Args:
        caption: The caption.
        trigger: Words put in front, or a template with `{}`: "ink style of {}" gives "ink style of a red apple". An empty
            trigger changes nothing.

    Returns:
        The prompt.

    Raises:
        UserError: The trigger holds braces other than one `{}`.
    """
    check_trigger(trigger)
    caption, trigger = caption.strip(), trigger.strip()
    if not trigger:
        return caption
    words = " ".join(trigger.replace("{}", " ").split()).strip(" ,;:")
    caption = _PLACE.sub(lambda _: words, caption)
    if _holds(caption, trigger):
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
    """Replace a caption by the empty one at random, which keeps classifier-free guidance working.

    Args:
        caption: The caption.
        probability: From 0 to 1.
        rng: The generator; exactly one number is drawn.

    Returns:
        The caption, or "".
    """
    return "" if rng.random() < probability else caption


def shuffle_tags(caption: str, rng: random.Random, keep: int = 0) -> str:
    """Shuffle the comma-separated tags of a caption.

    Args:
        caption: Tags separated by commas; empty tags are removed.
        rng: The generator.
        keep: The number of tags at the front that stay in place.

    Returns:
        The tags joined by ", ".
    """
    tags = [tag for tag in (tag.strip() for tag in caption.split(",")) if tag]
    fixed, loose = tags[:keep], tags[keep:]
    rng.shuffle(loose)
    return ", ".join(fixed + loose)


def pick_line(caption: str, rng: random.Random | None) -> str:
    """Choose one of the lines of a caption, which are alternatives, as in sd-scripts and OneTrainer.

    Args:
        caption: The caption.
        rng: The generator, asked where there are several lines; None takes the first.

    Returns:
        A line.
    """
    lines = caption.split("\n")
    return lines[0] if rng is None or len(lines) == 1 else rng.choice(lines)


_WILDCARD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")


def pick_wildcards(caption: str, rng: random.Random | None) -> str:
    """Replace each `{a|b}` by one of its alternatives, as sd-scripts does; `{{` and `}}` are literal braces.

    Args:
        caption: The caption.
        rng: The generator; None takes the first alternative of each.

    Returns:
        The caption with single spaces.
    """

    def pick(match: re.Match[str]) -> str:
        if match[1] is None:
            return match[0][0]
        alternatives = match[1].split("|")
        return alternatives[0] if rng is None else rng.choice(alternatives)

    return " ".join(_WILDCARD.sub(pick, caption).split())


@dataclass(frozen=True)
class CaptionRules:
    """How a caption becomes the prompt of a training step: a line, its wildcards, then tags, then the trigger, then dropout.

    Attributes:
        trigger: See `with_trigger`.
        dropout: The probability of the empty prompt, from 0 to 1.
        shuffle: Whether tags are shuffled.
        keep_tags: The number of tags at the front of the written caption that stay in place.
        wildcards: Whether `{a|b}` is replaced, and any line of a caption of several drawn; otherwise it is the first.

    Raises:
        UserError: A value is out of its range.
    """

    trigger: str = ""
    dropout: float = 0.0
    shuffle: bool = False
    keep_tags: int = 0
    wildcards: bool = False

    @property
    def varies(self) -> bool:
        """Whether a caption can become other prompts than its own and the empty one."""
        return self.shuffle or self.wildcards

    def plain(self, caption: str) -> str:
        """Give the prompt for measuring and drawing: no dropout, tags in order, the first line and the first alternatives.

        Args:
            caption: The caption as written.

        Returns:
            The prompt.
        """
        line = pick_line(caption, None)
        return with_trigger(pick_wildcards(line, None) if self.wildcards else line, self.trigger)

    def __post_init__(self) -> None:
        check_trigger(self.trigger)
        if not 0 <= self.dropout <= 1:
            raise UserError(f"caption dropout is a probability from 0 to 1, not {self.dropout}")
        if self.keep_tags < 0:
            raise UserError(f"the number of tags to keep in place cannot be {self.keep_tags}")

    def prompt(self, caption: str, rng: random.Random) -> str:
        """Give the prompt of one step.

        Args:
            caption: The caption as written.
            rng: The generator; the same state gives the same prompt.

        Returns:
            The prompt, or "" if the caption was dropped.
        """
        words = pick_wildcards(pick_line(caption, rng), rng) if self.wildcards else pick_line(caption, None)
        words = shuffle_tags(words, rng, self.keep_tags) if self.shuffle else words
        return drop_caption(with_trigger(words, self.trigger), self.dropout, rng)
