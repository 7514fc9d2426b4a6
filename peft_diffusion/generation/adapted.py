"""A base with the adapters of a call: loaded from their files, and taken off again where the base is the caller's."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..bases import LanguageModel, components
from ..bases import family as families
from ..bases.base import frozen
from ..core.block_names import weighed
from ..core.errors import UserError
from ..core.events import Noted, Observer, Warned
from ..core.site import sites
from ..core.strength_schedule import ByPart
from .adapters import Adapters
from .kept import Kept
from .settings import Choice


@contextmanager
def adapted(
    base: Any,
    choices: Sequence[Choice],
    prompts: Sequence[Sequence[str]],
    tell: Observer,
    *,
    lent: bool,
    strict: bool,
    fast: bool | None = None,
    kept: Kept | None = None,
) -> Iterator[tuple[Adapters, list[str]]]:
    """Load adapters for as long as the context is open.

    Args:
        base: A pipeline or a language model.
        choices: The adapters, and how much of each.
        prompts: What is drawn or written with each of them: it is told which adapters they do not call.
        tell: Is told what the person should know of adapters and prompts.
        lent: Whether the base is the caller's, who gets it back as it was.
        strict: Whether to refuse a file of which a tensor is left out.
        fast: Whether to draw by recorded steps; None where it pays, but leaves a lent base as it is. A lent base that is
            fast, or is made so, stays so: it would be recorded anew for each call.
        kept: The adapters that stay with the base; None where none do.

    Yields:
        The adapters of the base, and the names of those that were chosen, in their order.

    Raises:
        UserError: For a file that cannot be used on this base, and for a lent base that carries adapters: no recipe would
            know of them.
    """
    adapters = Adapters(base) if kept is None else kept.adapters
    if lent and kept is None and adapters.names:
        raise UserError(
            f"the base carries adapters already ({', '.join(adapters.names)}): remove them, and name their files as adapter"
        )
    with frozen(base if lent else None):
        try:
            names = []
            if kept is not None:
                kept.begin(choices)
            for choice, drawn in zip(choices, prompts, strict=True):
                if kept is None:
                    name = adapters.load(choice.parsed(), None, choice.amount, strict=strict, warn=warner(tell))
                else:
                    name = kept.load(choice, strict=strict, warn=warner(tell))
                names.append(name)
                _tell_triggers(adapters, names[-1], drawn, tell)
                if kept is None and choice.parts is not None:
                    _tell_idle(components(base), name, choice, choice.parts, tell)
            with _quick(adapters, fast, tell, lent=lent):
                yield adapters, names
        finally:
            if kept is not None:
                kept.end()
            for name in adapters.names if lent and kept is None else ():
                adapters.remove(name)


@contextmanager
def _quick(adapters: Adapters, fast: bool | None, tell: Observer, *, lent: bool) -> Iterator[None]:
    """Draw by recorded steps inside, where that is wanted, and tell where a step could not be recorded."""
    if (fast is None and lent) or isinstance(adapters.pipe, LanguageModel):
        yield
        return
    was = adapters.is_fast
    why = adapters.fast(fast)
    if why is not None and fast:
        tell(Warned(f"pictures are drawn without fast steps: {why}"))
    try:
        yield
        if adapters.plain_because is not None:
            tell(Noted(f"pictures were drawn without fast steps: {adapters.plain_because}"))
    finally:
        if lent and was and not adapters.is_fast:
            adapters.fast(True)


def warner(tell: Observer) -> Callable[[str], None]:
    """Make warnings of the loader events.

    Args:
        tell: Is told them.

    Returns:
        What `Adapters.load` takes as ``warn``.
    """

    def warn(message: str) -> None:
        tell(Warned(message))

    return warn


def tell_of_adapters(adapters: Adapters, names: Sequence[str], prompts: Sequence[Sequence[str]], tell: Observer) -> None:
    """Tell what the person should know of adapters that are loaded already.

    Args:
        adapters: Those on the base.
        names: Those that are meant.
        prompts: What is drawn or written with each of them.
        tell: Is told.
    """
    for name, drawn in zip(names, prompts, strict=True):
        for warning in adapters[name].warnings:
            tell(Warned(warning))
        _tell_triggers(adapters, name, drawn, tell)


def _tell_triggers(adapters: Adapters, name: str, prompts: Sequence[str], tell: Observer) -> None:
    """Tell which prompts do not call an adapter."""
    loaded = adapters[name]
    triggers = loaded.spec.triggers
    for prompt in dict.fromkeys(prompts):
        if triggers and not any(contains(prompt, trigger) for trigger in triggers):
            words = " or ".join(f'"{trigger}"' for trigger in triggers)
            tell(Noted(f'{loaded.path} is called by {words}, which the prompt "{prompt}" does not contain'))


def _tell_idle(base: Mapping[str, nn.Module], name: str, choice: Choice, parts: ByPart, tell: Observer) -> None:
    """Tell of strengths of components and blocks in which an adapter changes nothing."""
    changed = {component: tuple(found) for component, module in base.items() if (found := sites(module, name))}
    by_role: dict[str | None, list[str]] = {}  # as `te` means the encoders of all bases
    for component in parts.components:
        by_role.setdefault(families.role_of(component), []).append(component)
    for role, named in by_role.items():
        if not changed.keys() & set(named):
            what = f"nothing of {named[0]}" if len(named) == 1 else f"no {role}"
            tell(Noted(f"{choice.path} changes {what}, so the strength that is said of it has no effect"))
    if parts.blocks and not any(weighed(parts.blocks, paths) for paths in changed.values()):
        blocks = " and ".join(parts.blocks)
        tell(Noted(f"{choice.path} changes nothing in {blocks}, and has strength 0 in blocks that are not named"))


def contains(prompt: str, trigger: str) -> bool:
    """Tell whether a prompt calls an adapter.

    Args:
        prompt: The prompt.
        trigger: Words that call it.

    Returns:
        Whether they stand in the prompt as words, in letters of any case.
    """
    return _as_words(trigger).search(prompt) is not None


def without(prompt: str, trigger: str) -> str:
    """Take the words that call an adapter out of a prompt.

    Args:
        prompt: The prompt.
        trigger: Words that call it.

    Returns:
        The prompt with a space in their places, where they stand as `contains` finds them.
    """
    return _as_words(trigger).sub(" ", prompt)


def _as_words(trigger: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(trigger)}(?!\w)", re.IGNORECASE)
