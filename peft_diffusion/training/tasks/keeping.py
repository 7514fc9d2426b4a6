"""What keeps the adapters that another one is trained beside: prompts that call them, answered as without the new one.

As pictures of a class keep a base (prior preservation, Ruiz et al. 2022, https://arxiv.org/abs/2208.12242), with the network
that carries the others as what is kept, and this run's own pictures under their prompts: to say what it answers takes no
picture of theirs.
"""

from collections.abc import Sequence
from dataclasses import replace

from ...core.errors import UserError
from ...data.captions import CaptionRules
from .diffusion import Examples


def kept(train: Examples, usual: CaptionRules, triggers: Sequence[str], prompts: Sequence[str]) -> Examples:
    """Give the pictures of a run the prompts of others.

    Args:
        train: The pictures of the run.
        usual: How its captions become prompts.
        triggers: What calls each of the others; "" where its file names nothing.
        prompts: Prompts that call them, which go before the triggers.

    Returns:
        The same latents, the pictures' prompts taken in turn: of ``prompts``, or their captions with each trigger.

    Raises:
        UserError: There are neither prompts nor triggers, so that nothing tells what calls the others.
    """
    count = len(train.captions)
    if prompts:
        return replace(train, captions=[prompts[place % len(prompts)] for place in range(count)], weights=(), rules=())
    called = [trigger for trigger in dict.fromkeys(triggers) if trigger and trigger != usual.trigger]
    if not called:
        raise UserError(
            "--beside-keep: the files of --beside name no trigger, so nothing tells which prompts call them; say some with"
            ' --beside-prompt "ink drawing of a cat"'
        )
    own = train.rules or [usual] * count
    rules = [replace(one.of_class(), trigger=called[place % len(called)]) for place, one in enumerate(own)]
    return replace(train, weights=(), rules=rules)
