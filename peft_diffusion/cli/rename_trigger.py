"""``peft-diffusion rename-trigger``: another name for a word of an adapter."""

from ..tools.tool_settings import RenameTriggerConfig
from .commands import reads
from .progress import GenerationConsole
from .tools import tell


@reads(RenameTriggerConfig)
def rename_trigger(config: RenameTriggerConfig) -> None:
    """Give a word of an adapter another name: a trigger that its file tells, or a learned word itself.

    What a LoRA answers to is in its weights, and stays.
    """
    config.check()  # before torch is imported, which takes seconds
    from ..tools.labels import rename_trigger as run

    with GenerationConsole("renaming") as console:
        made = run(config, observers=[console])
    tell(made, False)
