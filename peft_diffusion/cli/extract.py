"""``peft-diffusion extract``: what a checkpoint was trained to, beyond its base, as a LoRA."""

from ..tools.tool_settings import ExtractConfig
from .commands import reads
from .progress import GenerationConsole
from .tools import tell


@reads(ExtractConfig)
def extract(config: ExtractConfig) -> None:
    """Write what a checkpoint was trained to, beyond its base, as a LoRA.

    Both may be folders or single files. --conv-rank takes convolutions too (LoCon).
    """
    config.check()  # before torch is imported, which takes seconds
    from ..tools.extraction import extract as run

    with GenerationConsole("extracting") as console:
        made = run(config, observers=[console])
    tell(made, config.errors)
