"""``peft-diffusion compose``: learn how to weigh adapters."""

from ..training.settings.composing import ComposeTrainConfig
from .commands import reads


@reads(ComposeTrainConfig)
def train(config: ComposeTrainConfig) -> None:
    """Learn how much of each adapter acts in each block and step, from a few pictures for each.

    The adapters stay as they are. What is written is a small file that names them by digest; generate --compose-file takes
    it. Ctrl-C finishes the step and saves a checkpoint; --resume goes on.
    """
    config.check()  # before torch is imported, which takes seconds
    from .. import api
    from .console import TrainingConsole

    with TrainingConsole() as console:
        api.train_composition(config, observers=[console])
