"""``peft-diffusion join``: one file of several that change different sites."""

from ..tools.tool_settings import JoinConfig
from .commands import reads
from .progress import GenerationConsole
from .tools import tell


@reads(JoinConfig)
def join(config: JoinConfig) -> None:
    """Write one file of several that change different sites.

    No number changes. Files that change the same sites are merged instead.
    """
    config.check()  # before torch is imported, which takes seconds
    from ..tools.parting import join as run

    with GenerationConsole("joining") as console:
        made = run(config, observers=[console])
    tell(made, False)
