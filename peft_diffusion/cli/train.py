"""``peft-diffusion train``: learn a style from a folder of images and write it as one adapter file."""

import os
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

from ..training.config import TrainConfig


def train(config: Annotated[TrainConfig, Parameter(name="*")]) -> None:
    """Learn a style from a folder of images and write it as one adapter file.

    Whatever is left out comes from the preset, the base and the machine; what was chosen is printed and kept in the run
    folder. Ctrl-C finishes the step and saves a checkpoint; --resume goes on.
    """
    # OpenMP's threads wait in a busy loop; on a machine that does something else too, that makes a step up to ten times as
    # slow. A short loop costs nothing on an idle one. It is read when torch is loaded, below, which --help must not do.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    from ..training import Interrupted
    from ..training import train as run

    console = Console()
    try:
        run(config, console=console)
    except Interrupted as stopped:
        console.print(str(stopped), markup=False, highlight=False, soft_wrap=True)
        raise
