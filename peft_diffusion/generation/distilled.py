"""Adapters that make a base draw in a few steps: known by name and metadata, with the settings that they need. No torch."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from .. import methods
from ..bases import family as families
from ..core.events import Noted, Observer, Warned
from .settings import Choice, Sampling

S = TypeVar("S", bound=Sampling)
_TITLES = ("modelspec.title", "ss_output_name", "name")  # of metadata
_STEPS = re.compile(r"\b(\d{1,2})-?steps?\b")  # the numbers of a training run are longer, or stand behind the word


@dataclass(frozen=True)
class Distilled:
    """A kind of adapter for few steps, and how its authors draw with it.

    Attributes:
        title: What it is called.
        words: One of these words stands in its name.
        scheduler: As `--scheduler` names it.
        steps: How many, where its name does not tell.
        counted: Whether its name must tell how many, as its word alone may be that of a style.
        of_base: Whether its name must speak of a base or a LoRA too, for the same reason.
        guided: Guidance of what has "cfg" in its name; the others take none.
        of_one: The scheduler of what was trained for one step; "" for the same.
    """

    title: str
    words: tuple[str, ...]
    scheduler: str
    steps: int = 4
    counted: bool = False
    of_base: bool = False
    guided: float = 1.0
    of_one: str = ""


KINDS = (
    Distilled("an LCM", ("lcm",), "lcm"),  # https://arxiv.org/abs/2311.05556
    Distilled("a TCD", ("tcd",), "tcd"),  # https://arxiv.org/abs/2402.19159
    Distilled("a DMD2", ("dmd2",), "lcm"),  # https://arxiv.org/abs/2405.14867
    # https://arxiv.org/abs/2404.13686; that for one step was trained for TCD's steps, as its authors say.
    Distilled("a Hyper-SD", ("hyper",), "ddim-trailing", counted=True, guided=5.0, of_one="tcd"),
    Distilled("a Lightning", ("lightning",), "euler-trailing", counted=True),  # https://arxiv.org/abs/2402.13929
    Distilled("a Turbo", ("turbo",), "euler-a-trailing", of_base=True),  # arXiv 2311.17042
)
"""Each with its paper."""


def recognised(choice: Choice) -> tuple[Distilled, int, float] | None:
    """Tell whether an adapter is for few steps.

    Args:
        choice: The adapter.

    Returns:
        What kind it is, its steps, and its guidance; None for any other.
    """
    metadata = choice.parsed().header.metadata
    for name in (choice.name, *(metadata.get(key, "") for key in _TITLES)):
        plain = re.sub(r"[\W_]+", "-", str(name).lower())
        words = set(plain.split("-"))
        told = _STEPS.search(plain)
        for kind in KINDS:
            named = not kind.of_base or words & {"sd", "xl", *methods.known(), *(row.name for row in families.every())}
            if words.intersection(kind.words) and named and (told or not kind.counted):
                steps = int(told[1]) if told else kind.steps
                found = replace(kind, scheduler=kind.of_one) if kind.of_one and steps == 1 else kind
                return found, steps, kind.guided if "cfg" in words else 1.0
    return None


def for_few_steps(sampling: S, choices: Sequence[Choice], tell: Observer) -> S:
    """Take the steps, the guidance and the scheduler that an adapter for few steps needs, where none are given.

    Args:
        sampling: What was asked for.
        choices: The adapters.
        tell: Is told what is taken.

    Returns:
        What is done.
    """
    for choice in choices:
        found = recognised(choice) if choice.strength else None
        if found is None:
            continue
        kind, steps, guidance = found
        wanted: dict[str, Any] = {"steps": steps, "guidance": guidance, "scheduler": kind.scheduler}
        taken = {name: value for name, value in wanted.items() if getattr(sampling, name) is None}
        if not taken:
            continue
        if sampling.negative and taken.get("guidance", 2.0) <= 1:
            tell(
                Warned(f"the negative prompt has no effect: {choice.path} draws without guidance; --guidance 1.5 adds some")
            )
            taken["negative"] = ""
        said = f"--steps {steps} --guidance {guidance:g} --scheduler {kind.scheduler}"
        tell(
            Noted(f"{choice.path} is {kind.title} adapter for few steps, drawn as with {said}; what you give yourself holds")
        )
        return replace(sampling, **taken)
    return sampling
