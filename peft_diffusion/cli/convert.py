"""``peft-diffusion convert``: write an adapter file anew in another layout."""

from ..tools.settings import ConvertConfig
from .commands import reads
from .progress import GenerationConsole
from .terminal import say
from .tools import tell


@reads(ConvertConfig)
def convert(config: ConvertConfig) -> None:
    """Write an adapter file anew in another layout, dtype or method, without its base.

    Metadata, triggers and kohya's ss_ entries are kept, and numbers to the bit, unless --dtype says otherwise. What a layout
    cannot say is refused with the reason.
    """
    config.check()  # before torch is imported, which takes seconds
    from ..tools.convert import convert as run  # which brings torch

    with GenerationConsole("converting") as console:
        done = run(config, observers=[console])
    tell(done.made, config.errors)
    for one in done.verified:
        say(f"  {one.line()}")
