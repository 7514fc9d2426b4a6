"""``peft-diffusion merge``: one adapter of several, or a checkpoint of a base and adapters."""

from ..tools.tool_settings import MergeConfig
from .commands import reads
from .progress import GenerationConsole
from .tools import tell


@reads(MergeConfig)
def merge(config: MergeConfig) -> None:
    """Make one adapter of several, or fold adapters into a base.

    Without --rank LoRAs are added exactly, by writing their ranks one after the other; with it, or by another way of --how,
    what is left out is told. --into folds them into the weights of a base and writes a checkpoint.
    """
    config.check()  # before torch is imported, which takes seconds
    from ..tools.merging import merge as run

    with GenerationConsole("merging") as console:
        made = run(config, observers=[console])
    tell(made, config.errors)
