"""``peft-diffusion strength``: an adapter that does at strength 1 what another does at a given one."""

from ..tools.tool_settings import StrengthConfig
from .commands import reads
from .progress import GenerationConsole
from .tools import tell


@reads(StrengthConfig)
def strength(config: StrengthConfig) -> None:
    """Scale an adapter: at strength 1 the new file does what the old one does at a given strength.

    The method stays what it is where its file can say a scale.
    """
    config.check()  # before torch is imported, which takes seconds
    from ..tools.scaling import strength as run

    with GenerationConsole("scaling") as console:
        made = run(config, observers=[console])
    tell(made, False)
