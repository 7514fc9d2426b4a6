"""``text generate``: texts from a causal language model, with any number of adapters."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..bases import LanguageModel, load_lm
from ..core.errors import UserError
from ..core.events import Ended, Never, Observer, Progress, Stop, check_stop, observed
from ..core.settings import of_kind
from ..data.prompts import refuse_files
from .adapted import adapted
from .events import TextWritten
from .text_settings import TextGenerateConfig

_GREEDY = 1e-6  # logits over a smaller temperature would be infinite


@dataclass(frozen=True)
class Written:
    """A text that was written: what it goes on from, with which seed, and how it goes on."""

    prompt: str
    seed: int
    continuation: str


def generate_text(
    config: TextGenerateConfig,
    *,
    base: LanguageModel | None = None,
    observers: Sequence[Observer] = (),
    stop: Stop | None = None,
) -> Iterator[Written]:
    """Write every prompt with every seed, one after the other; the same seed gives the same text.

    Nothing is done before the first text is asked for.

    Args:
        config: What is written, and how.
        base: A model that is loaded already, used in place of ``config.base``. It is left as it was once the last text was
            taken, or the iterator is closed.
        observers: Are told what happens, by the events of `generation.events`.
        stop: Where it is set, nothing is written after the present token; what was written of that text is not given.

    Yields:
        Each text when it is written to its end.

    Raises:
        UserError: Before anything is written, for adapters and prompts that cannot be used.
        Interrupted: It was stopped. It is a KeyboardInterrupt.
    """
    with observed(observers) as tell:
        of_kind(config, TextGenerateConfig)
        choices = config.choices()
        refuse_files(config.prompts)
        model = load_lm(base or config.base, device=config.device, dtype=config.precision, quantize=config.quantize)
        with adapted(model, choices, [()] * len(choices), tell, lent=base is not None, strict=config.strict):
            seeds = range(config.seed, config.seed + config.count)
            prompts = [(prompt, _encoded(model, prompt, config.max_tokens)) for prompt in config.prompts]
            wanted = [(prompt, ids, seed) for prompt, ids in prompts for seed in seeds]
            for number, (prompt, ids, seed) in enumerate(wanted):
                new: list[int] = []
                for token in continued(model, ids, config, seed):
                    check_stop(stop or Never(), f"stopped after {number} of {len(wanted)} texts")
                    new.append(token)
                written = Written(prompt, seed, str(model.tokenizer.decode(new, skip_special_tokens=True)))
                tell(Progress("writing", number + 1, len(wanted)))
                tell(TextWritten(written))
                yield written
        tell(Ended("finished"))


@torch.no_grad()
def continued(base: LanguageModel, ids: list[int], config: TextGenerateConfig, seed: int) -> Iterator[int]:
    """Write on, token by token.

    Args:
        base: The language model.
        ids: The tokens of the prompt.
        config: How tokens are chosen, and how many.
        seed: Of the choice.

    Yields:
        The tokens, until the model ends the text or there are ``max_tokens``.
    """
    chance = torch.Generator().manual_seed(seed)  # on the CPU, whatever the device: the same numbers everywhere
    rows, cache = torch.tensor([ids], device=base.device), None
    for _ in range(config.max_tokens):
        answer = base.lm(input_ids=rows, past_key_values=cache, use_cache=True)
        token = choose(answer.logits[0, -1].float().cpu(), config.temperature, config.top_p, chance)
        if token == base.tokenizer.eos_token_id:
            return
        yield token
        rows, cache = torch.tensor([[token]], device=base.device), answer.past_key_values


def choose(logits: Tensor, temperature: float, top_p: float, chance: torch.Generator) -> int:
    """Choose a token: the likeliest, or by nucleus sampling (Holtzman et al. 2020, https://arxiv.org/abs/1904.09751).

    Args:
        logits: (vocabulary,).
        temperature: 0, or nearly 0, takes the likeliest.
        top_p: The probability of the tokens among which it chooses.
        chance: The generator.

    Returns:
        The token.

    Raises:
        UserError: The logits are no numbers.
    """
    if not bool(logits.max().isfinite()):  # NaN is the largest
        raise UserError("the model's answer is not finite; lower the strengths, or take --precision float32")
    if temperature < _GREEDY:
        return int(logits.argmax())
    probabilities, tokens = (logits / temperature).softmax(-1).sort(descending=True, stable=True)
    before = probabilities.cumsum(-1) - probabilities
    kept = torch.where(before < top_p, probabilities, 0.0)
    kept[0] = probabilities[0]  # whatever is left of a tiny top_p in float32
    return int(tokens[torch.multinomial(kept, 1, generator=chance)])


def _encoded(base: LanguageModel, prompt: str, more: int) -> list[int]:
    """The tokens of a prompt. Raises UserError where there are none, or too many for the base's context."""
    ids = [*base.start(), *base.encode(prompt)]
    if not ids:
        raise UserError("the prompt is empty, and this base cannot begin a text by itself")
    if len(ids) + more > base.context:
        raise UserError(
            f"the prompt has {len(ids)} tokens and --max-tokens asks for {more}, but the base takes {base.context} in all;"
            " shorten one of them"
        )
    return ids
