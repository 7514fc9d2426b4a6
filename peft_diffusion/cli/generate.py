"""``peft-diffusion generate``: pictures from prompts, with any number of adapters."""

from typing import Annotated

from cyclopts import Parameter

from ..generation.settings import GenerateConfig
from .progress import bar


def generate(config: Annotated[GenerateConfig | None, Parameter(name="*")] = None) -> None:
    """Make pictures from prompts, with any number of adapters.

    Every prompt is drawn with every seed, and the same seed gives the same picture whatever else is drawn with it. Each
    file carries its whole recipe, from which --recipe makes the picture again.
    """
    config = config or GenerateConfig()  # without a prompt, which it says
    config.check()  # before torch is imported, which takes seconds
    from ..generation.generate import generate as run

    with bar("generating") as progress:
        pictures = run(config, progress)
    for picture in pictures:
        print(picture.path)
    if config.sheet is not None:
        print(config.sheet)
