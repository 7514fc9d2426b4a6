"""``peft-diffusion train``: learn a style from a folder of images and write it as one adapter file."""

from ..training.settings.pictures import TrainConfig
from ..training.settings.shared import FindLr
from .commands import reads


@reads(TrainConfig, FindLr)
def train(config: TrainConfig, asked: FindLr) -> None:
    """Learn a style from a folder of images and write it as one adapter file.

    Whatever is left out comes from the preset, the base and the machine; what was chosen is printed and kept in the run
    folder. Ctrl-C finishes the step and saves a checkpoint; --resume goes on.
    """
    from .. import api
    from .console import TrainingConsole

    with TrainingConsole() as console:
        if asked.find_lr:
            api.find_rates(config, observers=[console])
        else:
            api.train(config, observers=[console])
