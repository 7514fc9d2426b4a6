"""Turn captions into prompts: add the trigger, drop words, shuffle tags. Pure functions of an explicit generator."""

import random
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

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
    words = _plain_words(trigger)
    caption = _PLACE.sub(lambda _: words, caption)
    if _holds(caption, trigger):
        return caption
    if "{}" in trigger:
        return " ".join(trigger.replace("{}", caption).split())
    return f"{trigger}, {caption}" if caption else trigger


def _plain_words(trigger: str) -> str:
    """The words of a trigger without the place of the caption."""
    return " ".join(trigger.replace("{}", " ").split()).strip(" ,;:")


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


def split_tags(caption: str) -> list[str]:
    """List the comma-separated tags of a caption.

    Args:
        caption: Tags separated by commas.

    Returns:
        Those that are not empty, without spaces around them.
    """
    return [tag for tag in (tag.strip() for tag in caption.split(",")) if tag]


def distinct_tags(caption: str) -> list[str]:
    """List the tags of a caption, each once.

    Args:
        caption: Tags separated by commas; each line is an alternative.

    Returns:
        Those of all lines, in their order.
    """
    return list(dict.fromkeys(tag for line in caption.split("\n") for tag in split_tags(line)))


def tag_frequency(captions: Iterable[str], most: int = 400) -> dict[str, dict[str, int]]:
    """Count the tags of captions, as kohya's trainer keeps them in ``ss_tag_frequency``: what an adapter is found by.

    Args:
        captions: The captions; each line of one is an alternative.
        most: How many tags are kept; the most frequent, and of equal ones the first.

    Returns:
        How many captions have each tag. They stand under "captions", where kohya has the name of a folder: where pictures
        lay is nobody's business. A caption without commas is one tag.
    """
    counted: Counter[str] = Counter()
    for caption in captions:
        counted.update(distinct_tags(caption))
    return {"captions": dict(counted.most_common(most))} if counted else {}


@dataclass(frozen=True)
class Tags:
    """The tags of a caption: those that stay in place at both ends, and those between.

    Attributes:
        front: Those that stay at the front.
        loose: Those that may move or be left out.
        back: Those that stay at the end.
    """

    front: list[str]
    loose: list[str]
    back: list[str]

    @classmethod
    def of(cls, caption: str, keep: int = 0, separator: str = "") -> "Tags":
        """Read the tags of a caption.

        Args:
            caption: Tags separated by commas.
            keep: How many at the front stay, where there is no separator in the caption.
            separator: A mark: what stands before it stays, and what stands behind a second one, as sd-scripts has it.

        Returns:
            The tags.
        """
        if separator and separator in caption:
            front, _, rest = caption.partition(separator)
            loose, _, back = rest.partition(separator)
            return cls(split_tags(front), split_tags(loose), split_tags(back))
        tags = split_tags(caption)
        return cls(tags[:keep], tags[keep:], [])

    def __str__(self) -> str:
        """Join all of them by ", "."""
        return ", ".join([*self.front, *self.loose, *self.back])

    def shuffled(self, rng: random.Random) -> "Tags":
        """Shuffle the loose ones.

        Args:
            rng: The generator.

        Returns:
            All of them.
        """
        loose = list(self.loose)
        rng.shuffle(loose)
        return replace(self, loose=loose)

    def thinned(self, probability: float, rng: random.Random) -> "Tags":
        """Leave out some of the loose ones.

        Args:
            probability: With which each is left out.
            rng: The generator; it is asked once for each.

        Returns:
            Those that are left.
        """
        return replace(self, loose=[tag for tag in self.loose if rng.random() >= probability])


def around(prefix: str, words: str, suffix: str) -> str:
    """Put words before and behind others.

    Args:
        prefix: Those before.
        words: Those between, or "".
        suffix: Those behind; no space comes before one that begins with a comma or the like.

    Returns:
        All of them, with single spaces between.
    """
    before = " ".join(part for part in (prefix.strip(), words) if part)
    suffix = suffix.strip()
    return f"{before}{suffix}" if suffix[:1] in tuple(",.;:!?") else f"{before} {suffix}".strip()


_FIELD = re.compile(r"\{(caption|trigger)\}")


def check_template(template: str) -> None:
    """Check that a template of captions can be filled in.

    Args:
        template: Text with ``{caption}`` or ``{trigger}`` or both.

    Raises:
        UserError: It has neither, or other braces.
    """
    if _FIELD.search(template) is None or set("{}") & set(_FIELD.sub("", template)):
        raise UserError(
            f'the template of captions "{template}" holds {{caption}} or {{trigger}} or both, and no other braces'
        )


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
    """How a caption becomes the prompt of a training step.

    First a line is taken and its wildcards, then come tags, prefix and suffix, then template and trigger, then dropout.

    Attributes:
        trigger: See `with_trigger`.
        dropout: The probability of the empty prompt, from 0 to 1.
        shuffle: Whether tags are shuffled.
        keep_tags: The number of tags at the front of the written caption that stay, and stay in place.
        wildcards: Whether `{a|b}` is replaced, and any line of a caption of several drawn; otherwise it is the first.
        tag_dropout: The probability with which each other tag is left out, from 0 to below 1.
        separator: A mark that says which tags stay, in place of their number; see `Tags.of`.
        prefix: Words before the caption.
        suffix: Words behind it.
        templates: Texts with ``{caption}`` or ``{trigger}``, of which each step takes one.

    Raises:
        UserError: A value is out of its range.
    """

    trigger: str = ""
    dropout: float = 0.0
    shuffle: bool = False
    keep_tags: int = 0
    wildcards: bool = False
    tag_dropout: float = 0.0
    separator: str = ""
    prefix: str = ""
    suffix: str = ""
    templates: tuple[str, ...] = ()

    @property
    def varies(self) -> bool:
        """Whether a caption can become other prompts than its own and the empty one."""
        return self.shuffle or self.wildcards or self.tag_dropout > 0 or len(self.templates) > 1

    def of_class(self) -> "CaptionRules":
        """Give the rules for pictures of the class, in whose prompts nothing may call what is learned.

        Returns:
            The same without trigger, prefix, suffix and templates.
        """
        return replace(self, trigger="", prefix="", suffix="", templates=())

    def plain(self, caption: str) -> str:
        """Give the prompt for measuring and drawing: no dropout, tags in order, and the first of all alternatives.

        Args:
            caption: The caption as written.

        Returns:
            The prompt.
        """
        line = pick_line(caption, None)
        words = pick_wildcards(line, None) if self.wildcards else line
        if self.separator and self.separator in words:
            words = str(Tags.of(words, separator=self.separator))
        return self._whole(words, None)

    def __post_init__(self) -> None:
        check_trigger(self.trigger)
        for template in self.templates:
            check_template(template)
        if not 0 <= self.dropout <= 1:
            raise UserError(f"caption dropout is a probability from 0 to 1, not {self.dropout}")
        if not 0 <= self.tag_dropout < 1:
            raise UserError(f"tag dropout is a probability from 0 to below 1, not {self.tag_dropout}")
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
        if self.shuffle or self.tag_dropout or (self.separator and self.separator in words):
            tags = Tags.of(words, self.keep_tags, self.separator)
            tags = tags.shuffled(rng) if self.shuffle else tags
            words = str(tags.thinned(self.tag_dropout, rng) if self.tag_dropout else tags)
        return drop_caption(self._whole(words, rng), self.dropout, rng)

    def _whole(self, words: str, rng: random.Random | None) -> str:
        """What is said around the words of a caption; without a generator by the first template."""
        words = around(self.prefix, words, self.suffix) if self.prefix or self.suffix else words
        if not self.templates:
            return with_trigger(words, self.trigger)
        several = rng is not None and len(self.templates) > 1
        template = rng.choice(self.templates) if several and rng is not None else self.templates[0]
        called = _plain_words(self.trigger)
        parts = {"caption": _PLACE.sub(lambda _: called, words.strip()) if called else words.strip(), "trigger": called}
        filled = " ".join(_FIELD.sub(lambda found: parts[found[1]], template).split()).strip(" ,")
        return filled if "{trigger}" in template else with_trigger(filled, self.trigger)
