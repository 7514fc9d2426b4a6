"""``peft-diffusion resize``: an adapter with other ranks."""

from ..tools.tool_settings import ResizeConfig
from .commands import reads
from .progress import GenerationConsole
from .tools import tell


@reads(ResizeConfig)
def resize(config: ResizeConfig) -> None:
    """Write an adapter with other ranks.

    Each site becomes the best approximation of its rank; the ranks are given, or follow from the singular values by
    --energy, --frobenius or --ratio, which are sv_cumulative, sv_fro and sv_ratio of kohya's resize_lora.py.
    """
    config.check()  # before torch is imported, which takes seconds
    from ..tools.resizing import resize as run

    with GenerationConsole("resizing") as console:
        made = run(config, observers=[console])
    tell(made, config.errors)
