"""``peft-diffusion blend``: a labelled sheet from all of one adapter to all of another."""

from typing import Annotated

from cyclopts import Parameter

from ..generation.settings import BlendConfig
from .progress import bar


def blend(config: Annotated[BlendConfig | None, Parameter(name="*")] = None) -> None:
    """Draw a labelled sheet from all of one adapter to all of another.

    Rows are prompts, columns are mixes, and every picture starts from the same noise, so that only the mix differs.
    """
    config = config or BlendConfig()  # without a prompt, which it says
    config.check()  # before torch is imported, which takes seconds
    from ..generation.blend import blend as run

    with bar("blending") as progress:
        run(config, progress)
    print(config.output)
