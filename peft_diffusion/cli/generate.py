"""``peft-diffusion generate``: pictures from prompts, with any number of adapters."""

from ..generation.settings import GenerateConfig
from .commands import reads
from .lean import import_lean
from .progress import GenerationConsole
from .terminal import say


@reads(GenerateConfig)
def generate(config: GenerateConfig) -> None:
    """Make pictures from prompts, with any number of adapters.

    Every prompt is drawn with every seed, and the same seed gives the same picture, up to rounding, whatever else is drawn
    with it. Each file carries its whole recipe, from which --recipe makes the picture again.
    """
    config.check()  # before torch is imported, which takes seconds
    import_lean(config.base, config.quantize, config.control, config.recipe)
    from ..generation.generate import generate as run

    with GenerationConsole("generating") as console:
        pictures = run(config, observers=[console])
    for picture in pictures:
        say(picture.path)
    if config.sheet is not None:
        say(config.sheet)
