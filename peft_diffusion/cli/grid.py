"""``peft-diffusion grid``: a labelled sheet over values of settings."""

from ..generation.grid_settings import GridConfig
from .commands import reads
from .lean import import_lean
from .progress import GenerationConsole
from .terminal import say


@reads(GridConfig)
def grid(config: GridConfig) -> None:
    """Draw a labelled sheet over values of settings, with the recipe of each of its pictures in it.

    Columns are over one setting, rows over up to two more, and over prompts.
    """
    config.check()  # before torch is imported, which takes seconds
    import_lean(config.base, config.quantize, config.control)
    from ..generation.grid import grid as run

    with GenerationConsole("drawing") as console:
        run(config, observers=[console])
    say(config.output)
