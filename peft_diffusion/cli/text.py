"""``peft-diffusion text``: teach a language model a text, and let it write."""

from typing import Annotated

from cyclopts import Parameter

from ..generation.text_settings import TextGenerateConfig
from ..training.settings.shared import FIND_LR, LEARNING
from ..training.settings.text import TextTrainConfig


def train(
    config: Annotated[TextTrainConfig, Parameter(name="*")],
    *,
    find_lr: Annotated[bool, Parameter(group=LEARNING, negative=(), help=FIND_LR)] = False,
) -> None:
    """Teach a causal language model a text and write what it learned as one adapter file.

    Whatever is left out suits the base and the machine; what was chosen is printed and kept in the run folder. Ctrl-C
    finishes the step and saves a checkpoint; --resume goes on.
    """
    config.check()  # before torch is imported, which takes seconds
    from .. import api
    from .console import TrainingConsole

    with TrainingConsole() as console:
        if find_lr:
            api.find_text_rates(config, observers=[console])
        else:
            api.train_text(config, observers=[console])


def generate(config: Annotated[TextGenerateConfig | None, Parameter(name="*")] = None) -> None:
    """Let a causal language model go on from prompts, with any number of adapters.

    The same seed writes the same text. Texts are printed with their prompt, an empty line between them.
    """
    config = config or TextGenerateConfig()  # without a prompt, which it says
    config.choices()  # before torch is imported, which takes seconds
    from ..generation.text import generate_text

    for number, one in enumerate(generate_text(config)):
        print(("\n" if number else "") + one.prompt + one.continuation, flush=True)
