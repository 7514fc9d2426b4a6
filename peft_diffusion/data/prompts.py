"""What prompts of other programs hold that does not work here: it is told, and never drawn. Imports no torch."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..core.errors import UserError
from ..core.events import Observer, Warned

_LONGEST = 10_000  # letters; what is longer has more words than anybody means

# What A1111, ComfyUI and their extensions read in a prompt and nothing does here: how it looks, what of it are words, and
# what becomes of it. Adapters in a negative prompt are there in A1111 as letters.
_SYNTAXES = (
    (r"<(?:lora|lyco):[^<>]*>", "", "names an adapter where none is taken: only prompts of pictures do; it is left out"),
    (r"<[a-z]+(?:\[[^\[\]<>]*\])?:[^<>]*>", "", "is an instruction to another program; it is left out"),
    (r"\bembedding:(?=[\w./\\-])", "", "names learned words, which --adapter FILE brings here; the name alone is read"),
    (
        r"(?<!\\)\[([^\[\]:|]*)(?::[^\[\]:|]*)?:\s*(?:\d+\.?\d*|\.\d+)\s*\]",
        r"\1",
        "changes words while the picture is drawn, which nothing does here; the first are taken",
    ),
    (r"(?<!\\)\[([^\[\]|]*)\|[^\[\]]*\]", r"\1", "takes turns at each step, which nothing does here; the first is taken"),
    (r"(?<=\s)AND(?=\s)", "and", "joins prompts, which are one here; it is read as the word"),
)
# What is read in prompts, and in captions is letters.
_IN_PROMPTS = (
    r"(?<!\\)\{[^{}|]*\|[^{}]*\}",
    r"__[\w*./-]+?__",
)
_SEPARATOR = r"\|{3}"  # between tags that stay and others, where --keep-separator has it, which takes it out
_IN_WEIGHTED_CAPTIONS = (r"(?<!\\)\([^()]*:\s*[-+]?(?:\d+\.?\d*|\.\d+)\s*\)", r"(?<!\\)\({2,}[^()]*\){2,}", r"\bBREAK\b")


class Words(NamedTuple):
    """A prompt as it is drawn.

    Attributes:
        text: The words.
        taken: What was taken out, one of each syntax.
        notes: For each syntax in the prompt that is not read here, what it is and what becomes of it.
    """

    text: str
    taken: tuple[str, ...]
    notes: tuple[str, ...]


def words_of(prompt: str) -> Words:
    """Take what other programs read as instructions out of a prompt.

    Args:
        prompt: As it was given.

    Returns:
        The words that are left, and what was taken out; a prompt without such instructions is left as it is.
    """
    text, taken, notes = prompt, list[str](), list[str]()
    for pattern, kept, told in _SYNTAXES if len(prompt) <= _LONGEST else ():
        found = re.search(pattern, text)
        if found is not None:
            taken.append(found[0])
            notes.append(f"{found[0]} in the prompt {told}")
        before = None
        while before != text:  # they may stand in each other
            before, text = text, re.sub(pattern, kept, text)
    return Words(" ".join(text.split()) if notes else prompt, tuple(taken), tuple(notes))


def instructions(caption: str, *, weighted: bool, wildcards: bool) -> tuple[str, ...]:
    """Find what other programs read as instructions in a caption, and what is learned as letters.

    Args:
        caption: As it is learned.
        weighted: Whether weights and BREAK are read in it.
        wildcards: Whether alternatives are.

    Returns:
        One of each kind.
    """
    others = [_SEPARATOR, *(() if wildcards else _IN_PROMPTS), *(() if weighted else _IN_WEIGHTED_CAPTIONS)]
    found = (re.search(pattern, caption) for pattern in others) if len(caption) <= _LONGEST else ()
    return (*words_of(caption).taken, *(match[0] for match in found if match))


_LISTS = frozenset((".txt", ".csv", ".tsv", ".json", ".jsonl", ".toml", ".yaml", ".yml", ".md"))


def refuse_files(prompts: Sequence[str], instead: str = "give each prompt in quotes") -> None:
    """See that no prompt names a file of prompts, as sd-scripts takes it, or of an adapter: the name would be drawn.

    Args:
        prompts: As they were given.
        instead: What to do about it.

    Raises:
        UserError: One is.
    """
    for prompt in prompts:
        path = Path(prompt)
        if path.suffix.lower() in _LISTS and len(prompt) < 256 and path.is_file():
            raise UserError(f"the prompt {prompt!r} is a file, whose lines are not read; {instead}")
        named = [one for one in (prompt, prompt.rpartition("=")[0]) if one.endswith(".safetensors")]
        if any(len(one) < 256 and Path(one).is_file() for one in named):
            raise UserError(f"the prompt {prompt!r} is an adapter; name each with a flag of its own, as in --adapter FILE")


def in_words(prompts: Sequence[str], tell: Observer) -> list[str]:
    """Take what other programs read as instructions out of all prompts that are drawn.

    Args:
        prompts: As they were given.
        tell: Is told once of each that was taken out.

    Returns:
        For each prompt the words that are left.
    """
    read = [words_of(prompt) for prompt in prompts]
    for note in dict.fromkeys(note for words in read for note in words.notes):
        tell(Warned(note))
    return [words.text for words in read]
