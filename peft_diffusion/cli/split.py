"""``peft-diffusion split``: the parts of an adapter, as files."""

from ..tools.tool_settings import SplitConfig
from .commands import reads
from .progress import GenerationConsole
from .tools import tell


@reads(SplitConfig)
def split(config: SplitConfig) -> None:
    """Write the parts of an adapter, by component or by block, as files of their own.

    No number changes; join makes one file of them again.
    """
    config.check()  # before torch is imported, which takes seconds
    from ..tools.parting import split as run

    with GenerationConsole("splitting") as console:
        made = run(config, observers=[console])
    for part in made:
        tell(part, False)
