"""``peft-diffusion runs export``: the adapter in a checkpoint of a run."""

from ..training.settings.export import ExportConfig
from .commands import reads
from .terminal import say


@reads(ExportConfig)
def export(config: ExportConfig) -> None:
    """Write the adapter in a checkpoint of a run as an adapter file.

    It is what the run would have given at that step. Its base is loaded, and no pictures are needed.
    """
    from ..training.exporting import export as run

    say(f"wrote {run(config)}")
