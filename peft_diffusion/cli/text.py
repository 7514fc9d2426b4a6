"""``peft-diffusion text``: teach a language model a text, and let it write."""

from ..generation.text_settings import TextGenerateConfig
from ..training.settings.shared import FindLr
from ..training.settings.text import TextTrainConfig
from .commands import reads
from .terminal import say


@reads(TextTrainConfig, FindLr)
def train(config: TextTrainConfig, asked: FindLr) -> None:
    """Teach a causal language model a text and write what it learned as one adapter file.

    Whatever is left out suits the base and the machine; what was chosen is printed and kept in the run folder. Ctrl-C
    finishes the step and saves a checkpoint; --resume goes on.
    """
    config.check()  # before torch is imported, which takes seconds
    from .. import api
    from .console import TrainingConsole

    with TrainingConsole() as console:
        if asked.find_lr:
            api.find_text_rates(config, observers=[console])
        else:
            api.train_text(config, observers=[console])


@reads(TextGenerateConfig)
def generate(config: TextGenerateConfig) -> None:
    """Let a causal language model go on from prompts, with any number of adapters.

    The same seed writes the same text. Texts are printed with their prompt, an empty line between them.
    """
    config.choices()  # before torch is imported, which takes seconds
    from ..generation.text import generate_text
    from .progress import show_notes

    for number, one in enumerate(generate_text(config, observers=[show_notes])):
        say(("\n" if number else "") + one.prompt + one.continuation)
