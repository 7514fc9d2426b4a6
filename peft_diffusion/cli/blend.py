"""``peft-diffusion blend``: a labelled sheet from all of one adapter to all of another."""

from ..generation.settings import BlendConfig
from .commands import reads
from .lean import import_lean
from .progress import GenerationConsole
from .terminal import say


@reads(BlendConfig)
def blend(config: BlendConfig) -> None:
    """Draw a labelled sheet from all of one adapter to all of another.

    Rows are prompts, columns are mixes, and every picture starts from the same noise, so that only the mix differs.
    """
    config.check()  # before torch is imported, which takes seconds
    import_lean(config.base, config.quantize, config.control)
    from ..generation.blend import blend as run

    with GenerationConsole("blending") as console:
        run(config, observers=[console])
    say(config.output)
    if config.report is not None:
        say(config.report)
